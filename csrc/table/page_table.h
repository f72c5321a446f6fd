// What a backend is: the page table that says where a sequence's tokens lie. Two implementations, virtual_table (the
// MMU holds the table: a row of addresses per sequence) and paged_table (kernels read it: a list of blocks per
// sequence). Everything else (lengths, transactions, batches, accounting) is written once, in allocator/.
//
// Functions that take a Transaction only push records; the state changes in on_map, on_unmap, on_content and apply. Of
// two kinds there are many in a step (hold, acquire): what decides them changes the state and notes the record.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "base/geometry.h"
#include "base/zero_vector.h"
#include "index/prefix_index.h"
#include "memory/pages.h"
#include "memory/transaction.h"
#include "table/reclaim.h"
#include "table/sequences.h"
#include "table/view.h"

namespace kvmem {

class FollowedLengths;
class FollowRules;

// Memory that holds the start of a chain of cached blocks.
struct Found {
  i64 tokens = 0;  // how many tokens of the chain are all there, in every group
  i64 row = -1;    // virtual: the row that shows them
  i64 wanted = 0;  // how many the sequence that takes them over gets room for in the same call; 0: for no more
};

// Block `ordinal` of the sequence at `index` holds what the node says.
struct Published {
  i64 index, ordinal;
  i32 node;
};

class PageTable : public PageOwner {
 public:
  // True if tokens [0, tokens) of the group have room already: nothing to decide, no driver call.
  bool has_room(i64 index, i64 group, i64 tokens) {
    i64& ready = ready_tokens_[index * groups_ + group];
    return tokens <= ready || tokens <= (ready = find_room(index, group));
  }
  // Makes room for tokens [old_tokens, new_tokens), copying the tail first where it is shared.
  virtual void grow(i64 index, i64 group, i64 old_tokens, i64 new_tokens, Transaction& tx) = 0;
  // The length is about to become `new_tokens`; what lies behind may go.
  virtual void shrink(i64 index, i64 group, i64 old_tokens, i64 new_tokens, Transaction& tx) = 0;
  // Tokens before `first` are no longer needed (a sliding window has passed them).
  virtual void drop_front(i64 index, i64 group, i64 old_first, i64 first, Transaction& tx) = 0;
  // Gives `child` (which holds nothing) the first `tokens` tokens of `parent`: whole shared pieces plus a copied tail.
  virtual void share(i64 parent, i64 child, i64 group, i64 first, i64 tokens, Transaction& tx) = 0;
  // --- content (prefix_index.h): a chain is a list of nodes, one for each block from the first token on ---
  // A row from which a sequence of the first `tokens` tokens of the chain can be made, or -1. They end in its last
  // node, which may count in part; the index knows that each block is somewhere. Paged: any answer but -1.
  virtual i64 find_row(const std::vector<i32>& chain, i64 tokens) const = 0;
  // True if the groups of fixed size have a snapshot at the end of the node.
  virtual bool has_state(i32 node) const = 0;
  // Gives a sequence that holds nothing what was found; its lengths and fronts say so already. All nodes are in use.
  virtual void adopt(i64 index, const std::vector<i32>& chain, const Found& found, Transaction& tx) = 0;
  // True if the group has the node's tokens somewhere.
  virtual bool has(i32 node, i64 group) const = 0;
  virtual void publish(const std::vector<Published>& blocks, Transaction& tx) = 0;
  // The last block that the sequence has published is its own again, to be written over.
  virtual void unpublish(i64 index, i32 node, Transaction& tx) = 0;
  // Gives up a node that nobody uses and that no cached one continues. Its memory is parked then.
  virtual void evict(i32 node, Transaction& tx) = 0;
  // Gives up what a window group holds of a node and nobody needs.
  virtual void evict_window(i32 node, i32 window, Transaction& tx) = 0;
  // Gives up what window groups hold of nodes that no sequence needs, though a block of theirs is the end of one that
  // was cut within it: that block is its own then.
  virtual void evict_cut_ends(Transaction&) {}
  // A user has left the node, and others remain: a snapshot that none of them holds may be given up from now on.
  virtual void allow_eviction(i32 node) = 0;
  // One more pin ends at the node, or one fewer: some row shows all that a sequence would take over there, and goes on
  // doing so.
  virtual void pin_end(i32 node, bool pinned) = 0;
  // Keeps a copy of the sequence's fixed state with the last node of its chain.
  virtual void snapshot(i64 index, const std::vector<i32>& chain, Transaction& tx) = 0;
  // The sequence ends; its lengths are about to become 0.
  virtual void close(i64 index, Transaction& tx) = 0;
  // Makes sure that blocks 0 and 1 (kNullBlock, kPaddingBlock) of a group exist.
  virtual void back_reserved(i64 group, Transaction& tx) = 0;
  virtual bool has_reserved(i64 group) const = 0;
  // Room beyond the length that can be prepared in the background, best effort. False when nothing is to be done.
  virtual bool map_ahead(i64 index, i64 group, i64 tokens, Transaction& tx) = 0;
  // The records of the transaction that map_ahead filled are executed once job `job` is done.
  virtual void set_pending(i64 index, i64 job) = 0;
  virtual i64 pending(i64 index) const = 0;

