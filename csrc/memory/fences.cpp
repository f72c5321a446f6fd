// Fences, and the order of the streams whose work they cover.

#include <algorithm>
#include <chrono>
#include <limits>
#include <thread>

#include "memory/space.h"

namespace kvmem {

void Space::use_stream(Stream stream, bool only) {
  std::lock_guard<std::mutex> lock(mutex_);
  driver_->check_stream(stream);
  if (only) join_streams();
  std::vector<Stream> others;
  if (!only) {
    others = other_streams_;
    if (stream != stream_) others.push_back(stream_);
    others.erase(std::remove(others.begin(), others.end(), stream), others.end());
  }
  if (stream != stream_) order_after(stream_, stream);
  stream_ = stream;
  other_streams_ = std::move(others);
  KVMEM_ASSERT(std::count(other_streams_.begin(), other_streams_.end(), stream_) == 0, "stream_ is not a former one");
}

// Lets the device start what is put on `later` from now on after all work that `earlier` has been given. The host does
// not wait.
void Space::order_after(Stream earlier, Stream later) {
  const Event event = driver_->record(earlier);
  if (event == 0) return;
  try {
    driver_->order(event, later);
  } catch (...) {
    driver_->forget(event);
    throw;
  }
  driver_->forget(event);  // order() has taken effect already
}

// Orders stream_ after all other streams, so that an event on it covers them, and what is put on it may touch what they
// wrote.
void Space::join_streams() {
  for (Stream other : other_streams_) order_after(other, stream_);
}

void Space::join_streams_once() {
  if (!joined_) join_streams();
  joined_ = true;
}

void Space::make_fence(i64 number) {
  KVMEM_ASSERT(fences_.empty() || fences_.back().number < number, "fence numbers increase");
  wait_for(0);  // only removes fences that are done, so that the list stays short
  join_streams_once();
  fences_.push_back({number, 0});  // may throw bad_alloc, so it precedes record()
  try {
    fences_.back().event = driver_->record(stream_);
  } catch (...) {
    fences_.pop_back();
    throw;
  }
  if (fences_.back().event == 0) fences_.pop_back();  // the work is done
}

// Blocks until the work before fence `number` is done. Removes it, and every older or completed fence at the front.
void Space::wait_for(i64 number) {
  while (!fences_.empty() && (fences_.front().number <= number || driver_->done(fences_.front().event))) {
    if (fences_.front().number <= number) driver_->wait(fences_.front().event);
    driver_->forget(fences_.front().event);
    fences_.pop_front();
  }
  KVMEM_ASSERT(fences_.empty() || fences_.front().number > number, "no work before the fence is left");
}

bool Space::has_passed(i64 number) {
  std::lock_guard<std::mutex> lock(mutex_);
  while (!fences_.empty() && driver_->done(fences_.front().event)) {
    driver_->forget(fences_.front().event);
    fences_.pop_front();
  }
  return fences_.empty() || fences_.front().number > number;
}

// Blocks until the work that the stream has been given is done.
void Space::sync(Stream stream) {
  const Event event = driver_->record(stream);
  if (event == 0) return;
  driver_->wait(event);
  driver_->forget(event);
}

void Space::drain() {
  std::lock_guard<std::mutex> lock(mutex_);
  const bool drained = attempt([this] {
    wait_for(std::numeric_limits<i64>::max());
    join_streams();
    sync(stream_);
  });
  if (drained) return;
  // A stream may be destroyed or under capture, so wait for the whole device. If that fails too, the device does no
  // work that could still do harm.
  attempt([this] { driver_->wait_for_device(); });
}

void Space::wait_ahead() {
  Event event = 0;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    event = driver_->record(driver_->side_stream());
  }
  // Polls, because a blocking wait under the lock would keep steps from the driver.
  for (bool done = event == 0; !done;) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      done = driver_->done(event);
      if (done) driver_->forget(event);
    }
    if (!done) std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
}

}  // namespace kvmem
