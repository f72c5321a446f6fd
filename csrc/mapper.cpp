#include "mapper.h"

#include <system_error>

#include "space.h"

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
  }
  return true;
}

i64 Mapper::post(std::shared_ptr<Space> space, std::vector<Op> ops) {
  const i64 number = ++posted_;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    queue_.push_back({std::move(space), std::move(ops)});
  }
  wake_.notify_one();
  return number;
}

void Mapper::wait_idle() {
  if (idle()) return;
  std::unique_lock<std::mutex> lock(mutex_);
  rest_.wait(lock, [this] { return idle(); });
}

std::vector<Op> Mapper::take_failed() {
  std::lock_guard<std::mutex> lock(mutex_);
  failed_flag_.store(false, std::memory_order_release);
  return std::move(failed_);
}

void Mapper::run() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    wake_.wait(lock, [this] { return stop_ || !queue_.empty(); });
    if (queue_.empty()) return;
    Job job = std::move(queue_.front());
    queue_.pop_front();
    // A job behind a failed one may rest on it: it fails too, until the failure has been taken.
    bool failed = !failed_.empty();
    if (!failed) {
      lock.unlock();
      try {
        job.space->execute(job.ops.data(), job.ops.data() + job.ops.size(), true);
      } catch (const Error&) {
        failed = true;  // the step finds its room missing, maps it itself and reports what the driver says then
      }
      try {
        if (!failed) job.space->finish();
      } catch (const Error&) {
        // The pages are mapped; a device that cannot take an event any more will tell the step's own next call.
      }
      job.space.reset();
      lock.lock();
    }
    if (failed) {
      failed_.insert(failed_.end(), job.ops.begin(), job.ops.end());
      failed_flag_.store(true, std::memory_order_release);
    }
    done_.fetch_add(1, std::memory_order_acq_rel);
    rest_.notify_all();
  }
}

}  // namespace kvmem
