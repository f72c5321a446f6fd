// One long-lived thread that maps ahead, so that the step never waits for the driver. What it does was decided before,
// under the pool's lock; it only executes. It knows no Python, and it is not started before the first job.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "base/ops.h"

namespace kvmem {

class Space;

class Mapper {
 public:
  Mapper() = default;
  ~Mapper();  // finishes what is queued
  Mapper(const Mapper&) = delete;
  Mapper& operator=(const Mapper&) = delete;

  // Queues records for execution; returns the number of the job. Jobs are done in order. Throws, having queued nothing,
  // where there is no host memory; from then on a job needs none.
  i64 post(std::shared_ptr<Space> space, const std::vector<Op>& ops);
  bool start();  // before the first post(); false where the system gives no thread
  i64 done() const { return done_.load(std::memory_order_acquire); }
  i64 posted() const { return posted_; }
  bool idle() const { return done() == posted_; }
  void wait_idle();
  // Calls `undo` for the records of jobs that failed, and of all that were queued behind them, newest first, and
  // forgets them. They were not executed. The mapper is idle.
  template <class Undo>
  void take_failed(const Undo& undo) {
    std::unique_ptr<Job> job;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      failed_flag_.store(false, std::memory_order_release);
      job = std::move(failed_);
    }
    for (; job; job = std::move(job->next)) {
      for (auto op = job->ops.rbegin(); op != job->ops.rend(); ++op) undo(*op);
    }
  }
  std::size_t failed_ops();  // how many records those are
  bool has_failed() const { return failed_flag_.load(std::memory_order_acquire); }

 private:
  struct Job {
    std::shared_ptr<Space> space;
    std::vector<Op> ops;
    std::unique_ptr<Job> next;
  };
  void run();
  static bool execute(Job& job);

  std::mutex mutex_;
  std::condition_variable wake_, rest_;
  std::unique_ptr<Job> queue_;   // the oldest first
  Job* last_ = nullptr;          // of them
  std::unique_ptr<Job> failed_;  // the newest first
  std::atomic<bool> failed_flag_{false};
  std::atomic<i64> done_{0};
  i64 posted_ = 0;  // written under the pool's lock only
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace kvmem
