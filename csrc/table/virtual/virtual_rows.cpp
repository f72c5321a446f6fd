#include "table/virtual/virtual_rows.h"

namespace kvmem {

VirtualRows::VirtualRows(const Geometry& geometry, PagePool& pool, const Sequences& sequences, PrefixIndex& index)
    : PageTable(index, geometry),
      geometry_(geometry),
      pool_(pool),
      sequences_(sequences),
      row_of_(geometry.max_sequences, -1),
      doubles_(pool.journal),
      parked_(pool.journal),
      bound_(pool.journal) {
  limit_pages = pool.budget_pages();
  i64 all = 0;
  for (const GroupGeometry& group : geometry.groups) all += static_cast<i64>(group.token_bytes.size());
  base_arena_ = pool.add_owner(this, all);
  try {
    for (const GroupGeometry& group : geometry.groups) {
      first_.push_back(arenas_);
      has_state_ = has_state_ || group.growth == Growth::fixed;
      for (std::size_t i = 0; i < group.token_bytes.size(); ++i, ++arenas_) {
        pool.add_arena(this, static_cast<i32>(base_arena_ + arenas_), group.arena_slots[i]);
      }
    }
  } catch (...) {
    pool.remove_owner(this);
    throw;
  }
  first_.push_back(arenas_);
  rows_ = RowArray<Row, 1>(geometry.rows, 1);
  extents_ = RowArray<Extent>(geometry.rows, arenas_);
  scratch_pages_.assign(arenas_, -1);
  room_ = RowArray<i64>(geometry.rows, groups_, -1), ready_ = RowArray<i64>(geometry.rows, groups_, -1);
  if (guarded_) finite_ = RowArray<Finite>(geometry.rows, groups_);
  copy_tail_.resize(row_of_.size() * groups_);
  add_rows(1);  // it shows the trash blocks
}

void VirtualRows::add_rows(i64 rows) {
  if (rows <= rows_.size()) return;
  for (IdList* list : {&doubles_, &parked_, &bound_}) list->reserve(rows);
  extents_.grow(rows);
  room_.grow(rows), ready_.grow(rows);
  if (guarded_) finite_.grow(rows);
  for (i64 row = rows_.size(); row < rows; ++row) {
    const auto entry = row > 0 ? empty_.emplace_hint(empty_.end(), 0, row) : empty_.end();
    rows_.grow(row + 1);
    rows_[row].in_empty = entry;
  }
}

VirtualRows::~VirtualRows() {
  pool_.drain();
  for (i64 row = 0; row < rows_.size(); ++row) {
    for (i64 a = 0; a < arenas_; ++a) {
      const Extent& e = extent(row, a);
      for (i64 slot = e.lo; slot < e.hi; ++slot) {
        if (e.pages[slot] >= 0) pool_.drop_page(e.pages[slot]);
      }
    }
  }
  pool_.remove_owner(this);
}

bool VirtualRows::is_whole(const Op& op) const {
  const i64 a = op.at - base_arena_;
  if (a < 0 || a >= arenas_) return true;  // a neighbour's
  const i64 g = group_of(a);
  if (op.a == geometry_.groups[g].arena_slots[a - first_[g]] - 1) return scratch_pages_[a] < 0;
  const Extent& e = extent(op.a / row_slots(g, a), a);
  return e.count == e.hi - e.lo || geometry_.groups[g].window_tokens > 0;
}

void VirtualRows::note_shared() {
  const auto is_shared = [this](i32 page) { return page >= 0 && pool_.refs(page) > 1; };
  for (i64 row = 1; row < rows_.size(); ++row) {
    for (i64 a = 0; a < arenas_ && !rows_[row].maybe_shared; ++a) {
      const std::vector<i32>& pages = extent(row, a).pages;
      if (std::any_of(pages.begin(), pages.end(), is_shared)) set_maybe_shared(row, true);
    }
  }
}

// A row may show its own pages before those that it shares: a window's blocks can come from several rows.
i64 VirtualRows::first_shared(i64 row, i64 a, i64 tokens) const {
  const Extent& e = extent(row, a);
  i64 slot = std::max(e.lo, tokens * token_bytes(group_of(a), a) / page_bytes());
  while (slot < e.hi && (e.pages[slot] < 0 || !must_copy(e.pages[slot]))) ++slot;
  return slot;
}

bool VirtualRows::holds(i64 index, i64 group) const {
  const i64 row = row_of_[index], tokens = sequences_.tokens(index, group);
  if (tokens == 0) return sequences_.live(index) || row < 0;
  if (tokens == sequences_.front(index, group)) return row > 0;  // a window of one token needs none of them
  for (i64 a = first_[group]; row > 0 && a < first_[group + 1]; ++a) {
    const Extent& e = extent(row, a);
    const i64 lo = low_slot(group, a, sequences_.front(index, group));
    if (e.solid > lo || e.hi < high_slot(group, a, tokens)) return false;
    if (!copy_tail_[index * groups_ + group] && first_shared(row, a, tokens) < e.hi) return false;
  }
  return row > 0;
}

void VirtualRows::apply(const Op& op, bool undo) {
  const i64 index = sequences_.index(op.a);
  if (op.kind == OpKind::bind) {
    if (op.b <= 0 || op.b >= geometry_.rows) {
      throw SpecError("bind: no row " + std::to_string(op.b) + "; there are " + std::to_string(geometry_.rows - 1) +
                      ": max_sequences and cached_rows must be those of the allocator whose ops are followed");
    }
    add_rows(op.b + 1);
    if (rows_[op.b].index >= 0 || row_of_[index] >= 0) {
      throw SpecError("bind: row " + std::to_string(op.b) + " or the sequence is bound already");
    }
    row_of_[index] = static_cast<i32>(op.b);
    set_sequence(op.b, index);
    if (guarded_) mark_dirty(op.b);
    for (i64 g = 0; guarded_ && !undo && g < groups_; ++g) reset_cut(index, g);
    for (i32 w = 0; w < index_.windows(); ++w) need_blocks(op.b, w, first_block(index, w), blocks_of(op.b), undo);
    forget_room_of(op.b, index);
  } else if (op.kind == OpKind::unbind) {
    if (row_of_[index] < 0 || row_of_[index] != op.b) throw SpecError("unbind: not the row of this sequence");
    row_of_[index] = -1;
    for (i32 w = 0; w < index_.windows(); ++w) unneed_blocks(op.b, w, first_block(index, w), blocks_of(op.b), undo);
    set_sequence(op.b, -1);
    forget_room_of(op.b, index);
  } else {
    throw SpecError("block: the virtual backend has no block table");
  }
}

bool VirtualRows::is_mapped(i32 arena, i64 slot, i64 count) const {
  const i64 a = arena - base_arena_, g = group_of(a);
  if (slot == geometry_.groups[g].arena_slots[a - first_[g]] - 1) return count == 1 && scratch_pages_[a] >= 0;
  if (slot / row_slots(g, a) >= rows_.size()) return false;
  const Extent& e = extent(slot / row_slots(g, a), a);
  const i64 first = slot % row_slots(g, a);
  bool all = first >= e.lo && first + count <= e.hi;
  for (i64 i = first; all && i < first + count; ++i) all = e.pages[i] >= 0;
  return all;
}

// From the front, never by bisection: rows that computed a block each may still show one page for a later block.
i64 VirtualRows::common_blocks(i64 a, i64 b, i64 group, i64 known) const {
  const i64 row = row_of_[a], other = row_of_[b];
  if (row < 0 || other < 0 || sequences_.front(a, group) > 0 || sequences_.front(b, group) > 0) return 0;
  i64 tokens = std::min(sequences_.committed(a, group), sequences_.committed(b, group));
  for (i64 i = first_[group]; i < first_[group + 1]; ++i) {
    const auto mine = extent(row, i).pages.begin(), others = extent(other, i).pages.begin();
    const i64 from = known * geometry_.groups[group].block_tokens * token_bytes(group, i) / page_bytes();
    const i64 end = ceil_div(tokens * token_bytes(group, i), page_bytes());
    const i64 same = std::mismatch(mine + from, mine + end, others + from).first - mine;
    tokens = std::min(tokens, same * page_bytes() / token_bytes(group, i));
  }
  return tokens / geometry_.groups[group].block_tokens;
}

i64 VirtualRows::tokens_that_fit(i64 index, i64 group, i64 pages) const {
  i64 low = sequences_.tokens(index, group), high = geometry_.groups[group].max_tokens;
  while (low < high) {  // the need grows with the tokens
    const i64 middle = (low + high + 1) / 2;
    i64 need = 0;
    for (i64 a = first_[group]; a < first_[group + 1]; ++a) {
      const i64 hi = row_of_[index] < 0 ? 0 : extent(row_of_[index], a).hi;
      need += std::max(i64{0}, high_slot(group, a, middle) - hi);
    }
    if (need <= pages) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

i64 VirtualRows::parked_pages() const {
  i64 pages = 0;
  std::unordered_map<i32, i32> shared;  // page -> how many of its mappings are parked ones
  const auto count = [&](const Row& row, const Extent& e, i64 from, i64 to) {
    for (i64 slot = from; slot < to; ++slot) {
      if (e.pages[slot] < 0) continue;
      row.maybe_shared ? ++shared[e.pages[slot]] : ++pages;
    }
  };
  for (i64 row = 1; row < rows_.size(); ++row) {
    if (rows_[row].slots == 0) continue;
    for (i64 a = 0, g = 0; a < arenas_; ++a) {
      while (a >= first_[g + 1]) ++g;
      const Extent& e = extent(row, a);
      i64 lo, hi;
      needed(row, g, a, &lo, &hi);
      count(rows_[row], e, e.lo, std::min(lo, e.hi));
      count(rows_[row], e, std::max(hi, e.lo), e.hi);
    }
  }
  for (const auto& [page, mappings] : shared) pages += pool_.refs(page) == mappings;
  return pages;
}

// What other rows show too of bytes [from, to) of an arena of a row: in bytes of a page; returns how many.
i64 VirtualRows::add_shared(const Extent& e, i64 from, i64 to, std::vector<SharedPart>* shared) const {
  i64 bytes = 0;
  for (i64 slot = from / page_bytes(); slot * page_bytes() < to; ++slot) {
    if (pool_.refs(e.pages[slot]) <= 1) continue;
    const i64 start = slot * page_bytes();
    shared->push_back({e.pages[slot], std::max(from - start, i64{0}), std::min(to - start, page_bytes())});
    bytes += shared->back().to - shared->back().from;
  }
  return bytes;
}

void VirtualRows::count_bytes(i64* used_bytes, i64* shared_bytes) const {
  std::vector<SharedPart> shared;
  *used_bytes = 0;
  for (i64 index = 0; index < sequences_.capacity(); ++index) {
    const i64 row = row_of_[index];
    if (row < 0) continue;
    for (i64 g = 0; g < groups_; ++g) {
      const i64 front = sequences_.front(index, g), tokens = sequences_.tokens(index, g);
      for (i64 a = first_[g]; a < first_[g + 1]; ++a) {
        const i64 from = front * token_bytes(g, a), to = tokens * token_bytes(g, a);
        *used_bytes += to - from;
        if (!rows_[row].maybe_shared || from == to) continue;
        *used_bytes -= add_shared(extent(row, a), from, to, &shared);
      }
    }
  }
  const SharedCount count = count_shared(shared);
  *used_bytes += count.length;
  *shared_bytes = count.pieces * page_bytes();
}

// Blocks that begin alike show one page for their beginnings. Cost: a few steps for each block of the rows that may
// share pages.
i64 VirtualRows::common_bytes() const {
  std::vector<SharedPart> shared;
  i64 bytes = 0;
  for (i64 row = 1; row < rows_.size(); ++row) {
    for (i64 k = 0; rows_[row].maybe_shared && k < blocks_of(row); ++k) {
      const i32 node = rows_[row].holds[k].node;
      for (i64 g = 0; g < groups_; ++g) {
        const i32 w = index_.window_of(g);
        const bool counted = w < 0 ? holder_[node] == row && !index_.used(node)
                                   : first_shower(node, w) == row && index_.needs(node, w) == 0;
        if (!counted || geometry_.groups[g].growth != Growth::token) continue;
        for (i64 a = first_[g]; a < first_[g + 1]; ++a) {
          const i64 size = index_.block_tokens() * token_bytes(g, a);
          bytes += add_shared(extent(row, a), k * size, (k + 1) * size, &shared);
        }
      }
    }
  }
  return bytes - count_shared(shared).length;
}

i64 VirtualRows::mapped_extent_slots(i64 group, i64 arena_in_group) const {
  const i64 a = first_[group] + arena_in_group;
  for (i64 row = rows_.size() - 1; row >= 0; --row) {
    if (extent(row, a).count > 0) return slot_of(row, group, a) + extent(row, a).hi;
  }
  return 0;
}

void VirtualRows::set_sequence(i64 row, i64 index) {
  IdList& list = rows_[row].index < 0 ? parked_ : bound_;
  if (list.has(row)) list.remove(row);
  rows_[row].index = index;
  may_give(row);
  file_empty(row);
  file_double(row);
}

void VirtualRows::mark_dirty(i64 row) {
  for (i64 g = 0; g < groups_; ++g) {
    Finite& f = finite_.of(row)[g] = Finite();
    if (geometry_.groups[g].growth == Growth::fixed) continue;  // nothing is promised behind a state
    for (i64 a = first_[g]; a < first_[g + 1]; ++a) {
      f.dirty_to = std::max(f.dirty_to, ceil_div(extent(row, a).hi * page_bytes(), token_bytes(g, a)));
    }
  }
}

// What a live row had mapped beyond its guard was zeroed once, and is to be zeroed again before the sequence gets
// there.
void VirtualRows::on_rewritten(const Op& unmap) {
  const i64 a = unmap.at - base_arena_, g = group_of(a), row = unmap.a / row_slots(g, a);
  if (!guarded_ || row >= rows_.size() || rows_[row].index < 0) return;
  mark_dirty(row);
  for (i64 group = 0; group < groups_; ++group) forget_room(rows_[row].index, group);
}

// Both put the row where its present state says, or nowhere.
void VirtualRows::file_empty(i64 row) {
  Row& r = rows_[row];
  const bool belongs = r.index < 0 && r.holds.empty();
  if (r.entry.empty()) {
    if (belongs && r.in_empty->first == r.slots) return;
    r.entry = empty_.extract(r.in_empty);
  }
  if (!belongs) return;
  r.entry.value() = {r.slots, row};
  r.in_empty = empty_.insert(std::move(r.entry)).position;
}

void VirtualRows::file_double(i64 row) {
  const Row& r = rows_[row];
  const bool belongs = r.index < 0 && !r.holds.empty() && (r.holds.back().next >= 0 || r.holds.back().previous >= 0);
  if (belongs == doubles_.has(row)) return;
  if (belongs) {
    doubles_.add_last(row);
  } else {
    doubles_.remove(row);
  }
}

void VirtualRows::finish(bool committed) {
  for (const auto& [finite, to] : zeroed_) finite->to = to;
  zeroed_.clear();
  finish_cuts();
  index_.finish(committed);
}

void VirtualRows::change(const Op& op, bool mapped) {
  const i64 a = op.at - base_arena_;
  const i64 g = group_of(a);
  const GroupGeometry& geometry = geometry_.groups[g];
  if (op.a == geometry.arena_slots[a - first_[g]] - 1) {
    i64& page = scratch_pages_[a];
    if (page != (mapped ? -1 : op.b)) throw SpecError("map: the scratch slot shows page " + std::to_string(page));
    page = mapped ? op.b : -1;
    return;
  }
  const i64 row = op.a / row_slots(g, a), slot = op.a % row_slots(g, a);
  add_rows(row + 1);
  Extent& e = extent(row, a);
  if (slot + op.c > row_slots(g, a)) throw SpecError("map: a run leaves its row");
  for (i64 i = 0; i < op.c; ++i) {
    const i64 now = slot + i < static_cast<i64>(e.pages.size()) ? e.pages[slot + i] : -1;
    if (now != (mapped ? -1 : op.b + i)) {
      throw SpecError(std::string(mapped ? "map" : "unmap") + ": row " + std::to_string(row) + ", slot " +
                      std::to_string(slot + i) + " shows page " + std::to_string(now));
    }
  }
  if (static_cast<i64>(e.pages.size()) < slot + op.c) e.pages.resize(slot + op.c, -1);
  for (i64 i = 0; i < op.c; ++i) e.pages[slot + i] = mapped ? static_cast<i32>(op.b + i) : -1;
  const i64 sign = mapped ? 1 : -1;
  e.count += sign * op.c;
  rows_[row].slots += sign * op.c;
  if (e.count == 0) {
    e.lo = e.hi = e.solid = 0;
  } else if (mapped) {
    const bool first = e.count == op.c;
    e.lo = first ? slot : std::min(e.lo, slot);
    if (first || slot > e.hi) e.solid = slot;
    e.hi = first ? slot + op.c : std::max(e.hi, slot + op.c);
    while (e.solid > e.lo && e.pages[e.solid - 1] >= 0) --e.solid;
  } else {
    while (e.pages[e.lo] < 0) ++e.lo;
    while (e.pages[e.hi - 1] < 0) --e.hi;
    if (slot + op.c > e.solid && slot + op.c < e.hi) e.solid = slot + op.c;
    for (e.solid = std::min(e.solid, e.hi); e.solid > e.lo && e.pages[e.solid - 1] >= 0;) --e.solid;
  }
  room_.of(row)[g] = -1;
  if (mapped) may_give(row);
  if (rows_[row].index >= 0) {
    forget_room(rows_[row].index, g);
  } else if (row > 0 && rows_[row].holds.empty()) {
    file_empty(row);
  }
}

void VirtualRows::on_content(const Op& op, bool undo) {
  const i32 node = static_cast<i32>(op.a);
  if (!undo) index_.expect_change();
  if (op.kind == OpKind::aside) return index_.set_aside({node, static_cast<i32>(op.b)});
  if (op.kind == OpKind::back) return index_.put_back({node, static_cast<i32>(op.b)});
  if (op.kind == OpKind::demote) return on_demote(op, undo);
  if (const i32 window = window_of(op); window >= 0) {
    op.kind == OpKind::hold ? reveal(op.b, index_.ordinal(node), window, op.d, undo)
                            : conceal(op.b, index_.ordinal(node), window, undo);
  } else if (op.kind == OpKind::hold) {
    hold(op.b, node, (op.c & 1) != 0, op.c >> 1, op.d, undo);
  } else {
    unhold(op.b, node, (op.c & 1) != 0, undo);
  }
}

// As on_content() would have it: what an `evict` gave up can be given up again.
bool VirtualRows::can_give_up(const Op& op) const {
  const Row& row = rows_[op.b];
  const i32 node = static_cast<i32>(op.a), window = window_of(op);
  const i64 ordinal = index_.ordinal(node);
  if (window >= 0) {
    const bool there = ordinal < static_cast<i64>(row.holds.size()) && row.holds[ordinal].node == node;
    return there && shown(op.b, ordinal, window).here &&
           (index_.needs(node, window) == 0 || is_passed_copy(op.b, ordinal, window));
  }
  const bool last = row.index < 0 && !row.holds.empty() && row.holds.back().node == node;
  for (i32 w = 0; last && w < index_.windows(); ++w) {
    if (shown(op.b, ordinal, w).here && index_.needs(node, w) > 0 && index_.window_places(node, w) == 1) return false;
  }
  return last && (index_.places(node) > 1 || !index_.used(node));
}

void VirtualRows::hold(i64 row, i32 node, bool state, i64 windows, i64 after, bool undo) {
  Row& r = rows_[row];
  const i64 all_windows = index_.windows();
  if (!undo) r.given = pool_.transactions;
  if (static_cast<i64>(holder_.size()) < index_.capacity()) {
    shower_.resize(index_.capacity() * index_.windows(), -1);
    if (has_state_) state_row_.resize(index_.capacity(), -1);
    holder_.resize(index_.capacity(), -1);  // last: should one of them find no memory, all is tried again
  }
  if (all_windows > 0) r.shown.resize((r.holds.size() + 1) * all_windows);
  const auto ordinal = [&] { return index_.ordinal(node); };  // needed of rows that hold the same only
  Hold hold;
  hold.node = node, hold.previous = after == 0 ? -1 : static_cast<i32>(after);
  hold.next = after == 0 ? holder_[node] : rows_[after].holds[ordinal()].next;
  r.holds.push_back(hold);
  (after == 0 ? holder_[node] : rows_[after].holds[ordinal()].next) = static_cast<i32>(row);
  if (hold.next >= 0) rows_[hold.next].holds[ordinal()].previous = static_cast<i32>(row);
  if (hold.next >= 0) file_double(hold.next);
  index_.place(node, -1, undo);
  for (i32 w = 0; w < all_windows; ++w) {
    if (needs_block(row, ordinal(), w)) index_.need(node, w);
    if (windows >> w & 1) reveal(row, ordinal(), w, 0, undo);
  }
  if (state) {
    r.state = node;
    state_row_[node] = static_cast<i32>(row);
    index_.note_state(node, true, undo);
  }
  if (r.index < 0) file_content(row);
}

void VirtualRows::unhold(i64 row, i32 node, bool state, bool undo) {
  const i64 ordinal = index_.ordinal(node);
  if (state) {
    rows_[row].state = kNoNode;
    state_row_[node] = -1;
    index_.note_state(node, false, undo);
  }
  for (i32 w = index_.windows(); w-- > 0;) {
    if (shown(row, ordinal, w).here) conceal(row, ordinal, w, undo);
    if (needs_block(row, ordinal, w)) index_.unneed(node, w, undo);
  }
  const Hold hold = rows_[row].holds.back();
  (hold.previous >= 0 ? rows_[hold.previous].holds[ordinal].next : holder_[node]) = hold.next;
  if (hold.next >= 0) rows_[hold.next].holds[ordinal].previous = hold.previous;
  rows_[row].holds.pop_back();
  rows_[row].shown.resize(rows_[row].holds.size() * index_.windows());
  if (hold.previous >= 0) file_double(hold.previous);
  if (hold.next >= 0) file_double(hold.next);
  index_.displace(node, -1, undo);
  if (rows_[row].index < 0) file_content(row);
}

void VirtualRows::reveal(i64 row, i64 ordinal, i32 window, i64 after, bool undo) {
  const i32 node = rows_[row].holds[ordinal].node;
  i32& link = after == 0 ? shower_[node * index_.windows() + window] : shown(after, ordinal, window).next;
  Shown& s = shown(row, ordinal, window);
  s.here = true;
  s.next = link, s.previous = after == 0 ? -1 : static_cast<i32>(after);
  if (s.next >= 0) shown(s.next, ordinal, window).previous = static_cast<i32>(row);
  link = static_cast<i32>(row);
  index_.gain(node, window, undo);
}

void VirtualRows::conceal(i64 row, i64 ordinal, i32 window, bool undo) {
  const i32 node = rows_[row].holds[ordinal].node;
  Shown& s = shown(row, ordinal, window);
  (s.previous >= 0 ? shown(s.previous, ordinal, window).next : shower_[node * index_.windows() + window]) = s.next;
  if (s.next >= 0) shown(s.next, ordinal, window).previous = s.previous;
  s = Shown();
  may_give(row);
  index_.lose(node, window, undo);
}

void VirtualRows::need_blocks(i64 row, i32 window, i64 from, i64 to, bool undo) {
  for (i64 k = from; k < to; ++k) index_.need(rows_[row].holds[k].node, window, undo);
}

// The last block first, as those of other groups, which leave with the sequence's chain.
void VirtualRows::unneed_blocks(i64 row, i32 window, i64 from, i64 to, bool undo) {
  for (i64 k = to; k-- > from;) index_.unneed(rows_[row].holds[k].node, window, undo);
}

void VirtualRows::on_front(i64 index, i64 group, i64 old_first, i64 first, bool undo) {
  const i32 window = index_.window_of(group);
  const i64 row = row_of_[index];
  if (window < 0 || row < 0) return;
  const i64 from = ceil_div(std::min(old_first, first), index_.block_tokens());
  const i64 to = std::min(blocks_of(row), ceil_div(std::max(old_first, first), index_.block_tokens()));
  first > old_first ? unneed_blocks(row, window, from, to, undo) : need_blocks(row, window, from, to, undo);
}

i64 VirtualRows::mapped_windows(i64 row, i64 index, i64 ordinal) const {
  i64 windows = 0;
  for (i32 w = 0; w < index_.windows(); ++w) {
    const bool reached = ordinal >= first_block(index, w);
    windows |= i64{reached && is_whole_in(row, index_.group_of(w), ordinal)} << w;
  }
  return windows;
}

bool VirtualRows::is_whole_in(i64 row, i64 g, i64 ordinal) const {
  const i64 size = index_.block_tokens();
  for (i64 a = first_[g]; a < first_[g + 1]; ++a) {
    const Extent& e = extent(row, a);
    const i64 from = quotient(ordinal * size * token_bytes(g, a), page_bytes());
    const i64 to = ceil_div((ordinal + 1) * size * token_bytes(g, a), page_bytes());
    if (from < e.lo || to > e.hi) return false;
    for (i64 slot = from; slot < std::min(to, e.solid); ++slot) {
      if (e.pages[slot] < 0) return false;
    }
  }
  return true;
}

VirtualRows::Spare VirtualRows::spare(i64 row, i64 g, i64 a, bool ahead) const {
  const Extent& e = extent(row, a);
  const Row& r = rows_[row];
  const Growth growth = geometry_.groups[g].growth;
  const i32 window = index_.window_of(g);
  i64 blocks = e.count == 0 ? 0 : blocks_of(row);  // up to the last one whose memory counts
  const i64 block_bytes = index_.block_tokens() * token_bytes(g, a);
  // Not before what is mapped: a long row may show nothing in a window any more.
  while (window >= 0 && blocks * block_bytes > e.lo * page_bytes() && !shown(row, blocks - 1, window).here) --blocks;
  const i64 content = blocks * block_bytes;
  Spare s{e.hi, e.hi, e.hi};
  if (r.index >= 0) {
    i64 lo, hi;
    needed(row, g, a, &lo, &hi);
    s.end = std::max(ahead ? std::min(with_ahead(g, a, hi), e.hi) : hi, e.lo);
    s.to = std::min(lo, e.hi);
    s.from = std::max(e.lo, ceil_div(content, page_bytes()));  // what is known stays until it is evicted
  } else if (growth == Growth::fixed) {
    const bool state = !r.holds.empty() && r.state == r.holds.back().node;
    s.end = !state ? e.lo : std::min(e.hi, std::max(e.lo, ceil_div(token_bytes(g, a), page_bytes())));
  } else {
    s.end = std::min(e.hi, std::max(e.lo, ceil_div(content, page_bytes())));
  }
  s.from = std::min(s.from, s.to);
  return s;
}

// The content of a parked row says where it stands, and which of its slots are needed.
void VirtualRows::file_content(i64 row) {
  may_give(row);
  file_empty(row);
  file_double(row);
}

void VirtualRows::check_content(std::vector<std::string>* out) const {
  std::unordered_map<i32, i32> rows_of;
  for (i64 row = 0; row < rows_.size(); ++row) {
    const Row& r = rows_[row];
    const auto say = [&](const std::string& what) { out->push_back("row " + std::to_string(row) + ": " + what); };
    for (std::size_t i = 0; i < r.holds.size(); ++i) {
      const i32 node = r.holds[i].node, before = i == 0 ? kNoNode : r.holds[i - 1].node;
      ++rows_of[node];
      if (index_.ordinal(node) != static_cast<i64>(i)) say("holds a block at the wrong place");
      if (i > 0 && index_.parent(node) != before) say("its content is no chain");
      const i32 linked = r.holds[i].previous < 0 ? holder_[node] : rows_[r.holds[i].previous].holds[i].next;
      if (linked != row) say("not among the rows that hold its content");
    }
    if (r.index >= 0 && content_tokens(row) > sequences_.committed(r.index, main_group()))
      say("holds more than is valid");
    for (i64 a = 0; a < arenas_ && !r.holds.empty(); ++a) {
      const i64 g = group_of(a);
      if (geometry_.groups[g].growth != Growth::token) continue;
      if (geometry_.groups[g].window_tokens > 0) continue;
      const Extent& e = extent(row, a);
      const bool mapped = e.lo == 0 && e.hi >= ceil_div(content_tokens(row) * token_bytes(g, a), page_bytes());
      if (!mapped) say("its content is not mapped");
    }
  }
  check_shown(out);
  for (const auto& [node, rows] : rows_of) {
    if (index_.places(node) != rows) out->push_back("cached block " + std::to_string(node) + ": rows counted wrongly");
  }
}

// Windows: what rows show is mapped, is counted, and what sequences need is not to be evicted.
void VirtualRows::check_shown(std::vector<std::string>* out) const {
  std::unordered_map<i64, i32> places, needs;
  for (i64 row = 0; row < rows_.size(); ++row) {
    const auto say = [&](const std::string& what) { out->push_back("row " + std::to_string(row) + ": " + what); };
    for (i64 k = 0; k < blocks_of(row); ++k) {
      for (i32 w = 0; w < index_.windows(); ++w) {
        const Shown& s = shown(row, k, w);
        const i64 part = i64{rows_[row].holds[k].node} * index_.windows() + w;
        places[part] += s.here;
        needs[part] += needs_block(row, k, w);
        if (s.here && !is_whole_in(row, index_.group_of(w), k)) say("shows a block that is not mapped");
        const i32 linked = !s.here ? -1 : s.previous < 0 ? shower_[part] : shown(s.previous, k, w).next;
        if (s.here && linked != row) say("not among the rows that show its content");
        if (!s.here && needs_block(row, k, w)) say("its sequence needs a block that it does not show");
      }
    }
  }
  for (const auto& [part, count] : places) {
    const i32 node = static_cast<i32>(part / index_.windows()), w = static_cast<i32>(part % index_.windows());
    if (index_.window_places(node, w) != count) out->push_back("what windows show of a block is counted wrongly");
    const bool pinned = index_.pinned(node);
    if (index_.needs(node, w) < needs[part] || (!pinned && index_.needs(node, w) != needs[part]))
      out->push_back("what sequences need of a block is counted wrongly");
  }
}

// A row that is missing from a list would never be found again.
void VirtualRows::check_lists(i64 row, std::vector<std::string>* out) const {
  const Row& r = rows_[row];
  const auto say = [&](const char* what) { out->push_back("row " + std::to_string(row) + ": " + what); };
  const bool empty = r.index < 0 && r.holds.empty(), listed = empty_.count({r.slots, row}) > 0;
  if (listed != empty || r.entry.empty() != listed) say("wrongly among the empty rows, or wrongly not");
  const bool twice = r.index < 0 && !r.holds.empty() && index_.places(r.holds.back().node) > 1;
  if (doubles_.has(row) != twice) say("wrongly among the rows whose content lies elsewhere too, or wrongly not");
  if ((r.index < 0 ? bound_ : parked_).has(row)) say("in the list for rows of the other kind");
  if ((r.index < 0 ? parked_ : bound_).has(row)) return;
  for (i64 a = 0; a < arenas_; ++a) {
    const Extent& e = extent(row, a);
    const Spare s = spare(row, group_of(a), a, true);
    const bool front =
        s.from < s.to &&
        std::any_of(e.pages.begin() + s.from, e.pages.begin() + s.to, [](i32 page) { return page >= 0; });
    if (front || s.end < e.hi) return say("has pages to spare that nobody would find");
  }
}

void VirtualRows::check(std::vector<std::string>* out) const {
  check_content(out);
  std::unordered_map<i32, i32> seen;
  const auto say = [out](i64 row, const std::string& what) {
    out->push_back("row " + std::to_string(row) + ": " + what);
  };
  for (i64 row = 0; row < rows_.size(); ++row) {
    const Row& r = rows_[row];
    i64 slots = 0;
    for (i64 a = 0; a < arenas_; ++a) {
      const Extent& e = extent(row, a);
      slots += e.count;
      const bool windowed = geometry_.groups[group_of(a)].window_tokens > 0;
      if (e.count != e.hi - e.lo && !windowed) say(row, "a hole in the mapped range of arena " + std::to_string(a));
      for (i64 slot = e.solid; slot < e.hi; ++slot) {
        if (e.pages[slot] < 0) say(row, "a hole where it is to be solid");
      }
      for (i64 slot = e.lo; slot < e.hi; ++slot) {
        if (e.pages[slot] >= 0) ++seen[e.pages[slot]];
      }
      if (r.index < 0) continue;
      const i64 g = group_of(a), tokens = sequences_.tokens(r.index, g);
      if (tokens == sequences_.front(r.index, g)) continue;  // it needs none of them
      if (e.hi < high_slot(g, a, tokens)) say(row, "the frontier lies before the end of its tokens");
      if (e.solid > low_slot(g, a, sequences_.front(r.index, g))) say(row, "its first tokens are not mapped");
      if (!copy_tail_[r.index * groups_ + g] && first_shared(row, a, tokens) < e.hi) {
        say(row, "it would come to write in a page that another row shows");
      }
    }
    if (slots != r.slots)
      say(row, "counted " + std::to_string(slots) + " mapped slots, noted " + std::to_string(r.slots));
    if (r.index >= 0 && (!sequences_.live(r.index) || row_of_[r.index] != row)) say(row, "bound to no live sequence");
    if (row > 0) check_lists(row, out);
  }
  i64 distinct = 0;
  for (const auto& [page, count] : seen) {
    ++distinct;
    if (pool_.refs(page) != count) {
      out->push_back("invariant 3: page " + std::to_string(page) + " is mapped " + std::to_string(count) +
                     " times, counted " + std::to_string(pool_.refs(page)));
    }
  }
  if (distinct != owned_pages) {
    out->push_back("invariant 1: " + std::to_string(distinct) + " pages are mapped here, counted " +
                   std::to_string(owned_pages));
  }
}

void VirtualRows::digest(Hasher& hash) const {
  PageTable::digest(hash);
  for (i64 row = 0; row < rows_.size(); ++row) {
    const Row& r = rows_[row];
    // One that is as it came is no change: it stays when the call that wanted it is taken back.
    if (r.index < 0 && r.fence == 0 && r.slots == 0 && !r.maybe_shared && r.holds.empty()) continue;
    hash.add(row, r.index, r.fence, r.slots, r.maybe_shared, r.state);
    for (const Hold& hold : r.holds) hash.add(hold.node, hold.next, hold.previous);
    for (i64 a = 0; a < arenas_; ++a) {
      const Extent& e = extent(row, a);
      hash.add(e.lo, e.hi, e.count);
      for (i64 slot = e.lo; slot < e.hi; ++slot) hash.add(e.pages[slot]);
    }
  }
  hash.add_all(row_of_);
  hash.add_all(copy_tail_);
  for (const IdList* list : {&doubles_, &parked_, &bound_}) list->digest(hash);
  for (const auto& [slots, row] : empty_) {
    if (slots > 0) hash.add(slots, row);
  }
}

}  // namespace kvmem
