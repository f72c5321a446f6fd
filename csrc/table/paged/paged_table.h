// The paged backend (PagedAttention's idea): a sequence is a list of blocks, which kernels read.
//
// The arenas are reserved addresses, and only pages under blocks in use are mapped. So a block is
//   unbacked    some page under it is not mapped;
//   ready       backed, without reference or known content: in the free list, lowest first (ready_blocks.h);
//   cached      backed and without reference, but the index knows its content;
//   referenced  by table entries (invariants 2 and 3), whether its content is known or not.
// Blocks and pages need not divide each other.
//
// This class decides; its state is PagedBlocks. paged_table.cpp: growing, shrinking, ending. paged_content.cpp:
// adopting, publishing and evicting content. paged_reclaim.cpp: reclaiming memory. paged_compact.cpp: moving blocks.
// paged_accounting.cpp: counting. paged_follow.cpp: the rules for another allocator's ops.
#pragma once

#include <limits>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "table/page_table.h"
#include "table/paged/paged_blocks.h"

namespace kvmem {

struct BlockMove {
  i32 from, to;
};

class PagedTable final : public PageTable {
 public:
  // `append_only`: an entry that a sequence has is never replaced by another block.
  PagedTable(const Geometry& geometry, PagePool& pool, const Sequences& sequences, PrefixIndex& index, bool append_only)
      : PageTable(geometry, pool, sequences, index), append_only_(append_only), blocks_(*this, marks_) {}

  // ---- growth ----
  i64 find_room(i64 index, i64 group) override {
    const i64 tokens = sequences_.tokens(index, group);
    if (marks_.copy_tail(index, group) || has_truncated(index, group, tokens)) return 0;
    return round_up(tokens, blocks_[group].tokens);
  }
  void grow(i64 index, i64 group, i64 old_tokens, i64 new_tokens, Transaction& tx) override;
  void shrink(i64 index, i64 group, i64 old_tokens, i64 new_tokens, Transaction& tx) override;
  void advance_front(i64 index, i64 group, i64 old_first, i64 first, Transaction& tx) override;
  void share(i64 parent, i64 child, i64 group, i64 first, i64 tokens, Transaction& tx) override;
  void close(i64 index, Transaction& tx) override;
  void back_reserved(i64 group, Transaction& tx) override {
    if (!has_reserved(group)) back(group, 0, kReservedBlocks, Zero::always, tx);
  }
  bool has_reserved(i64 group) const override { return blocks_.has_reserved(group); }
  // There is nothing to prepare: blocks are taken from backed pages at no cost as long as there are any.
  bool map_ahead(i64, i64, i64, Transaction&) override { return false; }
  void set_pending(i64, i64) override {}
  i64 pending(i64) const override { return 0; }
  void zero_truncated(i64 index, i64 group, i64 tokens, Transaction& tx) override {
    zero_truncated(index, group, tokens, tokens, tx);
  }
  // Another group, and the null block of a window, need whole pages.
  bool eviction_scatters() const override { return groups_ > 1 || !has_reserved(0); }
  i64 tokens_that_fit(i64 index, i64 group, i64 pages) const override;
  TableView view(i64 group) const override;
  i64 offset_bytes(i64 index, i64 group, i64 a, i64 token) const override;