  virtual void apply(const Op& op, bool undo) = 0;  // bind, unbind, block, acquire, drop
  // The first token that a window still needs has changed, from `old_first` to `first`.
  virtual void on_front(i64 index, i64 group, i64 old_first, i64 first, bool undo) = 0;
  // The length has become less by another's decision: whether the tail is shared is to be seen before the next write.
  virtual void check_tail_again(i64 index, i64 group) = 0;
  // Another's decision has let go of memory, which the device may use until the pool's latest fence has passed.
  virtual void note_released(const Op& op) = 0;  // unbind, block, length, front
  // Another's decision may have mapped a page at a second place. Cost: a look at each mapped page.
  virtual void note_shared() {}
  // The length has become less than `old_tokens`, or may have: what the sequence wrote from there on lies behind its
  // end.
  void note_cut(i64 index, i64 group, i64 old_tokens) {
    if (!guarded_) return;
    i64& cut = cut_to_[index * groups_ + group];
    cut = std::max(cut, old_tokens);
    reset_room(index, group);
  }
  // True if tokens that it wrote and has cut off may lie behind the first `tokens`, where kernels load them.
  bool has_cut(i64 index, i64 group, i64 tokens) const { return guarded_ && cut_to_[index * groups_ + group] > tokens; }
  // Zeroes those, as far as nobody else reads them: another's tokens stay until the sequence grows and gets a copy.
  virtual void zero_cut(i64 index, i64 group, i64 tokens, Transaction& tx) = 0;
  // True if the mappings around those of `op` are as between calls: no holes, arenas in step.
  virtual bool is_whole(const Op& op) const = 0;
  // The pages or blocks that tokens [from, end) lie in, and the one that `from` cuts, by arena: -1 for those that are
  // the sequence's own.
  virtual std::vector<i64> shared_pieces(i64 index, i64 group, i64 from, i64 end) const = 0;
  // What a list of ops may do to this table's memory (follow.h).
  virtual std::unique_ptr<FollowRules> rules(const FollowedLengths& lengths) = 0;
  virtual bool owns(i32 arena) const = 0;
  // The sequence whose row a map or unmap is about, -1 for none.
  virtual i64 sequence_at(const Op& op) const = 0;
  // True while the sequence has a row, whatever is mapped there.
  virtual bool has_memory(i64 index) const = 0;
  // True if what the group's lengths speak of is there. Cost grows with the longest sequence there can be.
  virtual bool holds(i64 index, i64 group) const = 0;
  // Where a token of a sequence lies: bytes from the start of the group's a-th arena.
  virtual i64 offset_bytes(i64 index, i64 group, i64 a, i64 token) const = 0;
  virtual TableView view(i64 group) const = 0;
  // How many leading whole blocks of two sequences are the same memory, and committed in both; the first `known` are
  // known to be. 0 where a window has dropped the front of one. Cost: a comparison for each further page or block.
  virtual i64 common_blocks(i64 a, i64 b, i64 group, i64 known) const = 0;
  // A number that sequences with this committed block in common agree on; others may.
  virtual i64 block_key(i64 index, i64 group, i64 block) const = 0;
  // The most tokens one sequence could grow to with `pages` more pages (an answer for error messages).
  virtual i64 tokens_that_fit(i64 index, i64 group, i64 pages) const = 0;
  // Bytes of live tokens, padding included, each physical byte once; and physical bytes with more than one user.
  virtual void count_bytes(i64* used_bytes, i64* shared_bytes) const = 0;
  // What live sequences keep from others: blocks they hold, in part or whole, and trash blocks; or pages.
  virtual i64 held_bytes() const = 0;
  // Cached tokens that no sequence holds, on pages that some sequence needs. They can be given up, the pages cannot.
  virtual i64 beside_bytes() const = 0;
  // What cached blocks that nobody uses have in common: bytes that are counted once more for each of them but one.
  virtual i64 common_bytes() const { return 0; }
  virtual i64 first_arena(i64 group) const = 0;
  // Slots of an arena up to and including the last mapped one: what a default tensor shows.
  virtual i64 mapped_extent_slots(i64 group, i64 arena_in_group) const = 0;
  virtual void check(std::vector<std::string>* out) const = 0;
  i64 sure_pages() const override { return index_.pinned_count() > 0 ? 0 : parked_pages(); }  // pins keep some

