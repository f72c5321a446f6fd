// How a call of the allocator takes the lock and, in an allocator that was made with `debug`, is checked. Included by
// the sources of Allocator only.
#pragma once

#include <exception>
#include <string>
#include <type_traits>
#include <vector>

#include "allocator/allocator.h"

namespace kvmem {

// For short calls that change nothing. This and the next two throw DeviceError in a forked child.
inline PoolLock Allocator::lock_to_read() {
  fork_guard_.check("the allocator");
  return pool_->lock();
}

// For calls after which filled batches are still valid. This and the next also release the lock of the embedding
// language.
inline PoolLock Allocator::lock_to_fill() {
  PoolLock lock = lock_to_read();
  lock.step_back();
  return lock;
}

// For all other calls that change something.
inline PoolLock Allocator::lock_to_change() {
  PoolLock lock = lock_to_read();
  count_change();
  lock.step_back();
  return lock;
}

// Compares the metadata before and after a call, if the allocator was made with `debug`; does nothing otherwise.
class Allocator::InvariantCheck {
 public:
  explicit InvariantCheck(const Allocator& allocator)
      : allocator_(allocator.groups_.geometry().debug ? &allocator : nullptr),
        before_(allocator_ ? allocator.state_digest() : 0),
        logged_(allocator_ ? allocator.pool_->log.size() : 0),
        disturbed_(allocator_ ? allocator.disturbances() : 0) {}

  template <class Call>
  auto run(const Call& call) const {
    try {
      return call();
    } catch (...) {
      check_unchanged();
      throw;
    }
  }
  // Throws Error with the first violation.
  void check() const {
    if (allocator_) check_all();
  }

 private:
  [[gnu::cold, gnu::noinline]] void check_all() const {
    const std::vector<std::string> found = allocator_->violations();
    if (!found.empty()) throw Error("broken invariant: " + found.front());
  }
  // Called while the exception of the call is handled; throws Error, with its message, if the call changed something.
  [[gnu::cold, gnu::noinline]] void check_unchanged() const {
    if (!allocator_ || allocator_->disturbances() != disturbed_) return;
    if (allocator_->state_digest() == before_ && allocator_->pool_->log.size() == logged_) return;
    try {
      throw;
    } catch (const std::exception& e) {
      throw Error(std::string("broken invariant 5: a call that failed has changed something. It said: ") + e.what());
    }
  }

  const Allocator* const allocator_;
  const std::uint64_t before_;
  const std::size_t logged_;
  const i64 disturbed_;
};

// Returns what `call` returns, which may change something and runs under the lock. An allocator made with `debug`
// checks all invariants afterwards, and that a call which failed has changed nothing.
template <class Call>
auto Allocator::update(const Call& call) {
  const PoolLock lock = lock_to_change();
  const InvariantCheck invariants(*this);
  if constexpr (std::is_void_v<decltype(call())>) {
    invariants.run(call);
    invariants.check();
  } else {
    auto result = invariants.run(call);
    invariants.check();
    return result;
  }
}

// Runs one piece of a longer call: its changes stand, whatever happens to later pieces. REQUIRES: the lock.
template <class Call>
void Allocator::update_piece(const Call& call) {
  const InvariantCheck invariants(*this);
  invariants.run(call);
  invariants.check();
  pool_->note_piece();
}

}  // namespace kvmem
