// Memory and rows that are short: which parked row a sequence gets, and what is given up first.

#include <algorithm>

#include "virtual_table.h"

namespace kvmem {

// What nobody needs in parked rows first, the one that was freed longest ago leading: its fence has most likely
// passed. Then what live rows hold beyond their need, then second copies of cached blocks, then cached blocks.
// Cost: a few steps for each row that gives something or has changed since it was last looked at. Only a call that is
// about to be refused looks at all that are parked, and each looks at the rows whose windows a pin keeps.
i64 VirtualTable::spill(i64 pages, Transaction& tx) {
  i64 freed = spill_list(parked_, pages, tx);
  freed += spill_list(bound_, pages - freed, tx);
  const auto spill_doubles = [&](bool spare, i64 most) {
    for (i64 row; freed < pages && (row = find_double(spare, most)) != 0;) {
      cut(row, 0, tx);
      freed += spill_row(row, pages - freed, tx);
    }
  };
  spill_doubles(false, PrefixIndex::kCandidates);
  for (i32 node; freed < pages && (node = index_.victim()) != kNoNode;) freed += give_up(node, pages - freed, tx);
  spill_doubles(true, doubles_.size());
  return freed;
}

i64 VirtualTable::spill_list(const IdList& list, i64 pages, Transaction& tx) {
  i64 freed = 0;
  for (i64 row = list.first(), next; row != 0 && freed < pages; row = next) {
    next = list.next(row);
    if (row != copy_) freed += spill_row(row, pages - freed, tx);
  }
  return freed;
}

i64 VirtualTable::spill_row(i64 row, i64 pages, Transaction& tx) {
  i64 freed = 0, a = 0;
  bool all = true;  // that it could give
  for (i64 g = 0; a < arenas_ && freed < pages; ++a) {
    while (a >= first_[g + 1]) ++g;
    const Extent& e = extent(row, a);
    i64 lo, hi;
    wanted(row, g, a, &lo, &hi);
    const i64 before = owned_pages;
    if (e.lo < std::min(lo, e.hi)) {
      if (row == source_ || holds_pins(row)) {
        all = false;
      } else {
        unmap(row, a, e.lo, std::min(lo, e.hi), rows_[row].fence, tx);
      }
    }
    const i64 top = std::max(hi, e.lo);
    if (top < e.hi) {
      const i64 keep = rows_[row].maybe_shared ? 0 : std::max(i64{0}, (e.hi - top) - (pages - freed));
      unmap(row, a, top + keep, e.hi, rows_[row].fence, tx);
      all = all && keep == 0;
    }
    freed += before - owned_pages;
  }
  if (all && a == arenas_) gives_nothing(row);
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
    if ((is_copy(row) || !has_mapped(row, content_tokens(row))) && can_lose(row)) cut(row, 0, tx);
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

i64 VirtualTable::find_double(bool spare, i64 most) {
  for (i64 looked = 0, row; looked < most && (row = doubles_.first()) != 0; ++looked) {
    if (is_copy(row) || (spare && is_spare(row))) return row;
    doubles_.remove(row);
    doubles_.add_last(row);
  }
  return 0;
}

i64 VirtualTable::best_empty(i64 slots) const {
  if (empty_.empty()) return -1;
  const auto best = empty_.lower_bound({slots, 0});
  return best != empty_.end() ? best->second : empty_.lower_bound({empty_.rbegin()->first, 0})->second;
}

i64 VirtualTable::pick_empty(Transaction& tx) { return empty_.empty() ? empty_a_row(tx) : empty_.begin()->second; }

i64 VirtualTable::empty_a_row(Transaction& tx) {
  if (const i64 row = find_double(false, PrefixIndex::kCandidates)) {
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
  if (const i64 row = find_double(true, doubles_.size())) {
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
  for (i64 a = 0; a < arenas_; ++a) {
    const Extent& e = extent(row, a);
    i64 end = e.hi;
    while (end > e.lo && pool_.refs(e.pages[end - 1]) <= 1) --end;
    if (end > e.lo) unmap(row, a, e.lo, end, rows_[row].fence, tx);
  }
  set_maybe_shared(row, false);
}

}  // namespace kvmem
