// The interface of a backend: a page table, which says where each token of a sequence lies. There are two: VirtualTable
// (the MMU holds the table; each sequence has a row of addresses) and PagedTable (kernels read the table; each sequence
// has a list of blocks). Everything else is written once, in allocator/.
//
// A backend has two halves. Its metadata (VirtualRows, PagedBlocks) is its state, which changes through named functions
// only. The table derived from PageTable decides: it reads the metadata and pushes ops. The ops return through on_map,
// on_unmap, on_content and apply, which the table passes to the metadata. Two kinds are too frequent for that: the
// table changes the metadata itself and then notes the op (Transaction::note), for `hold` and `acquire`.
//
// Functions are called under the pool's lock. Those that take a Transaction may throw OutOfMemory, and DeviceError
// where mapping needs the driver; the transaction is then undone, which restores the state (invariant 5).
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "table/arenas.h"
#include "table/growth_marks.h"
#include "table/reclaim.h"
#include "table/view.h"
#include "tier/host_slots.h"

namespace kvmem {

class FollowedLengths;
class FollowRules;

// The memory that adopt() shares with a new sequence.
struct SharedPrefix {
  i64 tokens = 0;       // tokens of the chain that every group has
  i64 cookie = -1;      // what find_memory() returned
  i64 room_tokens = 0;  // tokens for which the same call makes room afterwards, as a hint; 0: none
};

// Block `ordinal` of the sequence at `index` holds the tokens of `node`.
struct Published {
  i64 index, ordinal;
  i32 node;
};

// Where the groups' bytes of a chain's blocks lie in host slots: -1 where they are on the device, or are not wanted.
struct SlotsOfChain {
  const i64* slots;  // [block][group]
  i64 groups;
  i64 at(i64 block, i64 group) const { return slots[block * groups + group]; }
};

class PageTable : public PageOwner, protected ArenaRegistration, protected TableContext {
 public:
  // ---- growth: called by Planner, SequenceGrowth, SequenceRecords, BatchFiller and Allocator::step() ----

  // Returns whether tokens [0, tokens) of the group have room: there is nothing to decide and no driver call to make.
  bool has_room(i64 index, i64 group, i64 tokens) {
    i64& room = marks_.room_tokens(index, group);
    return tokens <= room || tokens <= (room = find_room(index, group));
  }
  // Makes room for tokens [old_tokens, new_tokens). Copies the tail first if it is shared, and zeroes truncated tokens
  // that kernels may load.
  virtual void grow(i64 index, i64 group, i64 old_tokens, i64 new_tokens, Transaction& tx) = 0;
  // Releases what lies behind `new_tokens`, which is about to become the length. Needs no memory.
  virtual void shrink(i64 index, i64 group, i64 old_tokens, i64 new_tokens, Transaction& tx) = 0;
  // Releases tokens [old_first, first), which are out of window.
  virtual void advance_front(i64 index, i64 group, i64 old_first, i64 first, Transaction& tx) = 0;
  // Gives `child` tokens [first, tokens) of `parent`: it shares whole pages or blocks, and copies the tail. REQUIRES:
  // `child` has no memory in the group.
  virtual void share(i64 parent, i64 child, i64 group, i64 first, i64 tokens, Transaction& tx) = 0;
  // Releases all memory of a sequence, whose lengths are about to become 0.
  virtual void close(i64 index, Transaction& tx) = 0;
  // Backs the null block and the padding block of a group.
  virtual void back_reserved(i64 group, Transaction& tx) = 0;
  virtual bool has_reserved(i64 group) const = 0;
  // Pushes the mappings that the mapper thread should make beyond the length. Returns false if there are none. It never
  // reclaims memory for them.
  virtual bool map_ahead(i64 index, i64 group, i64 tokens, Transaction& tx) = 0;
  // The mapper's job that executes what map_ahead() pushed; 0 for none.
  virtual void set_pending(i64 index, i64 job) = 0;
  virtual i64 pending(i64 index) const = 0;
  // Whether truncated tokens may lie behind the first `tokens`, where kernels load them.
  bool has_truncated(i64 index, i64 group, i64 tokens) const {
    return guarded_ && marks_.truncated_to(index, group) > tokens;
  }
  // Zeroes them where no other sequence reads that memory. Elsewhere they stay until the sequence grows, which copies.
  virtual void zero_truncated(i64 index, i64 group, i64 tokens, Transaction& tx) = 0;
  // Returns the most tokens to which the sequence could grow with `pages` more pages, for error messages.
  virtual i64 tokens_that_fit(i64 index, i64 group, i64 pages) const = 0;
  virtual TableView view(i64 group) const = 0;
  // Returns where a token lies: bytes from the start of the group's a-th arena.
  virtual i64 offset_bytes(i64 index, i64 group, i64 a, i64 token) const = 0;
  virtual i64 first_arena(i64 group) const { return arena(first_[group]); }

