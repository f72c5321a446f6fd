// How the stand-in names its errors, and how its entry points are found.

#include "stub_state.h"

using namespace stub;

// Only addresses are taken here, so the signatures do not matter.
extern "C" {
void cuInit();
void cuDriverGetVersion();
void cuDeviceGetCount();
void cuDeviceGet();
void cuDeviceGetAttribute();
void cuDeviceTotalMem_v2();
void cuDevicePrimaryCtxRetain();
void cuDevicePrimaryCtxRelease_v2();
void cuCtxPushCurrent_v2();
void cuCtxPopCurrent_v2();
void cuCtxGetCurrent();
void cuCtxSetCurrent();
void cuCtxGetDevice();
void cuCtxSynchronize();
void cuMemGetInfo_v2();
void cuMemGetAllocationGranularity();
void cuMemAddressReserve();
void cuMemAddressFree();
void cuMemCreate();
void cuMemRelease();
void cuMemExportToShareableHandle();
void cuMemMap();
void cuMemUnmap();
void cuMemSetAccess();
void cuMemsetD8Async();
void cuMemcpyDtoDAsync_v2();
void cuMemcpyHtoDAsync_v2();
void cuMemcpyDtoHAsync_v2();
void cuStreamCreate();
void cuStreamDestroy_v2();
void cuStreamGetCtx();
void cuStreamIsCapturing();
void cuStreamWaitEvent();
void cuThreadExchangeStreamCaptureMode();
void cuEventCreate();
void cuEventRecord();
void cuEventQuery();
void cuEventSynchronize();
void cuEventDestroy_v2();
}

