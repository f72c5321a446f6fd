// The mapper: one long-lived thread that executes ops on a space, so that a step does not wait for the driver. What it
// executes was decided before, under the pool's lock. It runs no Python, and starts with the first job.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <list>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "base/check.h"
#include "base/ops.h"

namespace kvmem {

class Space;

// Jobs are done in order. A job behind a failed one may depend on it, so it fails too, until take_failed().
//
// Thread safety: done(), idle() and has_failed() may be called from any thread; the other functions under the pool's
// lock.
class Mapper {
 public:
  Mapper() = default;
  ~Mapper();  // waits until all jobs are done
  Mapper(const Mapper&) = delete;
  Mapper& operator=(const Mapper&) = delete;

  // Starts the thread if it does not run. Returns false where the system has no thread or no memory for it.
  bool start();
  // Queues ops for execution; returns the number of the job, which counts from 1. REQUIRES: start() returned true. May
  // throw std::bad_alloc, and has queued nothing then; the job itself needs no more memory.
  i64 post(std::shared_ptr<Space> space, const std::vector<Op>& ops);
  // Returns the number of jobs done, failed ones included.
  i64 done() const { return done_.load(std::memory_order_acquire); }
  bool idle() const { return done() == posted_; }
  void wait_idle();
  bool has_failed() const { return failed_flag_.load(std::memory_order_acquire); }
  // Returns the number of ops of failed jobs.
  std::size_t failed_ops();
  // Calls undo(op) for the ops of failed jobs, newest first, and drops those jobs. The space has undone what it had
  // executed of them. REQUIRES: idle().
  template <class Undo>
  void take_failed(const Undo& undo) {
    KVMEM_ASSERT(idle(), "no job is in progress");
    std::list<Job> jobs;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      failed_flag_.store(false, std::memory_order_release);
      jobs.swap(failed_);
    }
    for (const Job& job : jobs) std::for_each(job.ops.rbegin(), job.ops.rend(), undo);
  }

 private:
  struct Job {
    std::shared_ptr<Space> space;
    std::vector<Op> ops;
  };
  void run();
  static bool execute(const Job& job);

  std::mutex mutex_;  // guards the lists and stop_
  std::condition_variable wake_, done_cv_;
  std::list<Job> queue_;   // oldest first; lists, because a job moves between them without memory
  std::list<Job> failed_;  // newest first
  std::atomic<bool> failed_flag_{false};
  std::atomic<i64> done_{0};
  i64 posted_ = 0;  // jobs posted so far; guarded by the pool's lock
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace kvmem
