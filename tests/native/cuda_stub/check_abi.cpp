// Compiled, never run: csrc/driver/cuda/cuda_api.h, which declares the CUDA driver API in kvmem's own words, against
// NVIDIA's cuda.h.

#include <cuda.h>
#include <cudaTypedefs.h>

#include <type_traits>

#include "driver/cuda/cuda_api.h"

namespace ours = kvmem::cuda;

static_assert(sizeof(ours::MemLocation) == sizeof(CUmemLocation));
static_assert(sizeof(ours::AllocationProp) == sizeof(CUmemAllocationProp));
static_assert(alignof(ours::AllocationProp) == alignof(CUmemAllocationProp));
static_assert(sizeof(ours::AccessDesc) == sizeof(CUmemAccessDesc));
static_assert(offsetof(ours::MemLocation, id) == offsetof(CUmemLocation, id));
static_assert(offsetof(ours::AllocationProp, requested_handle_types) ==
              offsetof(CUmemAllocationProp, requestedHandleTypes));
static_assert(offsetof(ours::AllocationProp, location) == offsetof(CUmemAllocationProp, location));
static_assert(offsetof(ours::AllocationProp, win32_handle_metadata) ==
              offsetof(CUmemAllocationProp, win32HandleMetaData));
static_assert(offsetof(ours::AllocationProp, flags) == offsetof(CUmemAllocationProp, allocFlags));
static_assert(offsetof(ours::AccessDesc, flags) == offsetof(CUmemAccessDesc, flags));

static_assert(ours::kSuccess == CUDA_SUCCESS);
static_assert(ours::kInvalidValue == CUDA_ERROR_INVALID_VALUE);
static_assert(ours::kOutOfMemory == CUDA_ERROR_OUT_OF_MEMORY);
static_assert(ours::kDeinitialized == CUDA_ERROR_DEINITIALIZED);
static_assert(ours::kStubLibrary == CUDA_ERROR_STUB_LIBRARY);
static_assert(ours::kNoDevice == CUDA_ERROR_NO_DEVICE);
static_assert(ours::kInvalidDevice == CUDA_ERROR_INVALID_DEVICE);
static_assert(ours::kInvalidContext == CUDA_ERROR_INVALID_CONTEXT);
static_assert(ours::kSystemNotReady == CUDA_ERROR_SYSTEM_NOT_READY);
static_assert(ours::kDriverMismatch == CUDA_ERROR_SYSTEM_DRIVER_MISMATCH);
static_assert(ours::kCompatNotSupported == CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE);
static_assert(ours::kCaptureUnsupported == CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
static_assert(ours::kCaptureImplicit == CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
static_assert(ours::kNotReady == CUDA_ERROR_NOT_READY);
static_assert(ours::kContextIsDestroyed == CUDA_ERROR_CONTEXT_IS_DESTROYED);
static_assert(ours::kAttributeVmmSupported == CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED);
static_assert(ours::kAttributePosixFdSupported == CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED);
static_assert(ours::kAttributeRdmaSupported == CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED);
static_assert(ours::kHandlePosixFd == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
static_assert(ours::kAllocationTypePinned == CU_MEM_ALLOCATION_TYPE_PINNED);
static_assert(ours::kLocationDevice == CU_MEM_LOCATION_TYPE_DEVICE);
static_assert(ours::kAccessReadWrite == CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
static_assert(ours::kGranularityMinimum == CU_MEM_ALLOC_GRANULARITY_MINIMUM);
static_assert(ours::kGranularityRecommended == CU_MEM_ALLOC_GRANULARITY_RECOMMENDED);
static_assert(ours::kEventDisableTiming == CU_EVENT_DISABLE_TIMING);
static_assert(ours::kStreamNonBlocking == CU_STREAM_NON_BLOCKING);
static_assert(ours::kCaptureRelaxed == CU_STREAM_CAPTURE_MODE_RELAXED);

// Two parameter types agree if a call passes them alike: both pointers, or both integers (or enumerations) of one
// width.
template <class A, class B>
constexpr bool alike = std::is_pointer_v<A> == std::is_pointer_v<B> && sizeof(A) == sizeof(B) &&
                       (std::is_pointer_v<A> ||
                        ((std::is_integral_v<A> || std::is_enum_v<A>) && (std::is_integral_v<B> || std::is_enum_v<B>)));

template <class Ours, class Theirs>
struct Same : std::false_type {};
template <class R, class... A, class S, class... B>
struct Same<R (*)(A...), S (*)(B...)> {
  static constexpr bool check() {
    if constexpr (sizeof...(A) == sizeof...(B)) {
      return alike<R, S> && (alike<A, B> && ...);
    } else {
      return false;
    }
  }
  static constexpr bool value = check();
};

// Each entry point has, in the release named, the signature named: PFN_<name>_v<version> is NVIDIA's record of both.
#define CHECK_ENTRY(name, version, ...) \
  static_assert(Same<decltype(ours::Api::name), PFN_##name##_v##version>::value, #name);
KVMEM_CUDA_ENTRIES(CHECK_ENTRY)
