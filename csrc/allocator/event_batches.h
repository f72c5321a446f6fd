// The events or moves of an allocator's content index, in numbered batches. drain() returns the same batch until the
// consumer confirms its number, so no event is lost if the consumer is interrupted.
//
// State: the batch that is not confirmed yet. Thread safety: every function REQUIRES the pool's lock.
#pragma once

#include <memory>
#include <unordered_map>

#include "base/groups.h"
#include "index/prefix_index.h"
#include "table/page_table.h"

namespace kvmem {

// Events, as EventRing::drain() returns them, and the keys of the roots that they name.
struct EventBatch {
  i64 number = 0;  // batches that are not empty are numbered from 1 on
  EventRecords records;
  std::unordered_map<i32, PrefixKey> roots;
};

class EventBatches {
 public:
  EventBatches(const Groups& groups, PrefixIndex& index, EventRing& queue, const PageTable& table)
      : groups_(groups), index_(index), queue_(queue), table_(table) {}

  // Returns the batch after number `confirmed`, the last one that the consumer has processed; if there are no events,
  // an empty batch with the number of the last one. `max`: the most events of a new batch, -1 for all; with 0 only a
  // batch that is not confirmed is returned. `restart` drops that batch and all waiting events, and begins with an
  // event for all cached content. `*expired` receives the confirmed batch, so that the caller can free it without the
  // lock. May throw std::bad_alloc; the events are returned by the next call then.
  std::shared_ptr<EventBatch> drain(i64 confirmed, i64 max, bool restart, std::shared_ptr<EventBatch>* expired);

 private:
  void add_resident(i32 node, EventRecords& out) const;

  const Groups& groups_;
  PrefixIndex& index_;
  EventRing& queue_;
  const PageTable& table_;
  std::shared_ptr<EventBatch> unconfirmed_;
  i64 made_ = 0;  // batches
};

}  // namespace kvmem
