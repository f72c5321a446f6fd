#include "memory/mapper.h"

#include <new>
#include <system_error>

#include "memory/space.h"

namespace kvmem {

Mapper::~Mapper() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_one();
  if (thread_.joinable()) thread_.join();
}

bool Mapper::start() {
  std::lock_guard<std::mutex> lock(mutex_);
  return thread_.joinable() || attempt([this] { thread_ = std::thread(&Mapper::run, this); });
}

i64 Mapper::post(std::shared_ptr<Space> space, const std::vector<Op>& ops) {
  KVMEM_ASSERT(thread_.joinable() && space != nullptr, "start() was called, and there is a space to execute on");
  std::list<Job> job{{std::move(space), ops}};
  {
    std::lock_guard<std::mutex> lock(mutex_);
    queue_.splice(queue_.end(), job);
  }
  const i64 number = ++posted_;
  wake_.notify_one();
  return number;
}

void Mapper::wait_idle() {
  if (!idle()) {
    std::unique_lock<std::mutex> lock(mutex_);
    done_cv_.wait(lock, [this] { return idle(); });
  }
  KVMEM_ASSERT(idle() && queue_.empty(), "no job is queued or in progress");
}

std::size_t Mapper::failed_ops() {
  std::lock_guard<std::mutex> lock(mutex_);
  std::size_t ops = 0;
  for (const Job& job : failed_) ops += job.ops.size();
  return ops;
}

// Returns whether the job was executed. A step that finds its memory missing maps it itself, and reports the error.
bool Mapper::execute(const Job& job) {
  if (!attempt([&] { job.space->execute(job.ops.data(), job.ops.data() + job.ops.size(), true); })) return false;
  attempt([&] { job.space->wait_ahead(); });  // the pages are mapped; a broken device fails the step's next call
  return true;
}

// Allocates nothing, because there is no caller to which a failure could be reported.
void Mapper::run() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    wake_.wait(lock, [this] { return stop_ || !queue_.empty(); });
    if (queue_.empty()) return;
    std::list<Job> job;
    job.splice(job.begin(), queue_, queue_.begin());
    bool failed = !failed_.empty();
    if (!failed) {
      lock.unlock();
      failed = !execute(job.front());
      job.front().space.reset();
      lock.lock();
    }
    if (failed) {
      failed_.splice(failed_.begin(), job);
      failed_flag_.store(true, std::memory_order_release);
    }
    done_.fetch_add(1, std::memory_order_acq_rel);
    done_cv_.notify_all();
  }
}

}  // namespace kvmem
