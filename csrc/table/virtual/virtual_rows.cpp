#include "table/virtual/virtual_rows.h"

namespace kvmem {

VirtualRows::VirtualRows(const TableContext& context, GrowthMarks& marks)
    : TableContext(context),
      marks_(marks),
      rows_(geometry_.rows, 1),
      row_of_(geometry_.max_sequences, -1),
      duplicates_(pool_.journal),
      parked_(pool_.journal),
      bound_(pool_.journal),
      extents_(geometry_.rows, arenas_),
      room_(geometry_.rows, groups_, -1),
      ready_(geometry_.rows, groups_, -1),
      scratch_pages_(arenas_, -1) {
  if (guarded_) finite_ = RowArray<Finite>(geometry_.rows, groups_);
  add_rows(1);  // the reserved blocks
}

VirtualRows::~VirtualRows() {
  pool_.drain();
  for (i64 row = 0; row < rows_.size(); ++row) {
    for (i64 a = 0; a < arenas_; ++a) {
      for (const i32 page : extent(row, a).pages) {
        if (page >= 0) pool_.drop_page(page);
      }
    }
  }
}

void VirtualRows::add_rows(i64 rows) {
  if (rows <= rows_.size()) return;
  KVMEM_ASSERT(rows <= geometry_.rows, "there are addresses for the rows");
  for (IdList* list : {&duplicates_, &parked_, &bound_}) list->reserve(rows);
  extents_.grow(rows);
  room_.grow(rows), ready_.grow(rows);
  if (guarded_) finite_.grow(rows);
  for (i64 row = rows_.size(); row < rows; ++row) {
    const auto entry = row > 0 ? empty_.emplace_hint(empty_.end(), 0, row) : empty_.end();
    rows_.grow(row + 1);
    rows_[row].in_empty = entry;
  }
}

// ---- what is derived -----------------------------------------------------------------------------

VirtualRows::Unneeded VirtualRows::unneeded(i64 row, i64 g, i64 a, bool ahead) const {
  const Extent& e = extent(row, a);
  const Row& r = rows_[row];
  Unneeded u{e.hi, e.hi, e.hi};
  i64 blocks = e.count == 0 ? 0 : blocks_of(row);  // up to the last one whose memory counts
  const i64 block_bytes = index_.block_tokens() * token_bytes(g, a);
  if (r.index >= 0) {
    i64 lo, hi;
    needed(row, g, a, &lo, &hi);
    u.to = std::min(lo, e.hi);
    u.end = std::max(ahead ? std::min(with_ahead(g, a, hi), e.hi) : hi, e.lo);
  }
  if (const i32 window = index_.window_of(g); window >= 0) {
    // What the window itself needs lies behind u.to. The search ends where the mapped slots begin: a window may have no
    // part of any block of a long row.
    if (r.index >= 0) blocks = std::min(blocks, ceil_div(u.to * page_bytes(), block_bytes));
    while (blocks * block_bytes > e.lo * page_bytes() && !part(row, blocks - 1, window).present) --blocks;
  }
  if (r.index < 0 && has_state(g)) {
    const bool state = !r.holds.empty() && r.state == r.holds.back().node;
    u.end = !state ? e.lo : std::min(e.hi, std::max(e.lo, ceil_div(token_bytes(g, a), page_bytes())));
    return u;
  }
  const i64 content_end = std::max(e.lo, ceil_div(blocks * block_bytes, page_bytes()));  // stays until it is evicted
  if (r.index < 0) {
    u.end = std::min(e.hi, content_end);
  } else {
    u.from = std::min(content_end, u.to);
  }
  return u;
}

bool VirtualRows::holds(i64 index, i64 group) const {
  const i64 row = row_of_[index], tokens = sequences_.tokens(index, group);
  if (tokens == 0) return sequences_.live(index) || row < 0;
  if (tokens == sequences_.front(index, group)) return row > 0;  // a window of one token needs no earlier one
  for (i64 a = first_[group]; row > 0 && a < first_[group + 1]; ++a) {
    const Extent& e = extent(row, a);
    const i64 lo = low_slot(group, a, sequences_.front(index, group));
    if (e.solid > lo || e.hi < high_slot(group, a, tokens)) return false;
    if (!marks_.copy_tail(index, group) && first_shared(row, a, tokens) < e.hi) return false;
  }
  return row > 0;
}

bool VirtualRows::is_mapped(i64 a, i64 slot, i64 count) const {
  const i64 g = group_of(a);
  if (slot == scratch_slot(a)) return count == 1 && scratch_pages_[a] >= 0;
  if (slot / row_slots(g, a) >= rows_.size()) return false;
  const Extent& e = extent(slot / row_slots(g, a), a);
  const i64 first = slot % row_slots(g, a);
  bool all = true;
  for (i64 i = first; all && i < first + count; ++i) all = e.page(i) >= 0;
  return all;
}

bool VirtualRows::is_whole(const Op& op) const {
  const i64 a = local_arena(op.at);
  if (!is_own_arena(op.at)) return true;
  if (op.a == scratch_slot(a)) return scratch_pages_[a] < 0;
  const i64 g = group_of(a);
  const Extent& e = extent(op.a / row_slots(g, a), a);
  return e.count == e.hi - e.lo || geometry_.groups[g].window_tokens > 0;
}

// A row may have its own pages before shared ones, because a window's blocks can come from several rows.
i64 VirtualRows::first_shared(i64 row, i64 a, i64 tokens) const {
  const Extent& e = extent(row, a);
  i64 slot = std::max(e.lo, settled_bytes(group_of(a), a, tokens) / page_bytes());
  while (slot < e.hi && (e.pages[slot] < 0 || !must_copy(e.pages[slot]))) ++slot;
  return slot;
}

i64 VirtualRows::room(i64 row, i64 group) {
  i64& room = room_.of(row)[group];
  if (room >= 0) return room;
  const i64 front = rows_[row].index < 0 ? 0 : sequences_.front(rows_[row].index, group);
  room = geometry_.groups[group].max_tokens;
  for (i64 a = first_[group]; a < first_[group + 1]; ++a) {
    const Extent& e = extent(row, a);
    const i64 mapped = quotient(e.hi * page_bytes(), token_bytes(group, a));
    i64 here = settled_tokens(geometry_.groups[group], mapped) - guard_tokens(group);
    const bool reached = e.count > 0 && e.solid <= low_slot(group, a, front);
    if (!reached) here = 0;
    if (!reached || e.hi < row_slots(group, a)) room = std::min(room, std::max(i64{0}, here));
  }
  return room;
}

i64 VirtualRows::usable_room(i64 row, i64 group) {
  Row& r = rows_[row];
  i64 tokens = -1;
  if (r.job != 0) {
    // A job that failed counts as running: the next settle() undoes what it did not map.
    if (r.job > pool_.mapper().done() || pool_.mapper().has_failed()) {
      tokens = ready_.of(row)[group];
    } else {
      r.job = 0;
      for (i64 g = 0; g < groups_; ++g) ready_.of(row)[g] = -1;
    }
  }
  if (tokens < 0) tokens = room(row, group);
  if (!guarded_) return tokens;
  const Finite& f = finite_.of(row)[group];
  return f.to >= f.dirty_to ? tokens : std::min(tokens, f.to - guard_tokens(group));
}

// ---- bindings and mappings -----------------------------------------------------------------------

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
    for (i64 g = 0; guarded_ && !undo && g < groups_; ++g) marks_.reset_truncated(index, g);
    for (i32 w = 0; w < index_.windows(); ++w) need_blocks(op.b, w, first_block(index, w), blocks_of(op.b), undo);
  } else if (op.kind == OpKind::unbind) {
    if (row_of_[index] < 0 || row_of_[index] != op.b) throw SpecError("unbind: not the row of this sequence");
    row_of_[index] = -1;
    for (i32 w = 0; w < index_.windows(); ++w) unneed_blocks(op.b, w, first_block(index, w), blocks_of(op.b), undo);
    set_sequence(op.b, -1);
  } else {
    throw SpecError("block: the virtual backend has no block table");
  }
  reset_room_of(op.b, index);
  KVMEM_ASSERT((row_of_[index] == op.b) == (rows_[op.b].index == index), "sequence and row name each other");
}

