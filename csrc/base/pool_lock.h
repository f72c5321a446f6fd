// The lock of a pool: a mutex whose holder can let waiting threads pass, and which no thread waits for while it holds a
// lock of the embedding language (Python's GIL).
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <utility>

#include "base/check.h"
#include "base/types.h"

namespace kvmem {

// Called before a thread waits for a pool, and after it has unlocked the pool: they release and reacquire a lock that
// other threads need meanwhile. bindings/ sets them once, before any thread starts.
struct WaitHooks {
  void* (*before)() = nullptr;  // returns null where there was nothing to release
  void (*after)(void*) = nullptr;
};
inline WaitHooks wait_hooks;

// std::mutex is not fair: a thread that unlocks and locks again nearly always wins against threads that sleep.
class PoolMutex {
 public:
  bool try_lock() { return mutex_.try_lock(); }
  void unlock() { mutex_.unlock(); }
  void wait() {
    waiting_.fetch_add(1);
    mutex_.lock();
    count_turn();
  }

  // Lets every thread that waits now hold the lock once, then takes it again. Returns false, and does nothing, if no
  // thread waits. REQUIRES: the caller holds the lock. State that the lock guards may have changed afterwards.
  bool give_way() {
    // No waiting thread can lock before this one releases the mutex, so the count is exact. Among threads that call
    // give_way() at once, the first never waits for a later one.
    const i64 others = waiting_.load();
    if (others == 0) return false;
    std::unique_lock<std::mutex> held(mutex_, std::adopt_lock);
    const i64 until = turns_ + others;
    waiting_.fetch_add(1);
    turn_->wait(held, [&] { return turns_ >= until; });
    count_turn();
    held.release();
    return true;
  }
  // For a forked child. Threads that waited do not exist there, and the destructor of a condition variable would wait
  // for them, so it is leaked.
  void abandon() { turn_.release(); }

 private:
  void count_turn() {
    KVMEM_ASSERT(waiting_.load() > 0, "this thread was counted as waiting");
    waiting_.fetch_sub(1);
    ++turns_;
    turn_->notify_all();
  }

  std::mutex mutex_;
  std::unique_ptr<std::condition_variable> turn_ = std::make_unique<std::condition_variable>();
  std::atomic<i64> waiting_{0};
  i64 turns_ = 0;
};

// Holds a PoolMutex for its own lifetime.
class PoolLock {
 public:
  PoolLock() = default;
  static PoolLock wait_for(PoolMutex& mutex) {
    PoolLock held;
    if (!mutex.try_lock()) {
      held.step_back();
      mutex.wait();
    }
    held.mutex_ = &mutex;
    return held;
  }
  static PoolLock try_for(PoolMutex& mutex) {
    PoolLock held;
    if (mutex.try_lock()) held.mutex_ = &mutex;
    return held;
  }
  PoolLock(PoolLock&& other) noexcept
      : mutex_(std::exchange(other.mutex_, nullptr)), given_up_(std::exchange(other.given_up_, nullptr)) {}
  PoolLock& operator=(PoolLock&&) = delete;
  ~PoolLock() { unlock(); }

  explicit operator bool() const { return mutex_ != nullptr; }
  void unlock() {
    if (mutex_) std::exchange(mutex_, nullptr)->unlock();
    if (given_up_) wait_hooks.after(std::exchange(given_up_, nullptr));
  }
  bool give_way() { return mutex_->give_way(); }
  // Called before the thread waits for something else: releases the lock of the embedding language until unlock().
  void step_back() {
    if (!given_up_ && wait_hooks.before) given_up_ = wait_hooks.before();
  }

 private:
  PoolMutex* mutex_ = nullptr;
  void* given_up_ = nullptr;
};

}  // namespace kvmem
