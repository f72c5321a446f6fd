#include "virtual_rows.h"

#include <unordered_map>

#include "shared_parts.h"

namespace kvmem {

VirtualRows::VirtualRows(const Geometry& geometry, PagePool& pool, const Sequences& sequences, PrefixIndex& index)
    : PageTable(index, geometry),
      geometry_(geometry),
      pool_(pool),
      sequences_(sequences),
      rows_(geometry.rows),
      row_of_(geometry.max_sequences, -1),
      doubles_(pool.journal, geometry.rows),
      parked_(pool.journal, geometry.rows),
      bound_(pool.journal, geometry.rows) {
  limit_pages = pool.budget_pages();
  pool.add_owner(this);
  try {
    for (const GroupGeometry& group : geometry.groups) {
      first_.push_back(arenas_);
      has_windows_ = has_windows_ || group.window_tokens > 0;
      for (std::size_t i = 0; i < group.token_bytes.size(); ++i, ++arenas_) {
        const i32 arena = pool.add_arena(this, group.arena_slots[i]);
        if (arenas_ == 0) base_arena_ = arena;
      }
    }
  } catch (...) {
    pool.remove_owner(this);
    throw;
  }
  first_.push_back(arenas_);
  extents_.resize(rows_.size() * arenas_);
  scratch_pages_.assign(arenas_, -1);
  room_.assign(rows_.size() * groups_, -1);
  ready_.assign(rows_.size() * groups_, -1);
  copy_tail_.assign(row_of_.size() * groups_, 0);
  for (i64 row = 1; row < geometry.rows; ++row) {  // row 0 shows the trash blocks
    rows_[row].in_empty = empty_.emplace_hint(empty_.end(), 0, row);
  }
}

VirtualRows::~VirtualRows() {
  pool_.drain();
  for (const Extent& e : extents_) {
    for (i64 slot = e.lo; slot < e.hi; ++slot) {
      if (e.pages[slot] >= 0) pool_.drop_page(e.pages[slot]);
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
  return e.count == e.hi - e.lo;
}

bool VirtualRows::holds(i64 index, i64 group) const {
  const i64 row = row_of_[index], tokens = sequences_.tokens(index, group);
  if (tokens == 0) return sequences_.live(index) || row < 0;
  for (i64 a = first_[group]; row > 0 && a < first_[group + 1]; ++a) {
    const Extent& e = extent(row, a);
    const i64 lo = low_slot(group, a, sequences_.front(index, group));
    if (e.lo > lo || e.hi < high_slot(group, a, tokens) || e.count != e.hi - e.lo) return false;
    const i64 tail = tokens * token_bytes(group, a) / page_bytes();
    if (tail < e.hi && pool_.refs(e.pages[tail]) > 1 && !copy_tail_[index * groups_ + group]) return false;
  }
  return row > 0;
}

void VirtualRows::apply(const Op& op, bool) {
  const i64 index = sequences_.index(op.a);
  if (op.kind == OpKind::bind) {
    if (op.b <= 0 || op.b >= static_cast<i64>(rows_.size()) || rows_[op.b].index >= 0 || row_of_[index] >= 0) {
      throw SpecError("bind: row " + std::to_string(op.b) + " or the sequence is bound already");
    }
    row_of_[index] = static_cast<i32>(op.b);
    set_sequence(op.b, index);
    forget_room_of(op.b, index);
  } else if (op.kind == OpKind::unbind) {
    if (row_of_[index] < 0 || row_of_[index] != op.b) throw SpecError("unbind: not the row of this sequence");
    row_of_[index] = -1;
    set_sequence(op.b, -1);
    forget_room_of(op.b, index);
  } else {
    throw SpecError("block: the virtual backend has no block table");
  }
}

bool VirtualRows::is_mapped(i32 arena, i64 slot, i64 count) const {
  const i64 a = arena - base_arena_, g = group_of(a);
  if (slot == geometry_.groups[g].arena_slots[a - first_[g]] - 1) return count == 1 && scratch_pages_[a] >= 0;
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
    if (to <= from) return;
    if (!row.maybe_shared) pages += to - from;
    for (i64 slot = from; row.maybe_shared && slot < to; ++slot) ++shared[e.pages[slot]];
  };
  for (i64 row = 1; row < static_cast<i64>(rows_.size()); ++row) {
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

void VirtualRows::count_bytes(i64* used_bytes, i64* shared_bytes) const {
  std::vector<SharedPart> shared;  // in bytes of a page
  *used_bytes = 0;
  for (i64 index = 0; index < sequences_.capacity(); ++index) {
    const i64 row = row_of_[index];
    if (row < 0) continue;
    for (i64 g = 0; g < groups_; ++g) {
      const i64 front = sequences_.front(index, g), tokens = sequences_.tokens(index, g);
      for (i64 a = first_[g]; a < first_[g + 1]; ++a) {
        const i64 from = front * token_bytes(g, a), to = tokens * token_bytes(g, a);
        *used_bytes += to - from;
        if (!rows_[row].maybe_shared) continue;
        const Extent& e = extent(row, a);
        for (i64 slot = from / page_bytes(); slot * page_bytes() < to; ++slot) {
          if (pool_.refs(e.pages[slot]) <= 1) continue;
          const i64 start = slot * page_bytes();
          shared.push_back({e.pages[slot], std::max(from - start, i64{0}), std::min(to - start, page_bytes())});
          *used_bytes -= shared.back().to - shared.back().from;
        }
      }
    }
  }
  const SharedCount count = count_shared(shared);
  *used_bytes += count.length;
  *shared_bytes = count.pieces * page_bytes();
}

i64 VirtualRows::mapped_extent_slots(i64 group, i64 arena_in_group) const {
  const i64 a = first_[group] + arena_in_group;
  for (i64 row = static_cast<i64>(rows_.size()) - 1; row >= 0; --row) {
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
    e.lo = e.hi = 0;
  } else if (mapped) {
    e.lo = e.count == op.c ? slot : std::min(e.lo, slot);
    e.hi = std::max(e.hi, slot + op.c);
  } else {
    while (e.pages[e.lo] < 0) ++e.lo;
    while (e.pages[e.hi - 1] < 0) --e.hi;
  }
  room_[row * groups_ + g] = -1;
  if (mapped) may_give(row);
  if (rows_[row].index >= 0) {
    forget_room(rows_[row].index, g);
  } else if (row > 0 && rows_[row].holds.empty()) {
    file_empty(row);
  }
}

void VirtualRows::on_content(const Op& op, bool undo) {
  if (op.kind == OpKind::hold) {
    hold(op.b, static_cast<i32>(op.a), op.c == 1, op.d, undo);
  } else {
    unhold(op.b, static_cast<i32>(op.a), op.c == 1, undo);
  }
}

void VirtualRows::hold(i64 row, i32 node, bool state, i64 after, bool undo) {
  if (!undo) index_.expect_change();
  if (static_cast<i64>(holder_.size()) < index_.capacity()) holder_.resize(index_.capacity(), -1);
  const i64 ordinal = index_.ordinal(node);
  Hold hold;
  hold.node = node, hold.previous = after == 0 ? -1 : static_cast<i32>(after);
  hold.next = after == 0 ? holder_[node] : rows_[after].holds[ordinal].next;
  rows_[row].holds.push_back(hold);
  (after == 0 ? holder_[node] : rows_[after].holds[ordinal].next) = static_cast<i32>(row);
  if (hold.next >= 0) rows_[hold.next].holds[ordinal].previous = static_cast<i32>(row);
  if (hold.next >= 0) file_double(hold.next);
  if (state) rows_[row].state = node;
  index_.place(node, -1, undo);
  file_content(row);
}

void VirtualRows::unhold(i64 row, i32 node, bool state, bool undo) {
  if (!undo) index_.expect_change();
  const i64 ordinal = index_.ordinal(node);
  const Hold hold = rows_[row].holds.back();
  (hold.previous >= 0 ? rows_[hold.previous].holds[ordinal].next : holder_[node]) = hold.next;
  if (hold.next >= 0) rows_[hold.next].holds[ordinal].previous = hold.previous;
  rows_[row].holds.pop_back();
  if (hold.previous >= 0) file_double(hold.previous);
  if (hold.next >= 0) file_double(hold.next);
  if (state) rows_[row].state = kNoNode;
  index_.displace(node, -1, undo);
  file_content(row);
}

// The content of a parked row says where it stands, and which of its slots are needed.
void VirtualRows::file_content(i64 row) {
  if (rows_[row].index >= 0) return;
  may_give(row);
  file_empty(row);
  file_double(row);
}

void VirtualRows::check_content(std::vector<std::string>* out) const {
  std::unordered_map<i32, i32> rows_of;
  for (i64 row = 0; row < static_cast<i64>(rows_.size()); ++row) {
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
      if (geometry_.groups[g].window_tokens > 0) continue;  // what a window has passed may be gone
      const Extent& e = extent(row, a);
      const bool mapped = e.lo == 0 && e.hi >= ceil_div(content_tokens(row) * token_bytes(g, a), page_bytes());
      if (!mapped) say("its content is not mapped");
    }
  }
  for (const auto& [node, rows] : rows_of) {
    if (index_.places(node) != rows) out->push_back("cached block " + std::to_string(node) + ": rows counted wrongly");
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
    i64 lo, hi;
    wanted(row, group_of(a), a, &lo, &hi);
    if (e.lo < std::min(lo, e.hi) || std::max(hi, e.lo) < e.hi) return say("has pages to spare that nobody would find");
  }
}

void VirtualRows::check(std::vector<std::string>* out) const {
  check_content(out);
  std::unordered_map<i32, i32> seen;
  const auto say = [out](i64 row, const std::string& what) {
    out->push_back("row " + std::to_string(row) + ": " + what);
  };
  for (i64 row = 0; row < static_cast<i64>(rows_.size()); ++row) {
    const Row& r = rows_[row];
    i64 slots = 0;
    for (i64 a = 0; a < arenas_; ++a) {
      const Extent& e = extent(row, a);
      slots += e.count;
      if (e.count != e.hi - e.lo) say(row, "a hole in the mapped range of arena " + std::to_string(a));
      for (i64 slot = e.lo; slot < e.hi; ++slot) {
        if (e.pages[slot] >= 0) ++seen[e.pages[slot]];
      }
      if (r.index < 0) continue;
      const i64 g = group_of(a), tokens = sequences_.tokens(r.index, g);
      if (tokens == 0) continue;
      if (e.hi < high_slot(g, a, tokens)) say(row, "the frontier lies before the end of its tokens");
      if (e.lo > low_slot(g, a, sequences_.front(r.index, g))) say(row, "its first tokens are not mapped");
      const i64 tail = tokens * token_bytes(g, a) / page_bytes();
      if (tail < e.hi && e.pages[tail] >= 0 && pool_.refs(e.pages[tail]) > 1 && !copy_tail_[r.index * groups_ + g]) {
        say(row, "the next write would land in a page that another row shows");
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
  for (i64 row = 0; row < static_cast<i64>(rows_.size()); ++row) {
    const Row& r = rows_[row];
    hash.add(r.index, r.fence, r.slots, r.maybe_shared, r.state);
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
  for (const auto& [slots, row] : empty_) hash.add(slots, row);
}

}  // namespace kvmem
