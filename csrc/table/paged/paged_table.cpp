#include "table/paged/paged_table.h"

namespace kvmem {

void PagedTable::grow(i64 index, i64 group, i64 old_tokens, i64 new_tokens, Transaction& tx) {
  const Blocks& b = blocks_[group];
  if (marks_.copy_tail(index, group)) copy_tail(index, group, old_tokens, tx);
  if (has_truncated(index, group, new_tokens)) zero_truncated(index, group, old_tokens, new_tokens, tx);
  const i64 end = ceil_div(new_tokens, b.tokens);
  for (i64 ordinal = ceil_div(old_tokens, b.tokens), n = 0; ordinal < end; ordinal += n) {
    n = allocate_run(index, group, ordinal, end - ordinal, tx);
  }
}

void PagedTable::shrink(i64 index, i64 group, i64 old_tokens, i64 new_tokens, Transaction& tx) {
  const Blocks& b = blocks_[group];
  note_truncated(index, group, old_tokens);
  for (i64 ordinal = ceil_div(old_tokens, b.tokens); ordinal-- > ceil_div(new_tokens, b.tokens);) {
    blocks_.set_fence(group, tx.fence());
    set_entry(index, group, ordinal, 0, tx);
  }
  // The blocks of the node that the length divides are copied when the sequence next grows, so that truncating needs no
  // memory.
  for (i64 ordinal = blocks_.first_of_tail(b, new_tokens); ordinal < blocks_.end_of_tail(b, new_tokens); ++ordinal) {
    const i32 cut = blocks_.entry(index, group, ordinal);
    if (!blocks_.is_own(b, cut)) return check_tail_again(index, group);
  }
}

void PagedTable::advance_front(i64 index, i64 group, i64 old_first, i64 first, Transaction& tx) {
  const Blocks& b = blocks_[group];
  const i64 begin = quotient(old_first, b.tokens), end = quotient(first, b.tokens);
  if (begin == end) return;
  blocks_.set_fence(group, tx.fence());
  for (i64 ordinal = end; ordinal-- > begin;) set_entry(index, group, ordinal, 0, tx);  // last block first
}

void PagedTable::share(i64 parent, i64 child, i64 group, i64 first, i64 tokens, Transaction& tx) {
  const Blocks& b = blocks_[group];
  const i64 tail = blocks_.first_of_tail(b, tokens), end = blocks_.end_of_tail(b, tokens);
  for (i64 ordinal = quotient(first, b.tokens); ordinal < tail; ++ordinal) {
    set_entry(child, group, ordinal, blocks_.entry(parent, group, ordinal), tx);
  }
  for (i64 ordinal = tail; ordinal < end; ++ordinal) {
    const i64 fresh = next_block(group, end - ordinal, tx);
    set_entry(child, group, ordinal, fresh, tx);
    copy_block(group, blocks_.entry(parent, group, ordinal), fresh, std::min(b.tokens, tokens - ordinal * b.tokens),
               tx);
  }
}

std::vector<i64> PagedTable::shared_pieces(i64 index, i64 group, i64 from, i64 end) const {
  const Blocks& b = blocks_[group];
  std::vector<i64> pieces;
  for (i64 ordinal = quotient(from, b.tokens); ordinal < std::max(ceil_div(from, b.tokens), ceil_div(end, b.tokens));
       ++ordinal) {
    const i32 block = blocks_.entry(index, group, ordinal);
    pieces.push_back(block != 0 && b.info[block].refs > 1 ? block : -1);
  }
  return pieces;
}

void PagedTable::close(i64 index, Transaction& tx) {
  for (i64 g = 0; g < groups_; ++g) {
    const Blocks& b = blocks_[g];
    marks_.reset_room(index, g);  // also without blocks: the next sequence with this index has none
    if (sequences_.tokens(index, g) == 0) continue;
    blocks_.set_fence(g, tx.fence());
    const i64 first = quotient(sequences_.front(index, g), b.tokens);
    const i64 end = ceil_div(sequences_.tokens(index, g), b.tokens);
    if (first == end) continue;  // its window needs no block
    tx.push({OpKind::drop, static_cast<i32>(g), sequences_.handle_of(index), first, end - first});
  }
}

i64 PagedTable::next_block(i64 group, i64 wanted, Transaction& tx) {
  const Blocks& b = blocks_[group];
  if (b.ready.empty()) make_ready(group, wanted, tx);
  const i64 block = b.ready.first();
  if (zeroes_blocks()) zero_blocks(group, block, 1, tx);
  return block;
}

void PagedTable::zero_truncated(i64 index, i64 group, i64 old_tokens, i64 tokens, Transaction& tx) {
  const Blocks& b = blocks_[group];
  const i64 end = std::min(marks_.truncated_to(index, group), round_up(old_tokens, b.tokens));
  if (tokens < end) {
    const i64 block = blocks_.entry(index, group, quotient(tokens, b.tokens)), first = remainder(tokens, b.tokens);
    if (block < kReservedBlocks || !blocks_.is_own(b, block)) return;
    if (blocks_.is_kept(group, block) || blocks_.may_be_cached(group, block)) return;
    for (const SlotClass& c : b.classes) {
      const i64 token_bytes = c.block_bytes / b.tokens, at = block * c.block_bytes + first * token_bytes;
      for (i64 a : c.arenas) tx.push({OpKind::zero, arena(a), at, (end - tokens) * token_bytes});
    }
  }
  marks_.note_zeroed(index, group);
}

i64 PagedTable::allocate_run(i64 index, i64 group, i64 first, i64 most, Transaction& tx) {
  const Blocks& b = blocks_[group];
  if (b.ready.empty()) make_ready(group, most, tx);
  if (zeroes_blocks()) zero_blocks(group, b.ready.first(), std::min(b.ready.run(b.ready.first()), most), tx);
  tx.expect();
  const auto [block, n] = blocks_.allocate(index, group, first, most);
  tx.note({OpKind::acquire, static_cast<i32>(group), sequences_.handle_of(index), first, n, block});
  return n;
}

void PagedTable::make_ready(i64 group, i64 wanted, Transaction& tx) {
  const Blocks& b = blocks_[group];
  const auto wants = [&] { return b.ready.empty() && !back_some(group, wanted, tx); };
  evict_in_order(tx, wants, [&](Item x) {
    const bool here = blocks_.block_of(x.node, group) != 0 && (x.window < 0 || x.window == b.window);
    if (!here) return free_page_of(x, tx) ? Outcome::evicted : Outcome::skipped;
    evict_item(x, tx);
    return Outcome::evicted;
  });
  while (wants()) {
    if (evict_next(tx)) continue;
    if (blocks_.first_unbacked(group) == b.max_blocks)
      throw OutOfMemory("all " + std::to_string(b.max_blocks - kReservedBlocks) + " blocks are in use");
    back(group, blocks_.first_unbacked(group), blocks_.first_unbacked(group) + 1, geometry_.zero,
         tx);  // reclaims another allocator's content
  }
}

bool PagedTable::back_some(i64 group, i64 wanted, Transaction& tx) {
  const Blocks& b = blocks_[group];
  const i64 first = blocks_.first_unbacked(group);
  if (first == b.max_blocks) return false;
  const i64 least = blocks_.missing_pages(group, first);
  const i64 ready = pool_.ready_pages(*this);
  // The run is counted only if there is room for one block, because counting visits each block.
  if (pool_.make_room(*this, least, false, tx) < least) return false;
  // Room for all blocks is made at once, so that each arena is mapped and zeroed in one run.
  const i64 room = ready < least
                       ? pool_.make_room(*this, blocks_.unbacked_run(group, first, wanted, kNoLimit).pages, false, tx)
                       : ready;
  back(group, first, blocks_.unbacked_run(group, first, wanted, room).end, geometry_.zero, tx);
  return true;
}

void PagedTable::back(i64 group, i64 first, i64 end, Zero zero, Transaction& tx) {
  const Blocks& b = blocks_[group];
  blocks_.begin_backing(group, first, end);
  try {
    for (const SlotClass& c : b.classes) {
      for (i64 slot = c.backing_from; slot < c.backing_to;) {
        i64 n = 0;
        while (slot + n < c.backing_to && c.slots[slot + n].mapped == 0) ++n;
        for (i64 a : c.arenas) {
          if (n > 0) pool_.map_slots(*this, arena(a), slot, n, slot > 0 ? blocks_.page(a, slot - 1) : -1, zero, tx);
        }
        slot += std::max(n, i64{1});
      }
    }
  } catch (...) {
    blocks_.end_backing(group);
    throw;
  }
  blocks_.end_backing(group);
}

void PagedTable::copy_tail(i64 index, i64 group, i64 tokens, Transaction& tx) {
  const Blocks& b = blocks_[group];
  for (i64 ordinal = blocks_.first_of_tail(b, tokens); ordinal < blocks_.end_of_tail(b, tokens); ++ordinal) {
    copy_shared(index, group, ordinal, std::min(b.tokens, tokens - ordinal * b.tokens), tx);
  }
  marks_.set_copy_tail(index, group, false);
}

void PagedTable::copy_shared(i64 index, i64 group, i64 ordinal, i64 tokens, Transaction& tx) {
  const Blocks& b = blocks_[group];
  const i32 old = blocks_.entry(index, group, ordinal);
  // A kept block must not be written, and with a guard the call itself zeroes what lies behind the tail.
  if (old == 0 || (blocks_.is_own(b, old) && !(guarded_ && blocks_.is_kept(group, old)))) return;
  if (b.info[old].refs <= 1 && !index_.used(b.info[old].node) && b.ready.empty() && !can_back_one(group)) {
    return evict_subtree(b.info[old].node, tx);  // it costs less than another cached block, or a failure
  }
  const i64 fresh = next_block(group, 1, tx);
  const bool last = b.info[old].refs == 1;
  blocks_.keep_bytes(group, old);
  set_entry(index, group, ordinal, fresh, tx);
  copy_block(group, old, fresh, tokens, tx);
  if (last) blocks_.set_fence(group, tx.new_fence());  // the device still copies from the block
}

void PagedTable::copy_block(i64 group, i64 from, i64 to, i64 tokens, Transaction& tx) {
  const Blocks& b = blocks_[group];
  tokens = moved_tokens(geometry_.groups[group], tokens);
  for (const SlotClass& c : b.classes) {
    for (i64 a : c.arenas) {
      tx.push({OpKind::copy, arena(a), to * c.block_bytes, from * c.block_bytes, tokens * (c.block_bytes / b.tokens)});
    }
  }
}

void PagedTable::zero_blocks(i64 group, i64 first, i64 n, Transaction& tx) {
  for (const SlotClass& c : blocks_[group].classes) {
    for (i64 a : c.arenas) tx.push({OpKind::zero, arena(a), first * c.block_bytes, n * c.block_bytes});
  }
}

TableView PagedTable::view(i64 group) const {
  TableView v;
  v.table = blocks_[group].table.get(), v.stride = blocks_[group].per_sequence;
  v.versions = blocks_.versions(group), v.groups = groups_;
  return v;
}

i64 PagedTable::offset_bytes(i64 index, i64 group, i64 a, i64 token) const {
  const i64 size = blocks_[group].tokens, block = blocks_.entry(index, group, quotient(token, size));
  return (block * size + remainder(token, size)) * token_bytes(group, first_[group] + a);
}

std::unique_ptr<PageTable> make_paged_table(const Geometry& geometry, PagePool& pool, const Sequences& sequences,
                                            PrefixIndex& index, bool append_only) {
  return std::make_unique<PagedTable>(geometry, pool, sequences, index, append_only);
}

}  // namespace kvmem
