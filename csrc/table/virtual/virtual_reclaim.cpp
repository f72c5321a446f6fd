// Reclaiming memory: what each kind of reclaim frees, and which content is evicted for it.

#include <algorithm>

#include "table/virtual/virtual_table.h"

namespace kvmem {

// Idle pages: first those of the row that was parked first, whose fence has most likely passed; then what bound rows do
// not need. Cost: proportional to the rows that free something or have changed since they were last visited. Only
// `out_of_window` and `ahead` visit all rows.
i64 VirtualTable::reclaim_kind(Reclaim kind, i64 pages, Transaction& tx) {
  switch (kind) {
    case Reclaim::idle: {
      const i64 freed = reclaim_list(rows_.parked(), pages, tx);
      return freed + reclaim_list(rows_.bound(), pages - freed, tx);
    }
    case Reclaim::second_copies:
      return reclaim_duplicates(false, PrefixIndex::kCandidates, pages, tx);
    case Reclaim::victims:
      return reclaim_victims(pages, tx);
    case Reclaim::snapshots:
      return reclaim_duplicates(true, rows_.duplicates().size(), pages, tx);
    case Reclaim::out_of_window:
      return index_.windows() > 0 ? reclaim_out_of_window(pages, tx) : 0;
    case Reclaim::ahead:
      return reclaim_ahead(pages, tx);
  }
  return 0;
}

i64 VirtualTable::reclaim_duplicates(bool snapshots, i64 most, i64 pages, Transaction& tx) {
  i64 freed = 0;
  for (i64 row; freed < pages && (row = find_duplicate(snapshots, most)) != 0;) {
    truncate_content(row, 0, tx);
    freed += reclaim_row(row, pages - freed, tx);
  }
  return freed;
}

i64 VirtualTable::reclaim_victims(i64 pages, Transaction& tx) {
  i64 freed = 0;
  const auto wants = [&] { return freed < pages; };
  evict_in_order(tx, wants, [&](Item x) {
    const i64 now = x.window < 0 ? evict_node(x.node, pages - freed, tx) : evict_part_page(x, tx);
    freed += std::max(now, i64{0});
    return now >= 0 ? Outcome::evicted : Outcome::skipped;
  });
  evict_in_order(tx, wants, [&](Item x) {  // pages that several items share
    const i64 before = owned_pages;
    x.window < 0 ? evict_node(x.node, pages - freed, tx) : (evict_window(x.node, x.window, tx), 0);
    freed += before - owned_pages;
    return Outcome::evicted;
  });
  return freed;
}

i64 VirtualTable::reclaim_ahead(i64 pages, Transaction& tx) {
  i64 freed = 0;
  for (i64 row = 1; row < rows_.size() && freed < pages; ++row) {
    if (rows_[row].index >= 0 && row != filled_row_) freed += reclaim_row(row, pages - freed, tx, false);
  }
  return freed;
}

// A part that is needed is never a victim, but the row of a sequence that is past it may have a second copy.
i64 VirtualTable::reclaim_out_of_window(i64 pages, Transaction& tx) {
  const i64 before = owned_pages;
  for (i64 row = 1; row < rows_.size() && before - owned_pages < pages; ++row) {
    if (rows_[row].source || row == filled_row_) continue;
    for (i64 k = 0; k < rows_.blocks_of(row); ++k) {
      for (i32 w = 0; w < index_.windows(); ++w) {
        if (rows_.is_out_of_window_copy(row, k, w)) evict_part_copy(row, k, w, tx);
      }
    }
    if (rows_[row].index < 0) detach_unfindable(row, tx);
  }
  return before - owned_pages;
}

i64 VirtualTable::reclaim_list(const IdList& list, i64 pages, Transaction& tx) {
  i64 freed = 0;
  for (i64 row = list.first(), next; row != 0 && freed < pages; row = next) {
    next = list.next(row);
    if (row == filled_row_) continue;
    if (index_.windows() > 0 && rows_[row].index < 0) freed += reclaim_part_copies(row, pages - freed, tx);
    freed += reclaim_row(row, pages - freed, tx);
  }
  return freed;
}

i64 VirtualTable::reclaim_part_copies(i64 row, i64 pages, Transaction& tx) {
  const i64 before = owned_pages;
  for (i64 g = 0; g < groups_ && !rows_[row].source; ++g) {
    const i32 window = index_.window_of(g);
    for (i64 a = first_[g]; window >= 0 && a < first_[g + 1]; ++a) {
      const i64 block_bytes = index_.block_tokens() * token_bytes(g, a);
      const Extent& e = rows_.extent(row, a);
      for (i64 slot = e.lo; slot < e.hi && before - owned_pages < pages; ++slot) {
        if (e.pages[slot] < 0 || pool_.is_shared(e.pages[slot])) continue;
        const BlockRange on = blocks_on(row, slot, block_bytes);
        bool copies = true;
        for (i64 k = on.first; copies && k < on.last; ++k) {
          copies = !rows_.part(row, k, window).present || rows_.is_out_of_window_copy(row, k, window);
        }
        for (i64 k = on.first; copies && k < on.last; ++k) {
          if (rows_.part(row, k, window).present) evict_part_copy(row, k, window, tx);
        }
      }
    }
  }
  if (before != owned_pages) detach_unfindable(row, tx);
  return before - owned_pages;
}

void VirtualTable::evict_part_copy(i64 row, i64 ordinal, i32 window, Transaction& tx) {
  keep_last_copy(row, ordinal);
  detach_part(row, ordinal, window, tx);
  unmap_part({row}, window, ordinal, tx);
}

i64 VirtualTable::reclaim_row(i64 row, i64 pages, Transaction& tx, bool ahead) {
  i64 freed = 0, a = 0;
  bool all = true;  // whether everything unneeded is unmapped
  for (i64 g = 0; a < arenas_ && freed < pages; ++a) {
    while (a >= first_[g + 1]) ++g;
    const Extent& e = rows_.extent(row, a);
    const VirtualRows::Unneeded u = rows_.unneeded(row, g, a, ahead);
    const i64 before = owned_pages;
    if (!rows_[row].source) {
      unmap(row, a, u.from, u.to, rows_[row].fence, tx);
    } else {
      all = all && u.from == u.to;
    }
    if (u.end < e.hi) {
      const i64 keep = rows_[row].maybe_shared ? 0 : std::max(i64{0}, (e.hi - u.end) - (pages - freed));
      unmap(row, a, u.end + keep, e.hi, rows_[row].fence, tx);
      all = all && keep == 0;
    }
    freed += before - owned_pages;
  }
  if (all && a == arenas_) rows_.has_nothing_to_reclaim(row);
  return freed;
}

i64 VirtualTable::evict_node(i32 node, i64 pages, Transaction& tx) {
  std::vector<i64> rows;
  for (i64 row = rows_.first_holder(node); row >= 0; row = rows_[row].holds[index_.ordinal(node)].next)
    rows.push_back(row);
  evict_subtree(node, tx);
  if (rows.size() == 1) evict_run(rows[0], pages, tx);
  i64 freed = 0;
  for (i64 row : rows) {
    if (is_second_copy(row) && can_lose(row)) truncate_content(row, 0, tx);  // other rows have the rest
    if (freed < pages) freed += reclaim_row(row, pages - freed, tx);
  }
  return freed;
}

// `pages`: how many pages the caller wants from this row. Not with states, because a row then has one snapshot only.
void VirtualTable::evict_run(i64 row, i64 pages, Transaction& tx) {
  if (rows_[row].index >= 0 || any_state_) return;
  evict_in_order(
      tx, [&] { return unneeded_behind(row) < pages; },
      [&](Item x) {
        if (x.window >= 0 || rows_.blocks_of(row) == 0) return Outcome::stop;
        const Hold& last = rows_[row].holds.back();
        if (last.node != x.node || last.next >= 0 || last.previous >= 0) return Outcome::stop;
        evict_subtree(x.node, tx);
        return Outcome::evicted;
      });
}

i64 VirtualTable::unneeded_behind(i64 row) const {
  i64 pages = 0;
  for (i64 g = 0, a = 0; g < groups_; ++g) {
    for (; a < first_[g + 1]; ++a) pages += rows_.extent(row, a).hi - rows_.unneeded(row, g, a, true).end;
  }
  return pages;
}

i64 VirtualTable::evict_part_page(Item x, Transaction& tx) {
  const i64 g = index_.group_of(x.window), size = index_.block_tokens(), ordinal = index_.ordinal(x.node);
  const i64 row = rows_.first_part_row(x.node, x.window);
  i64 best_a = -1, best_slot = -1;  // the page of the part with the fewest other parts
  std::size_t least = SIZE_MAX;
  for (i64 a = first_[g]; a < first_[g + 1]; ++a) {
    const i64 end = ceil_div((ordinal + 1) * size * token_bytes(g, a), page_bytes());
    for (i64 slot = quotient(ordinal * size * token_bytes(g, a), page_bytes()); slot < end && least > 1; ++slot) {
      if (find_parts_on(row, g, a, slot) && on_page_.size() < least) {
        least = on_page_.size();
        best_a = a, best_slot = slot;
      }
    }
  }
  if (best_a < 0) return -1;
  const i64 before = owned_pages;
  find_parts_on(row, g, best_a, best_slot);
  for (i32 node : std::vector<i32>(on_page_)) evict_item({node, x.window}, tx);
  return before - owned_pages;
}

bool VirtualTable::find_parts_on(i64 row, i64 group, i64 a, i64 slot) {
  const i32 window = index_.window_of(group);
  const i64 block_bytes = index_.block_tokens() * token_bytes(group, a);
  const i64 index = rows_[row].index;
  on_page_.clear();
  if (rows_[row].source || row == filled_row_) return false;
  if (index >= 0 && slot >= rows_.low_slot(group, a, sequences_.front(index, group))) return false;
  const BlockRange on = blocks_on(row, slot, block_bytes);
  for (i64 k = on.first; k < on.last; ++k) {
    const i32 node = rows_[row].holds[k].node;
    if (!rows_.part(row, k, window).present) continue;
    if (index_.needs(node, window) > 0) return false;
    on_page_.push_back(node);
  }
  return true;
}

bool VirtualTable::is_covered(i64 row, std::size_t from) const {
  const std::vector<Hold>& holds = rows_[row].holds;
  if (holds.size() <= from) return true;
  i64 seen = 0;
  const i64 most =
      index_.windows() == 0 ? PrefixIndex::kCandidates : 4;  // with windows, rows are compared block by block
  for (i64 other = rows_.first_holder(holds.back().node); other >= 0 && seen < most; ++seen) {
    bool as_much = other != row;
    for (i32 w = 0; as_much && w < index_.windows(); ++w) {
      // From the first block that is needed to start at the end of block `from`.
      i64 k = first_needed(w, static_cast<i64>(from + 1) * index_.block_tokens());
      while (k < rows_.blocks_of(row) && (rows_.part(other, k, w).present || !rows_.part(row, k, w).present)) ++k;
      as_much = k >= rows_.blocks_of(row);
    }
    if (as_much) return true;
    other = rows_[other].holds[holds.size() - 1].next;
  }
  return false;
}

bool VirtualTable::is_second_copy(i64 row) const {
  const Row& r = rows_[row];
  return !r.source && !r.holds.empty() && r.state != r.holds.back().node && is_covered(row, 0);
}

bool VirtualTable::can_lose_snapshot(i64 row) const {
  return rows_.blocks_of(row) > 0 && can_lose(row) && !index_.pinned(rows_[row].holds.back().node);
}

bool VirtualTable::can_lose(i64 row) const {
  if (rows_[row].source || row == filled_row_ || !keeps_pins(row, 0)) return false;
  for (i64 k = 0; k < rows_.blocks_of(row); ++k) {
    const i32 node = rows_[row].holds[k].node;
    if (index_.copies(node) <= 1 && index_.used(node)) return false;
    for (i32 w = 0; w < index_.windows(); ++w) {
      if (rows_.part(row, k, w).present && index_.window_copies(node, w) <= 1 && index_.needs(node, w) > 0)
        return false;
    }
  }
  return true;
}

bool VirtualTable::keeps_pins(i64 row, i64 from) const {
  if (!rows_.any_pin_ends()) return true;
  for (i64 k = from; k < rows_.blocks_of(row); ++k) {
    if (rows_.pin_ends_at(rows_[row].holds[k].node) && !can_start_elsewhere(row, k)) return false;
  }
  return true;
}

bool VirtualTable::can_start_elsewhere(i64 row, i64 ordinal) const {
  const i32 node = rows_[row].holds[ordinal].node;
  if (any_state_) return rows_[row].state != node;  // only one row has a snapshot of a node
  for (i64 other = rows_.first_holder(node); other >= 0; other = rows_[other].holds[ordinal].next) {
    if (other != row && has_needed_parts(other, ordinal + 1, (ordinal + 1) * index_.block_tokens())) return true;
  }
  return false;
}

i64 VirtualTable::find_duplicate(bool snapshots, i64 most) {
  for (i64 seen = 0, row; seen < most && (row = rows_.duplicates().first()) != 0; ++seen) {
    if (is_second_copy(row) || (snapshots && can_lose_snapshot(row))) return row;
    rows_.move_last_of_duplicates(row);
  }
  return 0;
}

}  // namespace kvmem
