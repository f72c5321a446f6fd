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

void Transaction::reserve_log() {
  std::vector<Op>& log = pool_.log;
  if (pool_.recording && log.capacity() - log.size() < ops_.size()) {
    log.reserve(std::max(log.size() + ops_.size(), 2 * log.capacity()));
  }
}

void Transaction::record() {
  if (!pool_.space()) pool_.count_calls(ops_);
  if (pool_.recording) {
    std::copy_if(ops_.begin(), ops_.end(), std::back_inserter(pool_.log),
                 [](const Op& op) { return !is_private(op.kind); });
  }
  committed_ = true;
  pool_.journal.close();
  pool_.finish(true);
}

void Transaction::commit() {
  reserve_log();
  if (Space* space = pool_.space()) {
    Space::Progress progress;
    try {
      space->execute(ops_.data(), ops_.data() + ops_.size(), false, &progress);
    } catch (...) {
      take_back({});
      const bool evicted_ops = pool_.distrust(ops_, progress);
      ops_.clear();
      pool_.journal.close();
      committed_ = true;
      pool_.finish(evicted_ops);
      throw;
    }
  }
  record();
}

// Leaves the records where they are, though they count no more.
void Transaction::take_back(const Point& point) {
  pool_.journal.begin_restoring();
  for (std::size_t i = ops_.size(); i > point.ops; --i) apply(inverse(ops_[i - 1]), true);
  pool_.journal.restore(point.noted);
  pool_.journal.end_restoring();
  pool_.on_taken_back();
}

void Transaction::roll_back_to(const Point& point) {
  take_back(point);
  ops_.resize(point.ops);
  if (fence_ > pool_.fence()) fence_ = 0;  // its record is among those taken back
}

void Transaction::roll_back() {
  take_back({});
  ops_.clear();
  pool_.journal.close();
  committed_ = true;
  pool_.finish(false);
}

}  // namespace kvmem
