// The CUDA driver: the verbs of driver.h over libcuda's virtual memory management, one driver call a verb.
//
// What the driver leaves undefined is refused here before it is called: a handle that does not exist, a page destroyed
// while mapped, a reservation freed while pages are mapped in it, a handle mapped in part. The rest is the driver's to
// refuse, and every return code is looked at.

#include <atomic>
#include <map>
#include <mutex>
#include <unordered_map>

#include "cuda_api.h"
#include "driver.h"
#include "fork_guard.h"

namespace kvmem {
namespace {

using cuda::Result;

std::string range(Address at, i64 bytes) {
  char text[64];
  std::snprintf(text, sizeof text, "[0x%zx, +%lld)", static_cast<size_t>(at), static_cast<long long>(bytes));
  return text;
}

[[noreturn]] void refuse(const char* verb, const std::string& why) {
  throw DeviceError(std::string("the CUDA driver: ") + verb + ": " + why, verb, cuda::kInvalidValue);
}

class CudaDriver final : public Driver {
 public:
  CudaDriver(int device_index, const std::string& library);
  ~CudaDriver() override;

  const DriverInfo& info() const override { return info_; }
  DriverCounters counters() const override;
  i64 physical_bytes() const override { return created_bytes_; }
  i64 available_bytes() const override;

  Address reserve(i64 bytes, i64 alignment) override;
  void release(Address base, i64 bytes) override;
  PageHandle create(i64 bytes) override;
  void destroy(PageHandle page) override;
  void map(Address at, i64 bytes, i64 offset, PageHandle page) override;
  void set_access(Address at, i64 bytes) override;
  // map_run and unmap_run are the base class's, one call a page. cuMemUnmap over several adjacent mappings at once is
  // seen to work on some drivers, but its documentation promises it only for the range of one cuMemMap.
  void unmap(Address at, i64 bytes) override;

  void zero(Address at, i64 bytes, Stream stream) override;
  void copy(Address to, Address from, i64 bytes, Stream stream) override;
  Event record(Stream stream) override;
  bool done(Event event) override;
  void wait(Event event) override;
  void forget(Event event) override;

 protected:
  Mapped mapped_at(Address at) const override;

 private:
  static constexpr const char* kName = "the CUDA driver";
  struct Page {
    i64 bytes;
    i64 mappings;
  };
  struct Mapping {
    i64 bytes;
    PageHandle page;
    bool accessible;
  };
  // Makes our context current for one scope: streams, events and memset need one, and the caller's must be left as it
  // was.
  class Current {
   public:
    explicit Current(const CudaDriver& driver) : driver_(driver) {
      driver.check(driver.api_.cuCtxPushCurrent(driver.context_), "cuCtxPushCurrent");
    }
    ~Current() {
      cuda::ContextPtr ours = nullptr;
      driver_.api_.cuCtxPopCurrent(&ours);  // can fail only where the push did
    }

   private:
    const CudaDriver& driver_;
  };

  void check(Result code, const char* call, const std::string& what = "") const {
    if (code != cuda::kSuccess) failed(code, call, what);
  }
  [[noreturn]] void failed(Result code, const char* call, const std::string& what) const;
  void open_device(int index);
  void read_info(int index);
  cuda::AllocationProp prop() const;
  void count(i64 DriverCounters::* counter) {
    std::lock_guard<std::mutex> lock(event_mutex_);
    ++(counters_.*counter);
  }
  void give_everything_back();

  const ForkGuard fork_;
  const cuda::Api api_;
  DriverInfo info_;
  cuda::DeviceId device_ = 0;
  cuda::ContextPtr context_ = nullptr;

  mutable std::mutex mutex_;  // the books below; held during the driver's calls, which it serialises anyway
  std::atomic<i64> created_bytes_{0};
  std::map<Address, i64> reservations_;
  std::unordered_map<PageHandle, Page> pages_;
  std::map<Address, Mapping> mappings_;

