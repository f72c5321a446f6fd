// The CUDA driver: the interface of driver.h on libcuda's virtual memory management, with one call of libcuda for each
// function.
//
// Misuse that libcuda leaves undefined is refused before the call: a handle that does not exist or is mapped in part, a
// page destroyed while mapped, a reservation freed while pages are mapped in it, access to a range that is not wholly
// mapped. Other misuse libcuda reports; every result is checked.
//
// Thread safety: mutex_ guards the record of reservations, pages and mappings, and is held during the calls that change
// it, which libcuda serialises anyway. event_mutex_ guards counters and events, and is never held during a call: the
// query of an event must not wait for a slow cuMemSetAccess.
#pragma once

#include <atomic>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
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
  // Makes one call for the run. Drivers accept this, although cuMemUnmap is documented for the range of one cuMemMap
  // only; once a driver has refused it, each page gets a call of its own.
  void unmap_run(Address at, i64 page_bytes, i64 count) override;

  void zero(Address at, i64 bytes, Stream stream) override;
  void copy(Address to, Address from, i64 bytes, Stream stream) override;
  void load(Address to, const char* from, i64 bytes, Stream stream) override;
  void store(char* to, Address from, i64 bytes, Stream stream) override;
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
  using Mappings = std::map<Address, Mapping>;
  using MappingRange = std::pair<Mappings::iterator, Mappings::iterator>;
  // Counts a call; begin() returns the lock of the record too.
  std::unique_lock<ForkMutex> begin(i64 DriverCounters::* counter) {
    std::unique_lock<ForkMutex> lock(mutex_);
    ++(counters_.*counter);
    return lock;
  }
  void count(i64 DriverCounters::* counter) {
    std::lock_guard<ForkMutex> lock(event_mutex_);
    ++(counters_.*counter);
  }
  [[noreturn]] static void refuse(const char* verb, const std::string& why);
  // libcuda's sizes are unsigned, so a negative one would arrive as a huge one.
  static void check_positive(const char* verb, i64 bytes);
  MappingRange whole_mappings(const char* verb, Address at, i64 bytes, i64 page_bytes);
  bool unmap_at_once(Address at, i64 page_bytes, i64 count);
  cuda::EventPtr take_event();
  void check_not_captured(const char* verb, Stream stream) const;

  const cuda::Device device_;
  const cuda::Api& api_;

  mutable ForkMutex mutex_{"the CUDA driver"};
  cuda::StreamPtr side_ = nullptr;  // side_stream(); null before its first call
  std::atomic<i64> created_bytes_{0};
  std::map<Address, i64> reservations_;
  std::unordered_map<PageHandle, Page> pages_;
  Mappings mappings_;
  std::atomic<bool> unmaps_runs_{true};  // false once libcuda has refused to unmap a run

  mutable ForkMutex event_mutex_{"the CUDA driver"};
  DriverCounters counters_;
  std::vector<cuda::EventPtr> events_;       // all that were created; null where that failed
  std::vector<cuda::EventPtr> idle_events_;  // those that forget() has released
};

}  // namespace kvmem
