// The events of an allocator's content index, in numbered batches: each is given until the consumer says that it has
// taken it, so that none is lost on the way.
//
// State: the batch that was given and not taken yet. REQUIRES the pool's lock.
#pragma once

#include <memory>
#include <unordered_map>

#include "allocator/groups.h"
#include "index/prefix_index.h"
#include "table/page_table.h"

namespace kvmem {

// Events, as EventRing::drain takes them out, and the keys of the roots that they name.
struct EventBatch {
  i64 number = 0;  // counts the batches that were not empty, from 1
  EventRecords records;
  std::unordered_map<i32, PrefixKey> roots;
};

class EventBatches {
 public:
  EventBatches(const Groups& groups, PrefixIndex& index, const PageTable& table)
      : groups_(groups), index_(index), table_(table) {}

  // The batch after number `taken`, the last one that the consumer is done with; without events one of that number.
  // `restart` drops what was not taken and begins with all that is cached. `max` 0: a batch that is given again, no new
  // one. `done`: what is not needed any more, to be freed without the lock.
  std::shared_ptr<EventBatch> drain(i64 taken, i64 max, bool restart, std::shared_ptr<EventBatch>* done);

 private:
  void add_resident(i32 node, EventRecords& out) const;

  const Groups& groups_;
  PrefixIndex& index_;
  const PageTable& table_;
  std::shared_ptr<EventBatch> given_;
  i64 made_ = 0;
};

}  // namespace kvmem
