// The metadata of the virtual backend: which row belongs to which sequence, which page each slot of a row shows, and
// which cached blocks a row has. It decides nothing: VirtualTable does, and every change is made by a function below.
//
// Undone by ops: mappings, bindings, content. Undone by the journal: fences, the marks maybe_shared, note_ready(), the
// order of the lists. Derived: the set of empty rows, room, jobs, counts.
//
// Words: a row is bound while it belongs to a sequence, else parked. The content of a row is a chain of cached blocks,
// from block 0 on; several rows may hold the same block, and those are linked. A window group's part of a block need
// not be mapped in every row that holds the block: the parts that are present are linked too.
#pragma once

#include <algorithm>
#include <cstdint>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/id_list.h"
#include "table/arenas.h"
#include "table/growth_marks.h"
#include "table/row_array.h"

namespace kvmem {

// The mapped slots of a row in one arena. Between calls [lo, hi) is mapped without holes, except in a group with a
// sliding window: there slots out of window may be holes, and [solid, hi) has none.
struct Extent {
  i64 lo = 0, hi = 0, solid = 0, count = 0;
  std::vector<i32> pages;  // by slot of the row, -1 where nothing is mapped
  i64 page(i64 slot) const { return slot < static_cast<i64>(pages.size()) ? pages[slot] : -1; }
};

constexpr i64 kMostWindows = 32;  // as many as `hold` has bits for
constexpr int kWindowShift = 40;  // position of a window's number in `hold` and `evict`

// Block i of a row's content, with its links to the other rows that hold the same node.
struct Hold {
  i32 node = kNoNode, next = -1, previous = -1;  // rows
};

// A window group's part of a block that the row holds, with links to the other rows in which it is present.
struct Part {
  i32 next = -1, previous = -1;  // rows
  bool present = false;          // mapped, and written by the row's sequence or copied
};

// Rows by mapped slots, then by number.
using RowsBySlots = std::set<std::pair<i64, i64>>;

struct Row {
  i64 index = -1;  // the sequence to which it is bound, -1: parked
  i64 fence = 0;   // the device may use this memory until the fence has passed
  i64 job = 0;     // the mapper's job that maps part of it, 0 for none
  i64 slots = 0;   // mapped, all arenas
  // Numbers of the latest transactions that added to its content, and that may have to restore it.
  i64 attached_in = 0, kept_in = 0;
  std::uint8_t maybe_shared = false;  // some page may be mapped in another row too
  bool source = false;                // the decision in progress copies or maps from it: it must not lose content
  i32 state = kNoNode;                // the node whose snapshot it has
  std::vector<Hold> holds;            // its content, by block
  std::vector<Part> parts;            // [block][window]
  // Its entry in the set of empty rows; otherwise the entry itself, kept so that changes of state need no memory.
  RowsBySlots::iterator in_empty;
  RowsBySlots::node_type entry;
};

// What lies behind the tokens of a bound row's sequence: before `to` everything is finite, in [to, dirty_to) it may be
// anything, and from there on pages were zeroed when they were mapped. In tokens. `to` may be too low and `dirty_to`
// too high, never the reverse.
struct Finite {
  i64 to = 0, dirty_to = 0;
};

class VirtualRows : public TableContext {
 public:
  VirtualRows(const TableContext& context, GrowthMarks& marks);
  ~VirtualRows();
  VirtualRows(const VirtualRows&) = delete;
  VirtualRows& operator=(const VirtualRows&) = delete;