void VirtualRows::set_sequence(i64 row, i64 index) {
  KVMEM_ASSERT((rows_[row].index < 0) != (index < 0), "a row is bound and unbound in turn");
  has_nothing_to_reclaim(row);  // it leaves the list of its kind
  rows_[row].index = index;
  may_reclaim(row);
  update_empty(row);
  update_duplicate(row);
}

void VirtualRows::change(const Op& op, bool mapped) {
  const i64 a = local_arena(op.at), g = group_of(a);
  if (op.a == scratch_slot(a)) return change_scratch(op, a, mapped);
  const i64 row = op.a / row_slots(g, a), slot = op.a % row_slots(g, a);
  add_rows(row + 1);
  Extent& e = mutable_extent(row, a);
  if (slot + op.c > row_slots(g, a)) throw SpecError("map: a run leaves its row");
  for (i64 i = 0; i < op.c; ++i) {
    const i64 now = e.page(slot + i);
    if (now != (mapped ? -1 : op.b + i)) {
      throw SpecError(std::string(mapped ? "map" : "unmap") + ": row " + std::to_string(row) + ", slot " +
                      std::to_string(slot + i) + " shows page " + std::to_string(now));
    }
  }
  if (static_cast<i64>(e.pages.size()) < slot + op.c) e.pages.resize(slot + op.c, -1);
  for (i64 i = 0; i < op.c; ++i) e.pages[slot + i] = mapped ? static_cast<i32>(op.b + i) : -1;
  rows_[row].slots += mapped ? op.c : -op.c;
  update_extent(e, slot, op.c, mapped);
  room_.of(row)[g] = -1;
  if (mapped) may_reclaim(row);
  if (rows_[row].index >= 0) {
    marks_.reset_room(rows_[row].index, g);
  } else if (row > 0 && rows_[row].holds.empty()) {
    update_empty(row);
  }
}

