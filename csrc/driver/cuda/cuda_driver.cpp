// The CUDA driver: the verbs of driver.h over libcuda's virtual memory management, one driver call a verb.
//
// What the driver leaves undefined is refused here before it is called: a handle that does not exist, a page destroyed
// while mapped, a reservation freed while pages are mapped in it, a handle mapped in part, access to what is not all
// mapped. The rest is the driver's to refuse, and every return code is looked at.

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <unordered_map>

#include "driver/cuda/cuda_device.h"
#include "driver/driver.h"

namespace kvmem {
namespace {

using cuda::Result;

[[noreturn]] void refuse(const char* verb, const std::string& why) {
  throw DeviceError(std::string("the CUDA driver: ") + verb + ": " + why, verb, cuda::kInvalidValue);
}

cuda::StreamPtr cu(Stream stream) { return reinterpret_cast<cuda::StreamPtr>(stream); }
cuda::EventPtr cu_event(Event event) { return reinterpret_cast<cuda::EventPtr>(event); }

// The driver's sizes are unsigned: a negative one would arrive as an enormous one.
void check_positive(const char* verb, i64 bytes) {
  if (bytes <= 0) refuse(verb, std::to_string(bytes) + " bytes is not a positive size");
}

// An entry for the books, made before the driver is asked: what it has given must not be lost because there is no
// memory to note it.
template <class Map>
typename Map::node_type new_entry(typename Map::mapped_type value) {
  Map one;
  return one.extract(one.emplace(0, value).first);
}

template <class Map>
void enter(Map& map, typename Map::node_type entry, typename Map::key_type key) {
  entry.key() = key;
  map.insert(std::move(entry));
}

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
  void count(i64 DriverCounters::* counter) {  // for what is not serialised by our books
    std::lock_guard<ForkMutex> lock(event_mutex_);
    ++(counters_.*counter);
    device_.check_fork();
  }
  bool unmap_at_once(Address at, i64 page_bytes, i64 count);
  cuda::EventPtr take_event();
  void check_not_captured(const char* verb, Stream stream) const;
  void give_everything_back();

  const cuda::Device device_;
  const cuda::Api& api_;