  // ---- content: called by PrefixMatcher, Admission, SequenceContents, Pins and Allocator (memory.cpp, fill.cpp) ----
  // A chain is a list of nodes of the index, one for each block from the first token on.

  // Returns where a sequence of the first `tokens` tokens of the chain can find them, or -1. Only adopt() of this table
  // can read the answer (virtual: a row; paged: 0). They end in the chain's last node, which may count in part.
  // REQUIRES: each node has memory.
  virtual i64 find_memory(const std::vector<i32>& chain, i64 tokens) const = 0;
  // Whether the groups of fixed state have a snapshot at the end of the node.
  virtual bool has_snapshot(i32 node) const = 0;
  // Gives a sequence what was found, sharing whole pages or blocks and copying the tail. REQUIRES: it has no memory;
  // its lengths and fronts are set; all nodes are in use.
  virtual void adopt(i64 index, const std::vector<i32>& chain, const SharedPrefix& found, Transaction& tx) = 0;
  // Whether the group has memory with the node's tokens.
  virtual bool has(i32 node, i64 group) const = 0;
  virtual void publish(const std::vector<Published>& blocks, Transaction& tx) = 0;
  // The inverse for the sequence's last published block, which the sequence is about to overwrite.
  virtual void unpublish(i64 index, i32 node, Transaction& tx) = 0;
  // Whether no table names the node's block in some full-attention group, although the node is cached: a user of it may
  // have a block of its own with the same tokens, which publish() puts in that place (append-only tables).
  virtual bool is_unread(i32) const { return false; }
  // Evicts a node; its memory is parked then. REQUIRES: it has no user, and no cached node continues it.
  virtual void evict(i32 node, Transaction& tx) = 0;
  // Evicts the window group's part of a node. REQUIRES: nothing needs the part.
  virtual void evict_window(i32 node, i32 window, Transaction& tx) = 0;
  // Evicts the window groups' parts of nodes within which a sequence was truncated, and which no other sequence needs:
  // the sequence keeps that block as its own.
  virtual void evict_truncated_ends(Transaction&) {}
  // A user has left the node and others remain: a snapshot that no sequence refers to may be evicted from now on.
  virtual void allow_eviction(i32 node) = 0;
  // Counts one more or one fewer pin that ends at the node. While there is one, some row has all that a sequence needs
  // to start there.
  virtual void pin_end(i32 node, bool pinned) = 0;
  // Copies the sequence's fixed state; the copy belongs to the last node of the chain.
  virtual void snapshot(i64 index, const std::vector<i32>& chain, Transaction& tx) = 0;
  // Returns how many leading whole blocks of two sequences are the same memory and committed in both, given that the
  // first `known` are. Returns 0 if either has a front. Cost: a comparison for each further page or block.
  virtual i64 common_blocks(i64 a, i64 b, i64 group, i64 known) const = 0;
  // Returns a number that is equal for sequences which share this committed block; others may have it too.
  virtual i64 block_key(i64 index, i64 group, i64 block) const = 0;
  // Appends the bytes of a group's live tokens for each of its arenas, padding included, each physical byte once; adds
  // the physical bytes with several users to `shared_bytes`.
  virtual void count_bytes(i64 group, std::vector<i64>* used_bytes, i64* shared_bytes) const = 0;
  // Returns the bytes that live sequences and reserved blocks occupy: whole blocks (paged) or pages (virtual).
  virtual i64 held_bytes() const = 0;
  // Returns the bytes of cached, unreferenced tokens on pages that live sequences need: they can be evicted, but their
  // pages cannot be reclaimed.
  virtual i64 cached_beside_bytes() const { return 0; }
  // Returns the bytes that are counted more than once if each cached, unreferenced block is counted in full.
  virtual i64 common_bytes() const { return 0; }
  // Returns the slots of an arena up to the last mapped one: what a default tensor shows.
  virtual i64 mapped_extent_slots(i64 group, i64 arena_in_group) const = 0;
  virtual void check(std::vector<std::string>* out) const = 0;

