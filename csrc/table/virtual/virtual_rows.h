// The metadata of the virtual backend: which row belongs to which sequence, and which slots of it show which pages.
// virtual_table.cpp decides; the mappings and bindings it pushes come back through on_map, on_unmap and apply, and
// change here only.
//
// Changed by records: mappings, bindings, what rows hold. By the journal: fences, the marks maybe_shared and
// copy_tail_, ready_, the order of doubles_, parked_ and bound_. Derived: empty_, room_, job, counts.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/id_list.h"
#include "table/page_table.h"
#include "table/row_array.h"
#include "table/shared_bytes.h"

namespace kvmem {

// What of a row is mapped in one arena. Between calls that is all of [lo, hi), but in a group with a sliding window:
// there what the window has passed may have holes, and [solid, hi) has none.
struct Extent {
  i64 lo = 0, hi = 0, solid = 0, count = 0;
  std::vector<i32> pages;  // by slot of the row, -1 where nothing is mapped
};

// As many as a record has bits for.
constexpr i64 kMostWindows = 32;
constexpr int kWindowShift = 40;  // of the number of a window in a record

// What block i of a row holds: hold i of its list. Rows that hold the same node are linked through it.
struct Hold {
  i32 node = kNoNode, next = -1, previous = -1;  // rows
};

// Whether a row shows what a window group needs of a block that it holds, and the other rows that do.
struct Shown {
  i32 next = -1, previous = -1;  // rows
  bool here = false;
};

// Rows by mapped slots, then by number.
using RowsBySlots = std::set<std::pair<i64, i64>>;

struct Row {
  i64 index = -1;  // the sequence it belongs to, -1: unbound
  i64 fence = 0;   // the device may use what lies here until this fence has passed
  i64 job = 0;     // the mapper's job that maps part of it, 0 for none
  i64 slots = 0;   // mapped, all arenas
  // Numbers of the latest transactions that have added to its content, and that may have to restore it.
  i64 given = 0, kept = 0;
  std::uint8_t maybe_shared = false;  // some page may be mapped elsewhere too
  bool source = false;                // content is being taken from it: it must lose none meanwhile
  i32 state = kNoNode;                // the node at whose end its fixed state was copied
  std::vector<Hold> holds;            // its content, as far as it is known, block by block
  std::vector<Shown> shown;           // [block][window]; what groups without a window hold is always there
  // Its entry in empty_ while it has one; else the entry itself, kept so that no change of state needs memory.
  RowsBySlots::iterator in_empty;
  RowsBySlots::node_type entry;
};

// What a row came with lies behind its sequence's tokens: before `to` all of it is finite, in [to, dirty_to) it may be
// anything, and behind that there are only pages that were zeroed when they were mapped. `to` may be too low and
// `dirty_to` too high at any time, never the other way round. In tokens; of a row of no sequence it says nothing.
struct Finite {
  i64 to = 0, dirty_to = 0;
};

class VirtualRows : public PageTable {
 public:
  VirtualRows(const Geometry& geometry, PagePool& pool, const Sequences& sequences, PrefixIndex& index);
  ~VirtualRows() override;

  bool has_reserved(i64 group) const override {
    const i64 a = first_[group + 1] - 1;  // arenas are mapped together
    return extent(0, a).hi == reserved_slots(group, a);
  }

