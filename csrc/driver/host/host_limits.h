// How much of the machine this process may use: memory, up to the limit of its cgroup, and kernel mappings (VMAs), up
// to vm.max_map_count. Thread-safe.
#pragma once

#include "base/types.h"

namespace kvmem {

// Returns the physical memory, or the lowest limit of this process's cgroup and its ancestors.
i64 host_total_bytes();
// Returns MemAvailable, or what is left under those limits if that is less; never a negative number.
i64 host_available_bytes();
// Returns vm.max_map_count: how many mappings one process may have.
i64 host_max_mappings();

// Refuses mappings with OutOfMemory before the kernel does. At its limit the kernel refuses every mmap(), also the one
// that turns a mapping into a hole, so the process could not free memory any more. Hence new mappings stop at 80 % of
// the limit, an unmap that splits a mapping in two stops at 90 %, and the undo of a failed call at 95 %; the rest is
// for the process's other mappings. An unmap that splits nothing is never refused.
class MappingBudget {
 public:
  MappingBudget();
  // Throw OutOfMemory if `more` mappings would exceed the share for this purpose.
  void check_map(i64 more, bool undoing = false) const { check(more, undoing ? kUndoPercent : kMapPercent); }
  void check_unmap(i64 more, bool undoing = false) const { check(more, undoing ? kUndoPercent : kSplitPercent); }
  // Changes the number of mappings that all budgets of the process hold together.
  void add(i64 change);

 private:
  static constexpr i64 kMapPercent = 80, kSplitPercent = 90, kUndoPercent = 95;
  static_assert(kMapPercent < kSplitPercent && kSplitPercent < kUndoPercent && kUndoPercent < 100,
                "what frees memory may use more than what takes it");
  void check(i64 more, i64 percent) const;
  i64 limit_;
};

}  // namespace kvmem
