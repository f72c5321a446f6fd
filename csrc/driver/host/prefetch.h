// Prefetch of host memory into the CPU's caches.
#pragma once

#include <algorithm>

#include "base/types.h"

namespace kvmem {

// `count` pieces of `bytes` bytes each, whose starts are `stride` bytes apart.
struct StridedRange {
  i64 address, bytes, count, stride;
};

// Asks the CPU to load every cache line of the ranges, in order. A hint: the instruction never faults, also where
// nothing is mapped, and another thread may write or unmap the memory meanwhile.
//
// `*issued`: how many bytes of the ranges were asked for so far. `*most`: stops at so many; another thread may lower it
// at any time, which counts from the next 4 KiB on. Cost: about a nanosecond for a line, or the time of the memory.
inline void prefetch_lines(const StridedRange* ranges, i64 n, i64* issued, const i64* most) {
  constexpr i64 kLine = 64, kStep = 4096;  // on a CPU with longer lines, some instructions repeat
  i64 done = 0;
  for (const StridedRange* r = ranges; r < ranges + n; ++r) {
    for (i64 k = 0; k < r->count; ++k) {
      i64 at = r->address + k * r->stride;
      for (const i64 end = at + r->bytes; at < end;) {
        const i64 left = __atomic_load_n(most, __ATOMIC_RELAXED) - done;
        if (left <= 0) return;
        const i64 until = at + std::min({end - at, kStep - (at & (kStep - 1)), left});
        for (i64 line = at & -kLine; line < until; line += kLine) {
          __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 2);
        }
        done += until - at, at = until;
        __atomic_store_n(issued, done, __ATOMIC_RELAXED);
      }
    }
  }
}

}  // namespace kvmem