  // ---- sizes ----
  i64 row_slots(i64 g, i64 a) const { return geometry_.groups[g].row_slots[a - first_[g]]; }
  i64 slot_of(i64 row, i64 g, i64 a) const { return row * row_slots(g, a); }
  // The last slot of an arena belongs to no row: pages are prepared there.
  i64 scratch_slot(i64 a) const { return arena_slots(a) - 1; }
  // A state has no guard, because a kernel loads it by itself.
  i64 guard_tokens(i64 g) const { return has_state(g) ? 0 : geometry_.tail_guard_tokens; }
  // With a guard, because a kernel that loads whole tiles does so for a padding row too.
  i64 reserved_slots(i64 g, i64 a) const {
    const i64 tokens = kReservedBlocks * geometry_.groups[g].block_tokens + guard_tokens(g);
    return std::min(row_slots(g, a), ceil_div(tokens * token_bytes(g, a), page_bytes()));
  }
  // The slots [low_slot(first), high_slot(tokens)) have tokens [first, tokens) and the guard behind them.
  i64 low_slot(i64 g, i64 a, i64 first_token) const { return quotient(first_token * token_bytes(g, a), page_bytes()); }
  i64 high_slot(i64 g, i64 a, i64 tokens) const {
    if (tokens == 0) return 0;
    const i64 bytes = moved_bytes(g, a, tokens + guard_tokens(g));
    return std::min(row_slots(g, a), ceil_div(bytes, page_bytes()));
  }
  // A call that maps slots of a row maps some more, so that a sequence that grows token by token needs driver calls
  // less often. These are reclaimed after all that is cached.
  i64 with_ahead(i64 g, i64 a, i64 slots) const {
    if (geometry_.map_ahead_tokens == 0) return slots;
    return std::min(row_slots(g, a), slots + std::min(slots / kAheadShare, kMostAhead));
  }

  // ---- state ----
  i64 size() const { return rows_.size(); }  // rows that exist so far; row 0 has the reserved blocks
  const Row& operator[](i64 row) const { return rows_[row]; }
  i64 row_of(i64 index) const { return row_of_[index]; }  // -1 while the sequence has none
  const i32* row_of_data() const { return row_of_.data(); }
  const Extent& extent(i64 row, i64 a) const { return extents_.of(row)[a]; }
  i64 scratch_page(i64 a) const { return scratch_pages_[a]; }  // -1 between calls
  i64 blocks_of(i64 row) const { return static_cast<i64>(rows_[row].holds.size()); }
  const Part& part(i64 row, i64 ordinal, i32 window) const {
    return rows_[row].parts[ordinal * index_.windows() + window];
  }
  // The first row that holds the node, in which the part is present, or that has the snapshot; -1 for none.
  i64 first_holder(i32 node) const { return node < static_cast<i64>(holder_.size()) ? holder_[node] : -1; }
  i32 first_part_row(i32 node, i32 window) const {
    const std::size_t at = node * index_.windows() + window;
    return at < part_row_.size() ? part_row_[at] : -1;
  }
  i64 snapshot_row(i32 node) const { return node < static_cast<i64>(state_row_.size()) ? state_row_[node] : -1; }
  bool pin_ends_at(i32 node) const { return pin_ends_.count(node) > 0; }
  bool any_pin_ends() const { return !pin_ends_.empty(); }
  // Lists, so that no search has to visit all rows.
  const RowsBySlots& empty_rows() const { return empty_; }  // parked rows without content
  const IdList& duplicates() const { return duplicates_; }  // parked rows whose last block another row holds too
  const IdList& parked() const { return parked_; }          // parked and bound rows that may have pages to reclaim
  const IdList& bound() const { return bound_; }

