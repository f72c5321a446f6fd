// Content: adopting, publishing and detaching it; sharing pages between rows that begin alike; snapshots.

#include <algorithm>

#include "table/virtual/virtual_table.h"

namespace kvmem {

void VirtualTable::share(i64 parent, i64 child, i64 group, i64 first, i64 tokens, Transaction& tx) {
  if (rows_.row_of(child) < 0) bind_without_pages(child, tx);
  share_row(rows_.row_of(parent), rows_.row_of(child), group, first, tokens, tx);
}

// A row that holds a block holds all blocks before it, but the parts that windows need may be spread over several rows:
// each has those that its own sequence computed or needed. The best row is parked, ends with the chain and has all
// parts, because it can be reused as it is. Any other row with all parts saves copies.
i64 VirtualTable::find_memory(const std::vector<i32>& chain, i64 tokens) const {
  const i64 last = static_cast<i64>(chain.size()) - 1;
  if (any_state_) return rows_.snapshot_row(chain[last]);
  const i64 any = rows_.first_holder(chain[last]);
  if (any < 0) return !index_.whole() && needs_nothing(tokens) ? kNoRow : -1;
  i64 row = -1, seen = 0;
  for (i64 here = any; here >= 0 && seen < PrefixIndex::kCandidates; ++seen, here = rows_[here].holds[last].next) {
    const bool best = rows_[here].index < 0 && rows_.blocks_of(here) == last + 1;
    if ((row >= 0 && !best) || !has_needed_parts(here, last + 1, tokens)) continue;
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

bool VirtualTable::has_needed_parts(i64 row, i64 blocks, i64 tokens) const {
  for (i32 w = 0; w < index_.windows(); ++w) {
    for (i64 k = blocks; k-- > first_needed(w, tokens);) {
      if (!rows_.part(row, k, w).present) return false;
    }
  }
  return true;
}

void VirtualTable::adopt(i64 index, const std::vector<i32>& chain, const SharedPrefix& found, Transaction& tx) {
  const i64 source = found.cookie, whole = found.tokens / index_.block_tokens();
  Sources sources(rows_);
  const bool single = source == kNoRow || find_sources(found, chain, &sources);
  const bool taken = source != kNoRow && single && can_reuse_row(source, whole);
  if (taken) {
    reuse_row(index, source, whole, tx);
  } else {
    bind_behind(index, found, tx);
    for (i64 g = 0; g < groups_; ++g) {
      if (geometry_.groups[g].growth != Growth::token || source == kNoRow) continue;
      const i64 first = sequences_.front(index, g);
      if (single || index_.window_of(g) < 0) {
        share_row(source, rows_.row_of(index), g, first, found.tokens, tx);
      } else {
        share_window(rows_.row_of(index), g, first, found.tokens, tx);
      }
    }
    if (source != kNoRow) rows_.set_fence(source, tx.new_fence());  // the device still copies from it
    attach_all(rows_.row_of(index), chain, whole, index, false, tx);
  }
  for (i64 g = 0; g < groups_; ++g) {
    if (geometry_.groups[g].growth == Growth::token) grow(index, g, found.tokens, found.tokens, tx);
    if (geometry_.groups[g].growth != Growth::fixed) continue;
    grow(index, g, 0, 1, tx);
    copy_state(source, rows_.row_of(index), g, tx);
  }
  // Last, because pages behind the content may have been shared until here.
  if (geometry_.zero == Zero::always) zero_row(rows_.row_of(index), found.tokens, tx);
}

// Goes from the last block back, and stays with a row as long as it has the parts, so that there are few rows.
bool VirtualTable::find_sources(const SharedPrefix& found, const std::vector<i32>& chain, Sources* sources) {
  sources->add(found.cookie);
  if (has_needed_parts(found.cookie, static_cast<i64>(chain.size()), found.tokens)) return true;
  const i64 end = static_cast<i64>(chain.size());
  source_of_.assign(index_.windows() * end, -1);
  for (i32 w = 0; w < index_.windows(); ++w) {
    i64 row = found.cookie;
    for (i64 k = end; k-- > first_needed(w, found.tokens);) {
      if (!rows_.part(row, k, w).present) row = rows_.first_part_row(chain[k], w);
      source_of_[w * end + k] = row;
      sources->add(row);
    }
  }
  return false;
}

// A page is shared if one row has everything on it that is needed; otherwise its parts are copied.
void VirtualTable::share_window(i64 to, i64 group, i64 first, i64 tokens, Transaction& tx) {
  const i64 size = index_.block_tokens(), end = ceil_div(tokens, size);
  const i64* const rows = source_of_.data() + index_.window_of(group) * end;
  rows_.set_maybe_shared(to, true);
  for (i64 a = first_[group]; a < first_[group + 1]; ++a) {
    const i64 block_bytes = size * token_bytes(group, a), bytes = tokens * token_bytes(group, a);
    for (i64 slot = rows_.low_slot(group, a, first); slot < rows_.high_slot(group, a, tokens); ++slot) {
      const i64 from = std::max(slot * page_bytes(), first * token_bytes(group, a));
      const i64 until = std::min((slot + 1) * page_bytes(), bytes);
      const i64* const begin = rows + std::min(from / block_bytes, end);
      const i64* const behind = rows + ceil_div(until, block_bytes);
      const bool whole = (slot + 1) * page_bytes() <= bytes;
      if (whole && std::all_of(begin, behind, [begin](i64 row) { return row == *begin; })) {
        rows_.set_maybe_shared(*begin, true);
        tx.push({OpKind::map, arena(a), rows_.slot_of(to, group, a) + slot, rows_.extent(*begin, a).pages[slot], 1});
        continue;
      }
      map(to, a, slot, slot + 1, tx);
      for (i64 at = from, next; at < until; at = next) {
        next = std::min((at / block_bytes + 1) * block_bytes, until);
        tx.push({OpKind::copy, arena(a), rows_.slot_of(to, group, a) * page_bytes() + at,
                 rows_.slot_of(rows[at / block_bytes], group, a) * page_bytes() + at, next - at});
      }
    }
  }
}

bool VirtualTable::has(i32 node, i64 group) const {
  if (has_state(group)) return has_snapshot(node);
  const i32 window = index_.window_of(group);
  return window < 0 ? rows_.first_holder(node) >= 0 : index_.has_window(node, window);
}

void VirtualTable::publish(const std::vector<Published>& blocks, Transaction& tx) {
  constexpr std::size_t kAtOnce = 64;
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    if (i % kAtOnce == 0) tx.expect(std::min(blocks.size() - i, kAtOnce));
    const Published& p = blocks[i];
    attach_expected(rows_.row_of(p.index), p.node, p.index, false, tx);
  }
}

void VirtualTable::evict(i32 node, Transaction& tx) {
  for (i64 row; (row = rows_.first_holder(node)) >= 0;) truncate_content(row, index_.ordinal(node), tx);
}

void VirtualTable::evict_window(i32 node, i32 window, Transaction& tx) {
  const i64 ordinal = index_.ordinal(node);
  std::vector<i64> rows;
  for (i64 row = rows_.first_part_row(node, window); row >= 0; row = rows_.part(row, ordinal, window).next) {
    rows.push_back(row);
  }
  if (!rows.empty()) demote(node, index_.group_of(window), tx);
  for (i64 row : rows) detach_part(row, ordinal, window, tx);
  unmap_part(rows, window, ordinal, tx);
  for (i64 row : rows) {
    if (rows_[row].index < 0) detach_unfindable(row, tx);
  }
}

void VirtualTable::detach_unfindable(i64 row, Transaction& tx) {
  if (index_.whole()) return;
  const auto is_findable = [&](i64 ordinal) {
    for (i32 w = 0; w < index_.windows(); ++w) {
      if (rows_.part(row, ordinal, w).present) return true;
    }
    return false;
  };
  while (rows_.blocks_of(row) > 0 && !is_findable(rows_.blocks_of(row) - 1)) detach_last(row, tx);
}

void VirtualTable::unmap_part(const std::vector<i64>& rows, i32 window, i64 ordinal, Transaction& tx) {
  const i64 g = index_.group_of(window), size = index_.block_tokens();
  for (i64 row : rows) {
    if (rows_[row].source || row == filled_row_) {  // its pages stay while the decision reads or fills it
      rows_.may_reclaim(row);
      continue;
    }
    for (i64 a = first_[g]; a < first_[g + 1]; ++a) {
      i64 needed_lo, needed_hi;
      rows_.needed(row, g, a, &needed_lo, &needed_hi);
      const Extent& e = rows_.extent(row, a);
      const i64 block_bytes = size * token_bytes(g, a);
      const i64 from = std::max(e.lo, quotient(ordinal * block_bytes, page_bytes()));
      const i64 to = std::min({e.hi, needed_lo, ceil_div((ordinal + 1) * block_bytes, page_bytes())});
      for (i64 slot = from; slot < to; ++slot) {
        const BlockRange on = blocks_on(row, slot, block_bytes);
        bool present = false;
        for (i64 k = on.first; !present && k < on.last; ++k) present = rows_.part(row, k, window).present;
        if (!present && e.pages[slot] >= 0) unmap(row, a, slot, slot + 1, rows_[row].fence, tx);
      }
    }
  }
}

// A parked row gets the same pages and a copy of the state.
void VirtualTable::snapshot(i64 index, const std::vector<i32>& chain, Transaction& tx) {
  if (has_snapshot(chain.back())) return;
  const i64 from = rows_.row_of(index);
  Sources sources(rows_);
  sources.add(from);
  const i64 to = pick_empty(tx);
  Guard second(filled_row_, to);
  unmap_row(to, tx);
  const i64 tokens = static_cast<i64>(chain.size()) * index_.block_tokens();
  for (i64 g = 0; g < groups_; ++g) {
    if (geometry_.groups[g].growth == Growth::token) {
      share_row(from, to, g, sequences_.front(index, g), tokens, tx);
    } else {
      for (i64 a = first_[g]; a < first_[g + 1]; ++a) map(to, a, 0, rows_.high_slot(g, a, 1), tx);
      copy_state(from, to, g, tx);
    }
  }
  rows_.set_fence(to, tx.new_fence());
  attach_all(to, chain, static_cast<i64>(chain.size()), index, true, tx);
}

// Reports what no other row has of the row's last block.
void VirtualTable::demote_last(i64 row, Transaction& tx) {
  const i64 ordinal = rows_.blocks_of(row) - 1;
  const i32 node = rows_[row].holds[ordinal].node;
  if (index_.copies(node) == 1) return demote(node, -1, tx);
  for (i64 g = 0; g < groups_; ++g) {
    const i32 w = index_.window_of(g);
    const bool state = has_state(g) && rows_[row].state == node;
    if (state || (w >= 0 && rows_.part(row, ordinal, w).present && index_.window_copies(node, w) == 1))
      demote(node, g, tx);
  }
}

void VirtualTable::detach_last(i64 row, Transaction& tx) {
  const i64 ordinal = rows_.blocks_of(row) - 1;
  keep_last_copy(row, ordinal);
  if (demotes()) demote_last(row, tx);
  for (i32 w = 0; w < index_.windows(); ++w) {
    if (rows_.part(row, ordinal, w).present) detach_part(row, ordinal, w, tx);
  }
  const Row& r = rows_[row];
  const Hold& last = r.holds.back();
  tx.push({OpKind::evict, number, last.node, row, r.state == last.node, std::max(last.previous, 0)});
}

void VirtualTable::detach_part(i64 row, i64 ordinal, i32 window, Transaction& tx) {
  const i32 previous = rows_.part(row, ordinal, window).previous;
  tx.push({OpKind::evict, number, rows_[row].holds[ordinal].node, row, (i64{1} + window) << kWindowShift,
           std::max(previous, 0)});
}

// That is so if the block is in use, and the other rows that have it got it from this transaction. The blocks before it
// are kept too, because the row would have to hold all of them again.
void VirtualTable::keep_last_copy(i64 row, i64 ordinal) {
  if (rows_[row].kept_in != pool_.transactions && !is_last_copy(row, ordinal)) return;
  rows_.note_kept(row);
  rows_.set_maybe_shared(row, true);  // the next sequence of the row must not write there
  for (i64 g = 0; g < groups_; ++g) {
    if (geometry_.groups[g].growth != Growth::token) continue;
    for (i64 a = first_[g]; a < first_[g + 1]; ++a) {
      const Extent& e = rows_.extent(row, a);
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
  const auto is_old = [&](i64 other) { return other != row && rows_[other].attached_in != pool_.transactions; };
  i64 at = rows_.first_holder(node);
  while (at >= 0 && !is_old(at)) at = rows_[at].holds[ordinal].next;
  bool last = at < 0;
  for (i32 w = 0; w < index_.windows() && !last; ++w) {
    if (!rows_.part(row, ordinal, w).present || index_.needs(node, w) == 0) continue;
    at = rows_.first_part_row(node, w);
    while (at >= 0 && !is_old(at)) at = rows_.part(at, ordinal, w).next;
    last = at < 0;
  }
  return last;
}

void VirtualTable::truncate_content(i64 row, i64 from, Transaction& tx) {
  while (rows_.blocks_of(row) > from) detach_last(row, tx);
}

void VirtualTable::attach_all(i64 row, const std::vector<i32>& chain, i64 count, i64 index, bool state,
                              Transaction& tx) {
  for (i64 k = 0; k < count; ++k) {
    tx.expect();
    attach_expected(row, chain[k], index, state && k + 1 == count, tx);
  }
}

bool VirtualTable::can_reuse_row(i64 row, std::size_t blocks) const {
  if (rows_[row].index >= 0) return false;
  if (any_state_ || !keeps_pins(row, blocks)) return false;
  if (is_covered(row, blocks)) return true;
  const std::vector<Hold>& holds = rows_[row].holds;
  return best_empty(0) < 0 && !rows_.has_more_rows() &&
         std::none_of(
             holds.begin() + static_cast<std::ptrdiff_t>(blocks), holds.end(),
             [this](const Hold& h) { return index_.used(h.node); });
}

void VirtualTable::reuse_row(i64 index, i64 row, i64 blocks, Transaction& tx) {
  truncate_content(row, blocks, tx);
  tx.push({OpKind::bind, 0, sequences_.handle_of(index), row});
  for (i64 g = 0; g < groups_; ++g) check_tail_again(index, g);  // the next write may go to a shared page
  // Unmaps what would be in the way behind the tokens: everything if the window leaves holes before them, otherwise
  // from the first shared page behind the content on. The page that the length divides stays, for copy_tail().
  for (i64 a = 0; a < arenas_; ++a) {
    const Extent& e = rows_.extent(row, a);
    const i64 front = rows_.low_slot(group_of(a), a, sequences_.front(index, group_of(a)));
    const i64 bytes = sequences_.tokens(index, group_of(a)) * token_bytes(group_of(a), a);
    const i64 behind = std::max(e.lo, ceil_div(bytes, page_bytes()));
    if (e.solid > front) unmap(row, a, behind, e.hi, rows_[row].fence, tx);  // holes
    i64 slot = std::max(e.lo, blocks * index_.block_tokens() * token_bytes(group_of(a), a) / page_bytes());
    while (slot < e.hi && !pool_.is_shared(e.pages[slot])) ++slot;
    if (slot < e.hi) unmap(row, a, std::max(slot, bytes / page_bytes() + 1), e.hi, rows_[row].fence, tx);
  }
}

void VirtualTable::share_row(i64 from, i64 to, i64 group, i64 first, i64 tokens, Transaction& tx) {
  rows_.set_maybe_shared(from, true);
  rows_.set_maybe_shared(to, true);
  for (i64 a = first_[group]; a < first_[group + 1]; ++a) {
    const i64 bytes = moved_bytes(group, a, tokens), whole = settled_bytes(group, a, tokens) / page_bytes();
    const Extent& source = rows_.extent(from, a);
    for (i64 slot = rows_.low_slot(group, a, first); slot < whole;) {
      i64 n = 1;
      while (slot + n < whole && source.pages[slot + n] == source.pages[slot] + n) ++n;
      tx.push({OpKind::map, arena(a), rows_.slot_of(to, group, a) + slot, source.pages[slot], n});
      slot += n;
    }
    map_holes(to, a, whole, rows_.high_slot(group, a, tokens), tx);
    if (first == tokens) continue;  // a window of one token may need no token
    for (i64 at = whole * page_bytes(); at < bytes; at += page_bytes()) {
      tx.push({OpKind::copy, arena(a), rows_.slot_of(to, group, a) * page_bytes() + at,
               rows_.slot_of(from, group, a) * page_bytes() + at, std::min(page_bytes(), bytes - at)});
    }
  }
}

void VirtualTable::copy_state(i64 from, i64 to, i64 group, Transaction& tx) {
  for (i64 a = first_[group]; a < first_[group + 1]; ++a) {
    tx.push({OpKind::copy, arena(a), rows_.slot_of(to, group, a) * page_bytes(),
             rows_.slot_of(from, group, a) * page_bytes(), token_bytes(group, a)});
  }
}

}  // namespace kvmem