extern "C" {
// ---- Errors --------------------------------------------------------------------------------------------------------

#define STUB_ERRORS(ERROR)                                                                      \
  ERROR(0, "CUDA_SUCCESS", "no error")                                                          \
  ERROR(1, "CUDA_ERROR_INVALID_VALUE", "invalid argument")                                      \
  ERROR(2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory")                                         \
  ERROR(3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error")                                \
  ERROR(4, "CUDA_ERROR_DEINITIALIZED", "driver shutting down")                                  \
  ERROR(34, "CUDA_ERROR_STUB_LIBRARY", "CUDA driver is a stub library")                         \
  ERROR(100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device")                                  \
  ERROR(101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal")                             \
  ERROR(201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context")                            \
  ERROR(400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle")                            \
  ERROR(600, "CUDA_ERROR_NOT_READY", "device not ready")                                        \
  ERROR(700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access")                          \
  ERROR(702, "CUDA_ERROR_LAUNCH_TIMEOUT", "timed out")                                          \
  ERROR(709, "CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed")                         \
  ERROR(719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure")                          \
  ERROR(801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported")                             \
  ERROR(802, "CUDA_ERROR_SYSTEM_NOT_READY", "system not yet initialized")                       \
  ERROR(803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "driver mismatch")                            \
  ERROR(804, "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE", "forward compatibility")              \
  ERROR(900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "not permitted when stream is capturing") \
  ERROR(901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "previous error during capture")          \
  ERROR(999, "CUDA_ERROR_UNKNOWN", "unknown error")

Result cuGetErrorName(Result code, const char** text) {
  ENTER("cuGetErrorName", Needs::kNothing);
#define STUB_NAME(number, name, description) \
  case number:                               \
    *text = name;                            \
    return kOk;
  switch (code) { STUB_ERRORS(STUB_NAME) }
  *text = nullptr;
  return kInvalidValue;
}

Result cuGetErrorString(Result code, const char** text) {
  ENTER("cuGetErrorString", Needs::kNothing);
#define STUB_TEXT(number, name, description) \
  case number:                               \
    *text = description;                     \
    return kOk;
  switch (code) { STUB_ERRORS(STUB_TEXT) }
  *text = nullptr;
  return kInvalidValue;
}

// ---- Finding entry points ------------------------------------------------------------------------------------------

// The form of CUDA 11.3, which has no status; with STUB_OLD the library has no other, as a driver of that time.
#ifdef STUB_OLD
#define cuGetProcAddress_v2 static_get_proc_address
static
#endif
    Result cuGetProcAddress_v2(const char* symbol, void** found, int version, unsigned long long flags, int* status);

Result cuGetProcAddress(const char* symbol, void** found, int version, unsigned long long flags) {
  int status = 0;
  const Result code = cuGetProcAddress_v2(symbol, found, version, flags, &status);
  return code ? code : status ? kNotFound : kOk;
}

Result cuGetProcAddress_v2(const char* symbol, void** found, int version, unsigned long long flags, int* status) {
  ENTER("cuGetProcAddress", Needs::kNothing);
  if (flags > 2) return kInvalidValue;
  int ignored = 0;
  if (!status) status = &ignored;
  const std::string name = symbol;
  // The release in which each entry point took the signature exported here. cudaTypedefs.h is the source.
  struct Entry {
    int since;
    void* function;
  };
#define STUB_ENTRY(public_name, since, function)               \
  {                                                            \
    public_name, { since, reinterpret_cast<void*>(&function) } \
  }
  static const std::map<std::string, Entry> entries = {
      STUB_ENTRY("cuInit", 2000, cuInit),
      STUB_ENTRY("cuDriverGetVersion", 2020, cuDriverGetVersion),
      STUB_ENTRY("cuDeviceGetCount", 2000, cuDeviceGetCount),
      STUB_ENTRY("cuDeviceGet", 2000, cuDeviceGet),
      STUB_ENTRY("cuDeviceGetAttribute", 2000, cuDeviceGetAttribute),
      STUB_ENTRY("cuDeviceTotalMem", 3020, cuDeviceTotalMem_v2),
      STUB_ENTRY("cuDevicePrimaryCtxRetain", 7000, cuDevicePrimaryCtxRetain),
      STUB_ENTRY("cuDevicePrimaryCtxRelease", 11000, cuDevicePrimaryCtxRelease_v2),
      STUB_ENTRY("cuCtxPushCurrent", 4000, cuCtxPushCurrent_v2),
      STUB_ENTRY("cuCtxPopCurrent", 4000, cuCtxPopCurrent_v2),
      STUB_ENTRY("cuCtxGetCurrent", 4000, cuCtxGetCurrent),
      STUB_ENTRY("cuCtxSetCurrent", 4000, cuCtxSetCurrent),
      STUB_ENTRY("cuCtxGetDevice", 2000, cuCtxGetDevice),
      STUB_ENTRY("cuCtxSynchronize", 2000, cuCtxSynchronize),
      STUB_ENTRY("cuMemGetInfo", 3020, cuMemGetInfo_v2),
      STUB_ENTRY("cuMemGetAllocationGranularity", 10020, cuMemGetAllocationGranularity),
      STUB_ENTRY("cuMemAddressReserve", 10020, cuMemAddressReserve),
      STUB_ENTRY("cuMemAddressFree", 10020, cuMemAddressFree),
      STUB_ENTRY("cuMemCreate", 10020, cuMemCreate),
      STUB_ENTRY("cuMemRelease", 10020, cuMemRelease),
      STUB_ENTRY("cuMemExportToShareableHandle", 10020, cuMemExportToShareableHandle),
      STUB_ENTRY("cuMemMap", 10020, cuMemMap),
      STUB_ENTRY("cuMemUnmap", 10020, cuMemUnmap),
      STUB_ENTRY("cuMemSetAccess", 10020, cuMemSetAccess),
      STUB_ENTRY("cuMemsetD8Async", 3020, cuMemsetD8Async),
      STUB_ENTRY("cuMemcpyDtoDAsync", 3020, cuMemcpyDtoDAsync_v2),
      STUB_ENTRY("cuMemcpyHtoDAsync", 3020, cuMemcpyHtoDAsync_v2),
      STUB_ENTRY("cuMemcpyDtoHAsync", 3020, cuMemcpyDtoHAsync_v2),
      STUB_ENTRY("cuStreamCreate", 2000, cuStreamCreate),
      STUB_ENTRY("cuStreamDestroy", 4000, cuStreamDestroy_v2),
      STUB_ENTRY("cuStreamGetCtx", 9020, cuStreamGetCtx),
      STUB_ENTRY("cuStreamIsCapturing", 10000, cuStreamIsCapturing),
      STUB_ENTRY("cuStreamWaitEvent", 3020, cuStreamWaitEvent),
      STUB_ENTRY("cuThreadExchangeStreamCaptureMode", 10010, cuThreadExchangeStreamCaptureMode),
      STUB_ENTRY("cuEventCreate", 2000, cuEventCreate),
      STUB_ENTRY("cuEventRecord", 2000, cuEventRecord),
      STUB_ENTRY("cuEventQuery", 2000, cuEventQuery),
      STUB_ENTRY("cuEventSynchronize", 2000, cuEventSynchronize),
      STUB_ENTRY("cuEventDestroy", 4000, cuEventDestroy_v2),
      STUB_ENTRY("cuGetErrorName", 6000, cuGetErrorName),
      STUB_ENTRY("cuGetErrorString", 6000, cuGetErrorString),
  };
  const auto it = entries.find(name);
  *found = nullptr;
  if (it == entries.end() || s.hidden.count(name)) {
    *status = 1;
    return kOk;
  }
  if (version < it->second.since) {
    *status = 2;
    return kOk;
  }
  *status = 0;
  *found = it->second.function;
  return kOk;
}
}
