// How much memory this process may use: the machine's, or less where a cgroup says so.
#pragma once

#include "types.h"

namespace kvmem {

i64 host_total_bytes();      // physical memory, or the lowest limit of this process's cgroup and its ancestors
i64 host_available_bytes();  // MemAvailable, or what is left under those limits, whichever is less; never negative
i64 host_max_mappings();     // vm.max_map_count: mappings (VMAs) one process may have

}  // namespace kvmem
