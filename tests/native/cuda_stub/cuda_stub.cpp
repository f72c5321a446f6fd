// A stand-in for libcuda.so.1 over memfd and mmap, for tests on machines without a GPU. It exports the entry points
// under their real names and refuses what the CUDA documentation forbids, with CUDA's codes. Where the documentation
// leaves room it takes the strict reading. Memory it maps is real CPU memory at the device address.
//
// It does not run kernels, and work on a stream is done by the time the call returns; only events can be held back
// (stub_streams.cpp).

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <iterator>

#include "stub_state.h"

using namespace stub;
using kvmem::cuda::AccessDesc;
using kvmem::cuda::AllocationProp;

namespace stub {
ContextPtr context_of(DeviceId device) {
  return reinterpret_cast<ContextPtr>(static_cast<uintptr_t>(0xC0DE00 + device));
}
void* pointer(DevicePtr at) { return reinterpret_cast<void*>(at); }
}  // namespace stub

namespace {

bool is_device(State& s, DeviceId device) { return device >= 0 && device < s.settings["devices"]; }
bool is_power_of_two(size_t value) { return value && !(value & (value - 1)); }

bool aligned(State& s, DevicePtr at, size_t bytes) {
  const auto granularity = static_cast<size_t>(s.settings["granularity_bytes"]);
  return bytes > 0 && bytes % granularity == 0 && at % granularity == 0;
}

bool in_one_reservation(State& s, DevicePtr at, size_t bytes) {
  auto it = s.reservations.upper_bound(at);
  if (it == s.reservations.begin()) return false;
  --it;
  const auto size = static_cast<size_t>(it->second), skipped = static_cast<size_t>(at - it->first);
  return skipped <= size && bytes <= size - skipped;
}

bool overlaps_mapping(State& s, DevicePtr at, size_t bytes) {
  auto after = s.mappings.lower_bound(at);
  if (after != s.mappings.end() && after->first < at + bytes) return true;
  return after != s.mappings.begin() && std::prev(after)->first + std::prev(after)->second.bytes > at;
}

void drop_if_unused(State& s, std::map<AllocationHandle, Allocation>::iterator it) {
  if (!it->second.released || it->second.mappings) return;
  fallocate(s.memory_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, it->second.offset, it->second.bytes);
  s.free_offsets[it->second.bytes].push_back(it->second.offset);
  s.created_bytes -= it->second.bytes;
  s.allocations.erase(it);
}

Result check_prop(State& s, const AllocationProp* prop) {
  if (!prop || prop->type != 1 || prop->win32_handle_metadata) return kInvalidValue;
  if (prop->requested_handle_types & ~1) return kInvalidValue;
  if (prop->requested_handle_types && !s.settings["posix_fd_supported"]) return kNotSupported;
  if (prop->flags.gpu_direct_rdma_capable && !s.settings["rdma_supported"]) return kNotSupported;
  if (prop->location.type != 1) return kInvalidValue;
  return is_device(s, prop->location.id) ? kOk : kInvalidDevice;
}

size_t granularity(State& s, const AllocationProp* prop) {
  const long long rdma = prop->flags.gpu_direct_rdma_capable ? s.settings["rdma_granularity_bytes"] : 0;
  return static_cast<size_t>(std::max(s.settings["granularity_bytes"], rdma));
}

size_t free_bytes(State& s) {
  return static_cast<size_t>(s.settings["memory_bytes"] - s.created_bytes - s.settings["foreign_bytes"]);
}

}  // namespace

// What a kernel or copy may touch: ILLEGAL_ADDRESS inside a reservation, INVALID_VALUE outside any.
Result stub::accessible(State& s, DevicePtr at, size_t bytes) {
  if (!in_one_reservation(s, at, bytes)) return kInvalidValue;
  const DevicePtr end = at + bytes;
  auto it = s.mappings.upper_bound(at);
  if (it != s.mappings.begin()) --it;
  for (DevicePtr next = at; next < end; ++it) {
    if (it == s.mappings.end() || it->first > next) return kIllegalAddress;
    if (it->first + it->second.bytes <= next || !it->second.accessible) return kIllegalAddress;
    next = it->first + it->second.bytes;
  }
  return kOk;
}

