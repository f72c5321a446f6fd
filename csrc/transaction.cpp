#include "transaction.h"

namespace kvmem {

void Transaction::apply(const Op& op, bool undo) {
  if (is_physical(op.kind)) {
    pool_.apply(op, undo);
  } else {
    tables_.apply_table(op);
  }
}

void Transaction::record() {
  if (!pool_.space()) pool_.count_calls(ops_);
  if (pool_.recording) pool_.log.insert(pool_.log.end(), ops_.begin(), ops_.end());
  committed_ = true;
}

void Transaction::commit_deferred() { record(); }

void Transaction::commit() {
  if (Space* space = pool_.space()) {
    std::vector<Op> stuck;
    try {
      space->execute(ops_.data(), ops_.data() + ops_.size(), &stuck);
    } catch (const Error&) {
      roll_back();
      // The driver failed, and failed again while undoing. What it could not restore is taken out of the books: parked
      // mappings and free pages can go; anything else is a sequence's own memory, and the page table says so (check()).
      for (const Op& op : stuck) {
        if (op.kind == OpKind::map || op.kind == OpKind::create) apply(inverse(op), false);
      }
      throw;
    }
  }
  record();
}

void Transaction::roll_back() {
  while (!ops_.empty()) {
    const Op op = inverse(ops_.back());
    ops_.pop_back();
    apply(op, true);
  }
  committed_ = true;
}

}  // namespace kvmem
