// The CUDA driver: address space, pages, mappings and the destructor.

#include "driver/cuda/cuda_driver.h"

#include <algorithm>

#include "base/check.h"

namespace kvmem {

using cuda::Result;

namespace {

// Returns an entry of the record, allocated before the call of libcuda, so that its result can always be recorded.
template <class Map>
typename Map::node_type new_entry(typename Map::mapped_type value) {
  Map one;
  return one.extract(one.emplace(0, value).first);
}

template <class Map>
void insert(Map& map, typename Map::node_type entry, typename Map::key_type key) {
  entry.key() = key;
  [[maybe_unused]] const bool inserted = map.insert(std::move(entry)).inserted;
  KVMEM_ASSERT(inserted, "libcuda returned an address or handle that was not in use");
}

}  // namespace

void CudaDriver::refuse(const char* verb, const std::string& why) {
  throw DeviceError(std::string("the CUDA driver: ") + verb + ": " + why, verb, cuda::kInvalidValue);
}

void CudaDriver::check_positive(const char* verb, i64 bytes) {
  if (bytes <= 0) refuse(verb, std::to_string(bytes) + " bytes is not a positive size");
}

// ---- Destruction ---------------------------------------------------------------------------------------------------

// Ignores errors. At process exit libcuda may report that it, or the context, does not exist any more.
CudaDriver::~CudaDriver() {
  if (device_.forked()) return;  // the context is the parent's
  const Result pushed = api_.cuCtxPushCurrent(device_.context());
  if (pushed == cuda::kDeinitialized || pushed == cuda::kContextIsDestroyed) return;
  int mode = cuda::kCaptureRelaxed;  // Python's garbage collector may run this while a thread captures a graph
  const Result relaxed = api_.cuThreadExchangeStreamCaptureMode(&mode);
  if (!mappings_.empty()) api_.cuCtxSynchronize();  // a running kernel would fault on unmapped memory
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
  // libcuda's default alignment (0) is not documented to suffice for cuMemMap.
  alignment = std::max(alignment, info().granularity_bytes);
  auto entry = new_entry<decltype(reservations_)>(bytes);
  cuda::DevicePtr at = 0;
  const auto call = [&] { return api_.cuMemAddressReserve(&at, bytes, alignment, 0, 0); };
  device_.check(device_.relaxed(call), "cuMemAddressReserve", [&] {
    return "reserving " + std::to_string(bytes) + " bytes aligned to " + std::to_string(alignment);
  });
  insert(reservations_, std::move(entry), at);
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
  insert(pages_, std::move(entry), page);
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
  KVMEM_ASSERT(created_bytes_ >= 0, "no more bytes are destroyed than were created");
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
  insert(mappings_, std::move(entry), at);
  ++it->second.mappings;
}

void CudaDriver::set_access(Address at, i64 bytes) {
  const auto lock = begin(&DriverCounters::set_access);
  check_positive("set_access", bytes);
  const auto [first, end] = whole_mappings("set_access", at, bytes, 0);
  const cuda::AccessDesc access = device_.access();
  device_.check(device_.relaxed([&] { return api_.cuMemSetAccess(at, bytes, &access, 1); }), "cuMemSetAccess",
                [&] { return range_text(at, bytes); });
  for (auto it = first; it != end; ++it) it->second.accessible = true;
}

// Returns the mappings, adjacent ones, that make up the range. Refuses if there are none, or, for a `page_bytes` other
// than 0, if one has another size.
CudaDriver::MappingRange CudaDriver::whole_mappings(const char* verb, Address at, i64 bytes, i64 page_bytes) {
  const auto first = mappings_.find(at);
  auto end = first;
  for (Address next = at; next < at + bytes; ++end) {
    if (end == mappings_.end() || end->first != next || next + end->second.bytes > at + bytes ||
        (page_bytes > 0 && end->second.bytes != page_bytes)) {
      refuse(verb, range_text(at, bytes) + " is not made of mappings" +
                       (page_bytes > 0 ? " of " + std::to_string(page_bytes) + " bytes" : ", each of them whole"));
    }
    next += end->second.bytes;
  }
  return {first, end};
}

void CudaDriver::unmap(Address at, i64 bytes) { unmap_at_once(at, bytes, 1); }

void CudaDriver::unmap_run(Address at, i64 page_bytes, i64 count) {
  if (count == 1 || !unmaps_runs_ || !unmap_at_once(at, page_bytes, count)) Driver::unmap_run(at, page_bytes, count);
}

// Returns false, and has changed nothing, where libcuda refuses to unmap several mappings by one call.
bool CudaDriver::unmap_at_once(Address at, i64 page_bytes, i64 count) {
  const auto lock = begin(&DriverCounters::unmap);
  check_positive("unmap", page_bytes);
  const i64 bytes = count * page_bytes;
  const auto [first, end] = whole_mappings("unmap", at, bytes, page_bytes);
  const Result code = device_.relaxed([&] { return api_.cuMemUnmap(at, bytes); });
  if (code == cuda::kInvalidValue && count > 1) return unmaps_runs_ = false;
  device_.check(code, "cuMemUnmap", [&] { return range_text(at, bytes); });
  for (auto it = first; it != end; ++it) {
    [[maybe_unused]] const i64 left = --pages_.find(it->second.page)->second.mappings;
    KVMEM_ASSERT(left >= 0, "the page was mapped");
  }
  mappings_.erase(first, end);
  return true;
}

Driver::Mapped CudaDriver::mapped_at(Address at) const {
  std::lock_guard<ForkMutex> lock(mutex_);
  auto it = mappings_.find(at);
  if (it == mappings_.end()) return {};
  return {it->second.page, it->second.accessible};
}

std::shared_ptr<Driver> make_cuda_driver(int device_index, const std::string& library, PageOptions pages) {
  return std::make_shared<CudaDriver>(device_index, library, pages);
}

}  // namespace kvmem