  bool is_whole(const Op& op) const override;
  std::unique_ptr<FollowRules> rules(const FollowedLengths& lengths) override;  // virtual_follow.cpp
  bool owns(i32 arena) const override { return arena >= base_arena_ && arena - base_arena_ < arenas_; }
  i64 sequence_at(const Op& op) const override {
    const i64 a = op.at - base_arena_, row = op.a / row_slots(group_of(a), a);
    return row < rows_.size() ? rows_[row].index : -1;  // else: the scratch slot
  }
  bool has_memory(i64 index) const override { return row_of_[index] >= 0; }
  bool holds(i64 index, i64 group) const override;
  void check_tail_again(i64 index, i64 group) override {
    set_copy_tail(index, group, true);
    if (row_of_[index] >= 0) may_reclaim(row_of_[index]);
    reset_room(index, group);
  }
  void note_released(const Op& op) override {
    const i64 row = op.kind == OpKind::unbind ? op.b : row_of_[sequences_.place_of(op.a)];
    if (row > 0) set_fence(row, pool_.fence());
  }
  void note_shared() override;
  void set_pending(i64 index, i64 job) override { rows_[row_of_[index]].job = job; }
  i64 pending(i64 index) const override { return row_of_[index] < 0 ? 0 : rows_[row_of_[index]].job; }
  void apply(const Op& op, bool undo) override;
  void on_front(i64 index, i64 group, i64 old_first, i64 first, bool undo) override;
  void pin_end(i32 node, bool pinned) override {
    if (const auto found = pin_ends_.try_emplace(node, 0).first; (found->second += pinned ? 1 : -1) == 0) {
      pin_ends_.erase(found);
    }
  }
  bool is_mapped(i32 arena, i64 slot, i64 count) const override;
  void on_map(const Op& op) override { change(op, true); }
  void on_unmap(const Op& op) override { change(op, false); }
  void on_content(const Op& op, bool undo) override;
  void on_rewritten(const Op& unmap) override;
  void finish(bool committed) override;
  void on_taken_back() override {
    zeroed_.clear();
    PageTable::on_taken_back();
  }
  bool can_evict(const Op& op) const override;

  i64 offset_bytes(i64 index, i64 group, i64 a, i64 token) const override {
    return slot_of(row_of_[index], group, first_[group] + a) * page_bytes() +
           token * token_bytes(group, first_[group] + a);
  }

  TableView view(i64 group) const override {
    TableView v;
    v.rows = row_of_.data();
    v.row_blocks = geometry_.groups[group].row_tokens / geometry_.groups[group].block_tokens;
    return v;
  }

  i64 common_blocks(i64 a, i64 b, i64 group, i64 known) const override;

  i64 block_key(i64 index, i64 group, i64 block) const override {
    const i64 a = first_[group], start = block * geometry_.groups[group].block_tokens * token_bytes(group, a);
    return extent(row_of_[index], a).pages[start / page_bytes()];
  }

  i64 tokens_that_fit(i64 index, i64 group, i64 pages) const override;
  i64 parked_pages() const override;
  void count_bytes(i64* used_bytes, i64* shared_bytes) const override;
  i64 held_bytes() const override { return (owned_pages - parked_pages()) * page_bytes(); }
  i64 common_bytes() const override;
  i64 beside_bytes() const override { return 0; }  // a page that a sequence needs is a row's, and serves nobody else
  i64 first_arena(i64 group) const override { return base_arena_ + first_[group]; }
  i64 mapped_extent_slots(i64 group, i64 arena_in_group) const override;
  void check(std::vector<std::string>* out) const override;
  void digest(Hasher& hash) const override;

 protected:
  i64 page_bytes() const { return geometry_.page_bytes; }
  i32 arena(i64 a) const { return static_cast<i32>(base_arena_ + a); }
  i64 token_bytes(i64 g, i64 a) const { return geometry_.groups[g].token_bytes[a - first_[g]]; }
  i64 row_slots(i64 g, i64 a) const { return geometry_.groups[g].row_slots[a - first_[g]]; }
  i64 slot_of(i64 row, i64 g, i64 a) const { return row * row_slots(g, a); }

  i64 group_of(i64 a) const {
    i64 g = 0;
    while (a >= first_[g + 1]) ++g;
    return g;
  }

  Extent& extent(i64 row, i64 a) { return extents_.of(row)[a]; }
  const Extent& extent(i64 row, i64 a) const { return extents_.of(row)[a]; }

  // None behind a state, which a kernel loads by itself.
  i64 guard_tokens(i64 g) const {
    return geometry_.groups[g].growth == Growth::fixed ? 0 : geometry_.tail_guard_tokens;
  }

