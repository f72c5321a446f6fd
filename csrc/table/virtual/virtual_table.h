// The virtual backend's decisions, over the metadata of virtual_rows.h. virtual_table.cpp: growing and shrinking.
// virtual_content.cpp: what rows have in common. virtual_binding.cpp: which row comes
// next. virtual_reclaim.cpp: what is reclaimed.
#pragma once

#include <vector>

#include "table/virtual/virtual_rows.h"

namespace kvmem {

class VirtualTable final : public VirtualRows {
 public:
  using VirtualRows::VirtualRows;

  i64 find_room(i64 index, i64 group) override;
  void grow(i64 index, i64 group, i64 old_tokens, i64 new_tokens, Transaction& tx) override;
  void shrink(i64 index, i64 group, i64 old_tokens, i64 new_tokens, Transaction& tx) override;
  void zero_cut(i64 index, i64 group, i64 tokens, Transaction& tx) override;
  // Nothing is unmapped here: that would cost a driver call and a wait for every page a window leaves behind. The front
  // counts as parked from now on and goes when memory is short, in batches.
  void drop_front(i64 index, i64, i64, i64, Transaction& tx) override {
    set_fence(row_of_[index], tx.fence());
    may_reclaim(row_of_[index]);
  }

  void share(i64 parent, i64 child, i64 group, i64 first, i64 tokens, Transaction& tx) override;
  i64 find_row(const std::vector<i32>& chain, i64 tokens) const override;
  bool has_state(i32 node) const override { return state_row(node) >= 0; }
  void adopt(i64 index, const std::vector<i32>& chain, const Found& found, Transaction& tx) override;
  bool has(i32 node, i64 group) const override {
    if (geometry_.groups[group].growth == Growth::fixed) return has_state(node);
    const i32 window = index_.window_of(group);
    return window < 0 ? first_holder(node) >= 0 : index_.has_window(node, window);
  }
  void publish(const std::vector<Published>& blocks, Transaction& tx) override {
    constexpr std::size_t kAtOnce = 64;
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      if (i % kAtOnce == 0) tx.expect(std::min(blocks.size() - i, kAtOnce));
      const Published& p = blocks[i];
      attach_expected(row_of_[p.index], p.node, p.index, false, tx);
    }
  }

  void unpublish(i64 index, i32, Transaction& tx) override { detach_last(row_of_[index], tx); }

  void evict(i32 node, Transaction& tx) override;
  void evict_window(i32 node, i32 window, Transaction& tx) override;
  void allow_eviction(i32) override {}  // doubles_ knows the rows that this concerns
  void snapshot(i64 index, const std::vector<i32>& chain, Transaction& tx) override;
  std::vector<i64> shared_pieces(i64 index, i64 group, i64 from, i64 end) const override;
  void close(i64 index, Transaction& tx) override;
  void back_reserved(i64 group, Transaction& tx) override;
  bool map_ahead(i64 index, i64 group, i64 tokens, Transaction& tx) override;
  i64 reclaim_kind(Reclaim kind, i64 pages, Transaction& tx) override;

 private:
  // Marks a row that a decision reads or fills while it looks for memory, and that must not lose any to it.
  class Guard {
   public:
    Guard(i64& place, i64 row) : place_(place) { place_ = row; }
    ~Guard() { place_ = -1; }
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;

   private:
    i64& place_;
  };
  // Marks the rows that content is taken from, while it is.
  class Sources {
   public:
    explicit Sources(VirtualTable& table) : table_(table) {}
    ~Sources() {
      for (i64 row : rows_) table_.rows_[row].source = false;
    }
    Sources(const Sources&) = delete;
    Sources& operator=(const Sources&) = delete;
    void add(i64 row) {
      if (table_.rows_[row].source) return;
      rows_.push_back(row);
      table_.rows_[row].source = true;
    }

