#include "cuda_device.h"

namespace kvmem::cuda {

Device::Device(int index, const std::string& library) : api_(load_api(library)) {
  find(index);
  check(api_.cuDevicePrimaryCtxRetain(&context_, id_), "cuDevicePrimaryCtxRetain");
  try {
    read_info(index);
  } catch (const Error&) {
    api_.cuDevicePrimaryCtxRelease(id_);
    throw;
  }
}

// In a forked child the context is the parent's. At process exit the driver may be gone already and say so; there is
// nobody to tell.
Device::~Device() {
  if (!forked()) api_.cuDevicePrimaryCtxRelease(id_);
}

void Device::find(int index) {
  const Result code = api_.cuInit(0);
  if (code == kNoDevice) {
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
  check(api_.cuDeviceGet(&id_, index), "cuDeviceGet");
  int supported = 0;
  check(api_.cuDeviceGetAttribute(&supported, kAttributeVmmSupported, id_), "cuDeviceGetAttribute");
  if (!supported) {
    throw DeviceError(
        "cuda:" + std::to_string(index) +
            " has no virtual memory management (some virtualised GPUs and WSL2 lack it); kvmem cannot use it",
        "cuDeviceGetAttribute");
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
  info_.fresh_pages_are_zero = false;  // usually true, documented nowhere
}

AllocationProp Device::prop() const {
  AllocationProp prop{};
  prop.type = kAllocationTypePinned;
  prop.location = {kLocationDevice, id_};
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