  mutable ForkMutex mutex_{
      "the CUDA driver"};  // the books below; held during the driver's calls, which it serialises anyway
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

// ---- Closing -------------------------------------------------------------------------------------------------------

CudaDriver::~CudaDriver() {
  if (device_.forked()) return;  // the parent's context; the child has none
  give_everything_back();
}

// Errors have nowhere to go from here. At process exit the driver may answer that it, or the context, is gone already.
void CudaDriver::give_everything_back() {
  const Result pushed = api_.cuCtxPushCurrent(device_.context());
  if (pushed == cuda::kDeinitialized || pushed == cuda::kContextIsDestroyed) return;
  int mode = cuda::kCaptureRelaxed;  // Python's collector may end a driver while somebody captures
  const Result relaxed = api_.cuThreadExchangeStreamCaptureMode(&mode);
  if (!mappings_.empty()) api_.cuCtxSynchronize();  // unmapping under a running kernel is a fault
  for (const auto& [at, mapping] : mappings_) api_.cuMemUnmap(at, mapping.bytes);
  for (const auto& [page, info] : pages_) api_.cuMemRelease(page);
  for (const auto& [base, bytes] : reservations_) api_.cuMemAddressFree(base, bytes);
  for (cuda::EventPtr event : events_) {
    if (event) api_.cuEventDestroy(event);
  }
  if (side_) api_.cuStreamDestroy(side_);
  if (relaxed == cuda::kSuccess) api_.cuThreadExchangeStreamCaptureMode(&mode);
  cuda::ContextPtr ours = nullptr;
  if (pushed == cuda::kSuccess) api_.cuCtxPopCurrent(&ours);
}

// ---- Address space and pages ---------------------------------------------------------------------------------------

DriverCounters CudaDriver::counters() const {
  std::scoped_lock lock(mutex_, event_mutex_);
  return counters_;
}

i64 CudaDriver::available_bytes() const {
  device_.check_fork();
  size_t free = 0, total = 0;
  device_.check(device_.in_context([&] { return api_.cuMemGetInfo(&free, &total); }), "cuMemGetInfo");
  return static_cast<i64>(free);
}

Address CudaDriver::reserve(i64 bytes, i64 alignment) {
  const auto lock = begin(&DriverCounters::reserve);
  check_positive("reserve", bytes);
  if (alignment < 0) refuse("reserve", "the alignment is negative");
  // 0 is "a default alignment" to the driver, and no page promises that it is one at which it maps.
  alignment = std::max(alignment, info().granularity_bytes);
  auto entry = new_entry<decltype(reservations_)>(bytes);
  cuda::DevicePtr at = 0;
  const auto call = [&] { return api_.cuMemAddressReserve(&at, bytes, alignment, 0, 0); };
  device_.check(device_.relaxed(call), "cuMemAddressReserve", [&] {
    return "reserving " + std::to_string(bytes) + " bytes aligned to " + std::to_string(alignment);
  });
  enter(reservations_, std::move(entry), at);
  return at;
}

void CudaDriver::release(Address base, i64 bytes) {
  const auto lock = begin(&DriverCounters::release);
  auto it = reservations_.find(base);
  if (it == reservations_.end() || it->second != bytes)
    refuse("release", range_text(base, bytes) + " is not what reserve returned");
  const auto mapping = mappings_.lower_bound(base);
  if (mapping != mappings_.end() && mapping->first < base + bytes)
    refuse("release", range_text(base, bytes) + " still has pages mapped in it");
  device_.check(device_.relaxed([&] { return api_.cuMemAddressFree(base, bytes); }), "cuMemAddressFree",
                [&] { return range_text(base, bytes); });
  reservations_.erase(it);
}

PageHandle CudaDriver::create(i64 bytes) {
  const auto lock = begin(&DriverCounters::create);
  check_positive("create", bytes);
  const cuda::AllocationProp prop = device_.prop();
  auto entry = new_entry<decltype(pages_)>({bytes, 0});
  pages_.reserve(pages_.size() + 1);
  cuda::AllocationHandle page = 0;
  device_.check(device_.relaxed([&] { return api_.cuMemCreate(&page, bytes, &prop, 0); }), "cuMemCreate", [&] {
    return "creating a page of " + std::to_string(bytes) + " bytes; this driver holds " +
           std::to_string(created_bytes_) + " of the device's " + std::to_string(info().total_bytes) + " bytes";
  });
  if (page == 0) refuse("create", "cuMemCreate returned handle 0");
  enter(pages_, std::move(entry), page);
  created_bytes_ += bytes;
  return page;
}

void CudaDriver::destroy(PageHandle page) {
  const auto lock = begin(&DriverCounters::destroy);
  auto it = pages_.find(page);
  if (it == pages_.end()) refuse("destroy", "there is no page " + std::to_string(page));
  if (it->second.mappings) refuse("destroy", "page " + std::to_string(page) + " is still mapped");
  device_.check(device_.relaxed([&] { return api_.cuMemRelease(page); }), "cuMemRelease",
                [&] { return "page " + std::to_string(page); });
  created_bytes_ -= it->second.bytes;
  pages_.erase(it);
}

// ---- Mappings ------------------------------------------------------------------------------------------------------

void CudaDriver::map(Address at, i64 bytes, i64 offset, PageHandle page) {
  const auto lock = begin(&DriverCounters::map);
  auto it = pages_.find(page);
  if (it == pages_.end()) refuse("map", "there is no page " + std::to_string(page));
  if (it->second.bytes != bytes)
    refuse("map", "page " + std::to_string(page) + " has " + std::to_string(it->second.bytes) +
                      " bytes and is mapped whole, not " + std::to_string(bytes));
  auto entry = new_entry<decltype(mappings_)>({bytes, page, false});
  device_.check(device_.relaxed([&] { return api_.cuMemMap(at, bytes, offset, page, 0); }), "cuMemMap",
                [&] { return "page " + std::to_string(page) + " at " + range_text(at, bytes); });
  enter(mappings_, std::move(entry), at);
  ++it->second.mappings;
}

void CudaDriver::set_access(Address at, i64 bytes) {
  const auto lock = begin(&DriverCounters::set_access);
  check_positive("set_access", bytes);
  const auto first = mappings_.find(at);
  auto end = first;
  for (Address next = at; next < at + bytes; ++end) {
    if (end == mappings_.end() || end->first != next || next + end->second.bytes > at + bytes)
      refuse("set_access", range_text(at, bytes) + " is not made of whole mappings, back to back");
    next += end->second.bytes;
  }
  const cuda::AccessDesc access = device_.access();
  device_.check(device_.relaxed([&] { return api_.cuMemSetAccess(at, bytes, &access, 1); }), "cuMemSetAccess",
                [&] { return range_text(at, bytes); });
  for (auto it = first; it != end; ++it) it->second.accessible = true;
}

void CudaDriver::unmap(Address at, i64 bytes) {
  const auto lock = begin(&DriverCounters::unmap);
  auto it = mappings_.find(at);
  if (it == mappings_.end() || it->second.bytes != bytes)
    refuse("unmap", range_text(at, bytes) + " is not exactly one mapping");
  device_.check(device_.relaxed([&] { return api_.cuMemUnmap(at, bytes); }), "cuMemUnmap",
                [&] { return range_text(at, bytes); });
  --pages_.find(it->second.page)->second.mappings;
  mappings_.erase(it);
}

void CudaDriver::unmap_run(Address at, i64 page_bytes, i64 count) {
  if (count == 1 || !unmaps_runs_ || !unmap_at_once(at, page_bytes, count)) Driver::unmap_run(at, page_bytes, count);
}

// False, and nothing has changed, where the driver refuses several mappings in one call.
bool CudaDriver::unmap_at_once(Address at, i64 page_bytes, i64 count) {
  const auto lock = begin(&DriverCounters::unmap);
  const i64 bytes = count * page_bytes;
  const auto first = mappings_.find(at);
  auto end = first;
  for (i64 i = 0; i < count; ++i, ++end) {
    if (end == mappings_.end() || end->first != at + i * page_bytes || end->second.bytes != page_bytes)
      refuse("unmap", range_text(at, bytes) + " is not made of mappings of " + std::to_string(page_bytes) + " bytes");
  }
  const Result code = device_.relaxed([&] { return api_.cuMemUnmap(at, bytes); });
  if (code == cuda::kInvalidValue) return unmaps_runs_ = false;
  device_.check(code, "cuMemUnmap", [&] { return range_text(at, bytes); });
  for (auto it = first; it != end; ++it) --pages_.find(it->second.page)->second.mappings;
  mappings_.erase(first, end);
  return true;
}

Driver::Mapped CudaDriver::mapped_at(Address at) const {
  std::lock_guard<ForkMutex> lock(mutex_);
  auto it = mappings_.find(at);
  if (it == mappings_.end()) return {};
  return {it->second.page, it->second.accessible};
}

// ---- Streams -------------------------------------------------------------------------------------------------------

// The driver may crash over a handle that is no stream at all. 0 is whatever context is current, here ours.
void CudaDriver::check_stream(Stream stream) const {
  device_.check_fork();
  if (stream == cuda::kPerThreadStream) {
    throw SpecError(
        "stream 2 means another stream in each thread, so no fence could be recorded on it; give a stream of its own");
  }
  cuda::ContextPtr context = nullptr;
  const auto ask = [&] { return api_.cuStreamGetCtx(cu(stream), &context); };
  device_.check(device_.in_context(ask), "cuStreamGetCtx", [&] { return "stream " + std::to_string(stream); });
  if (context == device_.context()) return;
  cuda::DeviceId owner = -1;
  if (api_.cuCtxPushCurrent(context) == cuda::kSuccess) {
    api_.cuCtxGetDevice(&owner);
    api_.cuCtxPopCurrent(&context);
  }
  const std::string mine = "cuda:" + std::to_string(info().device_index);
  throw DeviceError("stream " + std::to_string(stream) + " belongs to " +
                        (owner == device_.id() ? "another context of " + mine
                                               : "device " + std::to_string(owner) + ", not to " + mine) +
                        " (cuStreamGetCtx); give a stream of the primary context of " + mine,
                    "cuStreamGetCtx", cuda::kInvalidContext);
}

Stream CudaDriver::side_stream() {
  std::lock_guard<ForkMutex> lock(mutex_);
  device_.check_fork();
  const auto create = [&] { return api_.cuStreamCreate(&side_, cuda::kStreamNonBlocking); };
  if (!side_) device_.check(device_.in_context(create), "cuStreamCreate");
  return reinterpret_cast<Stream>(side_);
}

void CudaDriver::order(Event event, Stream later) {
  if (event == 0) return;
  device_.check_fork();
  check_not_captured("order", later);
  const auto wait = [&] { return api_.cuStreamWaitEvent(cu(later), cu_event(event), 0); };
  device_.check(device_.in_context(wait), "cuStreamWaitEvent", [&] { return "stream " + std::to_string(later); });
}

void CudaDriver::wait_for_device() {
  device_.check_fork();
  device_.check(device_.in_context([&] { return api_.cuCtxSynchronize(); }), "cuCtxSynchronize");
}

// What is put on a stream that is being captured happens at each replay and not now: zeroing a live cache again. The
// default stream cannot be used at all while one that waits for it is captured; the driver says so by an error.
void CudaDriver::check_not_captured(const char* verb, Stream stream) const {
  int status = 0;
  const auto ask = [&] { return api_.cuStreamIsCapturing(cu(stream), &status); };
  const Result code = device_.in_context(ask);
  if (code != cuda::kCaptureImplicit) {
    device_.check(code, "cuStreamIsCapturing", [&] { return "stream " + std::to_string(stream); });
    if (status == 0) return;
  }
  throw DeviceError(std::string("the CUDA driver: ") + verb + ": stream " + std::to_string(stream) +
                        " is being captured into a graph" +
                        (code == cuda::kCaptureImplicit ? ", by way of one that waits for it" : "") +
                        ". Grow, fork and free sequences before the capture, or " + "between replays",
                    "cuStreamIsCapturing", cuda::kCaptureUnsupported);
}

// ---- Contents and fences -------------------------------------------------------------------------------------------

void CudaDriver::zero(Address at, i64 bytes, Stream stream) {
  count(&DriverCounters::zero);
  if (bytes == 0) return;
  check_positive("zero", bytes);
  check_not_captured("zero", stream);
  device_.check(device_.in_context([&] { return api_.cuMemsetD8Async(at, 0, bytes, cu(stream)); }), "cuMemsetD8Async",
                [&] { return range_text(at, bytes); });
}

void CudaDriver::copy(Address to, Address from, i64 bytes, Stream stream) {
  count(&DriverCounters::copy);
  if (bytes == 0) return;
  check_positive("copy", bytes);
  check_not_captured("copy", stream);
  device_.check(device_.in_context([&] { return api_.cuMemcpyDtoDAsync(to, from, bytes, cu(stream)); }),
                "cuMemcpyDtoDAsync", [&] { return range_text(from, bytes) + " to " + range_text(to, bytes); });
}

cuda::EventPtr CudaDriver::take_event() {
  std::size_t place = 0;
  {
    std::lock_guard<ForkMutex> lock(event_mutex_);
    if (!idle_events_.empty()) {
      const cuda::EventPtr event = idle_events_.back();
      idle_events_.pop_back();
      return event;
    }
    place = events_.size();
    events_.push_back(nullptr);
    try {
      idle_events_.reserve(events_.capacity());  // so that forget() needs no memory
    } catch (...) {
      events_.pop_back();
      throw;
    }
  }
  cuda::EventPtr event = nullptr;
  const auto create = [&] {
    const Result code = api_.cuEventCreate(&event, cuda::kEventDisableTiming);
    if (code == cuda::kSuccess) {  // noted here: what follows may fail
      std::lock_guard<ForkMutex> lock(event_mutex_);
      events_[place] = event;
    }
    return code;
  };
  device_.check(device_.in_context(create), "cuEventCreate");  // a place that stays empty does no harm
  return event;
}

Event CudaDriver::record(Stream stream) {
  count(&DriverCounters::record);
  check_not_captured("record", stream);
  const cuda::EventPtr event = take_event();
  try {
    device_.check(device_.in_context([&] { return api_.cuEventRecord(event, cu(stream)); }), "cuEventRecord",
                  [&] { return "on stream " + std::to_string(stream); });
  } catch (...) {
    forget(reinterpret_cast<Event>(event));
    throw;
  }
  return reinterpret_cast<Event>(event);
}

bool CudaDriver::done(Event event) {
  if (event == 0) return true;
  device_.check_fork();
  const Result code = device_.in_context([&] { return api_.cuEventQuery(cu_event(event)); });
  if (code == cuda::kNotReady) return false;
  device_.check(code, "cuEventQuery");
  return true;
}

void CudaDriver::wait(Event event) {
  count(&DriverCounters::wait);
  if (event == 0) return;
  device_.check(device_.in_context([&] { return api_.cuEventSynchronize(cu_event(event)); }), "cuEventSynchronize");
}

// Kept for the next record: an event that is recorded again forgets what it stood for.
void CudaDriver::forget(Event event) {
  if (event == 0) return;
  std::lock_guard<ForkMutex> lock(event_mutex_);
  idle_events_.push_back(cu_event(event));
}

}  // namespace

std::shared_ptr<Driver> make_cuda_driver(int device_index, const std::string& library, PageOptions pages) {
  return std::make_shared<CudaDriver>(device_index, library, pages);
}

}  // namespace kvmem
