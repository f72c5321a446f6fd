// What is known of each sequence's tokens: a chain of published blocks in the content index, then a tail of less than a
// block; and which nodes the call in progress uses.
//
// State, by sequence: the last node of its chain, its tail, the number of known tokens, its retention ranges.
// Invariants:
//   - known <= committed tokens; nothing is known of the tokens after them;
//   - the chain has known / block_tokens() nodes from the root on, the tail the remaining known tokens;
//   - the sequence is one user of its root and of each node of its chain (invariant 3).
// Publishing and unpublishing push records and need no device memory. Functions named note_...(), and those that follow
// the transaction, need no memory at all and cannot fail. Thread safety: every function REQUIRES the pool's lock.
#pragma once

#include <string>
#include <vector>

#include "allocator/match.h"
#include "allocator/plan.h"
#include "base/digest.h"
#include "memory/transaction.h"

namespace kvmem {

// The index items that the call in progress has acquired, in order. A transaction undoes the acquisitions that follow
// begin() when it undoes the `use` record of begin(), thus after the records pushed later.
class UsedNodes {
 public:
  explicit UsedNodes(PrefixIndex& index) : index_(index) {}
  void clear() { items_.clear(); }
  std::size_t size() const { return items_.size(); }
  const Item& operator[](std::size_t i) const { return items_[i]; }

  // From here on, `tx` undoes what is acquired.
  void begin(Transaction& tx) {
    tx.expect();
    tx.note({OpKind::use, 0, static_cast<i64>(items_.size())});
  }
  // Acquire nodes, or a window's part of one. May throw std::bad_alloc, and undo_to() is right then too.
  void acquire(i32 node, i32 window = -1) {
    items_.push_back({node, window});  // first, because it may throw
    window < 0 ? index_.acquire(node) : index_.need(node, window);
  }
  void acquire_all(const std::vector<i32>& nodes) {
    PrefixIndex& index = index_;
    for (i32 node : nodes) items_.push_back({node}), index.acquire(node);
  }
  // Returns the node that find() returns and has acquired; find() may throw, and has acquired nothing then.
  template <class Find>
  i32 acquire_found(const Find& find) {
    items_.push_back({kNoNode});
    return items_.back().node = find();
  }
  // Undoes all but the first `count` acquisitions, newest first.
  void undo_to(std::size_t count) {
    KVMEM_ASSERT(count <= items_.size(), "acquisitions are undone in reverse order");
    while (items_.size() > count) {
      const Item x = items_.back();
      items_.pop_back();
      if (x.node == kNoNode) continue;  // find() has thrown
      x.window < 0 ? index_.undo_acquire(x.node) : index_.unneed(x.node, x.window, true);
    }
  }

 private:
  PrefixIndex& index_;
  std::vector<Item> items_;
};

// A retention priority of blocks [first, end) of a sequence.
struct Retention {
  i64 first, end;
  int priority;
  double seconds;
};

class SequenceContents {
 public:
  SequenceContents(const Groups& groups, const PrefixMatcher& matcher, const Sequences& sequences, PrefixIndex& index,
                   PageTable& table);

  UsedNodes used;  // by the call in progress

  i64 known(i64 index) const { return contents_[index].known; }
  // Returns whether the fixed state may include tokens that are not committed.
  bool state_ahead(i64 index) const { return contents_[index].state_ahead; }
  // Writes the published blocks of a sequence, the first one first.
  void copy_chain(i64 index, std::vector<i32>* chain) const;

  // --- opening and freeing a sequence; none of these can fail ---
  void start(i64 index, i32 root);
  // The sequence begins with `known` tokens. `leaf`: their last whole block, or the root; `tail`: the tokens after it.
  // REQUIRES: the sequence is a user of the root and of each node of the chain already.
  void start_with(i64 index, i32 root, i32 leaf, i64 known, const i32* tail, KeyMarks&& marks);
  // The sequence was freed: drops its root and its chain.
  void end(i64 index);
  void drop_node(i32 node) {
    index_.drop(node);
    if (groups_.has_state() && index_.used(node)) table_.allow_eviction(node);
  }

