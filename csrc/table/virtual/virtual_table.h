// The virtual backend (vAttention's idea): each sequence owns a row, a contiguous range of addresses in every arena,
// and pages are mapped under it as it grows. A row stays mapped when its sequence ends (it is parked), so that the next
// sequence that fits can use it without a driver call. If its content is known, it is also cached for sequences that
// begin alike. The page is the unit of sharing: two rows show the same page, and the page that a length divides is
// copied.
//
// This class decides; its state is VirtualRows. virtual_table.cpp: growing, shrinking, ending. virtual_content.cpp:
// adopting, publishing and evicting content. virtual_binding.cpp: the choice of a row. virtual_reclaim.cpp: reclaiming
// memory. virtual_accounting.cpp: counting. virtual_follow.cpp: the rules for another allocator's ops.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "table/page_table.h"
#include "table/shared_bytes.h"
#include "table/virtual/virtual_rows.h"

namespace kvmem {

class VirtualTable final : public PageTable {
 public:
  VirtualTable(const Geometry& geometry, PagePool& pool, const Sequences& sequences, PrefixIndex& index)
      : PageTable(geometry, pool, sequences, index), rows_(*this, marks_) {}

  // ---- growth ----
  i64 find_room(i64 index, i64 group) override;
  void grow(i64 index, i64 group, i64 old_tokens, i64 new_tokens, Transaction& tx) override;
  void shrink(i64 index, i64 group, i64 old_tokens, i64 new_tokens, Transaction& tx) override;
  // Unmaps nothing, because each page would cost a driver call and a wait. What is out of window counts as parked, and
  // is reclaimed in batches when memory is short.
  void advance_front(i64 index, i64, i64, i64, Transaction& tx) override {
    rows_.set_fence(rows_.row_of(index), tx.fence());
    rows_.may_reclaim(rows_.row_of(index));
  }
  void share(i64 parent, i64 child, i64 group, i64 first, i64 tokens, Transaction& tx) override;
  void close(i64 index, Transaction& tx) override;
  void back_reserved(i64 group, Transaction& tx) override;
  bool has_reserved(i64 group) const override { return rows_.has_reserved(group); }
  bool map_ahead(i64 index, i64 group, i64 tokens, Transaction& tx) override;
  void set_pending(i64 index, i64 job) override { rows_.set_job(rows_.row_of(index), job); }
  i64 pending(i64 index) const override { return rows_.row_of(index) < 0 ? 0 : rows_[rows_.row_of(index)].job; }
  void zero_truncated(i64 index, i64 group, i64 tokens, Transaction& tx) override;
  i64 tokens_that_fit(i64 index, i64 group, i64 pages) const override;
  TableView view(i64 group) const override;
  i64 offset_bytes(i64 index, i64 group, i64 a, i64 token) const override;

  // ---- content ----
  i64 find_memory(const std::vector<i32>& chain, i64 tokens) const override;
  bool has_snapshot(i32 node) const override { return rows_.snapshot_row(node) >= 0; }
  void adopt(i64 index, const std::vector<i32>& chain, const SharedPrefix& found, Transaction& tx) override;
  bool has(i32 node, i64 group) const override;
  void publish(const std::vector<Published>& blocks, Transaction& tx) override;
  void unpublish(i64 index, i32, Transaction& tx) override { detach_last(rows_.row_of(index), tx); }
  void evict(i32 node, Transaction& tx) override;
  void evict_window(i32 node, i32 window, Transaction& tx) override;
  void allow_eviction(i32) override {}  // the list of duplicates has the rows that this concerns
  void pin_end(i32 node, bool pinned) override { rows_.pin_end(node, pinned); }
  void snapshot(i64 index, const std::vector<i32>& chain, Transaction& tx) override;
  void promote(const std::vector<i32>& chain, const SlotsOfChain& from, Transaction& tx) override;  // virtual_tiers.cpp
  i64 common_blocks(i64 a, i64 b, i64 group, i64 known) const override;
  i64 block_key(i64 index, i64 group, i64 block) const override;
  void count_bytes(i64 group, std::vector<i64>* used_bytes, i64* shared_bytes) const override;
  i64 held_bytes() const override { return (owned_pages - parked_pages()) * page_bytes(); }
  i64 common_bytes() const override;
  i64 mapped_extent_slots(i64 group, i64 arena_in_group) const override;
  void check(std::vector<std::string>* out) const override { rows_.check(owned_pages, out); }

