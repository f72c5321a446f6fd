// One opened CUDA device: its entry points, its primary context, and driver errors as exceptions.
#pragma once

#include <string>

#include "base/fork_guard.h"
#include "driver/cuda/cuda_api.h"
#include "driver/driver.h"

namespace kvmem::cuda {

class Device {
 public:
  // DeviceError where there is no driver, no such device, no virtual memory management, or not what `pages` asks for.
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
  AllocationProp prop() const;  // of exactly the memory that create() makes: granularity depends on it
  AccessDesc access() const { return {{kLocationDevice, id_}, kAccessReadWrite}; }

  // Throws unless `code` is success: OutOfMemory where the driver says so, else DeviceError. `what()` tells what was
  // asked; it is called only on failure, since some of the calls cost no more than such a sentence.
  template <class What>
  void check(Result code, const char* call, What what) const {
    if (code != kSuccess) failed(code, call, what());
  }
  void check(Result code, const char* call) const {
    if (code != kSuccess) failed(code, call, "");
  }

  // Runs one call of virtual memory management, which needs no context. While some thread captures a graph, a call that
  // may wait for the device fails and spoils the capture, unless the calling thread's mode is relaxed; cuda.h says of
  // cuMemSetAccess and cuMemUnmap that they may wait, and of none that it does not.
  template <class Call>
  Result relaxed(Call call) const {
    int mode = kCaptureRelaxed;
    check(api_.cuThreadExchangeStreamCaptureMode(&mode), "cuThreadExchangeStreamCaptureMode");
    const Result code = call();
    api_.cuThreadExchangeStreamCaptureMode(&mode);  // an error here must not say that what is done has failed
    return code;
  }

  // Runs one driver call with our context current and leaves the thread's own as it was. What needs a context: streams,
  // events, memset, cuMemGetInfo. Relaxed as well: asking an event would spoil a capture, and ours are recorded
  // outside.
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
