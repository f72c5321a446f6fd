// All or nothing (invariant 5). Records pushed to a transaction change the bookkeeping at once; commit() lets the space
// execute them. If a decision, the driver or the host's memory fails, every record is taken back, newest first, and
// then what the journal has noted.
//
// So everything that a call may change is one of three: a record, which has an inverse; noted in the journal, which
// knows what it was (marks, fences, the order of lists); or derived from those, and found again when it is needed. What
// is taken back needs no memory: a record takes the memory for its inverse when it is pushed.
#pragma once

#include <vector>

#include "base/ops.h"
#include "memory/pages.h"

namespace kvmem {

// What owns the table records (open ... block) of a transaction.
class TableState {
 public:
  virtual ~TableState() = default;
  // Throws SpecError, having changed nothing, when the record does not follow from the present state.
  // `undo`: the inverse of one that was applied.
  virtual void apply_table(const Op& op, bool undo) = 0;
};

class Transaction {
 public:
  Transaction(PagePool& pool, TableState& tables) : pool_(pool), tables_(tables), ops_(pool.scratch) {
    ops_.clear();
    ++pool_.transactions;
    pool_.journal.open();
  }
  ~Transaction() {
    if (!committed_) roll_back();
  }
  Transaction(const Transaction&) = delete;
  Transaction& operator=(const Transaction&) = delete;

  void push(const Op& op) {
    expect();
    apply(op, false);
    ops_.push_back(op);
  }
  // What note() needs memory for, and the journal for so many records: to be called before the changes.
  void expect(std::size_t records = 1) {
    if (ops_.capacity() - ops_.size() < records) ops_.reserve(2 * ops_.size() + records + 15);
    pool_.journal.reserve(records * Journal::kPerRecord);
  }
  // A private record whose change the caller has made itself: cheaper, where there are many.
  void note(const Op& op) { ops_.push_back(op); }
  // A fence that covers everything given to the device so far. One for each transaction is enough.
  i64 fence() { return fence_ != 0 ? fence_ : fence_ = new_fence(); }
  // One that also covers the copies of this transaction.
  i64 new_fence() {
    const i64 number = pool_.fence() + 1;
    push({OpKind::fence, 0, number});
    return number;
  }
  bool empty() const { return ops_.empty(); }
  const std::vector<Op>& ops() const { return ops_; }

  // A point to come back to: what was pushed since is taken back, the rest stands.
  struct Point {
    std::size_t ops = 0, noted = 0;
  };
  Point here() const { return {ops_.size(), pool_.journal.size()}; }
  void roll_back_to(const Point& point);

  // Everything that may fail comes before the device is asked: an error has taken all of it back.
  void commit();
  // Commits without executing: the records are done later, by the mapper. Cannot fail after expect_deferred().
  void expect_deferred() { reserve_log(); }
  void commit_deferred() { record(); }
  void roll_back();

 private:
  void apply(const Op& op, bool undo);
  void reserve_log();
  void record();
  void take_back(const Point& point);

  PagePool& pool_;
  TableState& tables_;
  std::vector<Op>& ops_;
  i64 fence_ = 0;
  bool committed_ = false;
};

}  // namespace kvmem