  // With the guard: a kernel that loads whole tiles does so for a padding row too.
  i64 reserved_slots(i64 g, i64 a) const {
    const i64 tokens = kReservedBlocks * geometry_.groups[g].block_tokens + guard_tokens(g);
    return std::min(row_slots(g, a), ceil_div(tokens * token_bytes(g, a), page_bytes()));
  }

  i64 low_slot(i64 g, i64 a, i64 first_token) const { return quotient(first_token * token_bytes(g, a), page_bytes()); }

  i64 high_slot(i64 g, i64 a, i64 tokens) const {
    if (tokens == 0) return 0;
    const i64 bytes = (tokens + guard_tokens(g)) * token_bytes(g, a);
    return std::min(row_slots(g, a), ceil_div(bytes, page_bytes()));
  }

  i64 main_group() const {  // one that grows with the tokens
    i64 g = 0;
    while (g + 1 < groups_ && geometry_.groups[g].growth != Growth::token) ++g;
    return g;
  }

  i64 blocks_of(i64 row) const { return static_cast<i64>(rows_[row].holds.size()); }
  // The first block of the row's content that the sequence's window needs.
  i64 first_block(i64 index, i32 window) const {
    return ceil_div(sequences_.front(index, index_.group_of(window)), index_.block_tokens());
  }
  i64 content_tokens(i64 row) const { return static_cast<i64>(rows_[row].holds.size()) * index_.block_tokens(); }
  i64 first_holder(i32 node) const { return node < static_cast<i64>(holder_.size()) ? holder_[node] : -1; }

  // The slots that the row's sequence needs; none for a parked row.
  void needed(i64 row, i64 g, i64 a, i64* lo, i64* hi) const {
    const i64 index = rows_[row].index;
    *lo = index < 0 ? extent(row, a).hi : low_slot(g, a, sequences_.front(index, g));
    *hi = index < 0 ? extent(row, a).hi : high_slot(g, a, sequences_.tokens(index, g));
  }

  // A call that maps pages of a row maps some more, so that a sequence that grows by a token at a time makes its driver
  // calls once in so many pages. They are spare, and given up after all that is cached.
  static constexpr i64 kAheadShare = 128, kMostAhead = 3;
  i64 with_ahead(i64 g, i64 a, i64 slots) const {
    if (geometry_.map_ahead_tokens == 0) return slots;
    return std::min(row_slots(g, a), slots + std::min(slots / kAheadShare, kMostAhead));
  }

  i64 add_shared(const Extent& e, i64 from, i64 to, std::vector<SharedPart>* shared) const;
  // Slots [from, to) and [end, hi) of a row: neither its sequence nor its content needs what is mapped there.
  // `ahead`: the pages that with_ahead() allows a live row are not among them.
  struct Spare {
    i64 from, to, end;
  };
  Spare spare(i64 row, i64 g, i64 a, bool ahead) const;

