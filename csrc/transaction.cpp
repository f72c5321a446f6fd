#include "transaction.h"

#include <algorithm>
#include <iterator>

namespace kvmem {

void Transaction::apply(const Op& op, bool undo) {
  if (is_private(op.kind)) {
    pool_.apply_private(op, undo);
  } else if (is_physical(op.kind)) {
    pool_.apply(op, undo);
  } else {
    tables_.apply_table(op, undo);
  }
}

void Transaction::record() {
  if (!pool_.space()) pool_.count_calls(ops_);
  if (pool_.recording) {
    std::copy_if(ops_.begin(), ops_.end(), std::back_inserter(pool_.log),
                 [](const Op& op) { return !is_private(op.kind); });
  }
  committed_ = true;
  pool_.finish(true);
}

void Transaction::commit_deferred() { record(); }

void Transaction::commit() {
  if (Space* space = pool_.space()) {
    try {
      space->execute(ops_.data(), ops_.data() + ops_.size());
    } catch (const Error&) {
      const std::vector<Op> ops = ops_;
      roll_back();
      // What was given up stays given up, if its memory may have been written to by now.
      const bool wrote = std::any_of(ops.begin(), ops.end(),
                                     [](const Op& op) {
                                       return op.kind == OpKind::copy || op.kind == OpKind::zero ||
                                              op.kind == OpKind::destroy;
                                     });
      for (const Op& op : ops) {
        if (wrote && op.kind == OpKind::evict) pool_.give_up(op);
      }
      pool_.finish(true);
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
  pool_.finish(false);
}

}  // namespace kvmem
