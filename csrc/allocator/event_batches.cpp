#include "allocator/event_batches.h"

#include <vector>

namespace kvmem {

std::shared_ptr<EventBatch> EventBatches::drain(i64 confirmed, i64 max, bool restart,
                                                std::shared_ptr<EventBatch>* expired) {
  if (unconfirmed_ && unconfirmed_->number > confirmed && !restart) return unconfirmed_;
  auto batch = std::make_shared<EventBatch>();
  expired->swap(unconfirmed_);
  batch->number = made_;
  if (max == 0 && !restart) return batch;
  batch->records = queue_.drain(
      max,
      [this](EventRecords& out) {
        for (i32 root : index_.roots()) {
          for (i32 node : index_.below(root)) add_resident(node, out);
        }
      },
      restart);
  i32 last = -1;
  try {
    for (i32 number : batch->records.roots) {
      if (number >= 0 && number != last) batch->roots.emplace(last = number, index_.root_key(number));
    }
  } catch (...) {
    queue_.undo_drain();
    throw;
  }
  index_.prune_roots();
  if (batch->records.size() > 0) batch->number = ++made_, unconfirmed_ = batch;
  return batch;
}

// Adds a `stored` event for each group that has the node; for a node that no group has, one event of group -1.
void EventBatches::add_resident(i32 node, EventRecords& out) const {
  const i32 before = index_.parent(node), parent = index_.is_root(before) ? kNoNode : before;
  std::vector<i32> tokens(index_.block_tokens());
  index_.copy_tokens(node, index_.block_tokens(), tokens.data());
  const auto add = [&](i32 g) {
    out.stored(node, parent, index_.root_number(node), g, index_.ordinal(node), tokens.data(), 0, index_.tag(node));
  };
  bool any = false;
  for (i64 g = 0; g < groups_.count(); ++g) {
    if (groups_[g].growth == Growth::prefill || !table_.has(node, g)) continue;
    add(static_cast<i32>(g));
    any = true;
  }
  if (!any) add(-1);
}

}  // namespace kvmem
