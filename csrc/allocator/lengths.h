// How a step adds to lengths outside of its transaction, which most steps need none of.
#pragma once

#include "allocator/allocator.h"

namespace kvmem {

// The lengths that extend() adds, and their records where all is recorded: taken back unless done() is called. One
// record for each would cost a step more than all else.
class Cache::Lengthened {
 public:
  Lengthened(Cache& cache, const i32* handles, const i32* counts, i64 n, i64 group)
      : cache_(cache), counts_(counts), n_(n), group_(group), logged_(cache.pool_->log.size()) {
    if (cache.pool_->recording) cache.log_lengths(handles, counts, n, group);
    cache.add_lengths(counts, n, group, 1);
    noted_ = cache.pool_->log.size();
  }
  ~Lengthened() {
    if (done_) return;
    cache_.add_lengths(counts_, n_, group_, -1);
    std::vector<Op>& log = cache_.pool_->log;
    log.erase(log.begin() + static_cast<std::ptrdiff_t>(logged_), log.begin() + static_cast<std::ptrdiff_t>(noted_));
  }
  Lengthened(const Lengthened&) = delete;
  Lengthened& operator=(const Lengthened&) = delete;
  void done() { done_ = true; }

 private:
  Cache& cache_;
  const i32* const counts_;
  const i64 n_, group_;
  const std::size_t logged_;
  std::size_t noted_ = 0;
  bool done_ = false;
};

}  // namespace kvmem