void VirtualRows::change_scratch(const Op& op, i64 a, bool mapped) {
  i64& page = scratch_pages_[a];
  if (page != (mapped ? -1 : op.b)) throw SpecError("map: the scratch slot shows page " + std::to_string(page));
  page = mapped ? op.b : -1;
}

// Slots [slot, slot + n) were mapped or unmapped.
void VirtualRows::update_extent(Extent& e, i64 slot, i64 n, bool mapped) {
  e.count += mapped ? n : -n;
  KVMEM_ASSERT(e.count >= 0, "slots are counted");
  if (e.count == 0) {
    e.lo = e.hi = e.solid = 0;
  } else if (mapped) {
    const bool first = e.count == n;
    e.lo = first ? slot : std::min(e.lo, slot);
    if (first || slot > e.hi) e.solid = slot;
    e.hi = first ? slot + n : std::max(e.hi, slot + n);
    while (e.solid > e.lo && e.pages[e.solid - 1] >= 0) --e.solid;
  } else {
    while (e.pages[e.lo] < 0) ++e.lo;
    while (e.pages[e.hi - 1] < 0) --e.hi;
    if (slot + n > e.solid && slot + n < e.hi) e.solid = slot + n;
    for (e.solid = std::min(e.solid, e.hi); e.solid > e.lo && e.pages[e.solid - 1] >= 0;) --e.solid;
  }
  KVMEM_ASSERT(e.lo <= e.solid && e.solid <= e.hi && e.count <= e.hi - e.lo, "the extent encloses what is mapped");
}

