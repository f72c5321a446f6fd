// check() and digest() of the metadata: every count is made again, every list and link is followed.

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
      if (index_.ordinal(node) != static_cast<i64>(i)) say("a block of its content has another ordinal");
      if (i > 0 && index_.parent(node) != before) say("its content is not a chain");
      const i32 linked = r.holds[i].previous < 0 ? holder_[node] : rows_[r.holds[i].previous].holds[i].next;
      if (linked != row) say("not linked to the rows with the same content");
    }
    if (r.index >= 0 && content_tokens(row) > sequences_.committed(r.index, main_group()))
      say("its content is longer than the committed tokens");
    for (i64 a = 0; a < arenas_ && !r.holds.empty(); ++a) {
      const i64 g = group_of(a);
      if (geometry_.groups[g].growth != Growth::token) continue;
      if (geometry_.groups[g].window_tokens > 0) continue;
      const Extent& e = extent(row, a);
      const bool mapped = e.lo == 0 && e.hi >= ceil_div(content_tokens(row) * token_bytes(g, a), page_bytes());
      if (!mapped) say("its content is not mapped");
    }
  }
  check_parts(out);
  for (const auto& [node, rows] : rows_of) {
    if (index_.copies(node) != rows) out->push_back("cached block " + std::to_string(node) + ": a wrong count of rows");
  }
}

// The parts of windows: they are mapped and counted, and the index knows which of them sequences need.
void VirtualRows::check_parts(std::vector<std::string>* out) const {
  std::unordered_map<i64, i32> copies, needs;
  for (i64 row = 0; row < rows_.size(); ++row) {
    const auto say = [&](const std::string& what) { out->push_back("row " + std::to_string(row) + ": " + what); };
    for (i64 k = 0; k < blocks_of(row); ++k) {
      for (i32 w = 0; w < index_.windows(); ++w) {
        const Part& p = part(row, k, w);
        const i64 key = i64{rows_[row].holds[k].node} * index_.windows() + w;
        copies[key] += p.present;
        needs[key] += needs_block(row, k, w);
        if (p.present && !is_mapped_block(row, index_.group_of(w), k)) say("a part that is present is not mapped");
        const i32 linked = !p.present ? -1 : p.previous < 0 ? part_row_[key] : part(p.previous, k, w).next;
        if (p.present && linked != row) say("not linked to the rows with the same part");
        if (!p.present && needs_block(row, k, w)) say("its sequence needs a part that is not present");
      }
    }
  }
  for (const auto& [key, count] : copies) {
    const i32 node = static_cast<i32>(key / index_.windows()), w = static_cast<i32>(key % index_.windows());
    if (index_.window_copies(node, w) != count) out->push_back("a wrong count of the copies of a part");
    const bool pinned = index_.pinned(node);
    if (index_.needs(node, w) < needs[key] || (!pinned && index_.needs(node, w) != needs[key]))
      out->push_back("a wrong count of the needs of a part");
  }
}

// Nothing would find a row that is missing from a list.
void VirtualRows::check_lists(i64 row, std::vector<std::string>* out) const {
  const Row& r = rows_[row];
  const auto say = [&](const char* what) { out->push_back("row " + std::to_string(row) + ": " + what); };
  const bool empty = r.index < 0 && r.holds.empty(), listed = empty_.count({r.slots, row}) > 0;
  if (listed != empty || r.entry.empty() != listed)
    say(empty ? "missing among the empty rows" : "wrongly among the empty rows");
  const bool twice = r.index < 0 && !r.holds.empty() && index_.copies(r.holds.back().node) > 1;
  if (duplicates_.has(row) != twice) say(twice ? "missing among the duplicates" : "wrongly among the duplicates");
  if ((r.index < 0 ? bound_ : parked_).has(row)) say("in the list of the other kind of rows");
  if ((r.index < 0 ? parked_ : bound_).has(row)) return;
  for (i64 a = 0; a < arenas_; ++a) {
    const Extent& e = extent(row, a);
    const Unneeded u = unneeded(row, group_of(a), a, true);
    const bool front =
        u.from < u.to &&
        std::any_of(e.pages.begin() + u.from, e.pages.begin() + u.to, [](i32 page) { return page >= 0; });
    if (front || u.end < e.hi) return say("has unneeded pages, and is in no list");
  }
}

// The mappings of a row, which are added to `mapped` by page.
void VirtualRows::check_mappings(i64 row, std::unordered_map<i32, i32>* mapped, std::vector<std::string>* out) const {
  const Row& r = rows_[row];
  const auto say = [&](const std::string& what) { out->push_back("row " + std::to_string(row) + ": " + what); };
  i64 slots = 0;
  for (i64 a = 0; a < arenas_; ++a) {
    const Extent& e = extent(row, a);
    const i64 g = group_of(a);
    slots += e.count;
    const bool windowed = geometry_.groups[g].window_tokens > 0;
    if (e.count != e.hi - e.lo && !windowed) say("a hole in the mapped range of arena " + std::to_string(a));
    for (i64 slot = e.lo; slot < e.hi; ++slot) {
      if (e.pages[slot] >= 0) ++(*mapped)[e.pages[slot]];
      if (e.pages[slot] < 0 && slot >= e.solid) say("a hole in its solid slots");
    }
    if (r.index < 0) continue;
    const i64 front = sequences_.front(r.index, g), tokens = sequences_.tokens(r.index, g);
    if (tokens == front) continue;  // it needs no slot
    if (e.hi < high_slot(g, a, tokens)) say("the mapped slots end before its tokens and their guard");
    if (e.solid > low_slot(g, a, front)) say("its first tokens are not mapped");
    if (!marks_.copy_tail(r.index, g) && first_shared(row, a, tokens) < e.hi) {
      say("its sequence would write to a page that another row shows");
    }
  }
  if (slots != r.slots) say("counted " + std::to_string(slots) + " mapped slots, noted " + std::to_string(r.slots));
}

void VirtualRows::check(i64 owned_pages, std::vector<std::string>* out) const {
  check_content(out);
  std::unordered_map<i32, i32> mapped;
  for (i64 row = 0; row < rows_.size(); ++row) {
    const i64 index = rows_[row].index;
    check_mappings(row, &mapped, out);
    if (index >= 0 && (!sequences_.live(index) || row_of_[index] != row)) {
      out->push_back("row " + std::to_string(row) + ": bound to no live sequence");
    }
    if (row > 0) check_lists(row, out);
  }
  for (const auto& [page, count] : mapped) {
    if (pool_.refs(page) != count) {
      out->push_back("invariant 3: page " + std::to_string(page) + " is mapped " + std::to_string(count) +
                     " times, counted " + std::to_string(pool_.refs(page)));
    }
  }
  if (static_cast<i64>(mapped.size()) != owned_pages) {
    out->push_back("invariant 1: " + std::to_string(mapped.size()) + " pages are mapped here, counted " +
                   std::to_string(owned_pages));
  }
}

void VirtualRows::digest(Hasher& hash) const {
  for (i64 row = 0; row < rows_.size(); ++row) {
    const Row& r = rows_[row];
    // An unused row is left out: it stays when the call that created it is undone.
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
  for (const IdList* list : {&duplicates_, &parked_, &bound_}) list->digest(hash);
  for (const auto& [slots, row] : empty_) {
    if (slots > 0) hash.add(slots, row);
  }
}

}  // namespace kvmem
