// The paged backend (PagedAttention): a sequence is a list of blocks, which kernels read.
//
// The arena is reserved addresses; only pages under blocks in use are backed. So a block is
//   unbacked    some page under it is not mapped;
//   ready       backed, and nobody refers to it: in the free list, lowest first (ready_blocks.h);
//   cached      backed, nobody refers to it, but the content index knows what it holds;
//   referenced  refs > 0 table entries (invariants 2 and 3), its content known or not.
// Blocks and pages need not divide each other. Arenas of a group whose tokens have equal size are mapped in lockstep
// and share their bookkeeping: one SlotClass.
#pragma once

#include <algorithm>
#include <limits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "table/paged/paged_blocks.h"

namespace kvmem {

class PagedTable final : public PagedBlocks {
 public:
  using PagedBlocks::PagedBlocks;
  i64 find_room(i64 index, i64 group) override {
    const i64 tokens = sequences_.tokens(index, group);
    if (copy_tail_[index * groups_ + group] || has_cut(index, group, tokens)) return 0;
    return round_up(tokens, blocks_[group].tokens);
  }
  void grow(i64 index, i64 group, i64 old_tokens, i64 new_tokens, Transaction& tx) override;
  void zero_cut(i64 index, i64 group, i64 tokens, Transaction& tx) override {
    zero_cut(index, group, tokens, tokens, tx);
  }
  void shrink(i64 index, i64 group, i64 old_tokens, i64 new_tokens, Transaction& tx) override;
  void drop_front(i64 index, i64 group, i64 old_first, i64 first, Transaction& tx) override;
  void share(i64 parent, i64 child, i64 group, i64 first, i64 tokens, Transaction& tx) override;
  i64 find_row(const std::vector<i32>&, i64) const override { return 0; }
  bool has_state(i32 node) const override;
  // What is taken over is referred to, or kept from being given up, before any memory is looked for. The caller needs
  // what windows hold of it.
  void adopt(i64 index, const std::vector<i32>& chain, const Found& found, Transaction& tx) override;
  bool has(i32 node, i64 group) const override { return block_of(node, group) != 0; }
  // A block that is cached already takes the place of the sequence's own, so that its content is held once.
  void publish(const std::vector<Published>& blocks, Transaction& tx) override;
  void unpublish(i64, i32, Transaction&) override {}  // its blocks have left the table, or are marked to be copied
  void evict(i32 node, Transaction& tx) override;
  // Where it was all that there is of the node, the node goes with it.
  void evict_window(i32 node, i32 window, Transaction& tx) override;
  void evict_cut_ends(Transaction& tx) override;
  void allow_eviction(i32 node) override {
    for (i64 g = 0; g < groups_; ++g) {
      if (const i32 block = has_state(g) ? block_of(node, g) : 0) offer_snapshot(blocks_[g], block);
    }
  }
  void snapshot(i64 index, const std::vector<i32>& chain, Transaction& tx) override;
  std::vector<i64> shared_pieces(i64 index, i64 group, i64 from, i64 end) const override;
  void close(i64 index, Transaction& tx) override;
  void back_reserved(i64 group, Transaction& tx) override {
    if (!has_reserved(group)) back(group, 0, kReservedBlocks, Zero::always, tx);
  }
  // Blocks are taken from backed pages as long as there are any, which costs nothing; there is nothing to prepare.
  bool map_ahead(i64, i64, i64, Transaction&) override { return false; }
  void set_pending(i64, i64) override {}
  i64 pending(i64) const override { return 0; }
  // Pages that hold nothing are given first and unmapped last, all of them in runs.
  i64 reclaim_kind(Reclaim kind, i64 pages, Transaction& tx) override;
  i64 finish_reclaim(i64 pages, i64, Transaction& tx) override { return reclaim_idle(pages, tx); }

 private:
  i64 block_tokens() const { return index_.block_tokens(); }
  void publish_part(const Published& p, i64 g, i64 part, i64 ordinal, std::size_t* expected, Transaction& tx);
  // `cut`: how many of a block's references are such ends. A pin needs the node besides its blocks.
  bool is_needed_by_ends(const Blocks& b, i64 g, i32 node, const std::unordered_map<i32, i32>& cut) const;
  void evict_of(i32 node, i64 g, Transaction& tx) {
    for (i64 part = blocks_[g].parts; part-- > 0;) {
      tx.push({OpKind::evict, number, node, g, block_of(node, g, part), part});
    }
  }
  // Takes the snapshots of a node out of the lists of those that may be given up, for a while.
  class KeptSnapshots {
   public:
    KeptSnapshots(PagedTable& table, i32 node) : table_(table) {
      for (i64 g = 0; g < table.groups_; ++g) {
        const i32 block = table.block_of(node, g);
        if (block == 0 || !table.blocks_[g].snapshots.has(block)) continue;
        blocks_.emplace_back(g, block);
        table.blocks_[g].snapshots.remove(block);
      }
    }
    // Puts them back; where an error has come instead, the journal does.
    void end() {
      for (const auto& [g, block] : blocks_) {
        Blocks& b = table_.blocks_[g];
        if (b.info[block].refs == 0) table_.list_snapshot(b, block);
      }
    }
    KeptSnapshots(const KeptSnapshots&) = delete;
    KeptSnapshots& operator=(const KeptSnapshots&) = delete;

