// The lock of a pool: a mutex whose holder can let those in that wait, and that nobody waits for with a lock of the
// embedding language in hand.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <utility>

#include "base/types.h"

namespace kvmem {

// What a thread does before it waits for a pool, and after it has let go of it: give up a lock that others need
// meanwhile. Set once, before there are threads (bindings.cpp).
struct WaitHooks {
  void* (*before)() = nullptr;  // null: there was nothing to give up
  void (*after)(void*) = nullptr;
};
inline WaitHooks wait_hooks;

// std::mutex alone is not fair: who unlocks and locks again nearly always gets it before those that slept.
class PoolMutex {
 public:
  bool try_lock() { return mutex_.try_lock(); }
  void unlock() { mutex_.unlock(); }
  void wait() {
    waiting_.fetch_add(1);
    mutex_.lock();
    count_turn();
  }

  // Of the holder: everybody who waits now gets the lock once, then it is held again. False if nobody waited. No state
  // that the lock guards is known any more.
  bool give_way() {
    // None of them can take its turn before this thread lets go, so the count is exact. Of threads that give way to
    // each other, the one that began first waits for no other one that does.
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
  // In a forked child: whoever waited is not there, and its waiting would be waited for.
  void abandon() { turn_.release(); }

 private:
  void count_turn() {
    waiting_.fetch_sub(1);
    ++turns_;
    turn_->notify_all();
  }

  std::mutex mutex_;
  std::unique_ptr<std::condition_variable> turn_ = std::make_unique<std::condition_variable>();
  std::atomic<i64> waiting_{0};
  i64 turns_ = 0;
};

// Holds a PoolMutex while it lives.
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
  // The thread is about to wait for something: what others need meanwhile is given up until the pool is let go.
  void step_back() {
    if (!given_up_ && wait_hooks.before) given_up_ = wait_hooks.before();
  }

 private:
  PoolMutex* mutex_ = nullptr;
  void* given_up_ = nullptr;
};

}  // namespace kvmem