  mutable std::mutex event_mutex_;  // never held during a call: polling an event must not wait for a slow set_access
  DriverCounters counters_;
  std::vector<cuda::EventPtr> idle_events_;
};

// ---- Opening -------------------------------------------------------------------------------------------------------

CudaDriver::CudaDriver(int device_index, const std::string& library) : api_(cuda::load_api(library)) {
  open_device(device_index);
  check(api_.cuDevicePrimaryCtxRetain(&context_, device_), "cuDevicePrimaryCtxRetain");
  try {
    read_info(device_index);
  } catch (const Error&) {
    api_.cuDevicePrimaryCtxRelease(device_);
    throw;
  }
}

void CudaDriver::open_device(int index) {
  const Result code = api_.cuInit(0);
  if (code == cuda::kNoDevice) {
    throw DeviceError("no CUDA device: cuInit says " + api_.describe(code) + " (is CUDA_VISIBLE_DEVICES empty?)",
                      "cuInit", code);
  }
  check(code, "cuInit");
  int devices = 0;
  check(api_.cuDeviceGetCount(&devices), "cuDeviceGetCount");
  if (index < 0 || index >= devices) {
    throw DeviceError("cuda:" + std::to_string(index) + " does not exist: there are " + std::to_string(devices) +
                          " CUDA devices, counted from 0",
                      "cuDeviceGetCount");
  }
  check(api_.cuDeviceGet(&device_, index), "cuDeviceGet");
  int supported = 0;
  check(api_.cuDeviceGetAttribute(&supported, cuda::kAttributeVmmSupported, device_), "cuDeviceGetAttribute");
  if (!supported) {
    throw DeviceError(
        "cuda:" + std::to_string(index) +
            " has no virtual memory management (some virtualised GPUs and WSL2 lack it); kvmem cannot use it",
        "cuDeviceGetAttribute");
  }
}

void CudaDriver::read_info(int index) {
  const cuda::AllocationProp prop = this->prop();
  size_t minimum = 0, recommended = 0, total = 0;
  check(api_.cuMemGetAllocationGranularity(&minimum, &prop, cuda::kGranularityMinimum),
        "cuMemGetAllocationGranularity");
  check(api_.cuMemGetAllocationGranularity(&recommended, &prop, cuda::kGranularityRecommended),
        "cuMemGetAllocationGranularity");
  check(api_.cuDeviceTotalMem(&total, device_), "cuDeviceTotalMem");
  info_.name = "cuda";
  info_.dlpack_device_type = 2;
  info_.device_index = index;
  info_.granularity_bytes = static_cast<i64>(minimum);
  info_.recommended_bytes = static_cast<i64>(recommended);
  info_.total_bytes = static_cast<i64>(total);
  info_.fresh_pages_are_zero = false;  // usually true, documented nowhere
}

// Exactly the memory that create() makes: granularity depends on it.
cuda::AllocationProp CudaDriver::prop() const {
  cuda::AllocationProp prop{};
  prop.type = cuda::kAllocationTypePinned;
  prop.location = {cuda::kLocationDevice, device_};
  return prop;
}

void CudaDriver::failed(Result code, const char* call, const std::string& what) const {
  const std::string message = std::string(call) + " failed: " + api_.describe(code) + (what.empty() ? "" : ", " + what);
  if (code == cuda::kOutOfMemory) {
    throw OutOfMemory(message + ". This driver holds " + std::to_string(created_bytes_) + " of the device's " +
                      std::to_string(info_.total_bytes) + " bytes; other processes and torch's own cache hold theirs");
  }
  throw DeviceError(message, call, code);
}

// ---- Closing -------------------------------------------------------------------------------------------------------

CudaDriver::~CudaDriver() {
  if (fork_.forked()) return;  // the parent's context; the child has none
  give_everything_back();
}

// Errors have nowhere to go from here, and at process exit the driver answers CUDA_ERROR_DEINITIALIZED or
// CUDA_ERROR_CONTEXT_IS_DESTROYED to everything: then all of it is gone already.
void CudaDriver::give_everything_back() {
  const Result pushed = api_.cuCtxPushCurrent(context_);
  if (pushed == cuda::kDeinitialized || pushed == cuda::kContextIsDestroyed) return;
  if (!mappings_.empty()) api_.cuCtxSynchronize();  // unmapping under a running kernel is a fault
  for (const auto& [at, mapping] : mappings_) api_.cuMemUnmap(at, mapping.bytes);
  for (const auto& [page, info] : pages_) api_.cuMemRelease(page);
  for (const auto& [base, bytes] : reservations_) api_.cuMemAddressFree(base, bytes);
  for (cuda::EventPtr event : idle_events_) api_.cuEventDestroy(event);
  cuda::ContextPtr ours = nullptr;
  if (pushed == cuda::kSuccess) api_.cuCtxPopCurrent(&ours);
  api_.cuDevicePrimaryCtxRelease(device_);
}

// ---- Address space and pages ---------------------------------------------------------------------------------------

DriverCounters CudaDriver::counters() const {
  std::scoped_lock lock(mutex_, event_mutex_);
  return counters_;
}

i64 CudaDriver::available_bytes() const {
  fork_.check(kName);
  Current current(*this);
  size_t free = 0, total = 0;
  check(api_.cuMemGetInfo(&free, &total), "cuMemGetInfo");
  return static_cast<i64>(free);
}

Address CudaDriver::reserve(i64 bytes, i64 alignment) {
  std::lock_guard<std::mutex> lock(mutex_);
  ++counters_.reserve;
  fork_.check(kName);
  cuda::DevicePtr at = 0;
  check(api_.cuMemAddressReserve(&at, bytes, alignment, 0, 0), "cuMemAddressReserve",
        "reserving " + std::to_string(bytes) + " bytes aligned to " + std::to_string(alignment));
  reservations_[at] = bytes;
  return at;
}

void CudaDriver::release(Address base, i64 bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  ++counters_.release;
  fork_.check(kName);
  auto it = reservations_.find(base);
  if (it == reservations_.end() || it->second != bytes)
    refuse("release", range(base, bytes) + " is not what reserve returned");
  auto mapping = mappings_.lower_bound(base);
  if (mapping != mappings_.end() && mapping->first < base + bytes) {
    refuse("release", range(base, bytes) + " still has pages mapped in it");
  }
  check(api_.cuMemAddressFree(base, bytes), "cuMemAddressFree", range(base, bytes));
  reservations_.erase(it);
}

PageHandle CudaDriver::create(i64 bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  ++counters_.create;
  fork_.check(kName);
  const cuda::AllocationProp prop = this->prop();
  cuda::AllocationHandle page = 0;
  check(api_.cuMemCreate(&page, bytes, &prop, 0), "cuMemCreate",
        "creating a page of " + std::to_string(bytes) + " bytes");
  if (page == 0) refuse("create", "cuMemCreate returned handle 0");
  pages_[page] = {bytes, 0};
  created_bytes_ += bytes;
  return page;
}

void CudaDriver::destroy(PageHandle page) {
  std::lock_guard<std::mutex> lock(mutex_);
  ++counters_.destroy;
  fork_.check(kName);
  auto it = pages_.find(page);
  if (it == pages_.end()) refuse("destroy", "there is no page " + std::to_string(page));
  if (it->second.mappings) refuse("destroy", "page " + std::to_string(page) + " is still mapped");
  check(api_.cuMemRelease(page), "cuMemRelease", "page " + std::to_string(page));
  created_bytes_ -= it->second.bytes;
  pages_.erase(it);
}

// ---- Mappings ------------------------------------------------------------------------------------------------------

void CudaDriver::map(Address at, i64 bytes, i64 offset, PageHandle page) {
  std::lock_guard<std::mutex> lock(mutex_);
  ++counters_.map;
  fork_.check(kName);
  auto it = pages_.find(page);
  if (it == pages_.end()) refuse("map", "there is no page " + std::to_string(page));
  if (it->second.bytes != bytes) {
    refuse("map", "page " + std::to_string(page) + " has " + std::to_string(it->second.bytes) +
                      " bytes and is mapped whole, not " + std::to_string(bytes));
  }
  check(api_.cuMemMap(at, bytes, offset, page, 0), "cuMemMap",
        "page " + std::to_string(page) + " at " + range(at, bytes));
  mappings_[at] = {bytes, page, false};
  ++it->second.mappings;
}

void CudaDriver::set_access(Address at, i64 bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  ++counters_.set_access;
  fork_.check(kName);
  const cuda::AccessDesc access{{cuda::kLocationDevice, device_}, cuda::kAccessReadWrite};
  check(api_.cuMemSetAccess(at, bytes, &access, 1), "cuMemSetAccess", range(at, bytes));
  for (auto it = mappings_.lower_bound(at); it != mappings_.end() && it->first < at + bytes; ++it)
    it->second.accessible = true;
}

void CudaDriver::unmap(Address at, i64 bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  ++counters_.unmap;
  fork_.check(kName);
  auto it = mappings_.find(at);
  if (it == mappings_.end() || it->second.bytes != bytes)
    refuse("unmap", range(at, bytes) + " is not exactly one mapping");
  check(api_.cuMemUnmap(at, bytes), "cuMemUnmap", range(at, bytes));
  --pages_.find(it->second.page)->second.mappings;
  mappings_.erase(it);
}

Driver::Mapped CudaDriver::mapped_at(Address at) const {
  std::lock_guard<std::mutex> lock(mutex_);
  auto it = mappings_.find(at);
  if (it == mappings_.end()) return {};
  return {it->second.page, it->second.accessible};
}

// ---- Contents and fences -------------------------------------------------------------------------------------------

void CudaDriver::zero(Address at, i64 bytes, Stream stream) {
  count(&DriverCounters::zero);
  fork_.check(kName);
  if (bytes == 0) return;
  Current current(*this);
  check(api_.cuMemsetD8Async(at, 0, bytes, reinterpret_cast<cuda::StreamPtr>(stream)), "cuMemsetD8Async",
        range(at, bytes));
}

void CudaDriver::copy(Address to, Address from, i64 bytes, Stream stream) {
  count(&DriverCounters::copy);
  fork_.check(kName);
  if (bytes == 0) return;
  Current current(*this);
  check(api_.cuMemcpyDtoDAsync(to, from, bytes, reinterpret_cast<cuda::StreamPtr>(stream)), "cuMemcpyDtoDAsync",
        range(from, bytes) + " to " + range(to, bytes));
}

Event CudaDriver::record(Stream stream) {
  count(&DriverCounters::record);
  fork_.check(kName);
  Current current(*this);
  cuda::EventPtr event = nullptr;
  {
    std::lock_guard<std::mutex> lock(event_mutex_);
    if (!idle_events_.empty()) {
      event = idle_events_.back();
      idle_events_.pop_back();
    }
  }
  if (!event) check(api_.cuEventCreate(&event, cuda::kEventDisableTiming), "cuEventCreate");
  const Result code = api_.cuEventRecord(event, reinterpret_cast<cuda::StreamPtr>(stream));
  if (code != cuda::kSuccess) {
    forget(reinterpret_cast<Event>(event));
    failed(code, "cuEventRecord", "on stream " + std::to_string(stream));
  }
  return reinterpret_cast<Event>(event);
}

bool CudaDriver::done(Event event) {
  if (event == 0) return true;
  fork_.check(kName);
  Current current(*this);
  const Result code = api_.cuEventQuery(reinterpret_cast<cuda::EventPtr>(event));
  if (code == cuda::kNotReady) return false;
  check(code, "cuEventQuery");
  return true;
}

void CudaDriver::wait(Event event) {
  count(&DriverCounters::wait);
  if (event == 0) return;
  fork_.check(kName);
  Current current(*this);
  check(api_.cuEventSynchronize(reinterpret_cast<cuda::EventPtr>(event)), "cuEventSynchronize");
}

// Kept for the next record: an event that is recorded again forgets what it stood for.
void CudaDriver::forget(Event event) {
  if (event == 0) return;
  std::lock_guard<std::mutex> lock(event_mutex_);
  idle_events_.push_back(reinterpret_cast<cuda::EventPtr>(event));
}

}  // namespace

std::shared_ptr<Driver> make_cuda_driver(int device_index, const std::string& library) {
  return std::make_shared<CudaDriver>(device_index, library);
}

}  // namespace kvmem
