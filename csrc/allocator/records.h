// The records of sequences (open, close, length, commit, front): decided here, and applied here when a transaction, an
// undo or a follower says so.
//
// State: none of its own; Sequences has the lengths. Invariants: 0 <= front <= committed <= tokens <= max_tokens in
// each group between calls, and groups that grow with the tokens are equally long. REQUIRES the pool's lock.
#pragma once

#include <vector>

#include "allocator/groups.h"
#include "allocator/plan.h"
#include "memory/transaction.h"
#include "table/page_table.h"
#include "table/sequences.h"

namespace kvmem {

class SequenceRecords {
 public:
  SequenceRecords(const Groups& groups, const PagePool& pool, Sequences& sequences, PageTable& table,
                  const Planner& planner)
      : groups_(groups), pool_(pool), sequences_(sequences), table_(table), planner_(planner) {}

  // --- decisions: push records to `tx` ---
  i64 open(Transaction& tx);  // returns the handle
  void close(i64 index, Transaction& tx);
  void set_tokens(i64 index, i64 g, i64 tokens, Transaction& tx);
  void set_committed(i64 index, i64 g, i64 tokens, Transaction& tx);
  void set_front(i64 index, i64 g, i64 token, Transaction& tx);

  // The commits of plan.moving, of which windows move on. Needs no memory of the device.
  [[gnu::noinline]] void commit_moving(const StepPlan& plan, Transaction& tx);
  // After the transaction: the commits of all others, which need no record. Cannot fail.
  void note_committed(const StepPlan& plan);

  // --- state: called by transactions only ---
  // Of one of these kinds. SpecError, and nothing has changed, when the record does not follow from the present state.
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

// The lengths that a plan adds, and their records where all is recorded: taken back unless done() is called. They stand
// outside of the transaction, which most steps need none of: a record for each would cost a step more than all else.
class AddedLengths {
 public:
  AddedLengths(const Groups& groups, PagePool& pool, Sequences& sequences, const StepPlan& plan)
      : groups_(groups), pool_(pool), sequences_(sequences), plan_(plan), logged_(pool.log.size()) {
    if (!plan.more) return;
    if (pool.recording) log();
    add(1);
    noted_ = pool.log.size();
  }
  ~AddedLengths() {
    if (!done_ && plan_.more) take_back();
  }
  AddedLengths(const AddedLengths&) = delete;
  AddedLengths& operator=(const AddedLengths&) = delete;
  void done() { done_ = true; }

 private:
  void add(i64 sign);
  void log();
  void take_back();

  const Groups& groups_;
  PagePool& pool_;
  Sequences& sequences_;
  const StepPlan& plan_;
  const std::size_t logged_;
  std::size_t noted_ = 0;
  bool done_ = false;
};

}  // namespace kvmem
