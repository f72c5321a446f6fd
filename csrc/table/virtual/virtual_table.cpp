#include "table/virtual/virtual_table.h"

#include <algorithm>

namespace kvmem {

i64 VirtualTable::find_room(i64 index, i64 group) {
  const i64 row = rows_.row_of(index);
  if (row < 0 || marks_.copy_tail(index, group)) return 0;
  if (has_truncated(index, group, sequences_.tokens(index, group))) return 0;
  return rows_.usable_room(row, group);
}

void VirtualTable::grow(i64 index, i64 group, i64 old_tokens, i64 new_tokens, Transaction& tx) {
  if (rows_.row_of(index) < 0) bind(index, new_tokens, tx);
  const i64 row = rows_.row_of(index);
  if (marks_.copy_tail(index, group)) copy_tail(index, group, old_tokens, tx);
  i64 left = geometry_.map_ahead_tokens > 0 ? slots_with_ahead(row, group, new_tokens, tx) : 0;
  for (i64 a = first_[group]; a < first_[group + 1]; ++a) {
    const Extent& e = rows_.extent(row, a);
    const i64 lo = rows_.low_slot(group, a, sequences_.front(index, group));
    const i64 hi = rows_.high_slot(group, a, new_tokens);
    if (hi < e.solid) unmap(row, a, hi, e.hi, rows_[row].fence, tx);  // parked pages behind a hole
    map_holes(row, a, lo, e.solid, tx);
    if (hi <= e.hi) continue;
    const i64 from = e.count == 0 ? lo : std::max(lo, e.hi), to = rows_.with_ahead(group, a, hi);
    // Only from free pages: reclaiming here could unmap what is mapped here.
    const bool ahead = left > 0 && pool_.ready_pages(*this) - pool_.most_kept() >= left;
    map(row, a, from, ahead ? to : hi, tx);
    left -= to - from;
  }
  if (!guarded_) return;
  if (has_truncated(index, group, new_tokens)) zero_truncated(index, group, new_tokens, tx);
  zero_ahead(row, group, old_tokens, new_tokens, tx);
}

i64 VirtualTable::slots_with_ahead(i64 row, i64 group, i64 tokens, Transaction& tx) {
  i64 slots = 0, ahead = 0;
  for (i64 a = first_[group]; a < first_[group + 1]; ++a) {
    const Extent& e = rows_.extent(row, a);
    const i64 lo = rows_.low_slot(group, a, sequences_.front(rows_[row].index, group)),
              hi = rows_.high_slot(group, a, tokens);
    const i64 to = rows_.with_ahead(group, a, hi);
    if (hi > e.hi) slots += to - (e.count == 0 ? lo : std::max(lo, e.hi)), ahead += to - hi;
  }
  if (ahead == 0) return 0;
  return pool_.make_room(*this, slots, true, tx) >= slots ? slots : 0;
}

void VirtualTable::zero_ahead(i64 row, i64 group, i64 old_tokens, i64 new_tokens, Transaction& tx) {
  const i64 guard = rows_.guard_tokens(group);
  const Finite& f = rows_.finite(row, group);
  if (f.to >= f.dirty_to || new_tokens + guard <= f.to) return;
  const i64 to = std::min(f.dirty_to, new_tokens + 2 * guard);
  zero_tokens(row, group, std::max(old_tokens, f.to), to, tx);
  rows_.note_zeroed(row, group, to);
}

void VirtualTable::zero_truncated(i64 index, i64 group, i64 tokens, Transaction& tx) {
  const i64 row = rows_.row_of(index);
  if (row < 0 || zero_tokens(row, group, tokens, marks_.truncated_to(index, group), tx))
    marks_.note_zeroed(index, group);
}

bool VirtualTable::zero_tokens(i64 row, i64 group, i64 from, i64 to, Transaction& tx) {
  bool all = true;
  for (i64 a = first_[group]; a < first_[group + 1]; ++a) {
    const Extent& e = rows_.extent(row, a);
    const i64 first = from * token_bytes(group, a), end = std::min(to * token_bytes(group, a), e.hi * page_bytes());
    const auto is_own = [&](i64 slot) { return e.pages[slot] >= 0 && !pool_.is_shared(e.pages[slot]); };
    for (i64 slot = std::max(e.lo, first / page_bytes()); slot * page_bytes() < end; ++slot) {
      const i64 begin = std::max(slot * page_bytes(), first);
      while (slot * page_bytes() < end && is_own(slot)) ++slot;
      const i64 stop = std::min(slot * page_bytes(), end);
      if (begin < stop)
        tx.push({OpKind::zero, arena(a), rows_.slot_of(row, group, a) * page_bytes() + begin, stop - begin});
      all = all && (slot * page_bytes() >= end || e.pages[slot] < 0);
    }
  }
  return all;
}

void VirtualTable::shrink(i64 index, i64 group, i64 old_tokens, i64 new_tokens, Transaction& tx) {
  const i64 row = rows_.row_of(index);
  if (row < 0) return;
  note_truncated(index, group, old_tokens);
  rows_.may_reclaim(row);
  bool frees = false;
  for (i64 a = first_[group]; a < first_[group + 1]; ++a) {
    frees = frees || rows_.high_slot(group, a, new_tokens) < rows_.high_slot(group, a, old_tokens);
  }
  if (frees) rows_.set_fence(row, tx.fence());
  if (!rows_[row].maybe_shared) return;
  // Shared pages behind the length must not be written. Those behind the guard are unmapped now. The others are
  // replaced when the sequence next grows, so that truncating needs no memory and the guard stays mapped.
  bool shared = false;
  for (i64 a = first_[group]; a < first_[group + 1]; ++a) {
    const Extent& e = rows_.extent(row, a);
    const i64 first = rows_.first_shared(row, a, new_tokens);
    if (first >= e.hi) continue;
    const i64 keep = std::max(first, rows_.high_slot(group, a, new_tokens));
    shared = shared || keep > first;
    unmap(row, a, keep, e.hi, rows_[row].fence, tx);
  }
  if (shared) check_tail_again(index, group);
}

std::vector<i64> VirtualTable::shared_pieces(i64 index, i64 group, i64 from, i64 end) const {
  std::vector<i64> pieces;
  for (i64 a = first_[group]; rows_.row_of(index) >= 0 && a < first_[group + 1]; ++a) {
    const Extent& e = rows_.extent(rows_.row_of(index), a);
    i64 slot = settled_bytes(group, a, from) / page_bytes();
    for (const i64 last = std::max(slot + 1, ceil_div(moved_bytes(group, a, end), page_bytes())); slot < last; ++slot) {
      const bool shared = slot >= e.lo && slot < e.hi && pool_.refs(e.pages[slot]) > 1;
      pieces.push_back(shared ? e.pages[slot] : -1);
    }
  }
  return pieces;
}

void VirtualTable::close(i64 index, Transaction& tx) {
  const i64 row = rows_.row_of(index);
  if (row < 0) return;
  rows_.set_fence(row, tx.fence());
  for (const Hold& hold : rows_[row].holds) index_.prefetch(hold.node);
  tx.push({OpKind::unbind, 0, sequences_.handle_of(index), row});
  if (index_.windows() > 0) detach_unfindable(row, tx);
}

void VirtualTable::back_reserved(i64 group, Transaction& tx) {
  for (i64 a = first_[group]; a < first_[group + 1]; ++a) {
    map(0, a, rows_.extent(0, a).hi, rows_.reserved_slots(group, a), tx, Zero::always);
  }
}

bool VirtualTable::map_ahead(i64 index, i64 group, i64 tokens, Transaction& tx) {
  const i64 row = rows_.row_of(index);
  const i64 ahead = geometry_.map_ahead_tokens;
  if (row < 0 || rows_[row].job != 0) return false;
  const i64 have = rows_.room(row, group);
  if (have - tokens >= ahead || have >= geometry_.groups[group].max_tokens) return false;
  i64 want = 0;
  for (i64 a = first_[group]; a < first_[group + 1]; ++a) {
    want += std::max(i64{0}, rows_.high_slot(group, a, tokens + 2 * ahead) - rows_.extent(row, a).hi);
  }
  if (want == 0 || want > pool_.ready_pages(*this)) return false;
  rows_.note_ready(row, group, have);
  for (i64 a = first_[group]; a < first_[group + 1]; ++a) {
    const i64 hi = rows_.high_slot(group, a, tokens + 2 * ahead);
    if (rows_.extent(row, a).hi < hi) map(row, a, rows_.extent(row, a).hi, hi, tx);
  }
  return true;
}

void VirtualTable::copy_tail(i64 index, i64 group, i64 tokens, Transaction& tx) {
  const i64 row = rows_.row_of(index);
  for (i64 a = first_[group]; a < first_[group + 1]; ++a) {
    const Extent& e = rows_.extent(row, a);
    const i64 bytes = moved_bytes(group, a, tokens), end = ceil_div(bytes, page_bytes());
    const i64 first = std::max(e.lo, settled_bytes(group, a, tokens) / page_bytes());
    const auto is_shared = [&](i64 slot) { return e.page(slot) >= 0 && rows_.must_copy(e.pages[slot]); };
    i64 copies = 0;
    for (i64 slot = first; slot < end; ++slot) copies += is_shared(slot);
    // If the only other row that shows a page is parked and has no content, it gives way, and nothing is copied.
    if (copies > pool_.ready_pages(*this)) pool_.make_room(*this, copies, false, tx);
    std::vector<i64> shared;
    for (i64 slot = first; slot < end; ++slot) {
      if (is_shared(slot)) shared.push_back(slot);
    }
    drop_shared_guard(row, a, std::max(e.lo, end), tx);
    for (i64 slot : shared) {
      replace_page(row, group, a, slot, std::min(page_bytes(), bytes - slot * page_bytes()), tx);
    }
  }
  marks_.set_copy_tail(index, group, false);
}

// The row's own pages stay mapped. If they were unmapped, this transaction could write to one, and after a failure of
// the driver it would lie behind the sequence's end again.
void VirtualTable::drop_shared_guard(i64 row, i64 a, i64 from, Transaction& tx) {
  const Extent& e = rows_.extent(row, a);
  const auto is_shared = [&](i64 slot) { return e.pages[slot] >= 0 && rows_.must_copy(e.pages[slot]); };
  for (i64 slot = from; slot < e.hi; ++slot) {
    const i64 begin = slot;
    while (slot < e.hi && is_shared(slot)) ++slot;
    if (slot == begin) continue;
    const bool last = slot == e.hi;
    for (i64 s = begin; s < slot; ++s) pool_.keep_bytes(e.pages[s]);
    unmap(row, a, begin, slot, tx.fence(), tx);  // kernels may have read the guard since the truncation
    if (!last) map(row, a, begin, slot, tx);
  }
}

void VirtualTable::replace_page(i64 row, i64 group, i64 a, i64 slot, i64 used_bytes, Transaction& tx) {
  const i64 scratch = rows_.scratch_slot(a);
  const i64 here = rows_.slot_of(row, group, a) + slot, old = rows_.extent(row, a).pages[slot];
  pool_.map_slots(*this, arena(a), scratch, 1, old, page_zero(), tx);
  const i64 fresh = rows_.scratch_page(a);
  tx.push({OpKind::copy, arena(a), scratch * page_bytes(), here * page_bytes(), used_bytes});
  const i64 fence = tx.new_fence();
  pool_.keep_bytes(old);
  tx.push({OpKind::unmap, arena(a), here, old, 1, fence});
  tx.push({OpKind::map, arena(a), here, fresh, 1});
  tx.push({OpKind::unmap, arena(a), scratch, fresh, 1, fence});
}

void VirtualTable::map(i64 row, i64 a, i64 from, i64 to, Transaction& tx, Zero zero) {
  if (to <= from) return;
  const Extent& e = rows_.extent(row, a);
  const i64 near = from > 0 ? e.page(from - 1) : -1;
  pool_.map_slots(*this, arena(a), rows_.slot_of(row, group_of(a), a) + from, to - from, near, zero, tx);
}

void VirtualTable::map_holes(i64 row, i64 a, i64 from, i64 to, Transaction& tx) {
  const Extent& e = rows_.extent(row, a);
  const auto is_hole = [&e](i64 slot) { return e.page(slot) < 0; };
  for (i64 slot = from; slot < to; ++slot) {
    const i64 begin = slot;
    while (slot < to && is_hole(slot)) ++slot;
    map(row, a, begin, slot, tx);
  }
}

void VirtualTable::unmap(i64 row, i64 a, i64 from, i64 to, i64 fence, Transaction& tx) {
  const Extent& e = rows_.extent(row, a);
  const auto page = [&e](i64 slot) { return i64{e.pages[slot]}; };
  unmap_runs(a, rows_.slot_of(row, group_of(a), a), from, to, fence, page, tx);
}

void VirtualTable::check_tail_again(i64 index, i64 group) {
  marks_.set_copy_tail(index, group, true);
  if (rows_.row_of(index) >= 0) rows_.may_reclaim(rows_.row_of(index));
  marks_.reset_room(index, group);
}

i64 VirtualTable::sequence_at(const Op& op) const {
  const i64 a = local_arena(op.at), row = op.a / rows_.row_slots(group_of(a), a);
  return row < rows_.size() ? rows_[row].index : -1;  // the scratch slot lies behind all rows
}

TableView VirtualTable::view(i64 group) const {
  TableView v;
  v.rows = rows_.row_of_data();
  v.row_blocks = geometry_.groups[group].row_tokens / geometry_.groups[group].block_tokens;
  return v;
}

i64 VirtualTable::offset_bytes(i64 index, i64 group, i64 a, i64 token) const {
  const i64 arena = first_[group] + a;
  return rows_.slot_of(rows_.row_of(index), group, arena) * page_bytes() + token * token_bytes(group, arena);
}

std::unique_ptr<PageTable> make_virtual_table(const Geometry& geometry, PagePool& pool, const Sequences& sequences,
                                              PrefixIndex& index) {
  if (index.windows() > kMostWindows) {
    throw SpecError("groups with a sliding window: got " + std::to_string(index.windows()) +
                    "; the virtual backend takes at most " + std::to_string(kMostWindows) +
                    ": use backend=\"paged\", or put layers with equal windows into one group");
  }
  return std::make_unique<VirtualTable>(geometry, pool, sequences, index);
}

}  // namespace kvmem
