// How a sequence grows, shrinks, is shared and ends: which blocks it takes, and what backs them.

#include "table/paged/paged_table.h"

namespace kvmem {

void PagedTable::grow(i64 index, i64 group, i64 old_tokens, i64 new_tokens, Transaction& tx) {
  const Blocks& b = blocks_[group];
  if (copy_tail_[index * groups_ + group]) copy_tail(index, group, old_tokens, tx);
  if (has_cut(index, group, new_tokens)) zero_cut(index, group, old_tokens, new_tokens, tx);
  const i64 end = ceil_div(new_tokens, b.tokens);
  for (i64 ordinal = ceil_div(old_tokens, b.tokens), n = 0; ordinal < end; ordinal += n) {
    n = take_run(index, group, ordinal, end - ordinal, tx);
  }
}

void PagedTable::shrink(i64 index, i64 group, i64 old_tokens, i64 new_tokens, Transaction& tx) {
  Blocks& b = blocks_[group];
  note_cut(index, group, old_tokens);
  for (i64 ordinal = ceil_div(old_tokens, b.tokens); ordinal-- > ceil_div(new_tokens, b.tokens);) {
    set_fence(b, tx.fence());
    set(index, group, ordinal, 0, tx);
  }
  // The blocks of the node that the length now cuts are copied when the sequence next grows, so that truncating needs
  // no memory.
  for (i64 ordinal = first_of_tail(b, new_tokens); ordinal < end_of_tail(b, new_tokens); ++ordinal) {
    const i32 cut = entry(index, group, ordinal);
    if (b.info[cut].refs > 1 || b.info[cut].node != kNoNode) return check_tail_again(index, group);
  }
}

void PagedTable::drop_front(i64 index, i64 group, i64 old_first, i64 first, Transaction& tx) {
  Blocks& b = blocks_[group];
  const i64 begin = quotient(old_first, b.tokens), end = quotient(first, b.tokens);
  if (begin == end) return;
  set_fence(b, tx.fence());
  for (i64 ordinal = end; ordinal-- > begin;) set(index, group, ordinal, 0, tx);  // the last goes first, as ever
}

void PagedTable::share(i64 parent, i64 child, i64 group, i64 first, i64 tokens, Transaction& tx) {
  const Blocks& b = blocks_[group];
  const i64 tail = first_of_tail(b, tokens), end = end_of_tail(b, tokens);
  for (i64 ordinal = quotient(first, b.tokens); ordinal < tail; ++ordinal) {
    set(child, group, ordinal, entry(parent, group, ordinal), tx);
  }
  for (i64 ordinal = tail; ordinal < end; ++ordinal) {
    const i64 fresh = take(group, end - ordinal, tx);
    set(child, group, ordinal, fresh, tx);
    copy_block(group, entry(parent, group, ordinal), fresh, std::min(b.tokens, tokens - ordinal * b.tokens), tx);
  }
}

std::vector<i64> PagedTable::shared_pieces(i64 index, i64 group, i64 from, i64 end) const {
  const Blocks& b = blocks_[group];
  std::vector<i64> pieces;
  for (i64 ordinal = quotient(from, b.tokens); ordinal < std::max(ceil_div(from, b.tokens), ceil_div(end, b.tokens));
       ++ordinal) {
    const i32 block = entry(index, group, ordinal);
    pieces.push_back(block != 0 && b.info[block].refs > 1 ? block : -1);
  }
  return pieces;
}

void PagedTable::close(i64 index, Transaction& tx) {
  for (i64 g = 0; g < groups_; ++g) {
    Blocks& b = blocks_[g];
    reset_room(index, g);  // also where it refers to no block: the next sequence at this place has none either
    if (sequences_.tokens(index, g) == 0) continue;
    set_fence(b, tx.fence());
    const i64 first = quotient(sequences_.front(index, g), b.tokens);
    const i64 end = ceil_div(sequences_.tokens(index, g), b.tokens);
    if (first == end) continue;  // its window holds none of them
    tx.push({OpKind::drop, static_cast<i32>(g), sequences_.handle_of(index), first, end - first});
  }
}

i64 PagedTable::take(i64 group, i64 wanted, Transaction& tx) {
  Blocks& b = blocks_[group];
  if (b.ready.empty()) make_ready(group, wanted, tx);
  const i64 block = b.ready.first();
  if (zeroes_blocks()) zero_blocks(b, block, 1, tx);
  return block;
}

void PagedTable::zero_cut(i64 index, i64 group, i64 old_tokens, i64 tokens, Transaction& tx) {
  const Blocks& b = blocks_[group];
  const i64 end = std::min(cut_to(index, group), round_up(old_tokens, b.tokens));
  if (tokens < end) {
    const i64 block = entry(index, group, quotient(tokens, b.tokens)), first = remainder(tokens, b.tokens);
    if (block < kReservedBlocks || b.info[block].refs > 1 || b.info[block].node != kNoNode) return;
    if (is_kept(group, block) || may_be_cached(group, block)) return;
    for (const SlotClass& c : b.classes) {
      const i64 token_bytes = c.block_bytes / b.tokens, at = block * c.block_bytes + first * token_bytes;
      for (i64 a : c.arenas) tx.push({OpKind::zero, arena(a), at, (end - tokens) * token_bytes});
    }
  }
  forget_cut(index, group);
}

i64 PagedTable::take_run(i64 index, i64 group, i64 first, i64 most, Transaction& tx) {
  Blocks& b = blocks_[group];
  if (b.ready.empty()) make_ready(group, most, tx);
  if (zeroes_blocks()) zero_blocks(b, b.ready.first(), std::min(b.ready.run(b.ready.first()), most), tx);
  tx.expect();
  b.ready.expect(most);
  i32* const entries = &b.table[index * b.per_sequence + first];
  const i64 n = most == 1 ? take_ready(b, entries) : take_ready(b, most, entries);
  tx.note({OpKind::acquire, static_cast<i32>(group), sequences_.handle_of(index), first, n, entries[0]});
  return n;
}

void PagedTable::make_ready(i64 group, i64 wanted, Transaction& tx) {
  Blocks& b = blocks_[group];
  const auto wants = [&] { return b.ready.empty() && !back_some(group, wanted, tx); };
  evict_in_order(tx, wants, [&](Item x) {
    const bool here = block_of(x.node, group) != 0 && (x.window < 0 || x.window == b.window);
    if (!here) return free_page_of(x, tx) ? Named::evicted : Named::aside;
    evict_item(x, tx);
    return Named::evicted;
  });
  while (wants()) {
    if (evict_next(tx)) continue;
    if (unbacked(group) == b.max_blocks)
      throw OutOfMemory("all " + std::to_string(b.max_blocks - kReservedBlocks) + " blocks are in use");
    back(group, unbacked(group), unbacked(group) + 1, geometry_.zero, tx);  // from another allocator's content
  }
}

bool PagedTable::back_some(i64 group, i64 wanted, Transaction& tx) {
  Blocks& b = blocks_[group];
  const i64 first = unbacked(group);
  if (first == b.max_blocks) return false;
  const i64 least = missing_pages(b, first);
  const i64 at_hand = pool_.ready_pages(*this);
  // Counting a run takes a step for each of its blocks: not where there is no room for one.
  if (pool_.make_room(*this, least, false, tx) < least) return false;
  // Room for all that is wanted is made at once: then each arena is mapped, and zeroed, in one run.
  const i64 room =
      at_hand < least ? pool_.make_room(*this, run_behind(b, first, wanted, kNoLimit).pages, false, tx) : at_hand;
  back(group, first, run_behind(b, first, wanted, room).end, geometry_.zero, tx);
  return true;
}

PagedTable::Run PagedTable::run_behind(Blocks& b, i64 first, i64 wanted, i64 room) const {
  Run run{first + 1, missing_pages(b, first)};
  for (SlotClass& c : b.classes) c.counted_to = end_slot(c, first);
  for (; run.end < b.max_blocks && run.end - first < wanted && !b.backed[run.end]; ++run.end) {
    i64 pages = run.pages;
    for (SlotClass& c : b.classes) {
      for (const i64 to = end_slot(c, run.end); c.counted_to < to; ++c.counted_to) {
        if (c.slots[c.counted_to].mapped == 0) pages += static_cast<i64>(c.arenas.size());
      }
    }
    if (pages > room) break;
    run.pages = pages;
  }
  return run;
}

i64 PagedTable::unbacked(i64 group) {
  Blocks& b = blocks_[group];
  while (b.cursor < b.max_blocks && b.backed[b.cursor]) ++b.cursor;
  return b.cursor;
}

i64 PagedTable::missing_pages(const Blocks& b, i64 block) const {
  i64 pages = 0;
  for (const SlotClass& c : b.classes) {
    for (i64 slot = first_slot(c, block); slot < end_slot(c, block); ++slot) {
      if (c.slots[slot].mapped == 0) pages += static_cast<i64>(c.arenas.size());
    }
  }
  return pages;
}

void PagedTable::back(i64 group, i64 first, i64 end, Zero zero, Transaction& tx) {
  Blocks& b = blocks_[group];
  for (SlotClass& c : b.classes) c.hold_from = first_slot(c, first), c.hold_to = end_slot(c, end - 1);
  try {
    for (SlotClass& c : b.classes) {
      for (i64 slot = c.hold_from; slot < c.hold_to;) {
        i64 n = 0;
        while (slot + n < c.hold_to && c.slots[slot + n].mapped == 0) ++n;
        for (i64 a : c.arenas) {
          if (n > 0) pool_.map_slots(*this, arena(a), slot, n, slot > 0 ? i64{pages_[a][slot - 1]} : -1, zero, tx);
        }
        slot += std::max(n, i64{1});
      }
    }
  } catch (...) {
    for (SlotClass& c : b.classes) c.hold_from = c.hold_to = 0;
    throw;
  }
  for (SlotClass& c : b.classes) c.hold_from = c.hold_to = 0;
}

void PagedTable::copy_tail(i64 index, i64 group, i64 tokens, Transaction& tx) {
  const Blocks& b = blocks_[group];
  for (i64 ordinal = first_of_tail(b, tokens); ordinal < end_of_tail(b, tokens); ++ordinal) {
    copy_shared(index, group, ordinal, std::min(b.tokens, tokens - ordinal * b.tokens), tx);
  }
  set_copy_tail(index, group, false);
}

void PagedTable::copy_shared(i64 index, i64 group, i64 ordinal, i64 tokens, Transaction& tx) {
  Blocks& b = blocks_[group];
  const i32 old = entry(index, group, ordinal);
  const bool is_own = b.info[old].refs <= 1 && b.info[old].node == kNoNode;
  if (old == 0 || (is_own && !(guarded_ && is_kept(group, old)))) return;  // a guard is zeroed in the call itself
  if (b.info[old].refs <= 1 && !index_.used(b.info[old].node) && b.ready.empty() && !has_room_for(b, unbacked(group))) {
    return evict_subtree(b.info[old].node, tx);  // rather than another cached block, or failing
  }
  const i64 fresh = take(group, 1, tx);
  const bool last = b.info[old].refs == 1;
  keep_bytes(group, old);
  set(index, group, ordinal, fresh, tx);
  copy_block(group, old, fresh, tokens, tx);
  if (last) set_fence(b, tx.new_fence());  // behind the copy: the block may go, and its page
}

void PagedTable::copy_block(i64 group, i64 from, i64 to, i64 tokens, Transaction& tx) {
  const Blocks& b = blocks_[group];
  for (const SlotClass& c : b.classes) {
    for (i64 a : c.arenas) {
      tx.push({OpKind::copy, arena(a), to * c.block_bytes, from * c.block_bytes, tokens * (c.block_bytes / b.tokens)});
    }
  }
}

void PagedTable::unmap(i64 a, i64 from, i64 to, i64 fence, Transaction& tx) {
  const ZeroVector<ZeroId>& pages = pages_[a];
  while (from < to) {
    i64 n = 1;
    while (from + n < to && pages[from + n] == pages[from] + n) ++n;
    tx.push({OpKind::unmap, arena(a), from, pages[from], n, fence});
    from += n;
  }
}

std::unique_ptr<PageTable> make_paged_table(const Geometry& geometry, PagePool& pool, const Sequences& sequences,
                                            PrefixIndex& index) {
  return std::make_unique<PagedTable>(geometry, pool, sequences, index);
}

}  // namespace kvmem
