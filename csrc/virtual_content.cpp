// Rows that begin alike: the same pages under several of them, a copy of the one that is cut.

#include <algorithm>

#include "virtual_table.h"

namespace kvmem {

void VirtualTable::share(i64 parent, i64 child, i64 group, i64 first, i64 tokens, Transaction& tx) {
  if (row_of_[child] < 0) bind_empty(child, tx);
  share_row(row_of_[parent], row_of_[child], group, first, tokens, tx);
}

// The last block first: a row holds all blocks before the ones it holds. Of the rows that hold it, one that is parked
// and ends there can be taken as it is.
Found VirtualTable::find(const std::vector<i32>& chain, i64 tokens) const {
  for (i64 k = static_cast<i64>(chain.size()); k > 0; --k) {
    Found found;
    found.tokens = std::min(tokens, k * index_.block_tokens());
    i64 looked = 0;
    for (i64 row = first_holder(chain[k - 1]); row >= 0 && looked < PrefixIndex::kCandidates; ++looked) {
      const bool best = rows_[row].index < 0 && static_cast<i64>(rows_[row].holds.size()) == k;
      if ((found.row < 0 || best) && shows(row, chain[k - 1], found.tokens)) found.row = row;
      if (found.row == row && best) break;
      row = rows_[row].holds[k - 1].next;
    }
    if (found.row >= 0) return found;
  }
  return Found();
}

void VirtualTable::adopt(i64 index, const std::vector<i32>& chain, const Found& found, Transaction& tx) {
  const i64 whole = found.tokens / index_.block_tokens();
  Guard guard(source_, found.row);
  const bool taken = can_take_over(found.row, whole);
  if (taken) {
    take_over(index, found.row, whole, tx);
  } else {
    bind_empty(index, tx);
    for (i64 g = 0; g < groups_; ++g) {
      if (geometry_.groups[g].growth != Growth::token) continue;
      share_row(found.row, row_of_[index], g, sequences_.front(index, g), found.tokens, tx);
    }
    hold_all(row_of_[index], chain, whole, false, tx);
  }
  for (i64 g = 0; g < groups_; ++g) {
    if (geometry_.groups[g].growth == Growth::token) grow(index, g, found.tokens, found.tokens, tx);
    if (geometry_.groups[g].growth != Growth::fixed) continue;
    grow(index, g, 0, 1, tx);
    copy_state(found.row, row_of_[index], g, tx);
  }
  // Only now: what lies behind the content may have been another row's too.
  if (taken && geometry_.zero == Zero::always) zero_row(found.row, found.tokens, tx);
}

void VirtualTable::evict(i32 node, Transaction& tx) {
  while (holder_[node] >= 0) cut(holder_[node], index_.ordinal(node), tx);
}

// A row of its own shows the same pages and has a copy of the state. It belongs to no sequence.
void VirtualTable::snapshot(i64 index, const std::vector<i32>& chain, Transaction& tx) {
  for (i64 row = holder_[chain.back()]; row >= 0; row = rows_[row].holds[chain.size() - 1].next) {
    if (rows_[row].state == chain.back()) return;
  }
  const i64 from = row_of_[index];
  Guard guard(source_, from);
  const i64 to = pick_empty(tx);
  Guard second(copy_, to);
  drop_pages(to, tx);
  const i64 tokens = static_cast<i64>(chain.size()) * index_.block_tokens();
  for (i64 g = 0; g < groups_; ++g) {
    if (geometry_.groups[g].growth == Growth::token) {
      share_row(from, to, g, sequences_.front(index, g), tokens, tx);
    } else {
      for (i64 a = first_[g]; a < first_[g + 1]; ++a) map(to, a, 0, high_slot(g, a, 1), tx);
      copy_state(from, to, g, tx);
    }
  }
  set_fence(to, tx.new_fence());
  hold_all(to, chain, static_cast<i64>(chain.size()), true, tx);
}

bool VirtualTable::shows(i64 row, i32 node, i64 tokens) const {
  for (const GroupGeometry& group : geometry_.groups) {
    const bool state = rows_[row].state == node && tokens % index_.block_tokens() == 0;
    if (group.growth == Growth::fixed && !state) return false;
  }
  return has_mapped(row, tokens);
}

bool VirtualTable::has_mapped(i64 row, i64 tokens) const {
  for (i64 a = 0, g = 0; a < arenas_; ++a) {
    while (a >= first_[g + 1]) ++g;
    const GroupGeometry& group = geometry_.groups[g];
    if (group.growth != Growth::token) continue;
    const i64 first = window_first(group, geometry_.tail_guard_tokens, tokens);
    const Extent& e = extent(row, a);
    if (e.lo > low_slot(g, a, first) || e.hi < ceil_div(tokens * token_bytes(g, a), page_bytes())) return false;
  }
  return true;
}

bool VirtualTable::is_covered(i64 row, std::size_t from) const {
  const std::vector<Hold>& holds = rows_[row].holds;
  if (holds.size() <= from) return true;
  i64 looked = 0;
  for (i64 other = first_holder(holds.back().node); other >= 0 && looked < PrefixIndex::kCandidates; ++looked) {
    bool as_much = other != row;  // where a window has passed in the other row, that one shows less
    for (i64 a = 0; as_much && a < arenas_; ++a) as_much = extent(other, a).lo <= extent(row, a).lo;
    if (as_much) return true;
    other = rows_[other].holds[holds.size() - 1].next;
  }
  return false;
}

void VirtualTable::cut(i64 row, i64 from, Transaction& tx) {
  while (static_cast<i64>(rows_[row].holds.size()) > from) tx.push(forgetting(row));
}

void VirtualTable::hold_all(i64 row, const std::vector<i32>& chain, i64 count, bool state, Transaction& tx) {
  for (i64 k = 0; k < count; ++k) hold_noted(row, chain[k], state && k + 1 == count, tx);
}

bool VirtualTable::can_take_over(i64 row, std::size_t blocks) const {
  if (rows_[row].index >= 0) return false;
  for (const GroupGeometry& group : geometry_.groups) {
    if (group.growth == Growth::fixed) return false;
  }
  if (is_covered(row, blocks)) return true;
  const std::vector<Hold>& holds = rows_[row].holds;
  return best_empty(0) < 0 && std::none_of(
                                  holds.begin() + static_cast<std::ptrdiff_t>(blocks), holds.end(),
                                  [this](const Hold& h) { return index_.used(h.node); });
}

void VirtualTable::take_over(i64 index, i64 row, i64 blocks, Transaction& tx) {
  cut(row, blocks, tx);
  tx.push({OpKind::bind, 0, sequences_.handle_of(index), row});
  for (i64 g = 0; g < groups_; ++g) look_at_tail(index, g);  // the next write may meet a shared page
  // Behind that page there may be more: a sequence that a window keeps short shows the later pages only.
  for (i64 a = 0; a < arenas_; ++a) {
    const Extent& e = extent(row, a);
    i64 slot = std::max(e.lo, blocks * index_.block_tokens() * token_bytes(group_of(a), a) / page_bytes());
    while (slot < e.hi && pool_.refs(e.pages[slot]) <= 1) ++slot;
    const i64 tail = sequences_.tokens(index, group_of(a)) * token_bytes(group_of(a), a) / page_bytes();
    if (slot < e.hi) unmap(row, a, std::max(slot, tail + 1), e.hi, rows_[row].fence, tx);
  }
}

void VirtualTable::share_row(i64 from, i64 to, i64 group, i64 first, i64 tokens, Transaction& tx) {
  set_maybe_shared(from, true);
  set_maybe_shared(to, true);
  for (i64 a = first_[group]; a < first_[group + 1]; ++a) {
    const i64 bytes = tokens * token_bytes(group, a);
    const i64 whole = bytes / page_bytes();
    const Extent& source = extent(from, a);
    for (i64 slot = low_slot(group, a, first); slot < whole;) {
      i64 n = 1;
      while (slot + n < whole && source.pages[slot + n] == source.pages[slot] + n) ++n;
      tx.push({OpKind::map, arena(a), slot_of(to, group, a) + slot, source.pages[slot], n});
      slot += n;
    }
    map(to, a, whole, high_slot(group, a, tokens), tx);
    if (const i64 tail = bytes % page_bytes()) {
      const i64 offset = whole * page_bytes();
      tx.push({OpKind::copy, arena(a), slot_of(to, group, a) * page_bytes() + offset,
               slot_of(from, group, a) * page_bytes() + offset, tail});
    }
  }
}

void VirtualTable::copy_state(i64 from, i64 to, i64 group, Transaction& tx) {
  for (i64 a = first_[group]; a < first_[group + 1]; ++a) {
    tx.push({OpKind::copy, arena(a), slot_of(to, group, a) * page_bytes(), slot_of(from, group, a) * page_bytes(),
             token_bytes(group, a)});
  }
}

}  // namespace kvmem