// ---- marks and lists -----------------------------------------------------------------------------

void VirtualRows::note_shared() {
  const auto is_shared = [this](i32 page) { return page >= 0 && pool_.refs(page) > 1; };
  for (i64 row = 1; row < rows_.size(); ++row) {
    for (i64 a = 0; a < arenas_ && !rows_[row].maybe_shared; ++a) {
      const std::vector<i32>& pages = extent(row, a).pages;
      if (std::any_of(pages.begin(), pages.end(), is_shared)) set_maybe_shared(row, true);
    }
  }
}

void VirtualRows::pin_end(i32 node, bool pinned) {
  if (pinned) {
    ++pin_ends_[node];  // may throw std::bad_alloc, and has changed nothing then
    return;
  }
  const auto found = pin_ends_.find(node);
  KVMEM_ASSERT(found != pin_ends_.end(), "a pin ends at the node");
  if (--found->second == 0) pin_ends_.erase(found);
}

void VirtualRows::mark_dirty(i64 row) {
  for (i64 g = 0; g < groups_; ++g) {
    Finite& f = finite_.of(row)[g] = Finite();
    if (has_state(g)) continue;  // no kernel reads behind a state
    for (i64 a = first_[g]; a < first_[g + 1]; ++a) {
      f.dirty_to = std::max(f.dirty_to, ceil_div(extent(row, a).hi * page_bytes(), token_bytes(g, a)));
    }
  }
}

// What a bound row had mapped beyond its guard was zeroed when it was mapped, and must be zeroed again before the
// sequence reaches it.
void VirtualRows::on_rewritten(const Op& unmap) {
  const i64 a = local_arena(unmap.at), g = group_of(a), row = unmap.a / row_slots(g, a);
  if (!guarded_ || row >= rows_.size() || rows_[row].index < 0) return;
  mark_dirty(row);
  for (i64 group = 0; group < groups_; ++group) marks_.reset_room(rows_[row].index, group);
}

void VirtualRows::finish() {
  for (const auto& [finite, to] : zeroed_) {
    KVMEM_ASSERT(to <= finite->dirty_to, "only what may hold anything is zeroed");
    finite->to = to;
  }
  zeroed_.clear();
}

void VirtualRows::may_reclaim(i64 row) {
  if (row == 0 || rows_[row].slots == 0) return;
  IdList& list = rows_[row].index < 0 ? parked_ : bound_;
  if (list.has(row)) return;
  // The row that was parked first leads the list, also where a row returns to it.
  if (&list == &parked_ && rows_[list.last()].fence > rows_[row].fence) {
    list.add_first(row);
  } else {
    list.add_last(row);
  }
}

void VirtualRows::update_empty(i64 row) {
  Row& r = rows_[row];
  const bool belongs = r.index < 0 && r.holds.empty();
  if (r.entry.empty()) {
    if (belongs && r.in_empty->first == r.slots) return;
    r.entry = empty_.extract(r.in_empty);
  }
  if (!belongs) return;
  r.entry.value() = {r.slots, row};
  r.in_empty = empty_.insert(std::move(r.entry)).position;
  KVMEM_ASSERT(r.entry.empty(), "the row was not in the set");
}

void VirtualRows::update_duplicate(i64 row) {
  const Row& r = rows_[row];
  const bool belongs = r.index < 0 && !r.holds.empty() && (r.holds.back().next >= 0 || r.holds.back().previous >= 0);
  if (belongs == duplicates_.has(row)) return;
  if (belongs) {
    duplicates_.add_last(row);
  } else {
    duplicates_.remove(row);
  }
}

// The content of a parked row has changed, and with it which of its slots are needed.
void VirtualRows::update_lists(i64 row) {
  may_reclaim(row);
  update_empty(row);
  update_duplicate(row);
}

}  // namespace kvmem