  void digest(Hasher& hash) const override { index_.digest(hash); }
  void on_taken_back() override { zeroed_cuts_.clear(); }  // the marks stay: it may be zeroed once more

  // Along kReclaimOrder, until so many pages are free.
  i64 reclaim(i64 pages, bool content, Transaction& tx) final;
  // Pages of this kind, at least so many as far as there are; returns how many. They are unmapped, or finish_reclaim()
  // does that.
  virtual i64 reclaim_kind(Reclaim kind, i64 pages, Transaction& tx) = 0;
  // What reclaim_kind() has given in all becomes free, `pages` at most; returns how many are.
  virtual i64 finish_reclaim(i64 /*pages*/, i64 given, Transaction&) { return given; }
  // Content that was lost, a record for each group that held a block; empty unless watch_lost() was called. For tests.
  struct Lost {
    i64 group, ordinal;
    std::vector<i32> tokens;
  };
  void watch_lost() { watches_lost_ = true; }
  std::vector<Lost> take_lost() { return std::exchange(lost_, {}); }
  // Calls evict(item) with what the policy names next, while wants() and as long as it names something. evict() returns
  // what has become of the item.
  template <class Wants, class Evict>
  void evict_in_order(Transaction& tx, Wants wants, Evict evict) {
    Skipped aside(index_, number, tx);
    while (wants()) {
      const Item x = index_.victim();
      if (x.node == kNoNode) break;
      const Named done = evict(x);
      if (done == Named::last || (done == Named::aside && aside.full())) break;
      if (done == Named::aside) aside.add(x);
    }
    aside.unskip();
  }

  // Evicts a node and all cached ones that continue it, ends first: nobody could find those without it.
  void evict_subtree(i32 node, Transaction& tx);
  void evict_item(Item x, Transaction& tx) {
    if (x.window < 0) return evict_subtree(x.node, tx);
    unskip_item(x, tx);
    evict_window(x.node, x.window, tx);
  }