  // ---- following ----
  void apply(const Op& op, bool undo) override { rows_.apply(op, undo); }
  void on_front(i64 index, i64 group, i64 old_first, i64 first, bool undo) override {
    rows_.on_front(index, group, old_first, first, undo);
  }
  void check_tail_again(i64 index, i64 group) override;
  void note_released(const Op& op) override {
    const i64 row = op.kind == OpKind::unbind ? op.b : rows_.row_of(sequences_.place_of(op.a));
    if (row > 0) rows_.set_fence(row, pool_.fence());
  }
  void note_shared() override { rows_.note_shared(); }
  bool is_whole(const Op& op) const override { return rows_.is_whole(op); }
  std::vector<i64> shared_pieces(i64 index, i64 group, i64 from, i64 end) const override;
  std::unique_ptr<FollowRules> rules(const FollowedLengths& lengths) override;  // virtual_follow.cpp
  i64 sequence_at(const Op& op) const override;
  bool has_memory(i64 index) const override { return rows_.row_of(index) >= 0; }
  bool holds(i64 index, i64 group) const override { return rows_.holds(index, group); }

  // ---- of PageOwner ----
  void on_map(const Op& op) override { rows_.on_map(op); }
  void on_unmap(const Op& op) override { rows_.on_unmap(op); }
  bool is_mapped(i32 number, i64 slot, i64 count) const override {
    return rows_.is_mapped(local_arena(number), slot, count);
  }
  void on_content(const Op& op, bool undo) override { is_copy(op) ? rows_.on_copy(op, undo) : on_order(op, undo); }
  void on_rewritten(const Op& unmap) override { rows_.on_rewritten(unmap); }
  bool can_evict(const Op& op) const override { return rows_.can_evict(op); }
  i64 parked_pages() const override;
  i64 reclaim_kind(Reclaim kind, i64 pages, Transaction& tx) override;
  void on_taken_back() override {
    rows_.undo_zeroed();
    PageTable::on_taken_back();
  }
  void finish(bool committed) override {
    rows_.finish();
    PageTable::finish(committed);
  }
  void digest(Hasher& hash) const override {
    PageTable::digest(hash);
    rows_.digest(hash);
  }

 private:
  // Sets `place` to a row that the decision in progress fills, and that must therefore lose nothing.
  class Guard {
   public:
    Guard(i64& place, i64 row) : place_(place) { place_ = row; }
    ~Guard() { place_ = -1; }
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;

   private:
    i64& place_;
  };
  // Marks the rows from which content is taken, for its lifetime.
  class Sources {
   public:
    explicit Sources(VirtualRows& rows) : rows_(rows) {}
    ~Sources() {
      for (i64 row : marked_) rows_.set_source(row, false);
    }
    Sources(const Sources&) = delete;
    Sources& operator=(const Sources&) = delete;
    void add(i64 row) {
      if (rows_[row].source) return;
      marked_.push_back(row);
      rows_.set_source(row, true);
    }
    const std::vector<i64>& rows() const { return marked_; }

   private:
    VirtualRows& rows_;
    std::vector<i64> marked_;
  };
  // The blocks [first, last) of a row's content that lie on a slot, also in part. `size` is that of a block in bytes.
  struct BlockRange {
    i64 first, last;
  };
  BlockRange blocks_on(i64 row, i64 slot, i64 size) const {
    return {quotient(slot * page_bytes(), size),
            std::min(rows_.blocks_of(row), ceil_div((slot + 1) * page_bytes(), size))};
  }

  // ---- virtual_table.cpp: mapping ----
  // Makes room for what growing to `tokens` maps in the group, including what is mapped ahead, and returns how many
  // slots that is. Returns 0 if there is no room for the latter, or nothing is mapped ahead.
  i64 slots_with_ahead(i64 row, i64 group, i64 tokens, Transaction& tx);
  // Replaces shared pages from the length on, after a truncation: what holds the token or block that the length divides
  // by a copy of the tokens in use, those behind it (the guard) by new pages. The copy is made at the scratch slot,
  // because the row's address still shows the old page.
  void copy_tail(i64 index, i64 group, i64 tokens, Transaction& tx);
  void drop_shared_guard(i64 row, i64 a, i64 from, Transaction& tx);
  void replace_page(i64 row, i64 group, i64 a, i64 slot, i64 used_bytes, Transaction& tx);
  // Zeroes what the row came with, as far as kernels load it behind `new_tokens`, and one more guard's length, so that
  // few steps have to.
  void zero_ahead(i64 row, i64 group, i64 old_tokens, i64 new_tokens, Transaction& tx);
  // Zeroes tokens [from, to) on pages that no other row shows. Returns false if there are others.
  bool zero_tokens(i64 row, i64 group, i64 from, i64 to, Transaction& tx);
  // A guard is finite only if its pages are zeroed when they are mapped, also those that this allocator owned before.
  Zero page_zero() const { return guarded_ ? Zero::always : geometry_.zero; }
  void map(i64 row, i64 a, i64 from, i64 to, Transaction& tx) { map(row, a, from, to, tx, page_zero()); }
  void map(i64 row, i64 a, i64 from, i64 to, Transaction& tx, Zero zero);
  void map_holes(i64 row, i64 a, i64 from, i64 to, Transaction& tx);
  void unmap(i64 row, i64 a, i64 from, i64 to, i64 fence, Transaction& tx);

