// Memory and rows that are short: which parked row a sequence gets, and what is given up first.

#include <algorithm>

#include "virtual_table.h"

namespace kvmem {

// What nobody needs in parked rows first, the one that was freed longest ago leading: its fence has most likely
// passed. Then what live rows hold beyond their need, then second copies of cached blocks, then cached blocks.
i64 VirtualTable::spill(i64 pages, Transaction& tx) {
  std::vector<i64> order;
  for (const auto& entry : unbound_) {
    if (entry.slots > 0 && entry.row != copy_) order.push_back(entry.row);
  }
  std::sort(order.begin(), order.end(), [this](i64 x, i64 y) {
    return rows_[x].fence != rows_[y].fence ? rows_[x].fence < rows_[y].fence : x < y;
  });
  const std::size_t parked = order.size();
  for (i64 row : row_of_) {
    if (row > 0) order.push_back(row);
  }
  i64 freed = 0;
  for (std::size_t i = 0; i < order.size() && freed < pages; ++i) freed += spill_row(order[i], pages - freed, tx);
  for (std::size_t i = 0; i < parked && freed < pages; ++i) {
    if (!is_copy(order[i])) continue;
    cut(order[i], 0, tx);
    freed += spill_row(order[i], pages - freed, tx);
  }
  for (i32 node; freed < pages && (node = index_.victim()) != kNoNode;) freed += give_up(node, pages - freed, tx);
  for (std::size_t i = 0; i < parked && freed < pages; ++i) {
    if (!is_spare(order[i])) continue;
    cut(order[i], 0, tx);
    freed += spill_row(order[i], pages - freed, tx);
  }
  return freed;
}

i64 VirtualTable::spill_row(i64 row, i64 pages, Transaction& tx) {
  i64 freed = 0;
  const bool parked = rows_[row].index < 0;
  const bool fronts = row != source_ && !holds_pins(row);
  for (i64 a = 0, g = 0; a < arenas_ && freed < pages; ++a) {
    while (a >= first_[g + 1]) ++g;
    const Extent& e = extent(row, a);
    i64 lo, hi;
    if (parked) {
      kept(row, g, a, &lo, &hi);
    } else {
      needed(row, g, a, &lo, &hi);
    }
    const i64 before = owned_pages;
    if (fronts && e.lo < std::min(lo, e.hi)) unmap(row, a, e.lo, std::min(lo, e.hi), rows_[row].fence, tx);
    const i64 top = std::max(hi, e.lo);
    if (top < e.hi) {
      const i64 keep = rows_[row].maybe_shared ? 0 : std::max(i64{0}, (e.hi - top) - (pages - freed));
      unmap(row, a, top + keep, e.hi, rows_[row].fence, tx);
    }
    freed += before - owned_pages;
  }
  return freed;
}

bool VirtualTable::holds_pins(i64 row) const {
  if (index_.pinned_count() == 0) return false;
  const std::vector<Hold>& holds = rows_[row].holds;
  return std::any_of(holds.begin(), holds.end(), [this](const Hold& h) { return index_.pinned(h.node); });
}

i64 VirtualTable::give_up(i32 node, i64 pages, Transaction& tx) {
  std::vector<i64> rows;
  for (i64 row = holder_[node]; row >= 0; row = rows_[row].holds[index_.ordinal(node)].next) rows.push_back(row);
  forget(node, tx);
  i64 freed = 0;
  for (i64 row : rows) {
    // What is left may be another row's too; or end where nobody could begin, since a window has passed there.
    if (can_lose(row) && (is_copy(row) || !has_mapped(row, content_tokens(row)))) cut(row, 0, tx);
    if (freed < pages) freed += spill_row(row, pages - freed, tx);
  }
  return freed;
}

bool VirtualTable::is_copy(i64 row) const {
  const Row& r = rows_[row];
  return row != source_ && !r.holds.empty() && r.state != r.holds.back().node && is_covered(row, 0);
}

bool VirtualTable::is_spare(i64 row) const {
  const std::vector<Hold>& holds = rows_[row].holds;
  if (holds.empty() || !can_lose(row)) return false;
  return has_windows_ ? !holds_pins(row) : !index_.pinned(holds.back().node);
}

bool VirtualTable::can_lose(i64 row) const {
  const std::vector<Hold>& holds = rows_[row].holds;
  return row != source_ && row != copy_ && std::all_of(holds.begin(), holds.end(), [this](const Hold& h) {
           return index_.places(h.node) > 1 || !index_.used(h.node);
         });
}

i64 VirtualTable::best_empty(i64 slots) const {
  const Unbound* best = nullptr;
  for (const Unbound& u : unbound_) {
    if (!rows_[u.row].holds.empty() || u.row == copy_) continue;
    const bool fits = u.slots >= slots, best_fits = best && best->slots >= slots;
    if (!best || (fits && !best_fits)) {
      best = &u;
    } else if (fits == best_fits) {
      const i64 better = fits ? best->slots - u.slots : u.slots - best->slots;
      if (better > 0 || (better == 0 && u.row < best->row)) best = &u;
    }
  }
  return best ? best->row : -1;
}

i64 VirtualTable::pick_empty(Transaction& tx) {
  const Unbound* best = nullptr;
  for (const Unbound& u : unbound_) {
    if (!rows_[u.row].holds.empty() || u.row == copy_) continue;
    if (!best || u.slots < best->slots || (u.slots == best->slots && u.row < best->row)) best = &u;
  }
  return best ? best->row : empty_a_row(tx);
}

i64 VirtualTable::empty_a_row(Transaction& tx) {
  for (const Unbound& u : unbound_) {
    if (!is_copy(u.row)) continue;
    const i64 row = u.row;
    cut(row, 0, tx);
    return row;
  }
  for (i32 node; (node = index_.victim()) != kNoNode;) {
    const i64 row = holder_[node];
    if (can_lose(row)) {
      cut(row, 0, tx);
      return row;
    }
    forget(node, tx);
  }
  for (const Unbound& u : unbound_) {
    if (!is_spare(u.row)) continue;
    const i64 row = u.row;
    cut(row, 0, tx);
    return row;
  }
  throw OutOfMemory("all rows are in use or hold pinned tokens");
}

i64 VirtualTable::pick_row(i64 tokens, Transaction& tx) {
  i64 need = 0;
  for (i64 g = 0; g < groups_; ++g) {
    if (geometry_.groups[g].growth != Growth::token) continue;
    for (i64 a = first_[g]; a < first_[g + 1]; ++a) need += high_slot(g, a, tokens);
  }
  const i64 empty = best_empty(need);
  if (empty < 0) return empty_a_row(tx);
  if (need - rows_[empty].slots <= std::min(pool_.room_pages(), limit_pages - owned_pages)) return empty;
  const i32 node = index_.victim();
  const i64 row = node == kNoNode ? -1 : first_holder(node);
  if (row < 0 || !can_lose(row) || rows_[row].slots > 2 * need) return empty;
  cut(row, 0, tx);
  return row;
}

void VirtualTable::bind(i64 index, i64 tokens, Transaction& tx) {
  const i64 row = pick_row(tokens, tx);
  tx.push({OpKind::bind, 0, sequences_.handle_of(index), row});
  if (rows_[row].maybe_shared) drop_shared(row, tx);
  if (geometry_.zero == Zero::always) zero_row(row, 0, tx);
}

void VirtualTable::zero_row(i64 row, i64 tokens, Transaction& tx) {
  for (i64 a = 0; a < arenas_; ++a) {
    const Extent& e = extent(row, a);
    const i64 base = slot_of(row, group_of(a), a) * page_bytes();
    const i64 from = std::max(e.lo * page_bytes(), tokens * token_bytes(group_of(a), a));
    if (from < e.hi * page_bytes()) tx.push({OpKind::zero, arena(a), base + from, e.hi * page_bytes() - from});
  }
}

void VirtualTable::bind_empty(i64 index, Transaction& tx) {
  const i64 row = pick_empty(tx);
  tx.push({OpKind::bind, 0, sequences_.handle_of(index), row});
  drop_pages(row, tx);
}

void VirtualTable::drop_pages(i64 row, Transaction& tx) {
  for (i64 a = 0; a < arenas_; ++a) {
    const Extent& e = extent(row, a);
    if (e.count > 0) unmap(row, a, e.lo, e.hi, rows_[row].fence, tx);
  }
}

void VirtualTable::drop_shared(i64 row, Transaction& tx) {
  bool shared = false;
  for (i64 a = 0; a < arenas_; ++a) {
    const Extent& e = extent(row, a);
    i64 end = e.hi;
    while (end > e.lo && pool_.refs(e.pages[end - 1]) <= 1) --end;
    if (end > e.lo) {
      unmap(row, a, e.lo, end, rows_[row].fence, tx);
      shared = true;
    }
  }
  rows_[row].maybe_shared = shared;
}

}  // namespace kvmem