   private:
    PagedTable& table_;
    std::vector<std::pair<i64, i32>> blocks_;
  };
  // Pages without users and content that are being prepared just now, and not to be taken away.
  i64 held_pages() const;
  i64 reclaim_idle(i64 pages, Transaction& tx);
  bool has_state(i64 g) const { return geometry_.groups[g].growth == Growth::fixed; }
  // Evicts the next item of the eviction order; after all of them, snapshots of tokens that are in use. False if there
  // is nothing left.
  bool evict_next(Transaction& tx);
  // What is pinned goes with its node.
  bool evict_snapshot(Transaction& tx);
  // Evicts the item and what else lies on one of its pages, the one with the least besides, so that this page comes
  // free. False, and nothing has happened, where none of its pages could.
  bool free_page_of(Item x, Transaction& tx);
  // What is cached on the page at a slot, in on_page_, a block before those it continues; false where that cannot all
  // be evicted without losing more.
  bool find_content(const Blocks& b, const SlotClass& c, i64 slot);
  void set(i64 index, i64 group, i64 ordinal, i64 block, Transaction& tx) {
    const i32 old = entry(index, group, ordinal);
    tx.push({OpKind::block, static_cast<i32>(group), sequences_.handle_of(index), ordinal, block, old});
  }
  // The next ready block. `wanted`: how many the caller will take in all, so that they are backed in one run.
  i64 take(i64 group, i64 wanted, Transaction& tx);
  // Kernels that load whole tiles read a block to its end, and multiply what lies behind the length by 0.
  bool zeroes_blocks() const { return guarded_ || geometry_.zero == Zero::always; }
  void zero_blocks(const Blocks& b, i64 first, i64 n, Transaction& tx) {
    for (const SlotClass& c : b.classes) {
      for (i64 a : c.arenas) tx.push({OpKind::zero, arena(a), first * c.block_bytes, n * c.block_bytes});
    }
  }
  // Zeroes [tokens, end of what was cut off) in the block that `old_tokens` cut; any later one is new, and zero.
  void zero_cut(i64 index, i64 group, i64 old_tokens, i64 tokens, Transaction& tx);
  // Entries from `first` on become the next run of ready blocks, `most` at most; returns how many.
  i64 take_run(i64 index, i64 group, i64 first, i64 most, Transaction& tx);
  // New pages, or pages without content, as long as there are any. Then what is evicted next: of this group it leaves a
  // block that is ready; of another it goes only if a page comes free by it.
  void make_ready(i64 group, i64 wanted, Transaction& tx);
  // Backs the next blocks, `wanted` at most, as far as no content has to go for them; false if there is no room for
  // one.
  bool back_some(i64 group, i64 wanted, Transaction& tx);
  static constexpr i64 kNoLimit = std::numeric_limits<i64>::max();
  struct Run {
    i64 end, pages;
  };
  // Of the unbacked blocks from `first` on, the first and as many more as `room` pages suffice for, `wanted` in all at
  // most; and the pages that they need.
  Run run_behind(Blocks& b, i64 first, i64 wanted, i64 room) const;
  // The lowest block with pages missing, or max_blocks.
  i64 unbacked(i64 group);
  // How many pages are missing under the block.
  i64 missing_pages(const Blocks& b, i64 block) const;
  bool has_room_for(const Blocks& b, i64 block) const {
    return block < b.max_blocks && missing_pages(b, block) <= pool_.ready_pages(*this);
  }
  // Maps what is not mapped yet under blocks [first, end).
  void back(i64 group, i64 first, i64 end, Zero zero, Transaction& tx);
  // A snapshot of a node in use, which no sequence refers to, may be given up from now on.
  void offer_snapshot(Blocks& b, i32 block);
  void copy_tail(i64 index, i64 group, i64 tokens, Transaction& tx);
  // Unless nobody else reads the block of a tail, `tokens` of which are the sequence's.
  void copy_shared(i64 index, i64 group, i64 ordinal, i64 tokens, Transaction& tx);
  void copy_block(i64 group, i64 from, i64 to, i64 tokens, Transaction& tx);
  void unmap(i64 a, i64 from, i64 to, i64 fence, Transaction& tx);
  std::vector<i32> on_page_;  // what find_content() found
};

}  // namespace kvmem
