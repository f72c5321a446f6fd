// How sequences grow: the records of their lengths, and the memory for their tokens.
//
// State: none of its own; Sequences has the lengths, the page table the memory. Invariants between calls: in each group
// 0 <= front <= committed <= tokens <= max_tokens, and the table has room for `tokens`; groups that grow with the
// tokens are equally long. Thread safety: every function REQUIRES the pool's lock.
#pragma once

#include <string>
#include <vector>

#include "allocator/plan.h"
#include "base/check.h"
#include "base/groups.h"
#include "memory/transaction.h"
#include "table/page_table.h"
#include "table/sequences.h"

namespace kvmem {

// The records open, close, length, commit and front: pushed here, and applied here when a transaction, an undo or a
// follower asks for it.
class SequenceRecords {
 public:
  SequenceRecords(const Groups& groups, const PagePool& pool, Sequences& sequences, PageTable& table,
                  const Planner& planner)
      : groups_(groups), pool_(pool), sequences_(sequences), table_(table), planner_(planner) {}

  // --- these push records to `tx` ---
  // Returns the handle of a new sequence. Throws OutOfMemory if all places are taken.
  i64 open(Transaction& tx);
  void close(i64 index, Transaction& tx);
  void set_tokens(i64 index, i64 g, i64 tokens, Transaction& tx);
  void set_committed(i64 index, i64 g, i64 tokens, Transaction& tx);
  void set_front(i64 index, i64 g, i64 token, Transaction& tx);

  // Commits the sequences of plan.moving, whose windows move on. Needs no device memory.
  [[gnu::noinline]] void commit_moving(const StepPlan& plan, Transaction& tx);
  // Commits all other sequences of the plan, which need no record. Comes after the transaction; cannot fail.
  void note_committed(const StepPlan& plan);

  // Applies a record of these kinds, for a transaction. Throws SpecError, and has changed nothing, if the record does
  // not follow from the present state.
  void apply(const Op& op, bool undo);

 private:
  void commit_one(i64 index, i64 count, i64 group, Transaction& tx);
  void set_value(const Op& op, i64 Sequences::Lengths::* which);
  void set_main(i64 handle, i64 tokens, i64 committed);
  [[noreturn]] static void refuse_value(const Op& op, i64 value);

  const Groups& groups_;
  const PagePool& pool_;
  Sequences& sequences_;
  PageTable& table_;
  const Planner& planner_;
};

// The lengths that a plan adds, and their records if the pool is recording. The destructor undoes them unless commit()
// was called. They are no records of the transaction, which most steps do without: a record for each sequence would
// cost more than the rest of the step.
class AddedLengths {
 public:
  AddedLengths(const Groups& groups, PagePool& pool, Sequences& sequences, const StepPlan& plan)
      : groups_(groups), pool_(pool), sequences_(sequences), plan_(plan), logged_(pool.log.size()) {
    if (!plan.more) return;
    if (pool.recording) log();
    add(1);
    added_ = pool.log.size();
  }
  ~AddedLengths() {
    if (!committed_ && plan_.more) undo();
  }
  AddedLengths(const AddedLengths&) = delete;
  AddedLengths& operator=(const AddedLengths&) = delete;
  void commit() { committed_ = true; }

 private:
  void add(i64 sign);
  void log();
  void undo();

  const Groups& groups_;
  PagePool& pool_;
  Sequences& sequences_;
  const StepPlan& plan_;
  const std::size_t logged_;
  std::size_t added_ = 0;
  bool committed_ = false;
};

// Memory for tokens: pages or blocks from the page table, and the null and padding block of groups with a window.
// REQUIRES that the lengths are set first, because the page table reads them when it looks for pages to reclaim.
class SequenceGrowth {
 public:
  SequenceGrowth(const Groups& groups, PagePool& pool, Sequences& sequences, PageTable& table, SequenceRecords& records,
                 const Planner& planner, TableState& tables)
      : groups_(groups),
        pool_(pool),
        sequences_(sequences),
        table_(table),
        records_(records),
        planner_(planner),
        tables_(tables) {}

  // Gives room to the sequences of plan.needy, in order. `*done` counts those that have it. Throws OutOfMemory.
  void grow_needy(const StepPlan& plan, std::size_t* done, Transaction& tx);
  // Gives room to a sequence whose length is `count` more than it has room for. Throws OutOfMemory.
  void grow_one(i64 index, i64 count, i64 group, Transaction& tx);
  // Sets the length of a sequence that has room for `held` tokens to `tokens`, and gives it room. Throws OutOfMemory.
  void grow_to(i64 index, i64 tokens, i64 held, Transaction& tx);
  // Throws OutOfMemory for the sequence of plan.needy that got no room; if all got room, the driver had no memory.
  [[noreturn]] void explain(const StepPlan& plan, std::size_t done, const OutOfMemory& why) const;
  // Maps memory beyond the lengths of these sequences, in the background. Best effort; never throws.
  void map_ahead(const i64* indices, i64 n, i64 group) {
    if (groups_.geometry().map_ahead_tokens > 0) start_ahead(indices, n, group);
  }

 private:
  void grow_in_order(const StepPlan& plan, std::size_t* done, Transaction& tx);
  // Runs grow(). If memory is short, runs it again without cached content, where that may help: evicted one by one,
  // blocks of a group come free on pages that hold others of it, and so give no page to another group.
  template <class Grow>
  void with_or_without_cache(Transaction& tx, const Grow& grow);
  void start_ahead(const i64* indices, i64 n, i64 group);
  void decide_ahead(const i64* indices, i64 n, i64 group);
  bool decide_one(i64 index, i64 group, Transaction& tx);

  const Groups& groups_;
  PagePool& pool_;
  Sequences& sequences_;
  PageTable& table_;
  SequenceRecords& records_;
  const Planner& planner_;
  TableState& tables_;
};

}  // namespace kvmem
