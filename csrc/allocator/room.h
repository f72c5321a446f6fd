// Room for the tokens of sequences, now and ahead of time: pages or blocks from the page table, and the null block and
// the padding block of groups with a window.
//
// State: none of its own. Invariant: after make() each planned sequence has room for its length in every group.
// REQUIRES the pool's lock, and the lengths to say what there is to be room for: what looks for pages to reclaim then
// sees what is needed.
#pragma once

#include <string>
#include <vector>

#include "allocator/plan.h"
#include "allocator/records.h"

namespace kvmem {

class Room {
 public:
  Room(const Groups& groups, PagePool& pool, Sequences& sequences, PageTable& table, SequenceRecords& records,
       const Planner& planner, TableState& tables)
      : groups_(groups),
        pool_(pool),
        sequences_(sequences),
        table_(table),
        records_(records),
        planner_(planner),
        tables_(tables) {}

  // For plan.needy, one after the other; `*done` counts those that have room. OutOfMemory.
  void make(const StepPlan& plan, std::size_t* done, Transaction& tx);
  // For a sequence whose length says `count` more than it has room for. OutOfMemory.
  void make_one(i64 index, i64 count, i64 group, Transaction& tx);
  // Sets all lengths that grow with the tokens to `tokens`, of which `held` have room, and makes room.
  void grow_to(i64 index, i64 tokens, i64 held, Transaction& tx);
  // OutOfMemory, for the one of plan.needy that got none; when all did, the driver itself ran out.
  [[noreturn]] void explain(const StepPlan& plan, std::size_t done, const OutOfMemory& why) const;
  // Maps further than the lengths of these sequences, in the background. Best effort, and never an error.
  void map_ahead(const i64* indices, i64 n, i64 group) {
    if (groups_.geometry().map_ahead_tokens > 0) start_ahead(indices, n, group);
  }

 private:
  void start_ahead(const i64* indices, i64 n, i64 group);
  void decide_ahead(const i64* indices, i64 n, i64 group);
  bool decide_one(i64 index, i64 group, Transaction& tx);

  const Groups& groups_;
  PagePool& pool_;
  Sequences& sequences_;
  PageTable& table_;
  SequenceRecords& records_;
  const Planner& planner_;
  TableState& tables_;
};

}  // namespace kvmem
