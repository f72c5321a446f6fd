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
  try {
    if (!thread_.joinable()) thread_ = std::thread(&Mapper::run, this);
  } catch (const std::system_error&) {
    return false;
  } catch (const std::bad_alloc&) {
    return false;
  }
  return true;
}

i64 Mapper::post(std::shared_ptr<Space> space, const std::vector<Op>& ops) {
  auto job = std::make_unique<Job>();
  job->ops = ops;
  job->space = std::move(space);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    Job* const newest = job.get();
    (queue_ ? last_->next : queue_) = std::move(job);
    last_ = newest;
  }
  const i64 number = ++posted_;
  wake_.notify_one();
  return number;
}

void Mapper::wait_idle() {
  if (idle()) return;
  std::unique_lock<std::mutex> lock(mutex_);
  rest_.wait(lock, [this] { return idle(); });
}

std::size_t Mapper::failed_ops() {
  std::lock_guard<std::mutex> lock(mutex_);
  std::size_t ops = 0;
  for (const Job* job = failed_.get(); job; job = job->next.get()) ops += job->ops.size();
  return ops;
}

// False where the step that finds its room missing maps it itself, and reports what the driver says then.
bool Mapper::execute(Job& job) {
  try {
    job.space->execute(job.ops.data(), job.ops.data() + job.ops.size(), true);
  } catch (...) {
    return false;
  }
  try {
    job.space->finish();
  } catch (...) {
    // The pages are mapped; a device that cannot take an event any more will tell the step's own next call.
  }
  return true;
}

// Takes no memory, since nobody could be told that there is none.
void Mapper::run() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    wake_.wait(lock, [this] { return stop_ || queue_; });
    if (!queue_) return;
    std::unique_ptr<Job> job = std::move(queue_);
    queue_ = std::move(job->next);
    // A job behind a failed one may rest on it: it fails too, until the failure has been taken.
    bool failed = failed_ != nullptr;
    if (!failed) {
      lock.unlock();
      failed = !execute(*job);
      job->space.reset();
      lock.lock();
    }
    if (failed) {
      job->next = std::move(failed_);
      failed_ = std::move(job);
      failed_flag_.store(true, std::memory_order_release);
    }
    done_.fetch_add(1, std::memory_order_acq_rel);
    rest_.notify_all();
  }
}

}  // namespace kvmem