  // While there is one, what is evicted counts as wrong: host memory gets none of it. Its pages may be unmapped
  // already.
  class Discarding {
   public:
    explicit Discarding(PageTable& table) : table_(table) { table_.discards_ = true; }
    ~Discarding() { table_.discards_ = false; }
    Discarding(const Discarding&) = delete;
    Discarding& operator=(const Discarding&) = delete;

   private:
    PageTable& table_;
  };
  // Evicts a node and all cached nodes that continue it, the ends first.
  void evict_subtree(i32 node, Transaction& tx);
  void evict_item(Item x, Transaction& tx) {
    if (x.window < 0) return evict_subtree(x.node, tx);
    unskip_item(x, tx);
    evict_window(x.node, x.window, tx);
  }
  // Evicts all that is cached and neither used nor pinned, in the policy's order.
  void evict_all(Transaction& tx);
  // Whether growth may fail although it would succeed with nothing cached: memory that is evicted item by item can be
  // of less use than the same memory evicted at once.
  virtual bool eviction_scatters() const { return false; }
  // Calls evict(item) for each victim that the policy names, while wants(). evict() returns what became of the item.
  template <class Wants, class Evict>
  void evict_in_order(Transaction& tx, Wants wants, Evict evict) {
    SkippedItems skipped(index_, number, tx);
    while (wants()) {
      const Item x = index_.victim();
      if (x.node == kNoNode) break;
      const Outcome outcome = evict(x);
      if (outcome == Outcome::stop || (outcome == Outcome::skipped && skipped.full())) break;
      if (outcome == Outcome::skipped) skipped.add(x);
    }
    skipped.restore();
  }

  // ---- tiers: called by Tiers ----

  // Blocks get one of these slots when they are evicted. REQUIRES: called once.
  void use_slots(std::shared_ptr<HostSlots> slots);
  HostSlots* slots() const { return slots_.get(); }
  // Returns the bytes of a block in a host slot of the group.
  i64 slot_bytes(i64 group) const;
  // Copies the group's bytes of a node that the device has to a slot, unless all are held. `group`: -1 for all groups.
  [[gnu::cold, gnu::noinline]] void keep(i32 node, i64 group, Transaction& tx);
  // Makes cached content of what the slots have of a chain's blocks. REQUIRES: all nodes are in use; after the call,
  // each node has memory in every full-attention group. May evict other content; a slot that is held stays.
  virtual void promote(const std::vector<i32>& chain, const SlotsOfChain& from, Transaction& tx) = 0;

  // ---- following: called by Follower for another allocator's ops, and by SequenceRecords for this one's ----

  // Applies a bind, unbind, block, acquire or drop. Throws SpecError if it does not fit the state.
  virtual void apply(const Op& op, bool undo) = 0;
  // The first token that a window needs has changed.
  virtual void on_front(i64 index, i64 group, i64 old_first, i64 first, bool undo) = 0;
  // The tail must be copied before the next write, if it is shared by then.
  virtual void check_tail_again(i64 index, i64 group) = 0;
  // An op of another allocator (unbind, block, length, front) has released memory, which the device may use until the
  // pool's latest fence has passed.
  virtual void note_released(const Op& op) = 0;
  // Such an op may have mapped a page a second time. Cost: a few instructions for each mapped page.
  virtual void note_shared() {}
  // The length may have become less than `old_tokens`.
  void note_truncated(i64 index, i64 group, i64 old_tokens) { marks_.note_truncated(index, group, old_tokens); }
  // Whether the mappings around those of `op` are as between calls: without holes, and equal in the group's arenas.
  virtual bool is_whole(const Op& op) const = 0;
  // Returns the pages or blocks of tokens [from, end), and the one that `from` divides, arena by arena: -1 for those
  // that the sequence does not share.
  virtual std::vector<i64> shared_pieces(i64 index, i64 group, i64 from, i64 end) const = 0;
  // Returns what a list of ops may do to this table's memory (follow.h).
  virtual std::unique_ptr<FollowRules> rules(const FollowedLengths& lengths) = 0;
  bool owns(i32 number) const { return is_own_arena(number); }
  // Returns the sequence in whose row the slots of a map or unmap lie, or -1.
  virtual i64 sequence_at(const Op& op) const = 0;
  // Whether the sequence has a row, whatever is mapped there.
  virtual bool has_memory(i64 index) const = 0;
  // Whether the sequence has exactly the memory that its lengths require. Cost: proportional to the longest sequence.
  virtual bool holds(i64 index, i64 group) const = 0;

  // ---- of PageOwner, for both backends; called by PagePool ----

