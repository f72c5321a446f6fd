// After fork(), the child has copies of the parent's objects, but device memory, mappings and contexts belong to the
// process that made them. An object that owns such a resource keeps a ForkGuard and checks it before each use.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>

#include "base/types.h"

namespace kvmem {

// The number of forks between the load of this library and this process. Only fork_guard.cpp changes it.
inline std::atomic<std::uint64_t> forks{0};

class ForkGuard {
 public:
  ForkGuard();
  // Returns true in a process that was forked after this guard was made. Cost: one atomic load. A bare clone(), without
  // libc's fork(), is not detected.
  bool forked() const { return forks.load(std::memory_order_relaxed) != generation_; }
  // Throws DeviceError in such a process; `what` names the owner in the message, e.g. "the host driver".
  void check(const char* what) const {
    if (forked()) refuse(what);
  }

 private:
  [[noreturn, gnu::cold]] static void refuse(const char* what);

  std::uint64_t generation_;
};

// A mutex that belongs to one process. A thread that held it at the moment of fork() does not exist in the child, so
// the child could wait for ever: lock() and try_lock() throw DeviceError there instead.
class ForkMutex {
 public:
  explicit ForkMutex(const char* owner) : owner_(owner) {}
  void lock() {
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

// keep_in_parent() registers a file descriptor that a forked child must close at once, since a child that holds a memfd
// keeps its memory alive after the parent has died. close_kept() unregisters the descriptor and closes it; in a forked
// child it does nothing, because the descriptor is closed already.
void keep_in_parent(int fd);
void close_kept(int fd);

}  // namespace kvmem
