// The CUDA driver: the verbs of driver.h over libcuda's virtual memory management, one driver call a verb.
//
// What the driver leaves undefined is refused here before it is called: a handle that does not exist, a page destroyed
// while mapped, a reservation freed while pages are mapped in it, a handle mapped in part, access to what is not all
// mapped. The rest is the driver's to refuse, and every return code is looked at.
#pragma once

#include <atomic>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "driver/cuda/cuda_device.h"
#include "driver/driver.h"

namespace kvmem {

class CudaDriver final : public Driver {
 public:
  CudaDriver(int index, const std::string& library, PageOptions pages)
      : device_(index, library, pages), api_(device_.api()) {}
  ~CudaDriver() override;

  const DriverInfo& info() const override { return device_.info(); }
  DriverCounters counters() const override;
  i64 physical_bytes() const override { return created_bytes_; }
  i64 available_bytes() const override;

  Address reserve(i64 bytes, i64 alignment) override;
  void release(Address base, i64 bytes) override;
  PageHandle create(i64 bytes) override;
  void destroy(PageHandle page) override;
  void map(Address at, i64 bytes, i64 offset, PageHandle page) override;
  void set_access(Address at, i64 bytes) override;
  void unmap(Address at, i64 bytes) override;
  // One call for the run. Drivers are seen to take that, though cuMemUnmap's documentation promises it only for the
  // range of one cuMemMap: one that refuses gets a call a page from then on.
  void unmap_run(Address at, i64 page_bytes, i64 count) override;

  void zero(Address at, i64 bytes, Stream stream) override;
  void copy(Address to, Address from, i64 bytes, Stream stream) override;
  Event record(Stream stream) override;
  bool done(Event event) override;
  void wait(Event event) override;
  void forget(Event event) override;

  void check_stream(Stream stream) const override;
  Stream side_stream() override;
  void order(Event event, Stream later) override;
  void wait_for_device() override;

 protected:
  Mapped mapped_at(Address at) const override;

 private:
  struct Page {
    i64 bytes;
    i64 mappings;
  };
  struct Mapping {
    i64 bytes;
    PageHandle page;
    bool accessible;
  };
  std::unique_lock<ForkMutex> begin(i64 DriverCounters::* counter) {
    std::unique_lock<ForkMutex> lock(mutex_);
    ++(counters_.*counter);
    device_.check_fork();
    return lock;
  }
  void count(i64 DriverCounters::* counter) {  // for what our record does not serialise
    std::lock_guard<ForkMutex> lock(event_mutex_);
    ++(counters_.*counter);
    device_.check_fork();
  }
  [[noreturn]] static void refuse(const char* verb, const std::string& why);
  // The driver's sizes are unsigned: a negative one would arrive as an enormous one.
  static void check_positive(const char* verb, i64 bytes);
  bool unmap_at_once(Address at, i64 page_bytes, i64 count);
  cuda::EventPtr take_event();
  void check_not_captured(const char* verb, Stream stream) const;
  void release_everything();

  const cuda::Device device_;
  const cuda::Api& api_;

  mutable ForkMutex mutex_{
      "the CUDA driver"};  // the record below; held during the driver's calls, which it serialises anyway
  cuda::StreamPtr side_ = nullptr;
  std::atomic<i64> created_bytes_{0};
  std::map<Address, i64> reservations_;
  std::unordered_map<PageHandle, Page> pages_;
  std::map<Address, Mapping> mappings_;
  std::atomic<bool> unmaps_runs_{true};  // until the driver has refused it

  // Never held during a call: polling an event must not wait for a slow set_access.
  mutable ForkMutex event_mutex_{"the CUDA driver"};
  DriverCounters counters_;
  std::vector<cuda::EventPtr> events_;       // all that were created, null where that failed
  std::vector<cuda::EventPtr> idle_events_;  // those that forget() gave back
};

}  // namespace kvmem
