// How a call of the allocator that changes something runs; included by the sources of Allocator alone.
#pragma once

#include <exception>

#include "allocator/allocator.h"

namespace kvmem {

// Looks at the metadata before a call and after it, in an allocator that was made with `debug`.
class Allocator::Watch {
 public:
  explicit Watch(const Allocator& allocator)
      : allocator_(allocator.groups_.geometry().debug ? &allocator : nullptr),
        before_(allocator_ ? allocator.state_digest() : 0),
        logged_(allocator_ ? allocator.pool_->log.size() : 0),
        disturbed_(allocator_ ? allocator.disturbances() : 0) {}

  void succeeded() const {
    if (allocator_) check();
  }
  [[gnu::cold, gnu::noinline]] void check() const {
    const std::vector<std::string> found = allocator_->violations();
    if (!found.empty()) throw Error("broken invariant: " + found.front());
  }
  // Within the handler of what the call has thrown.
  [[gnu::cold, gnu::noinline]] void failed() const {
    if (!allocator_ || allocator_->disturbances() != disturbed_) return;
    if (allocator_->state_digest() == before_ && allocator_->pool_->log.size() == logged_) return;
    try {
      throw;
    } catch (const std::exception& e) {
      throw Error(std::string("broken invariant 5: a call that failed has changed something. It said: ") + e.what());
    }
  }
  template <class Call>
  auto run(const Call& call) const {
    try {
      return call();
    } catch (...) {
      failed();
      throw;
    }
  }

 private:
  const Allocator* const allocator_;
  const std::uint64_t before_;
  const std::size_t logged_;
  const i64 disturbed_;
};

inline PoolLock Allocator::enter(bool look) {
  fork_guard_.check("the allocator");
  PoolLock lock = pool_->lock();
  if (look) return lock;
  changes_.store(changes() + 1, std::memory_order_relaxed);  // the lock is held, so no increment is lost
  lock.step_back();
  return lock;
}

template <class Call>
auto Allocator::mutate(const Call& call) {
  const PoolLock lock = enter();
  const Watch watch(*this);
  if constexpr (std::is_void_v<decltype(call())>) {
    watch.run(call);
    watch.succeeded();
  } else {
    auto result = watch.run(call);
    watch.succeeded();
    return result;
  }
}

template <class Call>
void Allocator::piece(const Call& call) {
  const Watch watch(*this);
  watch.run(call);
  watch.succeeded();
  pool_->note_piece();
}

}  // namespace kvmem