  // ---- virtual_content.cpp: content ----
  // Whether no window needs any of the first `tokens` tokens, as windows of one token at the end of a block.
  bool needs_nothing(i64 tokens) const;
  // The first block that a window needs of a sequence's first `tokens` tokens.
  i64 first_needed(i32 window, i64 tokens) const {
    const GroupGeometry& group = geometry_.groups[index_.group_of(window)];
    return window_first(group, geometry_.tail_guard_tokens, tokens) / index_.block_tokens();
  }
  // Whether the row has all parts that windows need of its first `blocks` blocks, `tokens` tokens of them.
  bool has_needed_parts(i64 row, i64 blocks, i64 tokens) const;
  // Finds the rows with the parts that windows need. Returns true if found.row has all of them; otherwise writes one
  // row for each block to source_of_. Adds them to `sources`.
  bool find_sources(const SharedPrefix& found, const std::vector<i32>& chain, Sources* sources);
  // Whether the parked row can become the sequence's own: it loses nothing by that which others could not show, or
  // there is no other row. Never with a state, which would be overwritten.
  bool can_reuse_row(i64 row, std::size_t blocks) const;
  void reuse_row(i64 index, i64 row, i64 blocks, Transaction& tx);
  // Maps the whole pages of tokens [first, tokens) in another row too, and copies the tail.
  void share_row(i64 from, i64 to, i64 group, i64 first, i64 tokens, Transaction& tx);
  // The same from the rows that find_sources() found.
  void share_window(i64 to, i64 group, i64 first, i64 tokens, Transaction& tx);
  void copy_state(i64 from, i64 to, i64 group, Transaction& tx);
  // Pushes the ops that copy block `ordinal` (of a fixed state 0) between the row and host memory.
  void move_block(OpKind kind, i64 row, i64 group, i64 ordinal, i64 at, Transaction& tx);
  void store(i32 node, i64 group, i64 at, Transaction& tx) override;
  // Maps the group's tokens of a chain in a parked row, and fills them from slots and other rows.
  void fill_full(i64 row, i64 group, const std::vector<i32>& chain, const SlotsOfChain& from, Transaction& tx);
  void fill_window(i64 row, i64 group, const std::vector<i32>& chain, const SlotsOfChain& from, Transaction& tx);
  void fill_state(i64 row, i64 group, i64 slot, Transaction& tx);
  // Adds a block to the row's content: what the sequence at `index` computed or was given, with the parts that its
  // windows reach. attach_expected() REQUIRES that memory for the op was made (Transaction::expect()).
  void attach_expected(i64 row, i32 node, i64 index, bool state, Transaction& tx) {
    const i64 windows = index_.windows() == 0 ? 0 : rows_.mapped_parts(row, index, index_.ordinal(node));
    index_.expect_copies();
    rows_.attach(row, node, state, windows, 0, false);
    tx.note({OpKind::hold, number, node, row, i64{state} | windows << 1});
  }
  void attach_all(i64 row, const std::vector<i32>& chain, i64 count, i64 index, bool state, Transaction& tx);
  // Removes the last block of the row's content; all blocks from `from` on.
  void detach_last(i64 row, Transaction& tx);
  void truncate_content(i64 row, i64 from, Transaction& tx);
  void detach_part(i64 row, i64 ordinal, i32 window, Transaction& tx);
  void demote_last(i64 row, Transaction& tx);
  // Keeps the bytes of a block that the transaction takes from the row, if a driver's failure would make the row the
  // only one that has it.
  void keep_last_copy(i64 row, i64 ordinal);
  bool is_last_copy(i64 row, i64 ordinal) const;
  // Removes what nothing could find from the end of a parked row's content, where only windows hold tokens.
  void detach_unfindable(i64 row, Transaction& tx);
  // Unmaps what rows had mapped for the part of a block, where no other present part lies on the same page.
  void unmap_part(const std::vector<i64>& rows, i32 window, i64 ordinal, Transaction& tx);