  // Reclaims in kReclaimOrder until `pages` pages are free.
  i64 reclaim(i64 pages, bool content, Transaction& tx) final;
  i64 reclaimable_pages() const final { return index_.pinned_count() > 0 ? 0 : parked_pages(); }  // pins keep some
  void digest(Hasher& hash) const override {
    index_.digest(hash);
    marks_.digest(hash);
    if (slots_) slots_->digest(hash);
  }
  void on_taken_back() override { marks_.undo_zeroed(); }
  void on_kept_in_vain(const Op& keep) final { slots_->lose(keep.c); }
  void finish(bool committed) override {
    marks_.finish();
    index_.finish(committed);
  }

 protected:
  PageTable(const Geometry& geometry, PagePool& pool, const Sequences& sequences, PrefixIndex& index)
      : ArenaRegistration(*this, geometry, pool),
        TableContext(geometry, pool, sequences, index, first_number()),
        marks_(geometry.max_sequences, groups_, guarded_, pool.journal) {}

  // Returns for how many tokens there is room; 0 if something must be done before the next token is written.
  virtual i64 find_room(i64 index, i64 group) = 0;
  // Whether a private op adds, removes or moves a copy of a node. The others are about the eviction order and tiers:
  // on_order() executes them.
  static bool is_copy(const Op& op) { return op.kind <= OpKind::shift; }
  static_assert(OpKind::hold < OpKind::shift && OpKind::evict < OpKind::shift && OpKind::shift < OpKind::aside,
                "is_copy() compares kinds");
  void on_order(const Op& op, bool undo);
  // Makes at least `pages` pages of this kind free, as far as there are any; returns how many. They are unmapped, or
  // finish_reclaim() unmaps them.
  virtual i64 reclaim_kind(Reclaim kind, i64 pages, Transaction& tx) = 0;
  // Ends a reclaim(): unmaps what reclaim_kind() made free, at most `pages`; returns how many pages are free.
  virtual i64 finish_reclaim(i64 /*pages*/, i64 freed, Transaction&) { return freed; }

  // The one hook before content is lost: called once for each loss, while the memory still holds it and the index still
  // knows it. Copies it to a host slot, if there are any. `group`: -1 for all groups.
  void demote(i32 node, i64 group, Transaction& tx) {
    if (slots_ && !discards_) keep(node, group, tx);
  }
  bool demotes() const { return slots_ != nullptr; }
  // Pushes the ops that copy the group's bytes of the node to host memory from `at` on, arena after arena.
  virtual void store(i32 node, i64 group, i64 at, Transaction& tx) = 0;
  // The tokens of an index block that a group stores: a unit of them, or one fixed state.
  i64 slot_tokens(i64 g) const { return has_state(g) ? 1 : index_.block_tokens(); }
  // Restores the position of an item in the eviction order, so that undoing its eviction returns it there.
  void unskip_item(Item x, Transaction& tx) {
    if (index_.is_skipped(x)) tx.push({OpKind::back, number, x.node, x.window});
  }

  GrowthMarks marks_;

 private:
  SlotContent content_of(i32 node, i64 group) const;

  std::shared_ptr<HostSlots> slots_;
  i64 keeps_in_ = -1;      // the latest transaction that called keep()
  bool discards_ = false;  // what is evicted counts as wrong
};

std::unique_ptr<PageTable> make_virtual_table(const Geometry& geometry, PagePool& pool, const Sequences& sequences,
                                              PrefixIndex& index);
std::unique_ptr<PageTable> make_paged_table(const Geometry& geometry, PagePool& pool, const Sequences& sequences,
                                            PrefixIndex& index, bool append_only);

// Nothing could find the continuations of a node without it. A node of which windows have no copy may have
// continuations with copies, so it is visited too, and it stays among its siblings until the transaction ends.
inline void PageTable::evict_subtree(i32 node, Transaction& tx) {
  const auto last_below = [this](i32 x) {
    for (i32 child; (child = index_.unused_child(x)) != kNoNode;) x = child;
    return x;
  };
  for (i32 x = last_below(node);;) {
    const i32 parent = index_.parent(x), sibling = x == node ? kNoNode : index_.unused_sibling(x);
    for (i32 window = -1; index_.skipped_count() > 0 && window < index_.windows(); ++window) {
      unskip_item({x, window}, tx);
    }
    evict(x, tx);
    if (x == node) return;
    x = sibling == kNoNode ? parent : last_below(sibling);
  }
}

}  // namespace kvmem