  // ---- derived from it ----
  // The slots that the row's sequence needs; none for a parked row.
  void needed(i64 row, i64 g, i64 a, i64* lo, i64* hi) const {
    const i64 index = rows_[row].index;
    *lo = index < 0 ? extent(row, a).hi : low_slot(g, a, sequences_.front(index, g));
    *hi = index < 0 ? extent(row, a).hi : high_slot(g, a, sequences_.tokens(index, g));
  }
  // Slots [from, to) and [end, hi) of a row, which neither its sequence nor its content needs.
  struct Unneeded {
    i64 from, to, end;
  };
  // `ahead`: what with_ahead() allows a bound row counts as needed.
  Unneeded unneeded(i64 row, i64 g, i64 a, bool ahead) const;
  // Whether the sequence has exactly the memory that its lengths require.
  bool holds(i64 index, i64 group) const;
  // The first block of the row's content that the sequence's window needs.
  i64 first_block(i64 index, i32 window) const {
    return ceil_div(sequences_.front(index, index_.group_of(window)), index_.block_tokens());
  }
  bool needs_block(i64 row, i64 ordinal, i32 window) const {
    const i64 index = rows_[row].index;
    return index >= 0 && ordinal * index_.block_tokens() >= sequences_.front(index, index_.group_of(window));
  }
  // Whether the part is present, also in another row, and not needed by the row's own sequence.
  bool is_out_of_window_copy(i64 row, i64 ordinal, i32 window) const {
    return part(row, ordinal, window).present && !needs_block(row, ordinal, window) &&
           index_.window_copies(rows_[row].holds[ordinal].node, window) > 1;
  }
  // Returns the windows, as bits, whose part of the block is mapped in the row and within reach of the sequence at
  // `index`. What is mapped before that was never copied.
  i64 mapped_parts(i64 row, i64 index, i64 ordinal) const;
  // Whether the row has the whole block mapped, in each arena of the group.
  bool is_mapped_block(i64 row, i64 g, i64 ordinal) const;
  bool is_mapped(i64 a, i64 slot, i64 count) const;
  bool is_whole(const Op& op) const;
  bool has_reserved(i64 group) const {
    const i64 a = first_[group + 1] - 1;  // the arenas are mapped together
    return extent(0, a).hi == reserved_slots(group, a);
  }
  // Whether a page must be copied before the sequence of a row that shows it writes there. Only with a guard is it
  // written during the call itself.
  bool must_copy(i64 page) const { return guarded_ ? pool_.is_shared(page) : pool_.refs(page) > 1; }
  // Returns the first slot from token `tokens` on whose page must be copied; hi or more if there is none.
  i64 first_shared(i64 row, i64 a, i64 tokens) const;
  // Returns for how many tokens the row has pages.
  i64 room(i64 row, i64 group);
  // The same, as far as what lies behind them is finite, and without what the row's job still has to map.
  i64 usable_room(i64 row, i64 group);
  const Finite& finite(i64 row, i64 group) const { return finite_.of(row)[group]; }
  // Whether on_copy(op) is possible by itself: nothing needs that memory.
  bool can_evict(const Op& op) const;

  // ---- changes that ops describe ----
  void on_map(const Op& op) { change(op, true); }
  void on_unmap(const Op& op) { change(op, false); }
  void apply(const Op& op, bool undo);  // bind, unbind
  void on_copy(const Op& op, bool undo);
  // Block `ordinal(node)`, the next one of the row's content, is `node`. `state`: the row has its snapshot. `windows`:
  // bits of the parts that are present. `after`: the row after which it is linked among those that hold the node; 0: it
  // becomes the first. May throw std::bad_alloc, and has changed nothing then.
  void attach(i64 row, i32 node, bool state, i64 windows, i64 after, bool undo);
  // The front of a sequence has moved: its window needs fewer or more blocks.
  void on_front(i64 index, i64 group, i64 old_first, i64 first, bool undo);

  // ---- other changes; the journal undoes those of marks and lists ----
  void add_rows(i64 rows);  // makes the metadata of the first `rows` rows
  bool has_more_rows() const { return rows_.size() < geometry_.rows; }
  // Makes sure that the empty rows include one without pages, if there may be more rows.
  void offer_row() {
    if ((empty_.empty() || empty_.begin()->first > 0) && has_more_rows()) add_rows(rows_.size() + 1);
  }
  void set_fence(i64 row, i64 fence) { pool_.journal.set(rows_[row].fence, fence); }
  void set_maybe_shared(i64 row, bool shared) {
    pool_.journal.set(rows_[row].maybe_shared, static_cast<std::uint8_t>(shared));
  }
  void note_shared();  // sets maybe_shared of each row that shares a page
  void set_source(i64 row, bool source) {
    KVMEM_ASSERT(rows_[row].source != source, "a row is marked once");
    rows_[row].source = source;
  }
  void note_kept(i64 row) { rows_[row].kept_in = pool_.transactions; }
  void pin_end(i32 node, bool pinned);
  // The row may have pages to reclaim; it has none; look at it last.
  void may_reclaim(i64 row);
  void has_nothing_to_reclaim(i64 row) {
    IdList& list = rows_[row].index < 0 ? parked_ : bound_;
    if (list.has(row)) list.remove(row);
  }
  void move_last_of_duplicates(i64 row) {
    duplicates_.remove(row);
    duplicates_.add_last(row);
  }
  // The mapper's job `job` maps more of the row; note_ready() first saves for how many tokens there was room before.
  void note_ready(i64 row, i64 group, i64 tokens) { pool_.journal.set(ready_.of(row)[group], tokens); }
  void set_job(i64 row, i64 job) {
    KVMEM_ASSERT(rows_[row].job == 0, "a row has one job at a time");
    rows_[row].job = job;
  }
  // All that the row has mapped is zeroed, or about to be.
  void mark_finite(i64 row) {
    if (guarded_) std::fill_n(finite_.of(row), groups_, Finite());
  }
  // The transaction in progress zeroes the row up to token `to`. Takes effect when it is committed.
  void note_zeroed(i64 row, i64 group, i64 to) { zeroed_.emplace_back(&finite_.of(row)[group], to); }
  void undo_zeroed() { zeroed_.clear(); }
  void finish();
  void on_rewritten(const Op& unmap);

