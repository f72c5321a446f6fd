// The invariants of the paged backend's metadata, as sentences.

#include "table/paged/paged_blocks.h"

namespace kvmem {

void PagedBlocks::check(std::vector<std::string>* out) const {
  i64 idle = 0, spare = 0, distinct = 0;
  for (i64 g = 0; g < groups_; ++g) {
    const Blocks& b = blocks_[g];
    const auto say = [&](i64 block, const std::string& what) {
      out->push_back("group " + std::to_string(g) + ", block " + std::to_string(block) + ": " + what);
    };
    std::vector<i32> refs(b.max_blocks, 0);
    refs[kNullBlock] = refs[kPaddingBlock] = 1;
    for (i64 index = 0; index < sequences_.capacity(); ++index) {
      const i64 first = sequences_.front(index, g) / b.tokens, end = ceil_div(sequences_.tokens(index, g), b.tokens);
      for (i64 ordinal = 0; ordinal < std::min(end + 2, b.per_sequence); ++ordinal) {
        const i32 block = entry(index, g, ordinal);
        if ((block != 0) != (ordinal >= first && ordinal < end)) {
          out->push_back("sequence " + std::to_string(sequences_.handle_of(index)) + ": table entry " +
                         std::to_string(ordinal) + " is " + std::to_string(block));
        }
        if (block != 0) ++refs[block];
      }
    }
    i64 ready = 0;
    for (i64 block = 0; block < b.max_blocks; ++block) {
      const bool is_ready = b.info[block].refs == 0 && b.backed[block] && b.info[block].node == kNoNode;
      if (is_ready != b.ready.has(block)) {
        say(block, is_ready ? "invariant 2: free, yet not in the free list"
                            : "invariant 2: in the free list, yet referenced, cached or not backed");
      }
      ready += is_ready;
    }
    if (ready != b.ready.size()) {
      say(-1, "invariant 2: the free list has " + std::to_string(b.ready.size()) + " entries, not " +
                  std::to_string(ready));
    }
    for (i64 block = 0; block < b.max_blocks; ++block) {
      if (refs[block] != b.info[block].refs) {
        say(block, "invariant 3: " + std::to_string(refs[block]) + " table entries, counted " +
                       std::to_string(b.info[block].refs));
      }
      if (block >= kReservedBlocks && refs[block] > 0 && !b.backed[block]) say(block, "in use, but not backed");
    }
    check_content(g, out);
    for (const SlotClass& c : b.classes) {
      std::vector<i32> users(c.slots.size(), 0), cached(c.slots.size(), 0);
      for (i64 block = 0; block < b.max_blocks; ++block) {
        if (refs[block] == 0 && b.info[block].node == kNoNode) continue;
        for (i64 slot = first_slot(c, block); slot < end_slot(c, block); ++slot) ++(refs[block] ? users : cached)[slot];
      }
      for (i64 slot = 0; slot < static_cast<i64>(users.size()); ++slot) {
        if (users[slot] != c.slots[slot].users) say(-1, "slot " + std::to_string(slot) + " has a wrong count of users");
        if (cached[slot] != c.slots[slot].cached)
          say(-1, "slot " + std::to_string(slot) + " has a wrong count of cached blocks");
        if (c.slots[slot].mapped != 0 && c.slots[slot].mapped != static_cast<i32>(c.arenas.size()))
          say(-1, "arenas out of step");
        if (users[slot] == 0) idle += c.slots[slot].mapped;
        if (users[slot] + cached[slot] == 0) spare += c.slots[slot].mapped;
        distinct += c.slots[slot].mapped;
      }
    }
  }
  if (spare != spare_pages_)
    out->push_back("invariant 1: " + std::to_string(spare) + " spare pages, counted " + std::to_string(spare_pages_));
  if (idle != idle_pages_)
    out->push_back("invariant 1: " + std::to_string(idle) + " idle pages, counted " + std::to_string(idle_pages_));
  if (distinct != owned_pages)
    out->push_back("invariant 1: " + std::to_string(distinct) + " pages mapped, counted " +
                   std::to_string(owned_pages));
}

// What the index thinks of the blocks, and that the next token of no sequence lands where others read.
void PagedBlocks::check_content(i64 g, std::vector<std::string>* out) const {
  const Blocks& b = blocks_[g];
  const auto say = [&](i64 block, const std::string& what) {
    out->push_back("group " + std::to_string(g) + ", block " + std::to_string(block) + ": " + what);
  };
  i64 cached = 0;
  for (i64 block = 0; block < b.max_blocks; ++block) {
    const i32 node = b.info[block].node;
    if (node == kNoNode) {
      if (b.snapshots.has(block)) say(block, "a snapshot, yet it holds nothing that is known");
      continue;
    }
    cached += b.info[block].refs == 0;
    bool here = false, all = true;
    for (i64 part = 0; part < b.parts; ++part) {
      here = here || block_of(node, g, part) == block, all = all && block_of(node, g, part) != 0;
    }
    if (!here) say(block, "the index knows its content elsewhere");
    if (!all) say(block, "a part of what the index knows is missing");
    if (!b.backed[block] || index_.copies(node) == 0) say(block, "invariant 2: cached, yet without memory");
    if (b.snapshots.has(block) && b.info[block].refs > 0) say(block, "a snapshot, yet referenced");
    const bool needed = b.window >= 0 && index_.needs(node, b.window) > 0;
    if (b.window >= 0 && b.info[block].refs > 0 && !needed)
      say(block, "referenced, yet the eviction order may name it");
    if (needed && !is_referenced(node, g) && !index_.pinned(node)) say(block, "cached for nobody");
  }
  if (cached != b.cached) say(-1, std::to_string(cached) + " cached blocks, counted " + std::to_string(b.cached));
  for (i64 index = 0; index < sequences_.capacity(); ++index) {
    const i64 tokens = sequences_.tokens(index, g);
    if (copy_tail_[index * groups_ + g]) continue;
    for (i64 ordinal = first_of_tail(b, tokens); ordinal < end_of_tail(b, tokens); ++ordinal) {
      const i32 block = entry(index, g, ordinal);
      if (block == 0 || (b.info[block].refs <= 1 && b.info[block].node == kNoNode)) continue;
      say(block, "the next write would land in a block that others read");
    }
  }
}

void PagedBlocks::digest(Hasher& hash) const {
  PageTable::digest(hash);
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
  for (i64 at = 0; at < sequences_.capacity() * groups_; ++at) {
    hash.add(copy_tail_[at], version_[at]);
  }
  hash.add(idle_pages_);
}

}  // namespace kvmem
