#include "driver/cuda/cuda_device.h"

namespace kvmem::cuda {

namespace {

// Returns the usual cause of an error of cuInit.
const char* hint(Result code) {
  switch (code) {
    case kStubLibrary:
      return "this libcuda is the CUDA toolkit's stub, made for linking only: take its folder off LD_LIBRARY_PATH";
    case kNoDevice:
      return "is CUDA_VISIBLE_DEVICES empty?";
    case kInvalidDevice:
      return "does CUDA_VISIBLE_DEVICES name a device that is not there?";
    case kSystemNotReady:
      return "is nvidia-fabricmanager running? GPUs behind NVSwitch need it";
    case kDriverMismatch:
      return "libcuda and the kernel module have different versions: reboot, or reinstall them";
    case kCompatNotSupported:
      return "the forward-compatible libcuda does not work with this GPU: take cuda-compat off LD_LIBRARY_PATH";
    default:
      return "does nvidia-smi work on this machine?";
  }
}

}  // namespace

Device::Device(int index, const std::string& library, PageOptions pages) : api_(load_api(library)), pages_(pages) {
  find(index);
  check(api_.cuDevicePrimaryCtxRetain(&context_, id_), "cuDevicePrimaryCtxRetain");
  try {
    read_info(index);
  } catch (const Error&) {
    api_.cuDevicePrimaryCtxRelease(id_);
    throw;
  }
}

// In a forked child the context is the parent's. At process exit the driver may return an error, which is ignored.
Device::~Device() {
  if (!forked()) api_.cuDevicePrimaryCtxRelease(id_);
}

void Device::find(int index) {
  if (const Result code = api_.cuInit(0); code != kSuccess) cannot_start(code);
  int devices = 0;
  check(api_.cuDeviceGetCount(&devices), "cuDeviceGetCount");
  const std::string device = "cuda:" + std::to_string(index);
  const Result found = api_.cuDeviceGet(&id_, index);
  if (found == kInvalidDevice) {
    throw DeviceError(device + " does not exist: there are " + std::to_string(devices) +
                          " CUDA devices, counted from 0 (cuDeviceGet: " + api_.describe(found) + ")",
                      "cuDeviceGet", found);
  }
  check(found, "cuDeviceGet");
  int supported = 0;
  check(api_.cuDeviceGetAttribute(&supported, kAttributeVmmSupported, id_), "cuDeviceGetAttribute");
  if (!supported) {
    throw DeviceError(
        device + " has no virtual memory management (some virtualised GPUs and WSL2 lack it); kvmem cannot use it",
        "cuDeviceGetAttribute");
  }
  if (pages_.shareable) {
    need_attribute(kAttributePosixFdSupported, "HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED",
                   device + " cannot export memory as file descriptors; leave out shareable=True");
  }
  if (pages_.rdma) {
    need_attribute(kAttributeRdmaSupported, "GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED",
                   device + " has no GPUDirect RDMA for memory that is mapped on demand; leave out rdma=True");
  }
}

void Device::cannot_start(Result code) const {
  const std::string said = "cuInit failed: " + api_.describe(code) + " (" + hint(code) + ")";
  if (code == kOutOfMemory) throw OutOfMemory(said);
  throw DeviceError((code == kNoDevice ? "no CUDA device: " : "") + said, "cuInit", code);
}

void Device::need_attribute(int attribute, const char* name, const std::string& what) const {
  int supported = 0;
  check(api_.cuDeviceGetAttribute(&supported, attribute, id_), "cuDeviceGetAttribute",
        [&] { return std::string(name); });
  if (!supported) {
    throw DeviceError(what + " (CU_DEVICE_ATTRIBUTE_" + name + " is 0)", "cuDeviceGetAttribute");
  }
}

void Device::read_info(int index) {
  const AllocationProp prop = this->prop();
  const char* granularity = "cuMemGetAllocationGranularity";
  size_t minimum = 0, recommended = 0, total = 0;
  check(api_.cuMemGetAllocationGranularity(&minimum, &prop, kGranularityMinimum), granularity);
  check(api_.cuMemGetAllocationGranularity(&recommended, &prop, kGranularityRecommended), granularity);
  check(api_.cuDeviceTotalMem(&total, id_), "cuDeviceTotalMem");
  info_.name = "cuda";
  info_.dlpack_device_type = 2;
  info_.device_index = index;
  info_.granularity_bytes = static_cast<i64>(minimum);
  info_.recommended_bytes = static_cast<i64>(recommended);
  info_.total_bytes = static_cast<i64>(total);
  info_.fresh_pages_are_zero = false;  // they usually are, but no document says so
  info_.shareable = pages_.shareable;
  info_.rdma = pages_.rdma;
  info_.creates_ahead = true;  // 28 us a page on an H100
  info_.tells_free_bytes = info_.has_streams = true;
  info_.captured_code = kCaptureUnsupported;
  info_.default_guard_tokens = 256;  // FlashAttention 3 loads tiles that end up to 224 tokens past the length
  info_.default_ahead_tokens = 64;
}

AllocationProp Device::prop() const {
  AllocationProp prop{};
  prop.type = kAllocationTypePinned;
  prop.location = {kLocationDevice, id_};
  if (pages_.shareable) prop.requested_handle_types = kHandlePosixFd;
  if (pages_.rdma) prop.flags.gpu_direct_rdma_capable = 1;
  return prop;
}

void Device::failed(Result code, const char* call, const std::string& what) const {
  const std::string message = std::string(call) + " failed: " + api_.describe(code) + (what.empty() ? "" : ", " + what);
  if (code == kOutOfMemory) {
    throw OutOfMemory(message + ". Give this driver less, or free what other processes and torch's own cache hold");
  }
  throw DeviceError(message, call, code);
}

}  // namespace kvmem::cuda