  // ---- content ----
  i64 find_memory(const std::vector<i32>&, i64) const override { return 0; }
  bool has_snapshot(i32 node) const override;
  // References what is adopted, or keeps it from eviction, before it looks for memory. REQUIRES also: the sequence's
  // windows need their parts (PrefixIndex::need()).
  void adopt(i64 index, const std::vector<i32>& chain, const SharedPrefix& found, Transaction& tx) override;
  bool has(i32 node, i64 group) const override { return blocks_.block_of(node, group) != 0; }
  // A block that is cached already replaces the sequence's own, so that its content is in memory once. Append-only: the
  // sequence keeps its own, which takes the place of a cached one that no sequence reads.
  void publish(const std::vector<Published>& blocks, Transaction& tx) override;
  bool is_unread(i32 node) const override;
  void unpublish(i64, i32, Transaction&) override {}  // its blocks have left the table, or are marked to be copied
  void evict(i32 node, Transaction& tx) override;
  void evict_window(i32 node, i32 window, Transaction& tx) override;
  void evict_truncated_ends(Transaction& tx) override;
  void allow_eviction(i32 node) override;
  void pin_end(i32, bool) override {}  // any blocks of the node will do
  void snapshot(i64 index, const std::vector<i32>& chain, Transaction& tx) override;
  void promote(const std::vector<i32>& chain, const SlotsOfChain& from, Transaction& tx) override;  // paged_tiers.cpp
  i64 common_blocks(i64 a, i64 b, i64 group, i64 known) const override;
  i64 block_key(i64 index, i64 group, i64 block) const override { return blocks_.entry(index, group, block); }
  void count_bytes(i64 group, std::vector<i64>* used_bytes, i64* shared_bytes) const override;
  i64 held_bytes() const override;
  i64 cached_beside_bytes() const override;
  i64 mapped_extent_slots(i64 group, i64 arena_in_group) const override;
  void check(std::vector<std::string>* out) const override { blocks_.check(owned_pages, out); }

  // ---- following ----
  void apply(const Op& op, bool undo) override { blocks_.apply(op, undo); }
  void on_front(i64, i64, i64, i64, bool) override {}  // the table entries say what a window needs
  void check_tail_again(i64 index, i64 group) override {
    marks_.set_copy_tail(index, group, true);
    marks_.reset_room(index, group);
  }
  void note_released(const Op& op) override {
    if (op.kind == OpKind::block && op.d != 0) blocks_.set_fence(op.at, pool_.fence());
  }
  bool is_whole(const Op& op) const override { return blocks_.is_whole(op); }
  std::vector<i64> shared_pieces(i64 index, i64 group, i64 from, i64 end) const override;
  std::unique_ptr<FollowRules> rules(const FollowedLengths& lengths) override;  // paged_follow.cpp
  i64 sequence_at(const Op&) const override { return -1; }  // pages under a block in a table cannot be unmapped
  bool has_memory(i64) const override { return false; }     // beyond its table entries
  bool holds(i64 index, i64 group) const override { return blocks_.holds(index, group); }

  // ---- of PageOwner ----
  void on_map(const Op& op) override { blocks_.on_map(op); }
  void on_unmap(const Op& op) override { blocks_.on_unmap(op); }
  bool is_mapped(i32 number, i64 slot, i64 count) const override {
    return blocks_.is_mapped(local_arena(number), slot, count);
  }
  void on_content(const Op& op, bool undo) override { is_copy(op) ? blocks_.on_copy(op, undo) : on_order(op, undo); }
  bool can_evict(const Op& op) const override { return blocks_.can_evict(op); }
  i64 parked_pages() const override { return blocks_.unreferenced_pages(); }
  i64 reclaim_kind(Reclaim kind, i64 pages, Transaction& tx) override;
  // Empty pages are counted first and unmapped last, all of them in runs.
  i64 finish_reclaim(i64 pages, i64, Transaction& tx) override { return unmap_empty(pages, tx); }
  i64 compact(i64 pages, Transaction& tx) override;
  void on_taken_back() override {
    blocks_.undo_kept();
    PageTable::on_taken_back();
  }
  void finish(bool committed) override {
    blocks_.finish();
    PageTable::finish(committed);
  }
  void digest(Hasher& hash) const override {
    PageTable::digest(hash);
    blocks_.digest(hash);
  }

