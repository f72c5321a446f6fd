// What is known of the tokens of each sequence: a chain of published blocks in the content index, then its tail; and
// which nodes the call in progress uses.
//
// State, by sequence: the last node of its chain, its tail, how many tokens are known, what retain() said. Invariants:
//   - known <= committed tokens; beyond them nothing is known;
//   - the chain has known / block_tokens() nodes from the root on, the tail the known % block_tokens() tokens after it;
//   - the sequence is one user of its root and of each node of its chain (invariant 3).
// Publishing and taking back push records and need no device memory; what is named note_...() or comes after the
// transaction needs no memory at all and cannot fail. REQUIRES the pool's lock.
#pragma once

#include <string>
#include <vector>

#include "allocator/match.h"
#include "allocator/plan.h"
#include "base/digest.h"
#include "memory/transaction.h"

namespace kvmem {

// What the call in progress uses of the index, in the order in which it began to. A transaction takes it back in its
// turn: records that were pushed before `use` are taken back after it.
class UsedNodes {
 public:
  explicit UsedNodes(PrefixIndex& index) : index_(index) {}
  void clear() { items_.clear(); }
  std::size_t size() const { return items_.size(); }
  const Item& operator[](std::size_t i) const { return items_[i]; }

  // What is used from now on, `tx` takes back.
  void begin(Transaction& tx) {
    tx.expect();
    tx.note({OpKind::use, 0, static_cast<i64>(items_.size())});
  }
  // May find no memory, and has changed nothing then.
  void use(i32 node, i32 window = -1) {
    items_.push_back({node, window});  // first: it may find no memory
    window < 0 ? index_.acquire(node) : index_.need(node, window);
  }
  void use_all(const std::vector<i32>& nodes) {
    PrefixIndex& index = index_;
    for (i32 node : nodes) items_.push_back({node}), index.acquire(node);
  }
  // The same of a node that `use` finds and enters, once there is memory for noting it.
  template <class Use>
  i32 use_found(const Use& use) {
    items_.push_back({kNoNode});
    return items_.back().node = use();
  }
  void take_back(std::size_t first) {
    while (items_.size() > first) {
      const Item x = items_.back();
      items_.pop_back();
      if (x.node == kNoNode) continue;  // there was no memory for it
      x.window < 0 ? index_.undo_acquire(x.node) : index_.unneed(x.node, x.window, true);
    }
  }

 private:
  PrefixIndex& index_;
  std::vector<Item> items_;
};

// What retain() said of blocks [first, end) of a sequence.
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
  bool state_ahead(i64 index) const { return contents_[index].state_ahead; }
  // The published blocks of a sequence, the first one first.
  void copy_chain(i64 index, std::vector<i32>* chain) const;

  // --- opening and ending a sequence; nothing here can fail ---
  void start(i64 index, i32 root);
  // It begins with `known` tokens, of which `leaf` is the last whole block; `tail`: those after it.
  void start_with(i64 index, i32 root, i32 leaf, i64 known, const i32* tail, KeyMarks&& marks);
  void leave(i64 index);  // the sequence has ended
  void leave_node(i32 node) {
    index_.drop(node);
    if (groups_.has_state() && index_.used(node)) table_.allow_eviction(node);
  }

  // --- forking: `child` holds what `parent` has committed ---
  // Before the transaction, in the transaction when the child is open, and after it.
  void prepare_fork(i64 parent, bool reserved);
  void use_fork(Transaction& tx);
  void publish_fork(i64 child, Transaction& tx);
  void finish_fork(i64 parent, i64 child);

  // --- publishing what is committed: plan.commits of each, plan.ids of all ---
  // Whether that completes a block.
  bool completes_any(const StepPlan& plan);
  // Whether `count` more tokens complete a block, if all before them are known.
  bool completes(i64 index, i64 count) const {
    return remainder(contents_[index].known, block_tokens()) + count >= block_tokens();
  }
  [[gnu::noinline]] void publish(const StepPlan& plan, Transaction& tx);  // seldom: kept out of the steps that do not
  void note_published(const StepPlan& plan);
  // The same of one sequence, where no block is completed.
  void note_tail(i64 index, const i32* tokens, i64 count);

  // --- taking back what is cut off ---
  // SpecError when some of it is pinned; then in the transaction, and after it.
  void prepare_cut(i64 handle, i64 index, i64 tokens);
  void unpublish(i64 index, Transaction& tx);
  void note_cut(i64 index, i64 have, i64 tokens);

  // Of blocks that are there, and of those to come (RetentionPolicy). Of each block the last word counts.
  void retain(i64 index, const Retention& added);
  const std::vector<Retention>& retained(i64 index) const { return contents_[index].retained; }

  void digest(Hasher& hash) const;
  // Adds each sequence to the users of its nodes.
  void count_users(std::vector<i32>* users) const;
  void check(std::vector<std::string>* out) const;

 private:
  struct Content {
    i32 root = kNoNode, leaf = kNoNode;  // the last published block, or the root
    i64 known = 0;
    KeyMarks marks;                   // of all of its tokens, those to come included
    std::vector<Retention> retained;  // ascending, no block twice
    // The fixed state may have seen tokens that are not committed and cannot be any more: they were cut off, or stayed
    // with the sequence that this one was forked from. The next commit() answers for the state again.
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
  const i64 block_tokens_, main_;     // a block of the index; the group whose tokens are known
  std::vector<Content> contents_;     // by sequence
  const i64 tail_tokens_;             // a block, or all that a sequence can hold
  std::vector<i32> tails_;            // [sequence][tail_tokens_]: the known tokens after the last published block
  std::vector<Published> published_;  // by the call in progress
  std::vector<i32> chain_, leaving_;  // scratch
  Content forked_;
};

}  // namespace kvmem