 protected:
  // The one hook before content is lost: called once for each loss, while the memory still holds it and the index still
  // knows it. Where a tier is to keep it, a `store` is pushed here.
  void demote(i32 node, i64 group, Transaction& tx) {
    if (watches_lost_) tx.push({OpKind::demote, number, node, group});
  }
  bool demotes() const { return watches_lost_; }  // else it need not be found out what is lost
  void on_demote(const Op& op, bool undo);
  // What is about to be evicted is set aside no more: taken back, it then comes to where it stood.
  void unskip_item(Item x, Transaction& tx) {
    if (index_.is_skipped(x)) tx.push({OpKind::back, number, x.node, x.window});
  }
  PageTable(PrefixIndex& index, const Geometry& geometry)
      : index_(index),
        groups_(static_cast<i64>(geometry.groups.size())),
        guarded_(geometry.tail_guard_tokens > 0),
        ready_tokens_(geometry.max_sequences * groups_) {
    if (guarded_) cut_to_.assign(ready_tokens_.size(), 0);
  }
  // How many tokens have room; 0 where something is to be done before the next token, whatever there is.
  virtual i64 find_room(i64 index, i64 group) = 0;
  // Called wherever find_room() might answer less than it did.
  void reset_room(i64 index, i64 group) { ready_tokens_[index * groups_ + group] = 0; }

  i64 cut_to(i64 index, i64 group) const { return cut_to_[index * groups_ + group]; }
  // The transaction zeroes all that was cut off. Until it is committed, the mark stays.
  void forget_cut(i64 index, i64 group) { zeroed_cuts_.push_back(index * groups_ + group); }
  void reset_cut(i64 index, i64 group) { cut_to_[index * groups_ + group] = 0; }  // it has no memory yet
  void finish_cuts() {
    for (const i64 at : zeroed_cuts_) cut_to_[at] = 0;
    zeroed_cuts_.clear();
  }

  PrefixIndex& index_;
  const i64 groups_;
  const bool guarded_;  // what kernels load behind a length, in whole tiles, has to be finite

 private:
  // [sequence][group]: tokens before it may have been written and cut off again. May be too high, never too low; empty
  // without a guard.
  std::vector<i64> cut_to_;
  std::vector<i64> zeroed_cuts_;  // by the transaction in progress
  ZeroVector<i64> ready_tokens_;  // [sequence][group]: what find_room() said; derived
  bool watches_lost_ = false;
  std::vector<Lost> lost_;
};

std::unique_ptr<PageTable> make_virtual_table(const Geometry& geometry, PagePool& pool, const Sequences& sequences,
                                              PrefixIndex& index);
std::unique_ptr<PageTable> make_paged_table(const Geometry& geometry, PagePool& pool, const Sequences& sequences,
                                            PrefixIndex& index);

inline void PageTable::on_demote(const Op& op, bool undo) {
  const i32 node = static_cast<i32>(op.a);
  for (i64 g = 0; g < groups_; ++g) {
    if ((op.b >= 0 && g != op.b) || !has(node, g)) continue;
    if (undo) {
      lost_.pop_back();
      continue;
    }
    lost_.push_back({g, index_.ordinal(node), std::vector<i32>(index_.block_tokens())});
    index_.copy_tokens(node, index_.block_tokens(), lost_.back().tokens.data());
  }
}

inline i64 PageTable::reclaim(i64 pages, bool content, Transaction& tx) {
  i64 given = 0;
  for (const Reclaim kind : kReclaimOrder) {
    if (given < pages && (content || kind == Reclaim::idle)) given += reclaim_kind(kind, pages - given, tx);
  }
  return finish_reclaim(pages, given, tx);
}

// Windows may have nothing of a block while they have something of those behind it, so it is passed, not skipped; and
// it stays among its siblings until the transaction ends.
inline void PageTable::evict_subtree(i32 node, Transaction& tx) {
  const auto last_below = [this](i32 x) {
    for (i32 child; (child = index_.unused_child(x)) != kNoNode;) x = child;
    return x;
  };
  for (i32 x = last_below(node);;) {
    const i32 parent = index_.parent(x), sibling = x == node ? kNoNode : index_.unused_sibling(x);
    for (i32 window = -1; index_.skipped_count() > 0 && window < index_.windows(); ++window)
      unskip_item({x, window}, tx);
    evict(x, tx);
    if (x == node) return;
    x = sibling == kNoNode ? parent : last_below(sibling);
  }
}

}  // namespace kvmem
