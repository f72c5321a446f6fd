// The CUDA driver: contents, events and streams.

#include "base/check.h"
#include "driver/cuda/cuda_driver.h"

namespace kvmem {

using cuda::Result;

namespace {

cuda::StreamPtr cu(Stream stream) { return reinterpret_cast<cuda::StreamPtr>(stream); }
cuda::EventPtr cu_event(Event event) { return reinterpret_cast<cuda::EventPtr>(event); }

}  // namespace

// ---- Streams -------------------------------------------------------------------------------------------------------

// libcuda may crash for a handle that is no stream. Stream 0 belongs to the current context, which is the primary one
// here.
void CudaDriver::check_stream(Stream stream) const {
  device_.check_fork();
  if (stream == cuda::kPerThreadStream) {
    throw SpecError(
        "stream 2 means another stream in each thread, so no fence can be recorded on it; pass a stream that was "
        "created");
  }
  cuda::ContextPtr context = nullptr;
  const auto ask = [&] { return api_.cuStreamGetCtx(cu(stream), &context); };
  device_.check(device_.in_context(ask), "cuStreamGetCtx", [&] { return "stream " + std::to_string(stream); });
  if (context == device_.context()) return;
  cuda::DeviceId owner = -1;
  if (api_.cuCtxPushCurrent(context) == cuda::kSuccess) {
    api_.cuCtxGetDevice(&owner);
    api_.cuCtxPopCurrent(&context);
  }
  const std::string device = "cuda:" + std::to_string(info().device_index);
  throw DeviceError("stream " + std::to_string(stream) + " belongs to " +
                        (owner == device_.id() ? "another context of " + device
                                               : "device " + std::to_string(owner) + ", not to " + device) +
                        " (cuStreamGetCtx); pass a stream of the primary context of " + device,
                    "cuStreamGetCtx", cuda::kInvalidContext);
}

Stream CudaDriver::side_stream() {
  std::lock_guard<ForkMutex> lock(mutex_);
  const auto create = [&] { return api_.cuStreamCreate(&side_, cuda::kStreamNonBlocking); };
  if (!side_) device_.check(device_.in_context(create), "cuStreamCreate");
  return reinterpret_cast<Stream>(side_);
}

void CudaDriver::order(Event event, Stream later) {
  if (event == 0) return;
  device_.check_fork();
  check_not_captured("order", later);
  const auto wait = [&] { return api_.cuStreamWaitEvent(cu(later), cu_event(event), 0); };
  device_.check(device_.in_context(wait), "cuStreamWaitEvent", [&] { return "stream " + std::to_string(later); });
}

void CudaDriver::wait_for_device() {
  device_.check_fork();
  device_.check(device_.in_context([&] { return api_.cuCtxSynchronize(); }), "cuCtxSynchronize");
}

// Throws DeviceError for a stream that is being captured. What is put on it would run at each replay, and not now: it
// would zero a live cache again. The default stream cannot be used while a stream that waits for it is captured, which
// libcuda reports as an error.
void CudaDriver::check_not_captured(const char* verb, Stream stream) const {
  int status = 0;
  const auto ask = [&] { return api_.cuStreamIsCapturing(cu(stream), &status); };
  const Result code = device_.in_context(ask);
  if (code != cuda::kCaptureImplicit) {
    device_.check(code, "cuStreamIsCapturing", [&] { return "stream " + std::to_string(stream); });
    if (status == 0) return;
  }
  throw DeviceError(std::string("the CUDA driver: ") + verb + ": stream " + std::to_string(stream) +
                        " is being captured into a graph" +
                        (code == cuda::kCaptureImplicit ? ", by way of one that waits for it" : "") +
                        ". Grow, fork and free sequences before the capture, or between replays",
                    "cuStreamIsCapturing", cuda::kCaptureUnsupported);
}

// ---- Contents and fences -------------------------------------------------------------------------------------------

void CudaDriver::zero(Address at, i64 bytes, Stream stream) {
  count(&DriverCounters::zero);
  if (bytes == 0) return;
  check_positive("zero", bytes);
  check_not_captured("zero", stream);
  device_.check(device_.in_context([&] { return api_.cuMemsetD8Async(at, 0, bytes, cu(stream)); }), "cuMemsetD8Async",
                [&] { return range_text(at, bytes); });
}

void CudaDriver::copy(Address to, Address from, i64 bytes, Stream stream) {
  count(&DriverCounters::copy);
  if (bytes == 0) return;
  check_positive("copy", bytes);
  check_not_captured("copy", stream);
  device_.check(device_.in_context([&] { return api_.cuMemcpyDtoDAsync(to, from, bytes, cu(stream)); }),
                "cuMemcpyDtoDAsync", [&] { return range_text(from, bytes) + " to " + range_text(to, bytes); });
}

void CudaDriver::load(Address to, const char* from, i64 bytes, Stream stream) {
  count(&DriverCounters::load);
  check_positive("load", bytes);
  check_not_captured("load", stream);
  device_.check(device_.in_context([&] { return api_.cuMemcpyHtoDAsync(to, from, bytes, cu(stream)); }),
                "cuMemcpyHtoDAsync", [&] { return range_text(to, bytes); });
}

void CudaDriver::store(char* to, Address from, i64 bytes, Stream stream) {
  count(&DriverCounters::store);
  check_positive("store", bytes);
  check_not_captured("store", stream);
  device_.check(device_.in_context([&] { return api_.cuMemcpyDtoHAsync(to, from, bytes, cu(stream)); }),
                "cuMemcpyDtoHAsync", [&] { return range_text(from, bytes); });
}

// Returns an idle event, or a new one.
cuda::EventPtr CudaDriver::take_event() {
  std::size_t index = 0;
  {
    std::lock_guard<ForkMutex> lock(event_mutex_);
    if (!idle_events_.empty()) {
      const cuda::EventPtr event = idle_events_.back();
      idle_events_.pop_back();
      return event;
    }
    index = events_.size();
    events_.push_back(nullptr);
    try {
      idle_events_.reserve(events_.capacity());  // forget() must not need memory
    } catch (...) {
      events_.pop_back();
      throw;
    }
  }
  cuda::EventPtr event = nullptr;
  const auto create = [&] {
    const Result code = api_.cuEventCreate(&event, cuda::kEventDisableTiming);
    if (code == cuda::kSuccess) {  // recorded here, because the rest of in_context() may fail
      std::lock_guard<ForkMutex> lock(event_mutex_);
      events_[index] = event;
    }
    return code;
  };
  device_.check(device_.in_context(create), "cuEventCreate");  // after an error the entry stays null
  return event;
}

Event CudaDriver::record(Stream stream) {
  count(&DriverCounters::record);
  check_not_captured("record", stream);
  const cuda::EventPtr event = take_event();
  try {
    device_.check(device_.in_context([&] { return api_.cuEventRecord(event, cu(stream)); }), "cuEventRecord",
                  [&] { return "on stream " + std::to_string(stream); });
  } catch (...) {
    forget(reinterpret_cast<Event>(event));
    throw;
  }
  return reinterpret_cast<Event>(event);
}

bool CudaDriver::done(Event event) {
  if (event == 0) return true;
  device_.check_fork();
  const Result code = device_.in_context([&] { return api_.cuEventQuery(cu_event(event)); });
  if (code == cuda::kNotReady) return false;
  device_.check(code, "cuEventQuery");
  return true;
}

void CudaDriver::wait(Event event) {
  count(&DriverCounters::wait);
  if (event == 0) return;
  device_.check(device_.in_context([&] { return api_.cuEventSynchronize(cu_event(event)); }), "cuEventSynchronize");
}

// The event is used again by record(): recording it once more replaces what it marked.
void CudaDriver::forget(Event event) {
  if (event == 0) return;
  std::lock_guard<ForkMutex> lock(event_mutex_);
  KVMEM_ASSERT(idle_events_.size() < events_.size(), "an event is forgotten once");
  idle_events_.push_back(cu_event(event));
}

}  // namespace kvmem