  // Bits of the windows that have all of the block mapped in the row, and that reach it in the sequence at `index`:
  // what is mapped before that was never copied.
  i64 mapped_windows(i64 row, i64 index, i64 ordinal) const;
  // The record by which the row shows the block no more.
  Op concealing(i64 row, i64 ordinal, i32 window) const {
    const Shown& s = shown(row, ordinal, window);
    return {OpKind::evict,          number, rows_[row].holds[ordinal].node, row, (i64{1} + window) << kWindowShift,
            std::max(s.previous, 0)};
  }
  static i32 window_of(const Op& op) { return static_cast<i32>(op.c >> kWindowShift) - 1; }
  // True if the row has all of the block mapped, in each arena of the group.
  bool is_whole_in(i64 row, i64 g, i64 ordinal) const;
  Shown& shown(i64 row, i64 ordinal, i32 window) { return rows_[row].shown[ordinal * index_.windows() + window]; }
  const Shown& shown(i64 row, i64 ordinal, i32 window) const {
    return rows_[row].shown[ordinal * index_.windows() + window];
  }
  i64 state_row(i32 node) const { return node < static_cast<i64>(state_row_.size()) ? state_row_[node] : -1; }
  i32 first_shower(i32 node, i32 window) const {
    const std::size_t at = node * index_.windows() + window;
    return at < shower_.size() ? shower_[at] : -1;
  }
  // The row shows what the window group has of the block, or does so no more.
  // `after`: among the rows that do, it stands behind this one; 0: it is the first.
  void reveal(i64 row, i64 ordinal, i32 window, i64 after, bool undo);
  void conceal(i64 row, i64 ordinal, i32 window, bool undo);
  // The row's sequence needs, or needs no more, what windows show of blocks [from, to).
  void need_blocks(i64 row, i32 window, i64 from, i64 to, bool undo);
  void unneed_blocks(i64 row, i32 window, i64 from, i64 to, bool undo);
  bool needs_block(i64 row, i64 ordinal, i32 window) const {
    const i64 index = rows_[row].index;
    return index >= 0 && ordinal * index_.block_tokens() >= sequences_.front(index, index_.group_of(window));
  }

  // Makes the metadata of the first `rows` rows, if it is not there.
  void add_rows(i64 rows);
  bool has_more_rows() const { return rows_.size() < geometry_.rows; }
  // An empty row without pages is among empty_ from now on, if there is one.
  void offer_row() {
    if ((empty_.empty() || empty_.begin()->first > 0) && has_more_rows()) add_rows(rows_.size() + 1);
  }

  // True if the row shows the block, another one does so too, and its own sequence does not need it.
  bool is_out_of_window_copy(i64 row, i64 ordinal, i32 window) const {
    return shown(row, ordinal, window).here && !needs_block(row, ordinal, window) &&
           index_.window_copies(rows_[row].holds[ordinal].node, window) > 1;
  }

  void set_fence(i64 row, i64 fence) { pool_.journal.set(rows_[row].fence, fence); }
  void set_maybe_shared(i64 row, bool shared) {
    pool_.journal.set(rows_[row].maybe_shared, static_cast<std::uint8_t>(shared));
  }
  void set_copy_tail(i64 index, i64 group, bool look) {
    pool_.journal.set(copy_tail_[index * groups_ + group], static_cast<std::uint8_t>(look));
  }

  // Block `ordinal(node)`, the next one of the row's content, is the node; and the inverse, of the last one. `state`:
  // the row has a copy of the fixed state at its end. `windows`: bits of those that show the block. `after`: among the
  // rows that hold it, it stands behind this one; 0: it is the first.
  void attach(i64 row, i32 node, bool state, i64 windows, i64 after, bool undo);
  void detach(i64 row, i32 node, bool state, bool undo);
  // The record by which the row forgets the last block of its content, which it shows in no window any more.
  Op forgetting(i64 row) const {
    const Row& r = rows_[row];
    const Hold& last = r.holds.back();
    return {OpKind::evict, number, last.node, row, r.state == last.node, std::max(last.previous, 0)};
  }

  // The row may have pages to spare from now on.
  void may_reclaim(i64 row) {
    if (row == 0 || rows_[row].slots == 0) return;
    IdList& list = rows_[row].index < 0 ? parked_ : bound_;
    if (list.has(row)) return;
    // Of those that are parked the one freed longest ago leads, also where an old one comes back.
    if (&list == &parked_ && rows_[list.last()].fence > rows_[row].fence) {
      list.add_first(row);
    } else {
      list.add_last(row);
    }
  }

  // It has none, until may_reclaim() says otherwise or the transaction is taken back.
  void reclaims_nothing(i64 row) {
    IdList& list = rows_[row].index < 0 ? parked_ : bound_;
    if (list.has(row)) list.remove(row);
  }

  // Whether a row that shows the page gets a copy before its sequence grows there: only with a guard does that write in
  // the call itself.
  bool must_copy(i64 page) const { return guarded_ ? pool_.is_shared(page) : pool_.refs(page) > 1; }
  // The first slot behind so many tokens whose page another row shows too; the frontier, or more, if there is none.
  i64 first_shared(i64 row, i64 a, i64 tokens) const;

