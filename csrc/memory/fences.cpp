// Which work the device must have finished before memory goes: streams, their order, and events.

#include <algorithm>
#include <chrono>
#include <limits>
#include <thread>

#include "memory/space.h"

namespace kvmem {

void Space::use_stream(Stream stream, bool only) {
  std::lock_guard<std::mutex> lock(mutex_);
  driver_->check_stream(stream);
  if (only) join();
  std::vector<Stream> others;
  if (!only) {
    others = others_;
    if (stream != stream_) others.push_back(stream_);
    others.erase(std::remove(others.begin(), others.end(), stream), others.end());
  }
  if (stream != stream_) go_after(stream_, stream);
  stream_ = stream;
  others_ = std::move(others);
}

// What is put on `later` from now on starts after all that `earlier` has been given. The device waits, not we.
void Space::go_after(Stream earlier, Stream later) {
  const Event event = driver_->record(earlier);
  if (event == 0) return;
  try {
    driver_->order(event, later);
  } catch (...) {
    driver_->forget(event);
    throw;
  }
  driver_->forget(event);  // the order was taken when it was given
}

// An event on stream_ stands for the work on all streams then, and what is put there may touch what they have written.
void Space::join() {
  for (Stream other : others_) go_after(other, stream_);
}

void Space::join_once() {
  if (!joined_) join();
  joined_ = true;
}

// Blocks until the work before fence `number` is done; forgets every event that is.
void Space::wait_for(i64 number) {
  while (!marks_.empty() && (marks_.front().number <= number || driver_->done(marks_.front().event))) {
    if (marks_.front().number <= number) driver_->wait(marks_.front().event);
    driver_->forget(marks_.front().event);
    marks_.pop_front();
  }
}

// Waits for all that was put on the stream.
void Space::sync(Stream stream) {
  const Event event = driver_->record(stream);
  if (event == 0) return;
  driver_->wait(event);
  driver_->forget(event);
}

void Space::drain() {
  std::lock_guard<std::mutex> lock(mutex_);
  try {
    wait_for(std::numeric_limits<i64>::max());
    join();
    sync(stream_);
    return;
  } catch (...) {
    // A stream may be gone, or be captured just now. Then for all of them.
  }
  try {
    driver_->wait_for_device();
  } catch (...) {
    // A device that cannot be waited for any more has nothing in flight that could still do harm.
  }
}

void Space::finish() {
  Event event = 0;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    event = driver_->record(driver_->side_stream());
  }
  // Asks now and then rather than waiting: the lock must stay free, since a driver takes one call at a time.
  for (bool done = event == 0; !done;) {
    std::unique_lock<std::mutex> lock(mutex_);
    done = driver_->done(event);
    if (done) {
      driver_->forget(event);
    } else {
      lock.unlock();
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
  }
}

}  // namespace kvmem
