// check() and digest() of the metadata: every count is made again.

#include "table/paged/paged_blocks.h"

namespace kvmem {
namespace {

std::string of_block(i64 g, i64 block) {
  return "group " + std::to_string(g) + ", block " + std::to_string(block) + ": ";
}

}  // namespace

void PagedBlocks::check(i64 owned_pages, std::vector<std::string>* out) const {
  PageCounts pages;
  for (i64 g = 0; g < groups_; ++g) {
    std::vector<i32> refs(blocks_[g].max_blocks, 0);
    check_tables(g, &refs, out);
    check_blocks(g, refs, out);
    check_content(g, out);
    check_slots(g, refs, &pages, out);
  }
  const auto compare = [out](i64 counted, i64 noted, const char* kind) {
    if (counted == noted) return;
    out->push_back("invariant 1: " + std::to_string(counted) + kind + " pages, counted " + std::to_string(noted));
  };
  compare(pages.empty, empty_pages_, " empty");
  compare(pages.unreferenced, unreferenced_pages_, " unreferenced");
  compare(pages.mapped, owned_pages, " mapped");
}

// Table entries agree with lengths. Counts the references to each block.
void PagedBlocks::check_tables(i64 g, std::vector<i32>* refs, std::vector<std::string>* out) const {
  const Blocks& b = blocks_[g];
  (*refs)[kNullBlock] = (*refs)[kPaddingBlock] = 1;
  for (i64 index = 0; index < sequences_.capacity(); ++index) {
    const i64 first = sequences_.front(index, g) / b.tokens, end = ceil_div(sequences_.tokens(index, g), b.tokens);
    for (i64 ordinal = 0; ordinal < std::min(end + 2, b.per_sequence); ++ordinal) {
      const i32 block = entry(index, g, ordinal);
      if ((block != 0) != (ordinal >= first && ordinal < end)) {
        out->push_back("sequence " + std::to_string(sequences_.handle_of(index)) + ": table entry " +
                       std::to_string(ordinal) + " is " + std::to_string(block));
      }
      if (block != 0) ++(*refs)[block];
    }
  }
}

// Each block is free, referenced or cached, and its references are counted.
void PagedBlocks::check_blocks(i64 g, const std::vector<i32>& refs, std::vector<std::string>* out) const {
  const Blocks& b = blocks_[g];
  const auto say = [&](i64 block, const std::string& what) { out->push_back(of_block(g, block) + what); };
  i64 ready = 0;
  for (i64 block = 0; block < b.max_blocks; ++block) {
    const BlockInfo& info = b.info[block];
    const bool is_ready = info.refs == 0 && b.backed[block] && info.node == kNoNode;
    if (is_ready != b.ready.has(block)) {
      say(block, is_ready ? "invariant 2: free, yet not in the free list"
                          : "invariant 2: in the free list, yet referenced, cached or not backed");
    }
    ready += is_ready;
    if (refs[block] != info.refs) {
      say(block,
          "invariant 3: " + std::to_string(refs[block]) + " table entries, counted " + std::to_string(info.refs));
    }
    if (block >= kReservedBlocks && refs[block] > 0 && !b.backed[block]) say(block, "in use, but not backed");
  }
  if (ready != b.ready.size()) {
    say(-1,
        "invariant 2: the free list has " + std::to_string(b.ready.size()) + " entries, not " + std::to_string(ready));
  }
}

// The index agrees with the blocks, and no sequence would write its next token to a block that others read.
void PagedBlocks::check_content(i64 g, std::vector<std::string>* out) const {
  const Blocks& b = blocks_[g];
  const auto say = [&](i64 block, const std::string& what) { out->push_back(of_block(g, block) + what); };
  i64 cached = 0;
  for (i64 block = 0; block < b.max_blocks; ++block) {
    const i32 node = b.info[block].node;
    if (node == kNoNode) {
      if (b.snapshots.has(block)) say(block, "a snapshot without known content");
      continue;
    }
    cached += b.info[block].refs == 0;
    bool here = false, all = true;
    for (i64 part = 0; part < b.parts; ++part) {
      here = here || block_of(node, g, part) == block, all = all && block_of(node, g, part) != 0;
    }
    if (!here) say(block, "its node has another block");
    if (!all) say(block, "a part of its node is missing");
    if (!b.backed[block] || index_.copies(node) == 0) say(block, "invariant 2: cached, yet without memory");
    if (b.snapshots.has(block) && b.info[block].refs > 0) say(block, "a snapshot, yet referenced");
    const bool needed = b.window >= 0 && index_.needs(node, b.window) > 0;
    if (b.window >= 0 && b.info[block].refs > 0 && !needed) say(block, "referenced, yet it could be evicted");
    if (needed && !is_referenced(node, g) && !index_.pinned(node)) say(block, "needed, yet not referenced");
  }
  if (cached != b.cached) say(-1, std::to_string(cached) + " cached blocks, counted " + std::to_string(b.cached));
  for (i64 index = 0; index < sequences_.capacity(); ++index) {
    const i64 tokens = sequences_.tokens(index, g);
    if (marks_.copy_tail(index, g)) continue;
    for (i64 ordinal = first_of_tail(b, tokens); ordinal < end_of_tail(b, tokens); ++ordinal) {
      const i32 block = entry(index, g, ordinal);
      if (block != 0 && !is_own(b, block)) say(block, "the next token would be written to a block that others read");
    }
  }
}

// The counts of each slot. Adds up the pages by their use.
void PagedBlocks::check_slots(i64 g, const std::vector<i32>& refs, PageCounts* pages,
                              std::vector<std::string>* out) const {
  const Blocks& b = blocks_[g];
  for (const SlotClass& c : b.classes) {
    std::vector<i32> users(c.slots.size(), 0), cached(c.slots.size(), 0);
    for (i64 block = 0; block < b.max_blocks; ++block) {
      if (refs[block] == 0 && b.info[block].node == kNoNode) continue;
      for (i64 slot = first_slot(c, block); slot < end_slot(c, block); ++slot) ++(refs[block] ? users : cached)[slot];
    }
    for (i64 slot = 0; slot < static_cast<i64>(users.size()); ++slot) {
      const SlotInfo& s = c.slots[slot];
      const auto say = [&](const char* what) {
        out->push_back("group " + std::to_string(g) + ", slot " + std::to_string(slot) + ": " + what);
      };
      if (users[slot] != s.users) say("a wrong count of referenced blocks");
      if (cached[slot] != s.cached) say("a wrong count of cached blocks");
      if (s.mapped != 0 && s.mapped != static_cast<i32>(c.arenas.size())) say("mapped in some of its arenas only");
      if (users[slot] == 0) pages->unreferenced += s.mapped;
      if (users[slot] + cached[slot] == 0) pages->empty += s.mapped;
      pages->mapped += s.mapped;
    }
  }
}

void PagedBlocks::digest(Hasher& hash) const {
  for (i64 g = 0; g < groups_; ++g) {
    const Blocks& b = blocks_[g];
    for (i64 block = 0; block < b.max_blocks; ++block) {
      const BlockInfo& info = b.info[block];
      if (info.refs != 0 || info.node != kNoNode) hash.add(block, info.refs, info.node);
    }
    b.ready.digest(hash);
    b.snapshots.digest(hash);
    hash.add(b.cached, b.extra_refs, b.fence);
    for (i64 index = 0; index < sequences_.capacity(); ++index) {
      if (!sequences_.live(index)) continue;
      for (i64 ordinal = 0; ordinal < ceil_div(sequences_.tokens(index, g), b.tokens); ++ordinal) {
        hash.add(entry(index, g, ordinal));
      }
    }
  }
  for (const ZeroVector<ZeroId>& arena : pages_) {
    for (std::size_t slot = 0; slot < arena.size(); ++slot) {
      if (arena[slot] >= 0) hash.add(slot, arena[slot]);
    }
    hash.add(-1);
  }
  hash.add_all(version_);
  hash.add(unreferenced_pages_);
}

}  // namespace kvmem