  // Whatever the row has mapped now may hold anything; and: all of it was zeroed, or is about to be.
  void mark_dirty(i64 row);
  void mark_finite(i64 row) {
    if (guarded_) std::fill_n(finite_.of(row), groups_, Finite());
  }

  // Of `room` tokens, how many have a guard behind them that is finite.
  i64 finite_room(i64 row, i64 group, i64 room) const {
    if (!guarded_) return room;
    const Finite& f = finite_.of(row)[group];
    return f.to >= f.dirty_to ? room : std::min(room, f.to - guard_tokens(group));
  }

  // Tokens that need no further mapping. Kept per row; -1 where a mapping has changed since.
  i64 room(i64 row, i64 group) {
    i64& room = room_.of(row)[group];
    if (room >= 0) return room;
    const GroupGeometry& g = geometry_.groups[group];
    const i64 front = rows_[row].index < 0 ? 0 : sequences_.front(rows_[row].index, group);
    room = g.max_tokens;
    for (i64 a = first_[group]; a < first_[group + 1]; ++a) {
      const Extent& e = extent(row, a);
      i64 here = quotient(e.hi * page_bytes(), token_bytes(group, a)) - guard_tokens(group);
      const bool reached = e.count > 0 && e.solid <= low_slot(group, a, front);
      if (!reached) here = 0;
      if (!reached || e.hi < row_slots(group, a)) room = std::min(room, std::max(i64{0}, here));
    }
    return room;
  }

  const Geometry& geometry_;
  PagePool& pool_;
  const Sequences& sequences_;
  bool has_state_ = false;  // some group is of fixed size
  i64 arenas_ = 0;
  i32 base_arena_ = 0;
  std::vector<i64> first_;                 // first arena of each group, and one past the last
  RowArray<Row, 1> rows_;                  // those that have been needed so far: addresses cost no metadata
  std::vector<i32> row_of_;                // by sequence, -1 while it holds nothing
  std::vector<i32> holder_;                // by node: the first row that holds it, or -1
  std::vector<i32> shower_;                // [node][window]: the first row that shows it, or -1
  std::vector<i32> state_row_;             // by node, where there are states: the row that has a snapshot of it, or -1
  std::unordered_map<i32, i32> pin_ends_;  // how many pins end there, of nodes at which some do
  // Whoever looks for a row or for pages asks these, never all rows.
  RowsBySlots empty_;         // unbound rows without content
  IdList doubles_;            // unbound rows whose last block another row holds too
  IdList parked_, bound_;     // the unbound and the bound rows that may have pages to spare
  RowArray<Extent> extents_;  // [row][arena]
  RowArray<i64> room_;        // [row][group]
  RowArray<i64> ready_;       // [row][group]: tokens that need nothing of the row's job, -1: it maps nothing
  RowArray<Finite> finite_;   // [row][group]; empty without a guard
  std::vector<std::pair<Finite*, i64>> zeroed_;  // what of it the transaction in progress moves on, and to where
  ZeroVector<std::uint8_t> copy_tail_;  // [sequence][group]: look whether the tail page is shared before writing
  std::vector<i64> scratch_pages_;      // by arena, -1 between calls

 private:
  class Rules;
  void reset_room_of(i64 row, i64 index) {
    for (i64 g = 0; g < groups_; ++g) {
      room_.of(row)[g] = -1;
      reset_room(index, g);
    }
  }

  void set_sequence(i64 row, i64 index);
  void file_empty(i64 row);
  void file_double(i64 row);
  void file_content(i64 row);
  void change(const Op& op, bool mapped);
  void check_content(std::vector<std::string>* out) const;
  void check_shown(std::vector<std::string>* out) const;
  void check_lists(i64 row, std::vector<std::string>* out) const;
};

}  // namespace kvmem
