// Content: adopting and publishing blocks, snapshots, and the eviction of one node.

#include "table/paged/paged_table.h"

namespace kvmem {

bool PagedTable::has_snapshot(i32 node) const {
  for (i64 g = 0; g < groups_; ++g) {
    if (has_state(g) && blocks_.block_of(node, g) == 0) return false;
  }
  return true;
}

void PagedTable::adopt(i64 index, const std::vector<i32>& chain, const SharedPrefix& found, Transaction& tx) {
  const i64 whole = quotient(found.tokens, block_tokens()), tail = remainder(found.tokens, block_tokens());
  const i32 last = chain[tail > 0 ? whole : whole - 1];
  // The last node's snapshots must not be evicted for these copies. If an exception prevents that they are listed
  // again, the journal restores the list.
  std::vector<i64> unlisted;
  for (i64 g = 0; g < groups_; ++g) {
    const i32 block = blocks_.block_of(last, g);
    if (block == 0 || !blocks_[g].snapshots.has(block)) continue;
    unlisted.push_back(g);
    blocks_.unlist_snapshot(g, block);
  }
  for (i64 g = 0; g < groups_; ++g) {
    if (has_state(g)) continue;
    const i64 parts = blocks_[g].parts;
    for (i64 node = quotient(sequences_.front(index, g), block_tokens()); node < whole; ++node) {
      for (i64 part = 0; part < parts; ++part) {
        set_entry(index, g, node * parts + part, blocks_.block_of(chain[node], g, part), tx);
      }
    }
  }
  for (i64 g = 0; g < groups_; ++g) {
    const bool state = has_state(g);
    if (state || tail > 0) adopt_copies(index, g, chain[state ? whole - 1 : whole], state ? 0 : whole, tail, tx);
  }
  for (const i64 g : unlisted) {
    const i32 block = blocks_.block_of(last, g);
    if (blocks_[g].info[block].refs == 0) blocks_.list_snapshot(g, block);
  }
}

void PagedTable::adopt_copies(i64 index, i64 g, i32 node, i64 first, i64 tail, Transaction& tx) {
  const Blocks& b = blocks_[g];
  const i64 parts = has_state(g) ? 1 : ceil_div(tail, b.tokens);
  for (i64 part = 0; part < parts; ++part) {
    const i64 fresh = next_block(g, parts - part, tx);
    set_entry(index, g, first * b.parts + part, fresh, tx);
    const i64 tokens = has_state(g) ? 1 : std::min(b.tokens, tail - part * b.tokens);
    copy_block(g, blocks_.block_of(node, g, part), fresh, tokens, tx);
  }
  blocks_.set_fence(g, tx.new_fence());  // behind the copies, since the node may be evicted
}

void PagedTable::publish(const std::vector<Published>& blocks, Transaction& tx) {
  for (i64 g = 0; g < groups_; ++g) {
    if (geometry_.groups[g].growth != Growth::token) continue;
    const i64 parts = blocks_[g].parts;
    std::size_t expected = 0;  // ops for which memory is made
    for (const Published& p : blocks) {
      if (parts == 1) {
        publish_part(p, g, 0, p.ordinal, &expected, tx);
      } else if (blocks_.entry(p.index, g, (p.ordinal + 1) * parts - 1) != 0) {
        for (i64 part = 0; part < parts; ++part) publish_part(p, g, part, p.ordinal * parts + part, &expected, tx);
      }
    }
  }
}

bool PagedTable::is_unread(i32 node) const {
  for (i64 g = 0; append_only_ && g < groups_; ++g) {
    const i32 block = has_state(g) || blocks_[g].window >= 0 ? 0 : blocks_.block_of(node, g);
    if (block != 0 && blocks_[g].info[block].refs == 0) return true;
  }
  return false;
}

// The last group first: full attention mostly leads, and the other backend reports its loss last, too.
void PagedTable::evict(i32 node, Transaction& tx) {
  demote(node, -1, tx);
  for (i64 g = groups_; g-- > 0;) {
    if (blocks_.block_of(node, g) != 0) evict_group(node, g, tx);
  }
}

void PagedTable::evict_group(i32 node, i64 g, Transaction& tx) {
  for (i64 part = blocks_[g].parts; part-- > 0;) {
    tx.push({OpKind::evict, number, node, g, blocks_.block_of(node, g, part), part});
  }
}

// Where this part is the only copy of the node, the node is evicted with it.
void PagedTable::evict_window(i32 node, i32 window, Transaction& tx) {
  if (index_.copies(node) == 1) unskip_item({node, -1}, tx);
  demote(node, index_.group_of(window), tx);
  evict_group(node, index_.group_of(window), tx);
}

void PagedTable::evict_truncated_ends(Transaction& tx) {
  for (i64 g = 0; g < groups_; ++g) {
    const Blocks& b = blocks_[g];
    if (b.window < 0) continue;
    std::unordered_map<i32, i32> ends;  // by block: how many sequences end within its node
    std::vector<i32> nodes;
    for (i64 index = 0; index < sequences_.capacity(); ++index) {
      const i64 tokens = sequences_.tokens(index, g);
      for (i64 ordinal = blocks_.first_of_tail(b, tokens); ordinal < blocks_.end_of_tail(b, tokens); ++ordinal) {
        const i32 block = blocks_.entry(index, g, ordinal);
        if (b.info[block].node != kNoNode && ends[block]++ == 0) nodes.push_back(b.info[block].node);
      }
    }
    for (i32 node : nodes) {
      if (blocks_.block_of(node, g) != 0 && is_needed_by_ends(g, node, ends)) evict_window(node, b.window, tx);
    }
  }
}

void PagedTable::snapshot(i64 index, const std::vector<i32>& chain, Transaction& tx) {
  for (i64 g = 0; g < groups_; ++g) {
    if (geometry_.groups[g].growth != Growth::fixed || blocks_.block_of(chain.back(), g) != 0) continue;
    const i64 fresh = next_block(g, 1, tx);
    tx.push({OpKind::hold, number, chain.back(), g, fresh});
    blocks_.list_snapshot(g, fresh);
    copy_block(g, blocks_.entry(index, g, 0), fresh, 1, tx);
  }
}

void PagedTable::publish_part(const Published& p, i64 g, i64 part, i64 ordinal, std::size_t* expected,
                              Transaction& tx) {
  constexpr std::size_t kAtOnce = 64;
  const i32 own = blocks_.entry(p.index, g, ordinal), cached = blocks_.block_of(p.node, g, part);
  if (own == 0 || own == cached) return;
  if (cached == 0) {
    if (*expected == 0) tx.expect(*expected = kAtOnce);
    --*expected;
    blocks_.attach(g, p.node, own, part, false);
    tx.note({OpKind::hold, number, p.node, g, own, part});
    return;
  }
  const bool unread = blocks_[g].info[cached].refs == 0;
  if (append_only_ && (!unread || blocks_[g].info[own].node != kNoNode)) return;
  *expected = 0;
  blocks_.set_fence(g, tx.fence());
  if (append_only_) {
    tx.push({OpKind::shift, number, p.node, g, own, cached});
  } else {
    set_entry(p.index, g, ordinal, cached, tx);
  }
}

bool PagedTable::is_needed_by_ends(i64 g, i32 node, const std::unordered_map<i32, i32>& ends) const {
  const Blocks& b = blocks_[g];
  i64 needs = 0;
  for (i64 part = 0; part < b.parts; ++part) {
    const i32 block = blocks_.block_of(node, g, part);
    const auto found = ends.find(block);
    if (b.info[block].refs != (found == ends.end() ? 0 : found->second)) return false;
    needs += b.info[block].refs > 0;
  }
  return index_.needs(node, b.window) == needs;
}

// A snapshot of a node in use, to which no table entry refers, may be evicted from now on.
void PagedTable::allow_eviction(i32 node) {
  for (i64 g = 0; g < groups_; ++g) {
    const i32 block = has_state(g) ? blocks_.block_of(node, g) : 0;
    if (block == 0 || blocks_[g].info[block].refs > 0 || blocks_[g].snapshots.has(block)) continue;
    if (index_.used(node) && !index_.pinned(node)) blocks_.list_snapshot(g, block);
  }
}

}  // namespace kvmem
