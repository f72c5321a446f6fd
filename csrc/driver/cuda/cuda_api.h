// The part of the CUDA driver API that kvmem calls. It is declared here, so that building needs no CUDA toolkit, and
// resolved at run time, so that only the use of a GPU needs a driver. tests/native/cuda_stub/check_abi.cpp compares
// every line with cuda.h where that exists.
#pragma once

#include <cstddef>
#include <string>

#include "base/types.h"

namespace kvmem::cuda {

// Handles and enumerations have the width of those of the API; pointers are opaque.
using Result = int;
using DeviceId = int;
using DevicePtr = unsigned long long;
using AllocationHandle = unsigned long long;
using ContextPtr = struct ContextTag*;
using StreamPtr = struct StreamTag*;
using EventPtr = struct EventTag*;

struct MemLocation {
  int type;
  int id;
};

struct AllocationProp {
  int type;
  int requested_handle_types;
  MemLocation location;
  void* win32_handle_metadata;
  struct {
    unsigned char compression_type;
    unsigned char gpu_direct_rdma_capable;
    unsigned short usage;
    unsigned char reserved[4];
  } flags;
};

struct AccessDesc {
  MemLocation location;
  int flags;
};

static_assert(sizeof(MemLocation) == 8 && sizeof(AllocationProp) == 32 && sizeof(AccessDesc) == 12);
static_assert(offsetof(AllocationProp, location) == 8 && offsetof(AllocationProp, flags) == 24);

constexpr Result kSuccess = 0, kInvalidValue = 1, kOutOfMemory = 2, kDeinitialized = 4, kStubLibrary = 34,
                 kNoDevice = 100, kInvalidDevice = 101, kInvalidContext = 201, kNotReady = 600,
                 kContextIsDestroyed = 709, kSystemNotReady = 802, kDriverMismatch = 803, kCompatNotSupported = 804,
                 kCaptureUnsupported = 900, kCaptureImplicit = 906;
constexpr int kAttributeVmmSupported = 102, kAttributePosixFdSupported = 103, kAttributeRdmaSupported = 110;
constexpr int kHandlePosixFd = 1;
constexpr int kAllocationTypePinned = 1, kLocationDevice = 1, kAccessReadWrite = 3;
constexpr int kGranularityMinimum = 0, kGranularityRecommended = 1;
constexpr unsigned kEventDisableTiming = 2, kStreamNonBlocking = 1;
constexpr int kCaptureRelaxed = 2;
constexpr std::size_t kPerThreadStream = 2;  // a handle that stands for another stream in each thread

// ENTRY(name, version, arguments...): `version` is the CUDA release in which the entry point got this signature.
// cuGetProcAddress is asked for that release, and so returns cuMemGetInfo_v2, for example, and not its first form.
#define KVMEM_CUDA_ENTRIES(ENTRY)                                                                                      \
  ENTRY(cuInit, 2000, unsigned flags)                                                                                  \
  ENTRY(cuDeviceGetCount, 2000, int* count)                                                                            \
  ENTRY(cuDeviceGet, 2000, DeviceId* device, int ordinal)                                                              \
  ENTRY(cuDeviceGetAttribute, 2000, int* value, int attribute, DeviceId device)                                        \
  ENTRY(cuDeviceTotalMem, 3020, size_t* bytes, DeviceId device)                                                        \
  ENTRY(cuDevicePrimaryCtxRetain, 7000, ContextPtr* context, DeviceId device)                                          \
  ENTRY(cuDevicePrimaryCtxRelease, 11000, DeviceId device)                                                             \
  ENTRY(cuCtxPushCurrent, 4000, ContextPtr context)                                                                    \
  ENTRY(cuCtxPopCurrent, 4000, ContextPtr* context)                                                                    \
  ENTRY(cuCtxGetDevice, 2000, DeviceId* device)                                                                        \
  ENTRY(cuCtxSynchronize, 2000)                                                                                        \
  ENTRY(cuMemGetInfo, 3020, size_t* free, size_t* total)                                                               \
  ENTRY(cuMemGetAllocationGranularity, 10020, size_t* bytes, const AllocationProp* prop, int option)                   \
  ENTRY(cuMemAddressReserve, 10020, DevicePtr* at, size_t bytes, size_t alignment, DevicePtr hint,                     \
        unsigned long long flags)                                                                                      \
  ENTRY(cuMemAddressFree, 10020, DevicePtr at, size_t bytes)                                                           \
  ENTRY(cuMemCreate, 10020, AllocationHandle* handle, size_t bytes, const AllocationProp* prop,                        \
        unsigned long long flags)                                                                                      \
  ENTRY(cuMemRelease, 10020, AllocationHandle handle)                                                                  \
  ENTRY(cuMemMap, 10020, DevicePtr at, size_t bytes, size_t offset, AllocationHandle handle, unsigned long long flags) \
  ENTRY(cuMemUnmap, 10020, DevicePtr at, size_t bytes)                                                                 \
  ENTRY(cuMemSetAccess, 10020, DevicePtr at, size_t bytes, const AccessDesc* access, size_t count)                     \
  ENTRY(cuMemsetD8Async, 3020, DevicePtr at, unsigned char value, size_t bytes, StreamPtr stream)                      \
  ENTRY(cuMemcpyDtoDAsync, 3020, DevicePtr to, DevicePtr from, size_t bytes, StreamPtr stream)                         \
  ENTRY(cuMemcpyHtoDAsync, 3020, DevicePtr to, const void* from, size_t bytes, StreamPtr stream)                       \
  ENTRY(cuMemcpyDtoHAsync, 3020, void* to, DevicePtr from, size_t bytes, StreamPtr stream)                             \
  ENTRY(cuStreamCreate, 2000, StreamPtr* stream, unsigned flags)                                                       \
  ENTRY(cuStreamDestroy, 4000, StreamPtr stream)                                                                       \
  ENTRY(cuStreamGetCtx, 9020, StreamPtr stream, ContextPtr* context)                                                   \
  ENTRY(cuStreamIsCapturing, 10000, StreamPtr stream, int* status)                                                     \
  ENTRY(cuStreamWaitEvent, 3020, StreamPtr stream, EventPtr event, unsigned flags)                                     \
  ENTRY(cuThreadExchangeStreamCaptureMode, 10010, int* mode)                                                           \
  ENTRY(cuEventCreate, 2000, EventPtr* event, unsigned flags)                                                          \
  ENTRY(cuEventRecord, 2000, EventPtr event, StreamPtr stream)                                                         \
  ENTRY(cuEventQuery, 2000, EventPtr event)                                                                            \
  ENTRY(cuEventSynchronize, 2000, EventPtr event)                                                                      \
  ENTRY(cuEventDestroy, 4000, EventPtr event)                                                                          \
  ENTRY(cuGetErrorName, 6000, Result code, const char** text)                                                          \
  ENTRY(cuGetErrorString, 6000, Result code, const char** text)

// Every entry point, resolved. The library is never unloaded, because it has threads of its own.
struct Api {
#define KVMEM_CUDA_MEMBER(name, version, ...) Result (*name)(__VA_ARGS__) = nullptr;
  KVMEM_CUDA_ENTRIES(KVMEM_CUDA_MEMBER)
#undef KVMEM_CUDA_MEMBER

  // Returns, for example, "CUDA_ERROR_INVALID_VALUE (invalid argument)".
  std::string describe(Result code) const;
};

// Returns "CUDA 13.0" for 13000.
std::string version_text(int version);

// Opens libcuda and returns its entry points. `library` is a path or soname; "" stands for $KVMEM_CUDA_DRIVER or
// libcuda.so.1. Throws DeviceError where it cannot be opened, is too old, or lacks an entry point.
Api load_api(const std::string& library);

}  // namespace kvmem::cuda
