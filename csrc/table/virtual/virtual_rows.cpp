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
    reset_room_of(op.b, index);
  } else if (op.kind == OpKind::unbind) {
    if (row_of_[index] < 0 || row_of_[index] != op.b) throw SpecError("unbind: not the row of this sequence");
    row_of_[index] = -1;
    for (i32 w = 0; w < index_.windows(); ++w) unneed_blocks(op.b, w, first_block(index, w), blocks_of(op.b), undo);
    set_sequence(op.b, -1);
    reset_room_of(op.b, index);
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

void VirtualRows::set_sequence(i64 row, i64 index) {
  IdList& list = rows_[row].index < 0 ? parked_ : bound_;
  if (list.has(row)) list.remove(row);
  rows_[row].index = index;
  may_reclaim(row);
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
  for (i64 group = 0; group < groups_; ++group) reset_room(rows_[row].index, group);
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
  if (mapped) may_reclaim(row);
  if (rows_[row].index >= 0) {
    reset_room(rows_[row].index, g);
  } else if (row > 0 && rows_[row].holds.empty()) {
    file_empty(row);
  }
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
  may_reclaim(row);
  file_empty(row);
  file_double(row);
}

}  // namespace kvmem
