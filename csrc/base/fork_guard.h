// A forked child has the parent's objects but must not have its cache: device memory, mappings and contexts belong to
// the process that made them. Whoever owns such a thing keeps a ForkGuard and asks it before each use.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>

#include "base/types.h"

namespace kvmem {

// How many forks led to this process since the library was loaded. Changed by fork_guard.cpp only.
inline std::atomic<std::uint64_t> forks{0};

class ForkGuard {
 public:
  ForkGuard();
  // True in a process forked after this guard was made. One atomic load. (A bare clone() without libc's fork is not
  // seen.)
  bool forked() const { return forks.load(std::memory_order_relaxed) != generation_; }
  // DeviceError in such a process; `what` names the owner, e.g. "the host driver".
  void check(const char* what) const {
    if (forked()) refuse(what);
  }

 private:
  [[noreturn, gnu::cold]] static void refuse(const char* what);

  std::uint64_t generation_;
};

// A mutex of such an owner: whoever held it at the moment of the fork is not in the child, where nobody would open it.
class ForkMutex {
 public:
  explicit ForkMutex(const char* owner) : owner_(owner) {}
  void lock() {  // DeviceError in a forked child
    guard_.check(owner_);
    mutex_.lock();
  }
  bool try_lock() {
    guard_.check(owner_);
    return mutex_.try_lock();
  }
  void unlock() { mutex_.unlock(); }

 private:
  const char* const owner_;
  const ForkGuard guard_;
  std::mutex mutex_;
};

// A descriptor that a forked child must not keep: a child holding a memfd would keep its memory alive after the parent
// died. keep_in_parent() from open to close; the child closes it at once.
void keep_in_parent(int fd);
void close_kept(int fd);  // close() and forget; does nothing in a forked child, where it is closed already

}  // namespace kvmem