  // ---- virtual_binding.cpp: the choice of a row ----
  // Binds a row for a sequence of `tokens` tokens; one for a sequence that shows pages of another row in front of its
  // own; one without pages.
  void bind(i64 index, i64 tokens, Transaction& tx);
  void bind_behind(i64 index, const SharedPrefix& found, Transaction& tx);
  void bind_without_pages(i64 index, Transaction& tx);
  // Returns a row for a sequence of `tokens` tokens, of which the whole pages of the first `shared` are another row's.
  // If content must be evicted for them, whole rows are, with at most a quarter more pages than needed: their pages
  // stay mapped, which saves driver calls.
  i64 pick_row(i64 tokens, i64 shared, Transaction& tx);
  // Returns the empty row whose mapped slots are closest to `slots`, -1 if there is none: the smallest that has as
  // many, or, if memory is short and it is much closer, the largest that has fewer. A slot too many counts two fifths
  // of one too few, since another sequence will have to map it. Among equals the first, so that rows of sequences that
  // start together lie at equal distances and a batch of them is one strided tensor.
  i64 best_empty(i64 slots) const;
  i64 pick_empty(Transaction& tx);  // with as few pages as possible; evicts content if there is none
  // Evicts the content of a parked row and returns it: a second copy, else the row of the eviction policy's victim.
  i64 empty_a_row(Transaction& tx);
  i64 any_evictable_row() const;  // 0 if there is none. Cost: proportional to the rows
  // Returns, of the next few victims' rows, the parked one with the most slots, at most `most`, that can lose all its
  // content; -1 if there is none.
  i64 pick_victim(i64 most, Transaction& tx);
  void zero_row(i64 row, i64 tokens, Transaction& tx);  // all that is mapped behind the first `tokens` tokens
  void unmap_row(i64 row, Transaction& tx);
  void unmap_shared(i64 row, Transaction& tx);  // up to the last page that another row shows too

  // ---- virtual_reclaim.cpp: each returns how many pages came free ----
  i64 reclaim_list(const IdList& list, i64 pages, Transaction& tx);
  i64 reclaim_duplicates(bool snapshots, i64 most, i64 pages, Transaction& tx);
  i64 reclaim_victims(i64 pages, Transaction& tx);
  i64 reclaim_out_of_window(i64 pages, Transaction& tx);
  i64 reclaim_ahead(i64 pages, Transaction& tx);
  // Unmaps what neither the row's sequence nor its content needs.
  i64 reclaim_row(i64 row, i64 pages, Transaction& tx, bool ahead = true);
  // Evicts second copies of window parts from a parked row, where that frees pages.
  i64 reclaim_part_copies(i64 row, i64 pages, Transaction& tx);
  void evict_part_copy(i64 row, i64 ordinal, i32 window, Transaction& tx);
  i64 evict_node(i32 node, i64 pages, Transaction& tx);
  // Evicts the next victims as long as they are in this row alone, so that their pages are one run for the driver.
  void evict_run(i64 row, i64 pages, Transaction& tx);
  // Evicts the part and all others on one of its pages, the page with the fewest. Returns -1, and changes nothing, if
  // no page can come free.
  i64 evict_part_page(Item x, Transaction& tx);
  // Writes the nodes whose parts lie on a page of a row to on_page_. Returns false if any of them is needed.
  bool find_parts_on(i64 row, i64 group, i64 a, i64 slot);
  i64 unneeded_behind(i64 row) const;  // pages behind the content of a parked row
  // Returns the first of the duplicates that can be reclaimed, 0 if there is none. `snapshots`: also one that would
  // lose a snapshot. Looks at `most` of them; those that cannot go to the end of the list.
  i64 find_duplicate(bool snapshots, i64 most);
  // Whether other rows have every block of the row's content from `from` on, with the same parts.
  bool is_covered(i64 row, std::size_t from) const;
  bool is_second_copy(i64 row) const;
  // Whether a row loses only its snapshot or parts that are out of window elsewhere, of blocks that are not pinned.
  bool can_lose_snapshot(i64 row) const;
  // Whether the row can lose all its content: nothing uses it, or another row has it too.
  bool can_lose(i64 row) const;
  // Whether other rows serve each pin that ends in the row's content from block `from` on.
  bool keeps_pins(i64 row, i64 from) const;
  // Whether another row has all that a sequence needs to start at the end of block `ordinal`.
  bool can_start_elsewhere(i64 row, i64 ordinal) const;

  // ---- virtual_accounting.cpp ----
  i64 add_shared(const Extent& e, i64 from, i64 to, std::vector<SharedPart>* shared) const;

  static constexpr i64 kNoRow = 0;  // find_memory() returns it where nothing is needed: row 0 has no content
  VirtualRows rows_;
  std::vector<i32> on_page_;    // the result of find_parts_on()
  std::vector<i64> source_of_;  // [window][block]: the result of find_sources()
  i64 filled_row_ = -1;         // the parked row that the decision in progress fills
};

}  // namespace kvmem
