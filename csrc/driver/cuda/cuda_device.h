// An open CUDA device: the driver's entry points, the primary context, and driver errors as exceptions. Immutable after
// construction, hence thread-safe.
#pragma once

#include <string>

#include "base/fork_guard.h"
#include "driver/cuda/cuda_api.h"
#include "driver/driver.h"

namespace kvmem::cuda {

class Device {
 public:
  // Throws DeviceError where there is no driver, no such device, no virtual memory management, or no pages with these
  // options.
  Device(int index, const std::string& library, PageOptions pages);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  const Api& api() const { return api_; }
  const DriverInfo& info() const { return info_; }
  ContextPtr context() const { return context_; }
  DeviceId id() const { return id_; }
  bool forked() const { return fork_.forked(); }
  void check_fork() const { fork_.check("the CUDA driver"); }
  AllocationProp prop() const;  // the properties of the memory that create() makes; the granularity depends on them
  AccessDesc access() const { return {{kLocationDevice, id_}, kAccessReadWrite}; }

  // Throws unless `code` is success: OutOfMemory where the driver reports it, else DeviceError. what() returns the
  // arguments as text; it is called on failure only, because such a text costs as much as some of the calls.
  template <class What>
  void check(Result code, const char* call, What what) const {
    if (code != kSuccess) failed(code, call, what());
  }
  void check(Result code, const char* call) const {
    if (code != kSuccess) failed(code, call, "");
  }

  // Makes one call that manages virtual memory, which needs no context; returns its result. While a thread captures a
  // graph, a call that may wait for the device fails and invalidates the capture, unless the calling thread's mode is
  // relaxed. cuda.h says that cuMemSetAccess and cuMemUnmap may wait, and of no call that it does not.
  template <class Call>
  Result relaxed(Call call) const {
    int mode = kCaptureRelaxed;
    check(api_.cuThreadExchangeStreamCaptureMode(&mode), "cuThreadExchangeStreamCaptureMode");
    const Result code = call();
    api_.cuThreadExchangeStreamCaptureMode(&mode);  // its error is ignored, because the call has taken effect
    return code;
  }

  // Makes one call that needs a context (streams, events, contents, cuMemGetInfo) in the primary context, and restores
  // the thread's own; returns its result. The capture mode is relaxed as well, because cuEventQuery would invalidate a
  // capture, even for an event that was recorded outside of it.
  template <class Call>
  Result in_context(Call call) const {
    check(api_.cuCtxPushCurrent(context_), "cuCtxPushCurrent");
    int mode = kCaptureRelaxed;
    const Result relaxed = api_.cuThreadExchangeStreamCaptureMode(&mode);
    const Result code = relaxed == kSuccess ? call() : relaxed;
    const Result restored = relaxed == kSuccess ? api_.cuThreadExchangeStreamCaptureMode(&mode) : relaxed;
    ContextPtr ours = nullptr;
    const Result popped = api_.cuCtxPopCurrent(&ours);
    check(relaxed, "cuThreadExchangeStreamCaptureMode");
    if (code == kSuccess) check(restored, "cuThreadExchangeStreamCaptureMode");
    if (code == kSuccess) check(popped, "cuCtxPopCurrent");
    return code;
  }

 private:
  void find(int index);
  [[noreturn]] void cannot_start(Result code) const;
  void need_attribute(int attribute, const char* name, const std::string& what) const;
  void read_info(int index);
  [[noreturn]] void failed(Result code, const char* call, const std::string& what) const;

  const ForkGuard fork_;
  const Api api_;
  const PageOptions pages_;
  DriverInfo info_;
  DeviceId id_ = 0;
  ContextPtr context_ = nullptr;
};

}  // namespace kvmem::cuda
