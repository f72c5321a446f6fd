// The kernel's limit on mappings (VMAs) per process, vm.max_map_count, met with a typed error before the kernel meets
// it.
#pragma once

#include "types.h"

namespace kvmem {

// Past the limit the kernel refuses every mmap, even the one by which a mapping becomes a hole again: the process would
// be stuck. So new mappings stop at 80 %, and an unmap that splits a mapping in two stops at 90 %; the rest is for the
// process's other mappings. An unmap that does not split always goes through.
class MappingBudget {
 public:
  MappingBudget();
  void check_map(i64 more) const { check(more, 80); }
  void check_unmap(i64 growth) const { check(growth, 90); }
  void add(i64 change);  // what the owner holds now, more or less than before; shared by all budgets of the process

 private:
  void check(i64 more, i64 percent) const;  // OutOfMemory
  i64 limit_;
};

}  // namespace kvmem
