// Memory that is short: what each kind of reclaim gives.

#include <algorithm>

#include "table/virtual/virtual_table.h"

namespace kvmem {

// Of what is idle the row that was freed longest ago leads: its fence has most likely passed. Then what live rows hold
// beyond their need. Cost: a few steps for each row that gives something or has changed since it was last looked at.
// Only a call for which all but `ahead` does not suffice looks at all rows.
i64 VirtualTable::reclaim_kind(Reclaim kind, i64 pages, Transaction& tx) {
  switch (kind) {
    case Reclaim::idle: {
      const i64 freed = reclaim_list(parked_, pages, tx);
      return freed + reclaim_list(bound_, pages - freed, tx);
    }
    case Reclaim::second_copies:
      return reclaim_copies(false, PrefixIndex::kCandidates, pages, tx);
    case Reclaim::victims:
      return reclaim_victims(pages, tx);
    case Reclaim::spares:
      return reclaim_copies(true, doubles_.size(), pages, tx);
    case Reclaim::out_of_window:
      return index_.windows() > 0 ? reclaim_out_of_window(pages, tx) : 0;
    case Reclaim::ahead:
      return reclaim_ahead(pages, tx);
  }
  return 0;
}

i64 VirtualTable::reclaim_copies(bool spare, i64 most, i64 pages, Transaction& tx) {
  i64 freed = 0;
  for (i64 row; freed < pages && (row = find_double(spare, most)) != 0;) {
    cut(row, 0, tx);
    freed += reclaim_row(row, pages - freed, tx);
  }
  return freed;
}

i64 VirtualTable::reclaim_victims(i64 pages, Transaction& tx) {
  i64 freed = 0;
  const auto wants = [&] { return freed < pages; };
  evict_in_order(tx, wants, [&](Item x) {
    const i64 now = x.window < 0 ? evict_node(x.node, pages - freed, tx) : evict_window_page(x, tx);
    freed += std::max(now, i64{0});
    return now >= 0 ? Named::evicted : Named::aside;
  });
  evict_in_order(tx, wants, [&](Item x) {  // pages that several have blocks on
    const i64 before = owned_pages;
    x.window < 0 ? evict_node(x.node, pages - freed, tx) : (evict_window(x.node, x.window, tx), 0);
    freed += before - owned_pages;
    return Named::evicted;
  });
  return freed;
}

i64 VirtualTable::reclaim_ahead(i64 pages, Transaction& tx) {
  i64 freed = 0;
  for (i64 row = 1; row < rows_.size() && freed < pages; ++row) {
    if (rows_[row].index >= 0 && row != copy_) freed += reclaim_row(row, pages - freed, tx, false);
  }
  return freed;
}

// What is needed, and therefore never a victim, may lie a second time where a window has passed it.
i64 VirtualTable::reclaim_out_of_window(i64 pages, Transaction& tx) {
  const i64 before = owned_pages;
  for (i64 row = 1; row < rows_.size() && before - owned_pages < pages; ++row) {
    if (rows_[row].source || row == copy_) continue;
    for (i64 k = 0; k < blocks_of(row); ++k) {
      for (i32 w = 0; w < index_.windows(); ++w) {
        if (is_out_of_window_copy(row, k, w)) evict_copy(row, k, w, tx);
      }
    }
    if (rows_[row].index < 0) drop_out_of_window(row, tx);
  }
  return before - owned_pages;
}

i64 VirtualTable::reclaim_list(const IdList& list, i64 pages, Transaction& tx) {
  i64 freed = 0;
  for (i64 row = list.first(), next; row != 0 && freed < pages; row = next) {
    next = list.next(row);
    if (row == copy_) continue;
    if (index_.windows() > 0 && rows_[row].index < 0) freed += reclaim_window_copies(row, pages - freed, tx);
    freed += reclaim_row(row, pages - freed, tx);
  }
  return freed;
}

i64 VirtualTable::reclaim_window_copies(i64 row, i64 pages, Transaction& tx) {
  const i64 before = owned_pages;
  for (i64 g = 0; g < groups_ && !rows_[row].source; ++g) {
    const i32 window = index_.window_of(g);
    for (i64 a = first_[g]; window >= 0 && a < first_[g + 1]; ++a) {
      const i64 block_bytes = index_.block_tokens() * token_bytes(g, a);
      const Extent& e = extent(row, a);
      for (i64 slot = e.lo; slot < e.hi && before - owned_pages < pages; ++slot) {
        if (e.pages[slot] < 0 || pool_.is_shared(e.pages[slot])) continue;
        const i64 first = quotient(slot * page_bytes(), block_bytes);
        const i64 last = std::min(blocks_of(row), ceil_div((slot + 1) * page_bytes(), block_bytes));
        bool copies = true;
        for (i64 k = first; copies && k < last; ++k) {
          copies = !shown(row, k, window).here || is_out_of_window_copy(row, k, window);
        }
        for (i64 k = first; copies && k < last; ++k) {
          if (shown(row, k, window).here) evict_copy(row, k, window, tx);
        }
      }
    }
  }
  if (before != owned_pages) drop_out_of_window(row, tx);
  return before - owned_pages;
}

void VirtualTable::evict_copy(i64 row, i64 ordinal, i32 window, Transaction& tx) {
  keep_last_copy(row, ordinal);
  tx.push(concealing(row, ordinal, window));
  unmap_block({row}, window, ordinal, tx);
}

i64 VirtualTable::reclaim_row(i64 row, i64 pages, Transaction& tx, bool ahead) {
  i64 freed = 0, a = 0;
  bool all = true;  // that it could give
  for (i64 g = 0; a < arenas_ && freed < pages; ++a) {
    while (a >= first_[g + 1]) ++g;
    const Extent& e = extent(row, a);
    const Spare s = spare(row, g, a, ahead);
    const i64 before = owned_pages;
    if (!rows_[row].source) {
      unmap(row, a, s.from, s.to, rows_[row].fence, tx);
    } else {
      all = all && s.from == s.to;
    }
    if (s.end < e.hi) {
      const i64 keep = rows_[row].maybe_shared ? 0 : std::max(i64{0}, (e.hi - s.end) - (pages - freed));
      unmap(row, a, s.end + keep, e.hi, rows_[row].fence, tx);
      all = all && keep == 0;
    }
    freed += before - owned_pages;
  }
  if (all && a == arenas_) reclaims_nothing(row);
  return freed;
}

i64 VirtualTable::evict_node(i32 node, i64 pages, Transaction& tx) {
  std::vector<i64> rows;
  for (i64 row = holder_[node]; row >= 0; row = rows_[row].holds[index_.ordinal(node)].next) rows.push_back(row);
  evict_subtree(node, tx);
  if (rows.size() == 1) evict_run(rows[0], pages, tx);
  i64 freed = 0;
  for (i64 row : rows) {
    if (is_copy(row) && can_lose(row)) cut(row, 0, tx);  // what is left is another row's too
    if (freed < pages) freed += reclaim_row(row, pages - freed, tx);
  }
  return freed;
}

// What the order names next, as long as it lies in the same row alone: then its pages go in one run, by one call of the
// driver. `pages`: how many were to come free with the block before. Not where a state goes with a block, too.
void VirtualTable::evict_run(i64 row, i64 pages, Transaction& tx) {
  if (rows_[row].index >= 0 || has_state_) return;
  evict_in_order(
      tx, [&] { return spare_pages(row) < pages; },
      [&](Item x) {
        if (x.window >= 0 || blocks_of(row) == 0) return Named::last;
        const Hold& last = rows_[row].holds.back();
        if (last.node != x.node || last.next >= 0 || last.previous >= 0) return Named::last;
        evict_subtree(x.node, tx);
        return Named::evicted;
      });
}

// Mapped behind the content of a parked row.
i64 VirtualTable::spare_pages(i64 row) const {
  i64 pages = 0;
  for (i64 g = 0, a = 0; g < groups_; ++g) {
    for (; a < first_[g + 1]; ++a) pages += extent(row, a).hi - spare(row, g, a, true).end;
  }
  return pages;
}

i64 VirtualTable::evict_window_page(Item x, Transaction& tx) {
  const i64 g = index_.group_of(x.window), size = index_.block_tokens(), ordinal = index_.ordinal(x.node);
  const i64 row = first_shower(x.node, x.window);
  i64 best_a = -1, best_slot = -1;  // of its pages, the one with the least besides
  std::size_t least = SIZE_MAX;
  for (i64 a = first_[g]; a < first_[g + 1]; ++a) {
    const i64 end = ceil_div((ordinal + 1) * size * token_bytes(g, a), page_bytes());
    for (i64 slot = quotient(ordinal * size * token_bytes(g, a), page_bytes()); slot < end && least > 1; ++slot) {
      if (find_content(row, g, a, slot) && on_page_.size() < least) {
        least = on_page_.size();
        best_a = a, best_slot = slot;
      }
    }
  }
  if (best_a < 0) return -1;
  const i64 before = owned_pages;
  find_content(row, g, best_a, best_slot);
  for (i32 node : std::vector<i32>(on_page_)) evict_item({node, x.window}, tx);
  return before - owned_pages;
}

bool VirtualTable::find_content(i64 row, i64 group, i64 a, i64 slot) {
  const i32 window = index_.window_of(group);
  const i64 block_bytes = index_.block_tokens() * token_bytes(group, a);
  const i64 index = rows_[row].index;
  on_page_.clear();
  if (rows_[row].source || row == copy_) return false;
  if (index >= 0 && slot >= low_slot(group, a, sequences_.front(index, group))) return false;
  const i64 last = std::min(blocks_of(row), ceil_div((slot + 1) * page_bytes(), block_bytes));
  for (i64 k = quotient(slot * page_bytes(), block_bytes); k < last; ++k) {
    const i32 node = rows_[row].holds[k].node;
    if (!shown(row, k, window).here) continue;
    if (index_.needs(node, window) > 0) return false;
    on_page_.push_back(node);
  }
  return true;
}

bool VirtualTable::is_copy(i64 row) const {
  const Row& r = rows_[row];
  return !r.source && !r.holds.empty() && r.state != r.holds.back().node && is_covered(row, 0);
}

bool VirtualTable::is_spare(i64 row) const {
  return blocks_of(row) > 0 && can_lose(row) && !index_.pinned(rows_[row].holds.back().node);
}

bool VirtualTable::can_lose(i64 row) const {
  if (rows_[row].source || row == copy_ || !keeps_pins(row, 0)) return false;
  for (i64 k = 0; k < blocks_of(row); ++k) {
    const i32 node = rows_[row].holds[k].node;
    if (index_.copies(node) <= 1 && index_.used(node)) return false;
    for (i32 w = 0; w < index_.windows(); ++w) {
      if (shown(row, k, w).here && index_.window_copies(node, w) <= 1 && index_.needs(node, w) > 0) return false;
    }
  }
  return true;
}

// True if another row shows what each pin keeps that ends in this one's content from block `from` on.
bool VirtualTable::keeps_pins(i64 row, i64 from) const {
  if (pin_ends_.empty()) return true;
  for (i64 k = from; k < blocks_of(row); ++k) {
    if (pin_ends_.count(rows_[row].holds[k].node) > 0 && !shows_elsewhere(row, k)) return false;
  }
  return true;
}

bool VirtualTable::shows_elsewhere(i64 row, i64 ordinal) const {
  const i32 node = rows_[row].holds[ordinal].node;
  if (has_state_) return rows_[row].state != node;  // no other row has it
  for (i64 other = first_holder(node); other >= 0; other = rows_[other].holds[ordinal].next) {
    bool all = other != row;
    for (i32 w = 0; all && w < index_.windows(); ++w) {
      const GroupGeometry& group = geometry_.groups[index_.group_of(w)];
      const i64 tokens = (ordinal + 1) * index_.block_tokens();
      const i64 first = window_first(group, geometry_.tail_guard_tokens, tokens) / index_.block_tokens();
      all = shows_blocks(other, w, first, ordinal + 1);
    }
    if (all) return true;
  }
  return false;
}

i64 VirtualTable::find_double(bool spare, i64 most) {
  for (i64 looked = 0, row; looked < most && (row = doubles_.first()) != 0; ++looked) {
    if (is_copy(row) || (spare && is_spare(row))) return row;
    doubles_.remove(row);
    doubles_.add_last(row);
  }
  return 0;
}

}  // namespace kvmem