 private:
  // ---- paged_table.cpp: blocks ----
  // Pushes the op by which a table entry becomes `block` (0: none).
  void set_entry(i64 index, i64 group, i64 ordinal, i64 block, Transaction& tx) {
    const i32 old = blocks_.entry(index, group, ordinal);
    tx.push({OpKind::block, static_cast<i32>(group), sequences_.handle_of(index), ordinal, block, old});
  }
  // Returns a ready block, which an entry may then become. `wanted`: how many blocks the caller will need in all, so
  // that they are backed in one run.
  i64 next_block(i64 group, i64 wanted, Transaction& tx);
  // The next run of ready blocks, at most `most`, becomes entries from `first` on; returns how many.
  i64 allocate_run(i64 index, i64 group, i64 first, i64 most, Transaction& tx);
  // Makes a block ready. Backs new blocks as long as that needs no content; then evicts: a victim of this group leaves
  // a ready block, one of another group is evicted only if a page comes free.
  void make_ready(i64 group, i64 wanted, Transaction& tx);
  bool can_back_one(i64 group) {
    const i64 block = blocks_.first_unbacked(group);
    return block < blocks_[group].max_blocks && blocks_.missing_pages(group, block) <= pool_.ready_pages(*this);
  }
  // Backs the next blocks, at most `wanted`, without evicting content. Returns false if there is no room for one.
  bool back_some(i64 group, i64 wanted, Transaction& tx);
  void back(i64 group, i64 first, i64 end, Zero zero,
            Transaction& tx);  // maps the missing pages of blocks [first, end)
  // Kernels that load whole tiles read a block to its end, and multiply what lies behind the length by 0.
  bool zeroes_blocks() const { return guarded_ || geometry_.zero == Zero::always; }
  void zero_blocks(i64 group, i64 first, i64 n, Transaction& tx);
  // Zeroes tokens [tokens, end of what was truncated) in the block that `old_tokens` divides. Later blocks are new.
  void zero_truncated(i64 index, i64 group, i64 old_tokens, i64 tokens, Transaction& tx);
  // Copies the blocks of the tail that others read.
  void copy_tail(i64 index, i64 group, i64 tokens, Transaction& tx);
  void copy_shared(i64 index, i64 group, i64 ordinal, i64 tokens, Transaction& tx);
  void copy_block(i64 group, i64 from, i64 to, i64 tokens, Transaction& tx);

  // ---- paged_content.cpp: content ----
  i64 block_tokens() const { return index_.block_tokens(); }
  // Copies the first `tail` tokens of a node, or its state, to new blocks of a sequence.
  void adopt_copies(i64 index, i64 g, i32 node, i64 first, i64 tail, Transaction& tx);
  void publish_part(const Published& p, i64 g, i64 part, i64 ordinal, std::size_t* expected, Transaction& tx);
  void evict_group(i32 node, i64 g, Transaction& tx);
  // Pushes the ops that copy a part of a node between its block and host memory.
  void move_part(OpKind kind, i64 g, i64 part, i64 block, i64 at, Transaction& tx);
  void store(i32 node, i64 group, i64 at, Transaction& tx) override;
  // Whether only the sequences that end within the node need it. `ends`: how many of a block's references are such
  // ends.
  bool is_needed_by_ends(i64 g, i32 node, const std::unordered_map<i32, i32>& ends) const;

  // ---- paged_reclaim.cpp ----
  i64 backing_pages() const;  // empty pages that are being backed
  i64 unmap_empty(i64 pages, Transaction& tx);
  // Evicts the next victim, or, after all of them, a snapshot of tokens in use. Returns false if there is none.
  bool evict_next(Transaction& tx);
  bool evict_snapshot(Transaction& tx);  // not a pinned one
  // Evicts the victim and all others on one of its pages, the page with the fewest. Returns false, and changes nothing,
  // if no page can come free.
  bool free_page_of(Item x, Transaction& tx);
  // Writes the nodes on a slot to on_page_, continuations first. Returns false if not all of them can be evicted
  // without losing more.
  bool find_content_on(const Blocks& b, const SlotClass& c, i64 slot);

  void move(i64 g, const std::vector<BlockMove>& moves, Transaction& tx);  // paged_compact.cpp
  i64 cached_bytes_on(const Blocks& b, const SlotClass& c, i64 slot) const;

  static constexpr i64 kNoLimit = std::numeric_limits<i64>::max();
  const bool append_only_;
  PagedBlocks blocks_;
  std::vector<i32> on_page_;  // the result of find_content_on()
};

}  // namespace kvmem