  void check(i64 owned_pages, std::vector<std::string>* out) const;
  void digest(Hasher& hash) const;

 private:
  static constexpr i64 kAheadShare = 128, kMostAhead = 3;

  Extent& mutable_extent(i64 row, i64 a) { return extents_.of(row)[a]; }
  Part& mutable_part(i64 row, i64 ordinal, i32 window) { return rows_[row].parts[ordinal * index_.windows() + window]; }
  i64 content_tokens(i64 row) const { return blocks_of(row) * index_.block_tokens(); }
  i64 main_group() const {  // the first that grows with the tokens
    i64 g = 0;
    while (g + 1 < groups_ && geometry_.groups[g].growth != Growth::token) ++g;
    return g;
  }
  void reset_room_of(i64 row, i64 index) {
    for (i64 g = 0; g < groups_; ++g) {
      room_.of(row)[g] = -1;
      marks_.reset_room(index, g);
    }
  }
  void detach(i64 row, i32 node, bool state, bool undo);  // the inverse of attach(), for the last block
  // The part is present from now on, linked after row `after` (0: first); and the inverse.
  void attach_part(i64 row, i64 ordinal, i32 window, i64 after, bool undo);
  void detach_part(i64 row, i64 ordinal, i32 window, bool undo);
  // The row's sequence needs the window's parts of blocks [from, to), or no longer needs them.
  void need_blocks(i64 row, i32 window, i64 from, i64 to, bool undo);
  void unneed_blocks(i64 row, i32 window, i64 from, i64 to, bool undo);
  void set_sequence(i64 row, i64 index);
  void mark_dirty(i64 row);  // whatever the row has mapped may hold anything
  // Enter the row into a list or remove it, as its state requires.
  void update_empty(i64 row);
  void update_duplicate(i64 row);
  void update_lists(i64 row);
  void change(const Op& op, bool mapped);
  void change_scratch(const Op& op, i64 a, bool mapped);
  void update_extent(Extent& e, i64 slot, i64 n, bool mapped);
  void check_content(std::vector<std::string>* out) const;
  void check_parts(std::vector<std::string>* out) const;
  void check_lists(i64 row, std::vector<std::string>* out) const;
  void check_mappings(i64 row, std::unordered_map<i32, i32>* mapped, std::vector<std::string>* out) const;

  GrowthMarks& marks_;
  RowArray<Row, 1> rows_;                  // those needed so far: addresses alone cost no metadata
  std::vector<i32> row_of_;                // by sequence, -1 for none
  std::vector<i32> holder_;                // by node: the first row that holds it, or -1
  std::vector<i32> part_row_;              // [node][window]: the first row in which the part is present, or -1
  std::vector<i32> state_row_;             // by node, with states only: the row that has its snapshot, or -1
  std::unordered_map<i32, i32> pin_ends_;  // by node: how many pins end there, if any
  RowsBySlots empty_;
  IdList duplicates_, parked_, bound_;
  RowArray<Extent> extents_;  // [row][arena]
  RowArray<i64> room_;        // [row][group]: what room() returned, -1 where a mapping has changed since
  RowArray<i64> ready_;       // [row][group]: tokens with room that the row's job does not map, -1: none of the group's
  RowArray<Finite> finite_;   // [row][group]; empty without a guard
  std::vector<std::pair<Finite*, i64>> zeroed_;  // by the transaction in progress
  std::vector<i64> scratch_pages_;               // by arena
};

}  // namespace kvmem
