// What a call writes to block tables, for callers that keep a copy of them: by group, then by row, then by column.
//
// State: the entries that the call in progress may replace, as they were. An entry that is out of window is 0, whatever
// the page table has there. Between see() and written() the call changes lengths and tables; written() needs no memory.
// REQUIRES the pool's lock.
#pragma once

#include <vector>

#include "allocator/plan.h"

namespace kvmem {

// Entry `column` of the table that `group` has of the call's sequence `row` is `block` now.
struct TableWrite {
  i32 row, column, block, group;
};

struct TableChanges {
  std::vector<TableWrite> writes;  // of all groups
  i32 main = 0;                    // the group that is meant where none is named
};

class TableDiff {
 public:
  // `merges`: a block that is cached already takes the place of one that is completed (paged).
  TableDiff(const Groups& groups, const Sequences& sequences, const PrefixIndex& index, const Planner& planner,
            PageTable& table, bool merges)
      : groups_(groups), sequences_(sequences), index_(index), planner_(planner), table_(table), merges_(merges) {}

  // Before what `plan` says is done. `changes` gets room for all that it may write.
  [[gnu::noinline]] void see(const StepPlan& plan, TableChanges* changes);
  // And after it: the entries that are another block now, and those that have come.
  [[gnu::noinline]] void written(const StepPlan& plan, TableChanges* changes) const;
  // All entries of one sequence's table, as row `row`.
  void add_table(i64 row, i64 index, i64 g, TableChanges* entries) const;

 private:
  i32 entry(const Placement& at, i64 index, i64 g, i64 ordinal) const;
  void see_range(i64 row, i64 index, i64 g, i64 first, i64 end);
  void see_committed(i64 row, i64 index, i64 g, i64 count);
  void see_last(i64 row, i64 index, i64 g);
  bool is_last(std::size_t k) const {
    return k + 1 == seen_.size() || seen_[k + 1].row != seen_[k].row || seen_[k + 1].group != seen_[k].group;
  }
  std::size_t most_written(const StepPlan& plan) const;

  const Groups& groups_;
  const Sequences& sequences_;
  const PrefixIndex& index_;
  const Planner& planner_;
  PageTable& table_;
  const bool merges_;
  std::vector<TableWrite> seen_;
};

}  // namespace kvmem