   private:
    VirtualTable& table_;
    std::vector<i64> rows_;
  };
  // The first block that a window needs of a sequence's first `tokens` tokens.
  i64 first_needed(i32 window, i64 tokens) const {
    const GroupGeometry& group = geometry_.groups[index_.group_of(window)];
    return window_first(group, geometry_.tail_guard_tokens, tokens) / index_.block_tokens();
  }
  // The rows that what windows need is taken from: true if that is found.row alone, else one for each block, in
  // source_of_.
  bool find_sources(const Found& found, const std::vector<i32>& chain, Sources* sources);
  void share_window(i64 to, i64 group, i64 first, i64 tokens, Transaction& tx);
  // True if the row shows what windows need of the first `tokens` tokens of the chain, which it holds.
  bool shows_windows(i64 row, const std::vector<i32>& chain, i64 tokens) const;
  bool shows_blocks(i64 row, i32 window, i64 from, i64 to) const;
  // True if another row shows every block of a parked row from `from` on, as far back as this one does.
  bool is_covered(i64 row, std::size_t from) const;
  i64 reclaim_list(const IdList& list, i64 pages, Transaction& tx);
  i64 reclaim_copies(bool spare, i64 most, i64 pages, Transaction& tx);
  i64 reclaim_victims(i64 pages, Transaction& tx);
  i64 reclaim_ahead(i64 pages, Transaction& tx);
  i64 reclaim_row(i64 row, i64 pages, Transaction& tx, bool ahead = true);
  void drop_out_of_window(i64 row, Transaction& tx);
  bool keeps_pins(i64 row, i64 from) const;
  i64 evict_node(i32 node, i64 pages, Transaction& tx);
  void evict_run(i64 row, i64 pages, Transaction& tx);
  i64 spare_pages(i64 row) const;
  // Evicts what a window group has of a node, and of other blocks on one of its pages if only so a page comes free;
  // returns how many pages did. -1, and nothing has happened, where none can.
  i64 evict_window_page(Item x, Transaction& tx);
  // Gives up, for at least so many pages, second copies of what windows have passed in their rows.
  i64 reclaim_out_of_window(i64 pages, Transaction& tx);
  // Gives up, of a parked row, what windows show in other rows as well, if it frees pages.
  i64 reclaim_window_copies(i64 row, i64 pages, Transaction& tx);
  void evict_copy(i64 row, i64 ordinal, i32 window, Transaction& tx);
  // What window group `group` shows of blocks that lie, also in part, on a page of a row, in on_page_; false where
  // somebody needs any of it.
  bool find_content(i64 row, i64 group, i64 a, i64 slot);
  // Unmaps what the rows had mapped for the block alone, after they have concealed it.
  void unmap_block(const std::vector<i64>& rows, i32 window, i64 ordinal, Transaction& tx);
  std::vector<i64> showers(i32 node, i32 window) const;
  // The row forgets the last block of its content.
  void detach_last(i64 row, Transaction& tx);
  void demote_last(i64 row, Transaction& tx);
  void keep_last_copy(i64 row, i64 ordinal);
  bool is_last_copy(i64 row, i64 ordinal) const;
  // The row forgets its content from block `from` on.
  void cut(i64 row, i64 from, Transaction& tx);
  // The row holds what the sequence at `index` computed or was given, and shows what its windows reach of that.
  void attach_noted(i64 row, i32 node, i64 index, bool state, Transaction& tx) {
    tx.expect();
    attach_expected(row, node, index, state, tx);
  }
  void attach_expected(i64 row, i32 node, i64 index, bool state, Transaction& tx) {
    const i64 windows = index_.windows() == 0 ? 0 : mapped_windows(row, index, index_.ordinal(node));
    index_.expect_copies();
    attach(row, node, state, windows, 0, false);
    tx.note({OpKind::hold, number, node, row, i64{state} | windows << 1});
  }
  void attach_all(i64 row, const std::vector<i32>& chain, i64 count, i64 index, bool state, Transaction& tx);
  // A parked row whose content other rows hold too.
  bool is_copy(i64 row) const;
  // A parked row whose blocks sequences hold as well, so that only its state or what a window has passed in theirs
  // would be lost: the last to go. What is pinned keeps both.
  bool is_spare(i64 row) const;
  // True if a parked row can lose what it holds: nobody uses it, or another row holds it too.
  bool can_lose(i64 row) const;
  // True if another row shows all that a sequence would take over at the end of block `ordinal` of this one.
  bool shows_elsewhere(i64 row, i64 ordinal) const;
  // The first of doubles_ that is a copy (or also: a spare), 0 if none is. Looks at `most` of them at most; those that
  // are none now go to the end, so that the next look begins behind them.
  i64 find_double(bool spare, i64 most);
  // The parked row without content whose mapped slots come nearest to `slots`: the smallest that has as many, unless
  // memory is short and the largest that has fewer is much nearer (a slot too many counts two fifths of one too few,
  // since somebody else has to map it later). Among equals the first, so that sequences that start together lie at
  // equal distances and a batch of them is one strided tensor. -1 if all hold content. The trash row is never among
  // them.
  i64 best_empty(i64 slots) const;
  // A row without content, and one that has as few pages as may be: for one that is to show pages of another.
  i64 pick_empty(Transaction& tx);
  // A parked row that gives up its content for the next one: a second copy, else the one with the least valuable block.
  i64 empty_a_row(Transaction& tx);
  // Some parked row with content that can lose it, 0 if there is none. Looks at all rows.
  i64 any_to_lose() const;
  // Makes room for what growing to `tokens` maps in the group, with what is ahead, and returns how many slots that is;
  // 0 where there is no room for the latter, or none is mapped ahead.
  i64 slots_with_ahead(i64 row, i64 group, i64 tokens, Transaction& tx);
  // Of the next few items of the eviction order, the parked row with the most slots of which all can go, `most` slots
  // at most; -1 if there is none.
  i64 pick_victim(i64 most, Transaction& tx);
  // Binds a row for a sequence that shows pages of another in front, and has its own behind those.
  void bind_behind(i64 index, const Found& found, Transaction& tx);
  // The row for a sequence that starts with `tokens` tokens, of which the whole pages of the first `shown` are another
  // row's. Where content has to go for them, rows go whole that have no more than a quarter too much: their pages are
  // taken with them, which costs no driver call.
  i64 pick_row(i64 tokens, i64 shown, Transaction& tx);
  void bind(i64 index, i64 tokens, Transaction& tx);
  // A parked row can go on as the sequence's own if it loses nothing by that which others cannot show, or if there is
  // no other row. A fixed state could not be found again once it is written over.
  bool can_reuse_row(i64 row, std::size_t blocks) const;
  void reuse_row(i64 index, i64 row, i64 blocks, Transaction& tx);
  // What the last tenant left behind the first `tokens` tokens, and whatever it had mapped beyond its own.
  void zero_row(i64 row, i64 tokens, Transaction& tx);
  // For a row that starts with pages of another one: whatever is parked in it would be in the way.
  void bind_empty(i64 index, Transaction& tx);
  void drop_pages(i64 row, Transaction& tx);
  // Shows the pages that lie whole within tokens [first, tokens) in another row too, and copies what is cut.
  void share_row(i64 from, i64 to, i64 group, i64 first, i64 tokens, Transaction& tx);
  void copy_state(i64 from, i64 to, i64 group, Transaction& tx);
  // A parked row may still show pages that a live one shares. They are not ours to write.
  void drop_shared(i64 row, Transaction& tx);
  // Pages from the length on are shared, after a truncation: the one that the length cuts is replaced by a copy of what
  // is used, and those behind it, which were kept as the guard, give way to new ones. The copy is made at the scratch
  // slot behind the last row, since the row's own address still shows the old page.
  void copy_tail(i64 index, i64 group, i64 tokens, Transaction& tx);
  void drop_shared_guard(i64 row, i64 a, i64 from, Transaction& tx);
  void replace_page(i64 row, i64 group, i64 a, i64 slot, i64 used_bytes, Transaction& tx);
  // Zeroes what the row came with, as far as kernels may load it behind `new_tokens` or before those are written, and
  // as much as the guard again, so that a step seldom has to.
  void zero_ahead(i64 row, i64 group, i64 old_tokens, i64 new_tokens, Transaction& tx);
  // Zeroes tokens [from, to) where pages are mapped that no other row shows; false if there are others.
  bool zero_tokens(i64 row, i64 group, i64 from, i64 to, Transaction& tx);
  // A guard is finite only if what is mapped for it is zeroed, this allocator's own pages too.
  Zero page_zero() const { return guarded_ ? Zero::always : geometry_.zero; }
  void map(i64 row, i64 a, i64 from, i64 to, Transaction& tx) { map(row, a, from, to, tx, page_zero()); }
  void map(i64 row, i64 a, i64 from, i64 to, Transaction& tx, Zero zero);
  void map_holes(i64 row, i64 a, i64 from, i64 to, Transaction& tx);
  void unmap(i64 row, i64 a, i64 from, i64 to, i64 fence, Transaction& tx);

  bool needs_nothing(i64 tokens) const;  // of the tokens before, as windows of one token at the end of a block

  static constexpr i64 kNoRow = 0;  // where nothing is needed: no row with content has this number
  std::vector<i32> on_page_;        // what find_content() found
  std::vector<i64> source_of_;      // [window][block]: what find_sources() found
  i64 copy_ = -1;                   // the row of no sequence that a snapshot is being made in
};

}  // namespace kvmem