  // The sequence has lost its blocks, in this transaction: of what only it offered, others that computed the same
  // tokens at the same time offer their own blocks from now on (append-only tables). Cost: linear in the chain; where
  // there is such a block, in the chains of all sequences.
  void hand_over(i64 index, Transaction& tx);

  // --- forking: `child` gets what `parent` has committed. Called in this order: before the transaction, twice in it
  // (the second time with an open child), and after it. `reserved`: the parent has tokens that are not committed ---
  void prepare_fork(i64 parent, bool reserved);
  void use_fork(Transaction& tx);
  void publish_fork(i64 child, Transaction& tx);
  void finish_fork(i64 parent, i64 child);

  // --- publishing: plan.commits[i] tokens of each sequence, with plan.ids ---
  // Returns whether they complete a block; begins a call.
  bool completes_any(const StepPlan& plan);
  // Returns whether `count` more tokens complete a block, given that all tokens before them are known.
  bool completes(i64 index, i64 count) const {
    return remainder(contents_[index].known, block_tokens()) + count >= block_tokens();
  }
  // Publishes the completed blocks. Most steps complete none, so it stays out of their way.
  [[gnu::noinline]] void publish(const StepPlan& plan, Transaction& tx);
  // After the transaction: the tokens are known from now on.
  void note_published(const StepPlan& plan);
  // The same for one sequence. REQUIRES: no block is completed, and the tokens are committed.
  void note_tail(i64 index, const i32* tokens, i64 count);

  // --- unpublishing what is cut off: before the transaction (throws SpecError if a pin holds it), in it, after it ---
  void prepare_cut(i64 handle, i64 index, i64 tokens);
  void unpublish(i64 index, Transaction& tx);
  // `have`: the length of the sequence before the cut.
  void note_cut(i64 index, i64 have, i64 tokens);

  // Sets the priority of present and future blocks (RetentionPolicy); replaces what earlier calls said of them. May
  // throw std::bad_alloc, and has changed nothing then.
  void retain(i64 index, const Retention& added);
  const std::vector<Retention>& retained(i64 index) const { return contents_[index].retained; }

  void digest(Hasher& hash) const;
  // Counts each sequence as a user of its nodes.
  void count_users(std::vector<i32>* users) const;
  void check(std::vector<std::string>* out) const;

 private:
  struct Content {
    i32 root = kNoNode, leaf = kNoNode;  // the last published block, or the root
    i64 known = 0;
    KeyMarks marks;                   // of all tokens, future ones included
    std::vector<Retention> retained;  // ascending, disjoint
    // The fixed state may include tokens that were cut off, or that the parent of a fork had reserved. The next
    // commit() with tokens declares the state valid again.
    bool state_ahead = false;
  };
  i64 block_tokens() const { return block_tokens_; }
  i32* tail(i64 index) { return &tails_[index * tail_tokens_]; }
  void collect(i64 index, const i32* tokens, i64 count);
  [[gnu::noinline]] void note_blocks(i64 index, const i32* end, std::size_t* at);
  void apply_retention(const Content& content, i32 node);

  const Groups& groups_;
  const PrefixMatcher& matcher_;
  const Sequences& sequences_;
  PrefixIndex& index_;
  PageTable& table_;
  const i64 block_tokens_, main_;     // a block of the index; and the group whose tokens are counted
  std::vector<Content> contents_;     // by sequence
  const i64 tail_tokens_;             // a block, or a whole sequence if that is shorter
  std::vector<i32> tails_;            // [sequence][tail_tokens_]: the known tokens after the last published block
  std::vector<Published> published_;  // by the call in progress, in the order of its sequences
  std::vector<i32> chain_, cut_;      // scratch
  Content forked_;
};

}  // namespace kvmem
