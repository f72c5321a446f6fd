// The choice of a sequence's row, and what happens to the pages that the row comes with.

#include <algorithm>

#include "table/virtual/virtual_table.h"

namespace kvmem {

i64 VirtualTable::best_empty(i64 slots) const {
  if (rows_.empty_rows().empty()) return -1;
  const auto more = rows_.empty_rows().lower_bound({slots, 0});
  if (more == rows_.empty_rows().begin()) return more->second;
  const auto less = std::prev(more);
  if (more == rows_.empty_rows().end()) return rows_.empty_rows().lower_bound({less->first, 0})->second;
  const i64 beyond = more->first - slots;
  return beyond <= pool_.ready_pages(*this) || 2 * beyond <= 5 * (slots - less->first)
             ? more->second
             : rows_.empty_rows().lower_bound({less->first, 0})->second;
}

i64 VirtualTable::pick_empty(Transaction& tx) {
  rows_.offer_row();
  return rows_.empty_rows().empty() ? empty_a_row(tx) : rows_.empty_rows().begin()->second;
}

i64 VirtualTable::empty_a_row(Transaction& tx) {
  if (const i64 row = find_duplicate(false, PrefixIndex::kCandidates)) {
    truncate_content(row, 0, tx);
    return row;
  }
  i64 row = 0;
  evict_in_order(
      tx, [] { return true; },
      [&](Item x) {
        const i64 holder = x.window < 0 ? rows_.first_holder(x.node) : rows_.first_part_row(x.node, x.window);
        if (rows_[holder].index < 0 && can_lose(holder)) {
          row = holder;
          return Outcome::stop;
        }
        if (x.window >= 0) return Outcome::skipped;  // its rows are bound
        evict_subtree(x.node, tx);
        return Outcome::evicted;
      });
  if (row == 0) row = find_duplicate(true, rows_.duplicates().size());
  if (row == 0) row = any_evictable_row();
  if (row != 0) {
    truncate_content(row, 0, tx);
    return row;
  }
  throw OutOfMemory("all rows are in use or hold pinned tokens");
}

// The last resort: the eviction order may name more items of bound rows than evict_in_order() skips.
i64 VirtualTable::any_evictable_row() const {
  i64 row = rows_.size() - 1;
  while (row > 0 && (rows_[row].index >= 0 || rows_[row].holds.empty() || !can_lose(row))) --row;
  return row;
}

i64 VirtualTable::pick_row(i64 tokens, i64 shared, Transaction& tx) {
  i64 need = 0, in_front = 0;
  for (i64 g = 0; g < groups_; ++g) {
    if (geometry_.groups[g].growth != Growth::token) continue;
    for (i64 a = first_[g]; a < first_[g + 1]; ++a) {
      need += rows_.with_ahead(g, a, rows_.high_slot(g, a, tokens)),
          in_front += quotient(shared * token_bytes(g, a), page_bytes());
    }
  }
  rows_.offer_row();
  i64 row = best_empty(need);
  // The slots that the chosen row lacks. Its pages in front of the sequence's own tokens come free, and so do those of
  // rows whose content is evicted here.
  i64 own = need - in_front - (row < 0 ? 0 : rows_[row].slots);
  if (own > pool_.ready_pages(*this)) {
    const Guard best(filled_row_, row);
    own -= pool_.make_room(*this, own, false, tx);
  } else {
    own = 0;
  }
  while (own > 0) {
    const i64 victim = pick_victim(own + own / 4, tx);
    if (victim < 0) break;
    own -= rows_[victim].slots;
    truncate_content(victim, 0, tx);
    row = best_empty(need);
  }
  return row < 0 ? empty_a_row(tx) : row;
}

i64 VirtualTable::pick_victim(i64 most, Transaction& tx) {
  constexpr i64 kMostSeen = 8;
  i64 best = -1, seen = 0;
  evict_in_order(
      tx, [&] { return seen < kMostSeen; },
      [&](Item x) {
        if (x.window >= 0) return Outcome::stop;
        const i64 row = rows_.first_holder(x.node), slots = rows_[row].slots;
        const bool fits = rows_[row].index < 0 && slots <= most && can_lose(row);
        if (fits && (best < 0 || slots > rows_[best].slots)) best = row;
        ++seen;
        return Outcome::skipped;  // none is evicted here
      });
  return best;
}

void VirtualTable::bind(i64 index, i64 tokens, Transaction& tx) {
  const i64 row = pick_row(tokens, 0, tx);
  tx.push({OpKind::bind, 0, sequences_.handle_of(index), row});
  if (rows_[row].maybe_shared) unmap_shared(row, tx);
  if (geometry_.zero != Zero::always) return;
  zero_row(row, 0, tx);
  rows_.mark_finite(row);
}

void VirtualTable::zero_row(i64 row, i64 tokens, Transaction& tx) {
  for (i64 a = 0; a < arenas_; ++a) {
    const Extent& e = rows_.extent(row, a);
    const i64 base = rows_.slot_of(row, group_of(a), a) * page_bytes(), first = tokens * token_bytes(group_of(a), a);
    for (i64 slot = std::max(e.lo, first / page_bytes()); slot < e.hi; ++slot) {
      const i64 begin = slot;
      while (slot < e.hi && e.pages[slot] >= 0) ++slot;
      const i64 from = std::max(begin * page_bytes(), first);
      if (from < slot * page_bytes()) tx.push({OpKind::zero, arena(a), base + from, slot * page_bytes() - from});
    }
  }
}

void VirtualTable::bind_without_pages(i64 index, Transaction& tx) {
  const i64 row = pick_empty(tx);
  tx.push({OpKind::bind, 0, sequences_.handle_of(index), row});
  unmap_row(row, tx);
  rows_.mark_finite(row);
}

void VirtualTable::bind_behind(i64 index, const SharedPrefix& found, Transaction& tx) {
  if (index_.windows() > 0 || any_state_) return bind_without_pages(index, tx);
  const i64 row = pick_row(std::max(found.room_tokens, found.tokens), found.tokens, tx);
  tx.push({OpKind::bind, 0, sequences_.handle_of(index), row});
  if (rows_[row].maybe_shared) unmap_shared(row, tx);
  for (i64 a = 0; a < arenas_; ++a) {
    const Extent& e = rows_.extent(row, a);
    unmap(row, a, e.lo, std::min(e.hi, found.tokens * token_bytes(group_of(a), a) / page_bytes()), rows_[row].fence,
          tx);
  }
}

void VirtualTable::unmap_row(i64 row, Transaction& tx) {
  for (i64 a = 0; a < arenas_; ++a) {
    const Extent& e = rows_.extent(row, a);
    if (e.count > 0) unmap(row, a, e.lo, e.hi, rows_[row].fence, tx);
  }
}

void VirtualTable::unmap_shared(i64 row, Transaction& tx) {
  for (i64 a = 0; a < arenas_; ++a) {
    const Extent& e = rows_.extent(row, a);
    i64 end = e.hi;
    while (end > e.lo && (e.pages[end - 1] < 0 || !pool_.is_shared(e.pages[end - 1]))) --end;
    if (end > e.lo) unmap(row, a, e.lo, end, rows_[row].fence, tx);
  }
  rows_.set_maybe_shared(row, false);
}

}  // namespace kvmem
