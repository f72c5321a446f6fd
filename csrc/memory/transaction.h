// A transaction: all changes of one call, or none of them (invariant 5). push() applies an op to the metadata at once;
// commit() lets the space execute the ops on the device. If a decision, the driver or the allocation of host memory
// fails, all ops are undone, newest first, and then the journal's entries.
//
// So all state that a call may change is one of three: changed by ops, which have inverses; recorded in the journal
// before each change (marks, fences, the order of lists); or derived from these, and recomputed when it is needed.
// Undoing needs no memory, because a change allocates what its undo needs.
//
// A pool has one open transaction at a time, under its lock.
#pragma once

#include <vector>

#include "base/check.h"
#include "base/ops.h"
#include "memory/pages.h"

namespace kvmem {

// The state that a transaction's logical ops (open ... drop) change.
class TableState {
 public:
  virtual ~TableState() = default;
  // Applies the op, or with `undo` the inverse of an applied one. Throws SpecError, and has changed nothing then, where
  // the op does not follow from the present state.
  virtual void apply_table(const Op& op, bool undo) = 0;
};

class Transaction {
 public:
  Transaction(PagePool& pool, TableState& tables) : pool_(pool), tables_(tables), ops_(pool.scratch) {
    ops_.clear();
    ++pool_.transactions;
    pool_.journal.open();
  }
  // Undoes a transaction that was not committed.
  ~Transaction() {
    if (!done_) roll_back();
  }
  Transaction(const Transaction&) = delete;
  Transaction& operator=(const Transaction&) = delete;

  // Applies an op and keeps it for commit() or for the undo. Throws what the application throws, and std::bad_alloc;
  // the op has then changed nothing.
  void push(const Op& op) {
    KVMEM_ASSERT(!done_, "the transaction is open");
    expect();
    apply(op, false);
    ops_.push_back(op);
  }
  // Makes room for `records` calls of note() and for their journal entries. REQUIRES: it precedes the changes. May
  // throw std::bad_alloc.
  void expect(std::size_t records = 1) {
    if (ops_.capacity() - ops_.size() < records) ops_.reserve(2 * ops_.size() + records + 15);
    pool_.journal.reserve(records * Journal::kPerRecord);
  }
  // Keeps an op that the caller has applied itself, which is cheaper than push().
  void note(const Op& op) {
    KVMEM_ASSERT(!done_ && ops_.size() < ops_.capacity(), "the transaction is open, and expect() made room");
    ops_.push_back(op);
  }
  // Returns the number of a fence that covers all device work from before this transaction; makes it on the first call.
  i64 fence() { return fence_ != 0 ? fence_ : fence_ = new_fence(); }
  // Returns the number of a new fence, which also covers the copies that this transaction has pushed.
  i64 new_fence() {
    const i64 number = pool_.fence() + 1;
    push({OpKind::fence, 0, number});
    return number;
  }
  const std::vector<Op>& ops() const { return ops_; }

  // A savepoint: roll_back_to() undoes what was pushed after here(), and leaves the rest.
  struct Point {
    std::size_t ops = 0, noted = 0;
  };
  Point here() const { return {ops_.size(), pool_.journal.size()}; }
  void roll_back_to(const Point& point);

  // Executes the ops and ends the transaction. What it throws leaves everything undone; all that may fail precedes the
  // first driver call.
  void commit();
  // End the transaction without executing its ops: the mapper does that later. expect_deferred() may throw
  // std::bad_alloc; after it commit_deferred() cannot fail.
  void expect_deferred();
  void commit_deferred();

 private:
  void apply(const Op& op, bool undo);
  void undo_to(const Point& point);
  void roll_back();
  void end(bool committed);

  PagePool& pool_;
  TableState& tables_;
  std::vector<Op>& ops_;
  i64 fence_ = 0;  // the number that fence() returns, or 0 before its first call
  bool done_ = false;
};

}  // namespace kvmem