extern "C" {

// ---- Devices and contexts ------------------------------------------------------------------------------------------

Result cuInit(unsigned flags) {
  ENTER("cuInit", Needs::kNothing);
  if (flags) return kInvalidValue;
  if (s.settings["devices"] == 0) return kNoDevice;
  s.initialized = true;
  return kOk;
}

Result cuDriverGetVersion(int* version) {
  ENTER("cuDriverGetVersion", Needs::kNothing);
  *version = static_cast<int>(s.settings["driver_version"]);
  return kOk;
}

Result cuDeviceGetCount(int* count) {
  ENTER("cuDeviceGetCount", Needs::kInit);
  *count = static_cast<int>(s.settings["devices"]);
  return kOk;
}

Result cuDeviceGet(DeviceId* device, int ordinal) {
  ENTER("cuDeviceGet", Needs::kInit);
  if (!is_device(s, ordinal)) return kInvalidDevice;
  *device = ordinal;
  return kOk;
}

Result cuDeviceGetAttribute(int* value, int attribute, DeviceId device) {
  ENTER("cuDeviceGetAttribute", Needs::kInit);
  if (!is_device(s, device)) return kInvalidDevice;
  const std::map<int, const char*> names = {
      {102, "vmm_supported"}, {103, "posix_fd_supported"}, {110, "rdma_supported"}};
  const auto it = names.find(attribute);
  *value = it == names.end() ? 0 : static_cast<int>(s.settings[it->second]);
  return kOk;
}

Result cuDeviceTotalMem_v2(size_t* bytes, DeviceId device) {
  ENTER("cuDeviceTotalMem", Needs::kInit);
  if (!is_device(s, device)) return kInvalidDevice;
  *bytes = static_cast<size_t>(s.settings["memory_bytes"]);
  return kOk;
}

Result cuDevicePrimaryCtxRetain(ContextPtr* context, DeviceId device) {
  ENTER("cuDevicePrimaryCtxRetain", Needs::kInit);
  if (!is_device(s, device)) return kInvalidDevice;
  ++s.context_uses[device];
  *context = context_of(device);
  return kOk;
}

Result cuDevicePrimaryCtxRelease_v2(DeviceId device) {
  ENTER("cuDevicePrimaryCtxRelease", Needs::kInit);
  if (!s.context_uses.count(device) || s.context_uses[device] == 0) return kInvalidContext;
  --s.context_uses[device];
  return kOk;
}

Result cuCtxPushCurrent_v2(ContextPtr context) {
  ENTER("cuCtxPushCurrent", Needs::kInit);
  for (const auto& entry : s.context_uses) {
    if (entry.second > 0 && context_of(entry.first) == context) {
      context_stack.push_back(context);
      return kOk;
    }
  }
  return kInvalidContext;
}

Result cuCtxPopCurrent_v2(ContextPtr* context) {
  ENTER("cuCtxPopCurrent", Needs::kContext);
  if (context) *context = context_stack.back();
  context_stack.pop_back();
  return kOk;
}

Result cuCtxSetCurrent(ContextPtr context) {
  ENTER("cuCtxSetCurrent", Needs::kInit);
  if (!context_stack.empty()) context_stack.pop_back();
  if (context) context_stack.push_back(context);
  return kOk;
}

Result cuCtxGetCurrent(ContextPtr* context) {
  ENTER("cuCtxGetCurrent", Needs::kInit);
  *context = context_stack.empty() ? nullptr : context_stack.back();
  return kOk;
}

Result cuCtxGetDevice(DeviceId* device) {
  ENTER("cuCtxGetDevice", Needs::kContext);
  *device = static_cast<DeviceId>(reinterpret_cast<uintptr_t>(context_stack.back()) - 0xC0DE00);
  return kOk;
}

Result cuCtxSynchronize() {
  ENTER("cuCtxSynchronize", Needs::kContext);
  s.trace.push_back("device-wide");
  return kOk;
}

Result cuMemGetInfo_v2(size_t* free, size_t* total) {
  ENTER("cuMemGetInfo", Needs::kContext);
  *total = static_cast<size_t>(s.settings["memory_bytes"]);
  *free = free_bytes(s);
  return kOk;
}

// ---- Virtual memory management -------------------------------------------------------------------------------------

Result cuMemGetAllocationGranularity(size_t* bytes, const AllocationProp* prop, int option) {
  ENTER("cuMemGetAllocationGranularity", Needs::kInit);
  if (Result code = check_prop(s, prop)) return code;
  if (option != 0 && option != 1) return kInvalidValue;
  const auto recommended = static_cast<size_t>(s.settings["recommended_bytes"]);
  *bytes = option == 1 && recommended ? recommended : granularity(s, prop);
  return kOk;
}

Result cuMemAddressReserve(DevicePtr* at, size_t bytes, size_t alignment, DevicePtr, unsigned long long flags) {
  ENTER_UNSAFE("cuMemAddressReserve");
  if (flags || bytes == 0 || bytes % 4096 || (alignment && !is_power_of_two(alignment))) return kInvalidValue;
  // As much alignment as was asked for and no more: the documentation promises none of its own.
  const size_t align = std::max(alignment, size_t{4096}), room = 2 * align;
  if (bytes > (size_t{1} << 46)) return kOutOfMemory;
  void* got = mmap(nullptr, bytes + room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (got == MAP_FAILED) return kOutOfMemory;
  const auto raw = reinterpret_cast<DevicePtr>(got);
  DevicePtr base = (raw + align - 1) / align * align;
  if (base % (2 * align) == 0) base += align;
  if (base > raw) munmap(got, base - raw);
  if (raw + room > base) munmap(pointer(base + bytes), raw + room - base);
  s.reservations[base] = static_cast<long long>(bytes);
  *at = base;
  return kOk;
}

Result cuMemAddressFree(DevicePtr at, size_t bytes) {
  ENTER_UNSAFE("cuMemAddressFree");
  auto it = s.reservations.find(at);
  if (it == s.reservations.end() || static_cast<size_t>(it->second) != bytes) return kInvalidValue;
  if (overlaps_mapping(s, at, bytes)) return kInvalidValue;
  munmap(pointer(at), bytes);
  s.reservations.erase(it);
  return kOk;
}

Result cuMemCreate(AllocationHandle* handle, size_t bytes, const AllocationProp* prop, unsigned long long flags) {
  ENTER_UNSAFE("cuMemCreate");
  if (Result code = check_prop(s, prop)) return code;
  if (flags || bytes == 0 || bytes % granularity(s, prop)) return kInvalidValue;
  if (bytes > free_bytes(s)) return kOutOfMemory;
  auto& free_offsets = s.free_offsets[static_cast<long long>(bytes)];
  long long offset = s.file_end;
  if (!free_offsets.empty()) {
    offset = free_offsets.back();
    free_offsets.pop_back();
  } else if (ftruncate(s.memory_fd, s.file_end + static_cast<long long>(bytes)) != 0) {
    return kOutOfMemory;
  } else {
    s.file_end += static_cast<long long>(bytes);
  }
  *handle = ++s.last_handle;
  s.allocations[*handle] = {static_cast<long long>(bytes), offset, 0, prop->requested_handle_types == 1};
  s.created_bytes += static_cast<long long>(bytes);
  return kOk;
}

Result cuMemRelease(AllocationHandle handle) {
  ENTER_UNSAFE("cuMemRelease");
  auto it = s.allocations.find(handle);
  if (it == s.allocations.end() || it->second.released) return kInvalidValue;
  it->second.released = true;
  drop_if_unused(s, it);
  return kOk;
}

// The whole device's memory rather than the page's; enough to see that a descriptor came of a page that may be shared.
Result cuMemExportToShareableHandle(void* out, AllocationHandle handle, int type, unsigned long long flags) {
  ENTER("cuMemExportToShareableHandle", Needs::kInit);
  auto it = s.allocations.find(handle);
  if (flags || type != 1 || it == s.allocations.end() || !it->second.shareable) return kInvalidValue;
  *static_cast<int*>(out) = fcntl(s.memory_fd, F_DUPFD_CLOEXEC, 0);
  return kOk;
}

Result cuMemMap(DevicePtr at, size_t bytes, size_t offset, AllocationHandle handle, unsigned long long flags) {
  ENTER_UNSAFE("cuMemMap");
  if (flags || offset != 0 || !aligned(s, at, bytes)) return kInvalidValue;
  auto it = s.allocations.find(handle);
  if (it == s.allocations.end() || it->second.released) return kInvalidValue;
  if (static_cast<size_t>(it->second.bytes) != bytes) return kInvalidValue;
  if (!in_one_reservation(s, at, bytes) || overlaps_mapping(s, at, bytes)) return kInvalidValue;
  void* got = mmap(pointer(at), bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, s.memory_fd, it->second.offset);
  if (got == MAP_FAILED) return kOutOfMemory;
  s.mappings[at] = {static_cast<long long>(bytes), handle};
  ++it->second.mappings;
  return kOk;
}

Result cuMemUnmap(DevicePtr at, size_t bytes) {
  ENTER_UNSAFE("cuMemUnmap");
  size_t covered = 0;
  for (auto it = s.mappings.find(at); covered < bytes; ++it) {
    if (it == s.mappings.end() || it->first != at + covered) return kInvalidValue;
    covered += static_cast<size_t>(it->second.bytes);
    if (covered > bytes || (covered < bytes && s.settings["unmaps_runs"] == 0)) return kInvalidValue;
  }
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
  if (mmap(pointer(at), bytes, PROT_NONE, flags, -1, 0) == MAP_FAILED) return kOutOfMemory;
  for (auto it = s.mappings.find(at); it != s.mappings.end() && it->first < at + bytes;) {
    auto allocation = s.allocations.find(it->second.handle);
    s.trace.push_back("unmap " + std::to_string(it->first));
    it = s.mappings.erase(it);
    --allocation->second.mappings;
    drop_if_unused(s, allocation);
  }
  return kOk;
}

Result cuMemSetAccess(DevicePtr at, size_t bytes, const AccessDesc* access, size_t count) {
  ENTER_UNSAFE("cuMemSetAccess");
  if (!aligned(s, at, bytes) || !access || count != 1 || access->flags != 3 || access->location.type != 1)
    return kInvalidValue;
  if (!is_device(s, access->location.id)) return kInvalidDevice;
  // The range must be made of whole mappings, back to back.
  const DevicePtr end = at + bytes;
  DevicePtr next = at;
  for (auto it = s.mappings.find(at); next < end; ++it) {
    if (it == s.mappings.end() || it->first != next) return kInvalidValue;
    next += static_cast<DevicePtr>(it->second.bytes);
  }
  if (next != end) return kInvalidValue;
  if (mprotect(pointer(at), bytes, PROT_READ | PROT_WRITE) != 0) return kOutOfMemory;
  for (auto it = s.mappings.find(at); it != s.mappings.end() && it->first < end; ++it) it->second.accessible = true;
  return kOk;
}
}
