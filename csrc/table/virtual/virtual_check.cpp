// check() and digest() of the virtual backend: every derived number is counted again.

#include "table/virtual/virtual_rows.h"

namespace kvmem {

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
    if (index_.copies(node) != rows) out->push_back("cached block " + std::to_string(node) + ": rows counted wrongly");
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
    if (index_.window_copies(node, w) != count) out->push_back("what windows show of a block is counted wrongly");
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
  const bool twice = r.index < 0 && !r.holds.empty() && index_.copies(r.holds.back().node) > 1;
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
