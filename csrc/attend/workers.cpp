#include "attend/workers.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "base/fork_guard.h"

namespace kvmem {
namespace {

struct Job {
  Job(const std::function<void(i64)>& w, i64 count) : work(&w), tasks(count) {}
  const std::function<void(i64)>* work;
  i64 tasks;
  std::atomic<i64> next{0};
  std::mutex failing;
  std::exception_ptr failed;

  void run() {
    try {
      for (i64 task = next.fetch_add(1); task < tasks; task = next.fetch_add(1)) (*work)(task);
    } catch (...) {
      next.store(tasks);
      const std::lock_guard<std::mutex> lock(failing);
      if (!failed) failed = std::current_exception();
    }
  }
};

class Workers {
 public:
  void run(Job& job, i64 threads) {
    const std::lock_guard<std::mutex> one(calls_);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job, wanted_ = running_ = started(threads - 1), ++round_;
    }
    wake_.notify_all();
    job.run();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return running_ == 0; });
    job_ = nullptr;
  }

  bool forked() const { return guard_.forked(); }

 private:
  // How many of `wanted` threads there are: fewer where the system gives no more. REQUIRES: mutex_.
  i64 started(i64 wanted) {
    try {
      while (static_cast<i64>(threads_.size()) < wanted) {
        threads_.emplace_back(&Workers::loop, this, static_cast<i64>(threads_.size()) + 1);
      }
    } catch (const std::system_error&) {  // the caller does their share
    }
    return std::min(wanted, static_cast<i64>(threads_.size()));
  }

  void loop(i64 worker) {
    for (i64 seen = 0;;) {
      Job* job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return round_ != seen; });
        seen = round_;
        if (worker > wanted_) continue;
        job = job_;
      }
      job->run();
      const std::lock_guard<std::mutex> lock(mutex_);
      if (--running_ == 0) done_.notify_one();
    }
  }

  const ForkGuard guard_;
  std::mutex calls_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  Job* job_ = nullptr;
  i64 wanted_ = 0, running_ = 0, round_ = 0;
};

// Never destroyed: its threads sleep until the process ends, and would wait on what exit() has destroyed. The object of
// a parent is left alone in a forked child, where its threads do not exist.
Workers& workers() {
  static std::atomic<Workers*> current{nullptr};
  Workers* found = current.load();
  if (found && !found->forked()) return *found;
  auto fresh = std::make_unique<Workers>();
  return *(current.compare_exchange_strong(found, fresh.get()) ? fresh.release() : found);
}

}  // namespace

void run_tasks(i64 tasks, i64 threads, const std::function<void(i64)>& work) {
  Job job(work, tasks);
  const i64 used = std::min(tasks, threads);
  if (used > 1) {
    workers().run(job, used);
  } else {
    job.run();
  }
  if (job.failed) std::rethrow_exception(job.failed);
}

}  // namespace kvmem
