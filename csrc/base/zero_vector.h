// Vectors as long as all that there may ever be, of which little is used: their memory comes from the system as zeroes,
// and what nobody touches is never taken. A value's initial state must be all zero bits.
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
  void construct(T*) {}  // zero as it came: a vector that has grown never shrinks
  template <class U, class... Args>
  void construct(U* at, Args&&... args) {
    ::new (static_cast<void*>(at)) U(std::forward<Args>(args)...);
  }
  bool operator==(const ZeroAllocator&) const { return true; }
  bool operator!=(const ZeroAllocator&) const { return false; }
};

template <class T>
using ZeroVector = std::vector<T, ZeroAllocator<T>>;

// An id, or -1, which is all zero bits.
class ZeroId {
 public:
  ZeroId() = default;
  ZeroId(i32 id) : stored_(id + 1) {}
  operator i32() const { return stored_ - 1; }

 private:
  i32 stored_ = 0;
};

}  // namespace kvmem
