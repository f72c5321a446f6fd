// What Allocator::stats() counts (memory.cpp). kvmem/allocator/stats.py says what each number means.
#pragma once

#include <vector>

#include "base/types.h"

namespace kvmem {

struct AllocatorStats {
  i64 limit_bytes = 0;  // the most that this allocator could hold beside what the others of the pool hold
  i64 budget_bytes = 0, created_bytes = 0, free_bytes = 0;
  i64 mapped_bytes = 0, used_bytes = 0, parked_bytes = 0, shared_bytes = 0, held_bytes = 0, cached_beside_bytes = 0;
  std::vector<std::vector<i64>> arena_used_bytes;  // used_bytes by group and arena
  i64 num_sequences = 0, driver_calls = 0, physical_bytes = 0;
  i64 cached_bytes = 0, cached_blocks = 0, pinned_blocks = 0, evicted_blocks = 0, lookup_tokens = 0, hit_tokens = 0;
};

}  // namespace kvmem
