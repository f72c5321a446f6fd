// What a call writes to block tables, for callers that have a copy of them: by group, then by row, then by column.
//
// State: the entries that the call in progress may replace, as they were before it. An entry that is out of window is
// 0, whatever the page table has there. note_before() comes before the call changes lengths and tables, write_changes()
// after it. Thread safety: every function REQUIRES the pool's lock.
#pragma once

#include <vector>

#include "allocator/plan.h"

namespace kvmem {

// Entry `column` of the table of the call's sequence `row`, in group `group`, is now `block`.
struct TableWrite {
  i32 row, column, block, group;
};

struct TableChanges {
  std::vector<TableWrite> writes;  // of all groups
  i32 main = 0;                    // the group meant if none is named
};

class TableDiff {
 public:
  // `merges`: a sequence that completes a block which is cached already uses the cached one from then on (paged).
  TableDiff(const Groups& groups, const Sequences& sequences, const PrefixIndex& index, const Planner& planner,
            PageTable& table, bool merges)
      : groups_(groups), sequences_(sequences), index_(index), planner_(planner), table_(table), merges_(merges) {}

  // Notes the entries that `plan` may replace, and reserves memory in `changes` for all that it may write. May throw
  // std::bad_alloc.
  [[gnu::noinline]] void note_before(const StepPlan& plan, TableChanges* changes);
  // Writes the entries that have changed or were added since note_before(). Cannot fail.
  [[gnu::noinline]] void write_changes(const StepPlan& plan, TableChanges* changes) const;
  // Appends all entries of one sequence's table, as row `row`.
  void add_table(i64 row, i64 index, i64 g, TableChanges* entries) const;

 private:
  i32 entry(const Placement& at, i64 index, i64 g, i64 ordinal) const;
  void note_range(i64 row, i64 index, i64 g, i64 first, i64 end);
  void note_commit(i64 row, i64 index, i64 g, i64 count);
  void note_last(i64 row, i64 index, i64 g);
  bool is_last(std::size_t k) const {
    return k + 1 == before_.size() || before_[k + 1].row != before_[k].row || before_[k + 1].group != before_[k].group;
  }
  std::size_t most_written(const StepPlan& plan) const;

  const Groups& groups_;
  const Sequences& sequences_;
  const PrefixIndex& index_;
  const Planner& planner_;
  PageTable& table_;
  const bool merges_;
  std::vector<TableWrite> before_;
};

}  // namespace kvmem
