#include "memory/transaction.h"

#include <algorithm>
#include <iterator>

namespace kvmem {

void Transaction::apply(const Op& op, bool undo) {
  if (is_private(op.kind) && op.kind != OpKind::use) {
    pool_.apply_private(op, undo);
  } else if (is_physical(op.kind)) {
    pool_.apply(op, undo);
  } else {
    tables_.apply_table(op, undo);
  }
}

void Transaction::expect_deferred() {
  std::vector<Op>& log = pool_.log;
  if (pool_.recording && log.capacity() - log.size() < ops_.size()) {
    log.reserve(std::max(log.size() + ops_.size(), 2 * log.capacity()));
  }
}

void Transaction::commit_deferred() {
  KVMEM_ASSERT(!done_, "the transaction is open");
  if (!pool_.space()) pool_.count_calls(ops_);
  if (pool_.recording) {
    KVMEM_ASSERT(pool_.log.capacity() - pool_.log.size() >= ops_.size(), "expect_deferred() made room");
    std::copy_if(ops_.begin(), ops_.end(), std::back_inserter(pool_.log),
                 [](const Op& op) { return !is_private(op.kind); });
  }
  end(true);
}

void Transaction::commit() {
  expect_deferred();
  if (Space* space = pool_.space()) {
    Space::Progress progress;
    try {
      space->execute(ops_.data(), ops_.data() + ops_.size(), false, &progress);
    } catch (...) {
      undo_to({});
      const bool evicted = pool_.invalidate_content(ops_, progress);
      ops_.clear();
      end(evicted);
      throw;
    }
  }
  commit_deferred();
}

// Undoes the ops and journal entries after `point`. The ops stay in the list: their numbers may still be needed.
void Transaction::undo_to(const Point& point) {
  KVMEM_ASSERT(!done_ && point.ops <= ops_.size() && point.noted <= pool_.journal.size(), "the point lies behind");
  pool_.journal.begin_restoring();
  for (std::size_t i = ops_.size(); i > point.ops; --i) apply(inverse(ops_[i - 1]), true);
  pool_.journal.restore(point.noted);
  pool_.journal.end_restoring();
  pool_.on_taken_back();
}

void Transaction::roll_back_to(const Point& point) {
  undo_to(point);
  ops_.resize(point.ops);
  if (fence_ > pool_.fence()) fence_ = 0;  // its op was undone
}

void Transaction::roll_back() {
  undo_to({});
  ops_.clear();
  end(false);
}

void Transaction::end(bool committed) {
  pool_.journal.close();
  done_ = true;
  pool_.finish(committed);
}

}  // namespace kvmem
