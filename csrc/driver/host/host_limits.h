// What this process may use of the machine: memory (the machine's, or less where a cgroup says so), and mappings (VMAs)
// up to vm.max_map_count, met with a typed error before the kernel meets it.
#pragma once

#include "base/types.h"

namespace kvmem {

i64 host_total_bytes();      // physical memory, or the lowest limit of this process's cgroup and its ancestors
i64 host_available_bytes();  // MemAvailable, or what is left under those limits, whichever is less; never negative
i64 host_max_mappings();     // vm.max_map_count: mappings (VMAs) one process may have

// Past the limit the kernel refuses every mmap, even the one by which a mapping becomes a hole again: the process would
// be stuck. So new mappings stop at 80 %, and an unmap that splits a mapping in two stops at 90 %; what takes back a
// call that failed may go on to 95 %, and the rest is for the process's other mappings. An unmap that does not split
// always goes through.
class MappingBudget {
 public:
  MappingBudget();
  void check_map(i64 more, bool undoing = false) const { check(more, undoing ? 95 : 80); }
  void check_unmap(i64 growth, bool undoing = false) const { check(growth, undoing ? 95 : 90); }
  void add(i64 change);  // what the owner holds now, more or less than before; shared by all budgets of the process

 private:
  void check(i64 more, i64 percent) const;  // OutOfMemory
  i64 limit_;
};

}  // namespace kvmem
