// All or nothing (invariant 5). Records pushed to a transaction change the bookkeeping at once; commit() lets the space
// execute them. If a decision or the driver fails, every record is taken back, newest first.
#pragma once

#include <vector>

#include "ops.h"
#include "pages.h"

namespace kvmem {

// What owns the table records (open ... block) of a transaction.
class TableState {
 public:
  virtual ~TableState() = default;
  // Throws SpecError, having changed nothing, when the record does not follow from the present state.
  virtual void apply_table(const Op& op, bool undo) = 0;
};

class Transaction {
 public:
  Transaction(PagePool& pool, TableState& tables) : pool_(pool), tables_(tables), ops_(pool.scratch) { ops_.clear(); }
  ~Transaction() {
    if (!committed_) roll_back();
  }
  Transaction(const Transaction&) = delete;
  Transaction& operator=(const Transaction&) = delete;

  void push(const Op& op) {
    apply(op, false);
    ops_.push_back(op);
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

  void commit();
  // Commits without executing: the records are done later, by the mapper.
  void commit_deferred();
  void roll_back();

 private:
  void apply(const Op& op, bool undo);
  void record();

  PagePool& pool_;
  TableState& tables_;
  std::vector<Op>& ops_;
  i64 fence_ = 0;
  bool committed_ = false;
};

}  // namespace kvmem
