// Rows that begin alike: the same pages under several of them, a copy of the one that is cut.

#include <algorithm>

#include "table/virtual/virtual_table.h"

namespace kvmem {

void VirtualTable::share(i64 parent, i64 child, i64 group, i64 first, i64 tokens, Transaction& tx) {
  if (row_of_[child] < 0) bind_empty(child, tx);
  share_row(row_of_[parent], row_of_[child], group, first, tokens, tx);
}

// A row holds all blocks before the ones it holds. What windows need may lie in several: each shows it from where its
// sequence began to compute, or to need, and a row that showed more may have gone. One that is parked, ends there and
// shows everything can be taken as it is; of the others one that shows everything spares copies.
i64 VirtualTable::find_row(const std::vector<i32>& chain, i64 tokens) const {
  const i64 last = static_cast<i64>(chain.size()) - 1;
  if (has_state_) return state_row(chain[last]);
  const i64 any = first_holder(chain[last]);
  if (any < 0) return !index_.whole() && needs_nothing(tokens) ? kNoRow : -1;
  i64 row = -1, looked = 0;
  for (i64 here = any; here >= 0 && looked < PrefixIndex::kCandidates; ++looked, here = rows_[here].holds[last].next) {
    const bool best = rows_[here].index < 0 && blocks_of(here) == last + 1;
    if ((row >= 0 && !best) || !shows_windows(here, chain, tokens)) continue;
    row = here;
    if (best) break;
  }
  return row >= 0 ? row : any;
}

bool VirtualTable::needs_nothing(i64 tokens) const {
  return std::all_of(geometry_.groups.begin(), geometry_.groups.end(), [&](const GroupGeometry& group) {
    return window_first(group, geometry_.tail_guard_tokens, tokens) == tokens;
  });
}

bool VirtualTable::shows_windows(i64 row, const std::vector<i32>& chain, i64 tokens) const {
  for (i32 w = 0; w < index_.windows(); ++w) {
    if (!shows_blocks(row, w, first_needed(w, tokens), static_cast<i64>(chain.size()))) return false;
  }
  return true;
}

bool VirtualTable::shows_blocks(i64 row, i32 window, i64 from, i64 to) const {
  for (i64 k = to; k-- > from;) {
    if (!shown(row, k, window).here) return false;
  }
  return true;
}

void VirtualTable::adopt(i64 index, const std::vector<i32>& chain, const Found& found, Transaction& tx) {
  const i64 whole = found.tokens / index_.block_tokens();
  Sources sources(*this);
  const bool single = found.row == kNoRow || find_sources(found, chain, &sources);
  const bool taken = found.row != kNoRow && single && can_reuse_row(found.row, whole);
  if (taken) {
    reuse_row(index, found.row, whole, tx);
  } else {
    bind_behind(index, found, tx);
    for (i64 g = 0; g < groups_; ++g) {
      if (geometry_.groups[g].growth != Growth::token || found.row == kNoRow) continue;
      const i64 first = sequences_.front(index, g);
      if (single || index_.window_of(g) < 0) {
        share_row(found.row, row_of_[index], g, first, found.tokens, tx);
      } else {
        share_window(row_of_[index], g, first, found.tokens, tx);
      }
    }
    if (found.row != kNoRow) set_fence(found.row, tx.new_fence());  // it may go, and is still being copied from
    attach_all(row_of_[index], chain, whole, index, false, tx);
  }
  for (i64 g = 0; g < groups_; ++g) {
    if (geometry_.groups[g].growth == Growth::token) grow(index, g, found.tokens, found.tokens, tx);
    if (geometry_.groups[g].growth != Growth::fixed) continue;
    grow(index, g, 0, 1, tx);
    copy_state(found.row, row_of_[index], g, tx);
  }
  // Only now: what lies behind the content may have been another row's too.
  if (geometry_.zero == Zero::always) zero_row(row_of_[index], found.tokens, tx);
}

// From the last block back, each from the row of the one behind it if that shows it too, so that there are few.
bool VirtualTable::find_sources(const Found& found, const std::vector<i32>& chain, Sources* sources) {
  sources->add(found.row);
  if (shows_windows(found.row, chain, found.tokens)) return true;
  const i64 end = static_cast<i64>(chain.size());
  source_of_.assign(index_.windows() * end, -1);
  for (i32 w = 0; w < index_.windows(); ++w) {
    i64 row = found.row;
    for (i64 k = end; k-- > first_needed(w, found.tokens);) {
      if (!shown(row, k, w).here) row = first_shower(chain[k], w);
      source_of_[w * end + k] = row;
      sources->add(row);
    }
  }
  return false;
}

// As share_row(), of rows that find_sources() found. A page is shared where one row shows all of it that is needed.
void VirtualTable::share_window(i64 to, i64 group, i64 first, i64 tokens, Transaction& tx) {
  const i64 size = index_.block_tokens(), end = ceil_div(tokens, size);
  const i64* const rows = source_of_.data() + index_.window_of(group) * end;
  set_maybe_shared(to, true);
  for (i64 a = first_[group]; a < first_[group + 1]; ++a) {
    const i64 block_bytes = size * token_bytes(group, a), bytes = tokens * token_bytes(group, a);
    for (i64 slot = low_slot(group, a, first); slot < high_slot(group, a, tokens); ++slot) {
      const i64 from = std::max(slot * page_bytes(), first * token_bytes(group, a));
      const i64 until = std::min((slot + 1) * page_bytes(), bytes);
      const i64* const begin = rows + std::min(from / block_bytes, end);
      const i64* const behind = rows + ceil_div(until, block_bytes);
      const bool whole = (slot + 1) * page_bytes() <= bytes;
      if (whole && std::all_of(begin, behind, [begin](i64 row) { return row == *begin; })) {
        set_maybe_shared(*begin, true);
        tx.push({OpKind::map, arena(a), slot_of(to, group, a) + slot, extent(*begin, a).pages[slot], 1});
        continue;
      }
      map(to, a, slot, slot + 1, tx);
      for (i64 at = from, next; at < until; at = next) {
        next = std::min((at / block_bytes + 1) * block_bytes, until);
        tx.push({OpKind::copy, arena(a), slot_of(to, group, a) * page_bytes() + at,
                 slot_of(rows[at / block_bytes], group, a) * page_bytes() + at, next - at});
      }
    }
  }
}

void VirtualTable::evict(i32 node, Transaction& tx) {
  for (i64 row; (row = first_holder(node)) >= 0;) cut(row, index_.ordinal(node), tx);
}

std::vector<i64> VirtualTable::showers(i32 node, i32 window) const {
  std::vector<i64> rows;
  for (i64 row = first_shower(node, window); row >= 0; row = shown(row, index_.ordinal(node), window).next) {
    rows.push_back(row);
  }
  return rows;
}

void VirtualTable::evict_window(i32 node, i32 window, Transaction& tx) {
  const std::vector<i64> rows = showers(node, window);
  const i64 ordinal = index_.ordinal(node);
  if (!rows.empty()) demote(node, index_.group_of(window), tx);
  for (i64 row : rows) tx.push(concealing(row, ordinal, window));
  unmap_block(rows, window, ordinal, tx);
  for (i64 row : rows) {
    if (rows_[row].index < 0) drop_out_of_window(row, tx);
  }
}

// Where nothing but windows holds tokens, a parked row ends with a block that it shows: what it holds behind that could
// not be found.
void VirtualTable::drop_out_of_window(i64 row, Transaction& tx) {
  if (index_.whole()) return;
  const auto is_shown = [&](i64 ordinal) {
    for (i32 w = 0; w < index_.windows(); ++w) {
      if (shown(row, ordinal, w).here) return true;
    }
    return false;
  };
  while (blocks_of(row) > 0 && !is_shown(blocks_of(row) - 1)) detach_last(row, tx);
}

void VirtualTable::unmap_block(const std::vector<i64>& rows, i32 window, i64 ordinal, Transaction& tx) {
  const i64 g = index_.group_of(window), size = index_.block_tokens();
  for (i64 row : rows) {
    if (rows_[row].source || row == copy_) continue;
    for (i64 a = first_[g]; a < first_[g + 1]; ++a) {
      i64 needed_lo, needed_hi;
      needed(row, g, a, &needed_lo, &needed_hi);
      const Extent& e = extent(row, a);
      const i64 block_bytes = size * token_bytes(g, a);
      const i64 from = std::max(e.lo, quotient(ordinal * block_bytes, page_bytes()));
      const i64 to = std::min({e.hi, needed_lo, ceil_div((ordinal + 1) * block_bytes, page_bytes())});
      for (i64 slot = from; slot < to; ++slot) {
        const i64 first = quotient(slot * page_bytes(), block_bytes);
        const i64 last = std::min(blocks_of(row), ceil_div((slot + 1) * page_bytes(), block_bytes));
        bool shows = false;
        for (i64 k = first; !shows && k < last; ++k) shows = shown(row, k, window).here;
        if (!shows && e.pages[slot] >= 0) unmap(row, a, slot, slot + 1, rows_[row].fence, tx);
      }
    }
  }
}

// A row of its own shows the same pages and has a copy of the state. It belongs to no sequence.
void VirtualTable::snapshot(i64 index, const std::vector<i32>& chain, Transaction& tx) {
  if (has_state(chain.back())) return;
  const i64 from = row_of_[index];
  Sources sources(*this);
  sources.add(from);
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
  attach_all(to, chain, static_cast<i64>(chain.size()), index, true, tx);
}

bool VirtualTable::is_covered(i64 row, std::size_t from) const {
  const std::vector<Hold>& holds = rows_[row].holds;
  if (holds.size() <= from) return true;
  i64 looked = 0;
  const i64 most = index_.windows() == 0 ? PrefixIndex::kCandidates : 4;  // each is compared block by block
  for (i64 other = first_holder(holds.back().node); other >= 0 && looked < most; ++looked) {
    bool as_much = other != row;
    for (i32 w = 0; as_much && w < index_.windows();
         ++w) {  // also what windows at the first of these blocks' ends need
      const GroupGeometry& group = geometry_.groups[index_.group_of(w)];
      const i64 tokens = static_cast<i64>(from + 1) * index_.block_tokens();
      i64 k = window_first(group, geometry_.tail_guard_tokens, tokens) / index_.block_tokens();
      while (k < blocks_of(row) && (shown(other, k, w).here || !shown(row, k, w).here)) ++k;
      as_much = k >= blocks_of(row);
    }
    if (as_much) return true;
    other = rows_[other].holds[holds.size() - 1].next;
  }
  return false;
}

// What no other row has of the last block of this one.
void VirtualTable::demote_last(i64 row, Transaction& tx) {
  const i64 ordinal = blocks_of(row) - 1;
  const i32 node = rows_[row].holds[ordinal].node;
  if (index_.copies(node) == 1) return demote(node, -1, tx);
  for (i64 g = 0; g < groups_; ++g) {
    const i32 w = index_.window_of(g);
    const bool state = geometry_.groups[g].growth == Growth::fixed && rows_[row].state == node;
    if (state || (w >= 0 && shown(row, ordinal, w).here && index_.window_copies(node, w) == 1)) demote(node, g, tx);
  }
}

void VirtualTable::detach_last(i64 row, Transaction& tx) {
  const i64 ordinal = blocks_of(row) - 1;
  keep_last_copy(row, ordinal);
  if (demotes()) demote_last(row, tx);
  for (i32 w = 0; w < index_.windows(); ++w) {
    if (shown(row, ordinal, w).here) tx.push(concealing(row, ordinal, w));
  }
  tx.push(forgetting(row));
}

// A block that is needed, and that besides only rows show which this transaction has filled: should the driver fail,
// the row is the only one that has it. With it stay the blocks before it, since a row holds all of those.
void VirtualTable::keep_last_copy(i64 row, i64 ordinal) {
  Row& r = rows_[row];
  if (r.kept != pool_.transactions && !is_last_copy(row, ordinal)) return;
  r.kept = pool_.transactions;
  set_maybe_shared(row, true);  // a sequence that comes to the row must not write there
  for (i64 g = 0; g < groups_; ++g) {
    if (geometry_.groups[g].growth != Growth::token) continue;
    for (i64 a = first_[g]; a < first_[g + 1]; ++a) {
      const Extent& e = extent(row, a);
      const i64 bytes = index_.block_tokens() * token_bytes(g, a);
      const i64 end = std::min(e.hi, ceil_div((ordinal + 1) * bytes, page_bytes()));
      for (i64 slot = std::max(e.lo, ordinal * bytes / page_bytes()); slot < end; ++slot) {
        if (e.pages[slot] >= 0) pool_.keep_bytes(e.pages[slot]);
      }
    }
  }
}

bool VirtualTable::is_last_copy(i64 row, i64 ordinal) const {
  const i32 node = rows_[row].holds[ordinal].node;
  if (!index_.used(node)) return false;
  const auto is_old = [&](i64 other) { return other != row && rows_[other].given != pool_.transactions; };
  i64 at = first_holder(node);
  while (at >= 0 && !is_old(at)) at = rows_[at].holds[ordinal].next;
  bool last = at < 0;
  for (i32 w = 0; w < index_.windows() && !last; ++w) {
    if (!shown(row, ordinal, w).here || index_.needs(node, w) == 0) continue;
    at = first_shower(node, w);
    while (at >= 0 && !is_old(at)) at = shown(at, ordinal, w).next;
    last = at < 0;
  }
  return last;
}

void VirtualTable::cut(i64 row, i64 from, Transaction& tx) {
  while (blocks_of(row) > from) detach_last(row, tx);
}

void VirtualTable::attach_all(i64 row, const std::vector<i32>& chain, i64 count, i64 index, bool state,
                              Transaction& tx) {
  for (i64 k = 0; k < count; ++k) attach_noted(row, chain[k], index, state && k + 1 == count, tx);
}

bool VirtualTable::can_reuse_row(i64 row, std::size_t blocks) const {
  if (rows_[row].index >= 0) return false;
  if (has_state_ || !keeps_pins(row, blocks)) return false;
  if (is_covered(row, blocks)) return true;
  const std::vector<Hold>& holds = rows_[row].holds;
  return best_empty(0) < 0 && !has_more_rows() &&
         std::none_of(
             holds.begin() + static_cast<std::ptrdiff_t>(blocks), holds.end(),
             [this](const Hold& h) { return index_.used(h.node); });
}

void VirtualTable::reuse_row(i64 index, i64 row, i64 blocks, Transaction& tx) {
  cut(row, blocks, tx);
  tx.push({OpKind::bind, 0, sequences_.handle_of(index), row});
  for (i64 g = 0; g < groups_; ++g) check_tail_again(index, g);  // the next write may meet a shared page
  // Behind that page there may be more: a sequence that a window keeps short shows the later pages only. What is taken
  // over ends with its tokens, which the last of its blocks may have more of.
  for (i64 a = 0; a < arenas_; ++a) {
    const Extent& e = extent(row, a);
    const i64 front = low_slot(group_of(a), a, sequences_.front(index, group_of(a)));
    const i64 bytes = sequences_.tokens(index, group_of(a)) * token_bytes(group_of(a), a);
    const i64 behind = std::max(e.lo, ceil_div(bytes, page_bytes()));
    if (e.solid > front) unmap(row, a, behind, e.hi, rows_[row].fence, tx);  // there are holes
    i64 slot = std::max(e.lo, blocks * index_.block_tokens() * token_bytes(group_of(a), a) / page_bytes());
    while (slot < e.hi && !pool_.is_shared(e.pages[slot])) ++slot;
    if (slot < e.hi) unmap(row, a, std::max(slot, bytes / page_bytes() + 1), e.hi, rows_[row].fence, tx);
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
    map_holes(to, a, whole, high_slot(group, a, tokens), tx);
    if (const i64 tail = first < tokens ? bytes % page_bytes() : 0) {  // a window of one token may need none of them
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
