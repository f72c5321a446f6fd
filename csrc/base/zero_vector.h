// Vectors that are sized for the largest possible number of elements, of which few are used. calloc() gets their memory
// as zero pages from the system, and pages that are never touched take no memory. REQUIRES: all bits of an element's
// initial state are zero.
#pragma once

#include <cstdlib>
#include <new>
#include <vector>

#include "base/types.h"

namespace kvmem {

template <class T>
struct ZeroAllocator {
  using value_type = T;
  ZeroAllocator() = default;
  template <class U>
  ZeroAllocator(const ZeroAllocator<U>&) {}
  T* allocate(std::size_t n) {
    if (void* memory = std::calloc(n, sizeof(T))) return static_cast<T*>(memory);
    throw std::bad_alloc();
  }
  void deallocate(T* memory, std::size_t) { std::free(memory); }
  void construct(T*) {}  // the memory is zero already: vectors of this type never shrink and grow again
  template <class U, class... Args>
  void construct(U* at, Args&&... args) {
    ::new (static_cast<void*>(at)) U(std::forward<Args>(args)...);
  }
  bool operator==(const ZeroAllocator&) const { return true; }
  bool operator!=(const ZeroAllocator&) const { return false; }
};

template <class T>
using ZeroVector = std::vector<T, ZeroAllocator<T>>;

// An id whose initial value, -1, is stored as zero bits.
class ZeroId {
 public:
  ZeroId() = default;
  ZeroId(i32 id) : stored_(id + 1) {}
  operator i32() const { return stored_ - 1; }

 private:
  i32 stored_ = 0;
};

}  // namespace kvmem
