// Streams, events and what is put on streams. An event stands for all that its stream was given before it, and is done
// when nothing of that is held back; so a fence that was put on the wrong stream is seen to be done too early.

#include <chrono>
#include <cstring>

#include "stub_state.h"

using namespace stub;

namespace {

constexpr int kModeGlobal = 0;
thread_local int capture_mode = kModeGlobal;

// The handles 0 and 1 both mean the default stream. Others must exist.
StreamState* find(State& s, StreamPtr stream) {
  auto it = s.streams.find(reinterpret_cast<uintptr_t>(stream) == 1 ? nullptr : stream);
  return it == s.streams.end() ? nullptr : &it->second;
}

// A stream belongs to one context, the default one to whichever is current.
bool of_current_context(const StreamState& stream) { return !stream.context || stream.context == context_stack.back(); }

std::string number(const void* value) { return std::to_string(reinterpret_cast<uintptr_t>(value)); }

Result put(State& s, const char* what, StreamPtr stream) {
  StreamState* on = find(s, stream);
  if (!on || !of_current_context(*on)) return kInvalidHandle;
  s.trace.push_back(std::string(on->capturing ? "captured " : "") + what + " " + number(stream));
  return kOk;
}

}  // namespace

Result stub::unsafe(State& s) {
  for (const auto& entry : s.streams) {
    if (!entry.second.capturing || capture_mode != kModeGlobal) continue;
    ++s.spoiled_captures;
    return kCaptureUnsupported;
  }
  return kOk;
}

extern "C" {

// ---- Contents ------------------------------------------------------------------------------------------------------

Result cuMemsetD8Async(DevicePtr at, unsigned char value, size_t bytes, StreamPtr stream) {
  ENTER("cuMemsetD8Async", Needs::kContext);
  if (Result code = accessible(s, at, bytes)) return code;
  if (Result code = put(s, "memset", stream)) return code;
  if (auto& graph = find(s, stream)->graph) {
    graph->push_back({at, value, bytes});
    return kOk;
  }
  std::memset(pointer(at), value, bytes);
  return kOk;
}

Result cuMemcpyDtoDAsync_v2(DevicePtr to, DevicePtr from, size_t bytes, StreamPtr stream) {
  ENTER("cuMemcpyDtoDAsync", Needs::kContext);
  if (Result code = accessible(s, to, bytes)) return code;
  if (Result code = accessible(s, from, bytes)) return code;
  if (Result code = put(s, "memcpy", stream)) return code;
  std::memmove(pointer(to), pointer(from), bytes);
  return kOk;
}

Result cuMemcpyHtoDAsync_v2(DevicePtr to, const void* from, size_t bytes, StreamPtr stream) {
  ENTER("cuMemcpyHtoDAsync", Needs::kContext);
  if (Result code = accessible(s, to, bytes)) return code;
  if (Result code = put(s, "memcpy", stream)) return code;
  std::memcpy(pointer(to), from, bytes);
  return kOk;
}

Result cuMemcpyDtoHAsync_v2(void* to, DevicePtr from, size_t bytes, StreamPtr stream) {
  ENTER("cuMemcpyDtoHAsync", Needs::kContext);
  if (Result code = accessible(s, from, bytes)) return code;
  if (Result code = put(s, "memcpy", stream)) return code;
  std::memcpy(to, pointer(from), bytes);
  return kOk;
}

Result cuMemcpyHtoD_v2(DevicePtr to, const void* from, size_t bytes) {
  ENTER("cuMemcpyHtoD", Needs::kContext);
  if (Result code = accessible(s, to, bytes)) return code;
  std::memcpy(pointer(to), from, bytes);
  return kOk;
}

Result cuMemcpyDtoH_v2(void* to, DevicePtr from, size_t bytes) {
  ENTER("cuMemcpyDtoH", Needs::kContext);
  if (Result code = accessible(s, from, bytes)) return code;
  std::memcpy(to, pointer(from), bytes);
  return kOk;
}

// ---- Streams -------------------------------------------------------------------------------------------------------

Result cuStreamCreate(StreamPtr* stream, unsigned flags) {
  ENTER("cuStreamCreate", Needs::kContext);
  if (flags > 1) return kInvalidValue;
  *stream = reinterpret_cast<StreamPtr>(new char);
  s.streams[*stream].context = context_stack.back();
  return kOk;
}

Result cuStreamDestroy_v2(StreamPtr stream) {
  ENTER("cuStreamDestroy", Needs::kContext);
  if (!stream || !s.streams.erase(stream)) return kInvalidHandle;
  delete reinterpret_cast<char*>(stream);
  return kOk;
}

Result cuStreamGetCtx(StreamPtr stream, ContextPtr* context) {
  ENTER("cuStreamGetCtx", Needs::kContext);
  const StreamState* found = find(s, stream);
  if (!found) return kInvalidHandle;  // the real one may crash
  *context = found->context ? found->context : context_stack.back();
  return kOk;
}

Result cuStreamIsCapturing(StreamPtr stream, int* status) {
  ENTER("cuStreamIsCapturing", Needs::kContext);
  const StreamState* found = find(s, stream);
  if (!found || !of_current_context(*found)) return kInvalidHandle;
  *status = found->capturing;
  return kOk;
}

Result cuStreamWaitEvent(StreamPtr stream, EventPtr event, unsigned flags) {
  ENTER("cuStreamWaitEvent", Needs::kContext);
  if (flags > 1) return kInvalidValue;
  if (!s.events.count(event)) return kInvalidHandle;
  if (Result code = put(s, "wait", stream)) return code;
  const auto& work = s.events[event].work;
  if (work && !work->done()) find(s, stream)->after.push_back(work);
  return kOk;
}

Result cuThreadExchangeStreamCaptureMode(int* mode) {
  ENTER("cuThreadExchangeStreamCaptureMode", Needs::kInit);
  if (*mode < 0 || *mode > 2) return kInvalidValue;
  std::swap(*mode, capture_mode);
  return kOk;
}

// ---- Events --------------------------------------------------------------------------------------------------------

Result cuEventCreate(EventPtr* event, unsigned flags) {
  ENTER("cuEventCreate", Needs::kContext);
  if (flags > 7) return kInvalidValue;
  *event = reinterpret_cast<EventPtr>(new char);
  s.events[*event] = {};
  return kOk;
}

Result cuEventRecord(EventPtr event, StreamPtr stream) {
  ENTER("cuEventRecord", Needs::kContext);
  if (!s.events.count(event)) return kInvalidHandle;
  if (Result code = put(s, "record", stream)) return code;
  StreamState& on = *find(s, stream);
  auto work = std::make_shared<Work>();
  work->held = s.settings["hold_events"] != 0 || on.held;
  for (const auto& before : on.after) {
    if (!before->done()) work->after.push_back(before);
  }
  on.after = work->after;
  if (work->held) on.works.push_back(work);
  s.events[event] = {work, on.capturing};
  return kOk;
}

Result cuEventQuery(EventPtr event) {
  ENTER("cuEventQuery", Needs::kContext);
  if (Result code = unsafe(s)) return code;
  const auto it = s.events.find(event);
  if (it == s.events.end()) return kInvalidHandle;
  if (it->second.captured) return kCapturedEvent;
  s.trace.push_back("query " + number(event));
  return it->second.work && !it->second.work->done() ? kNotReady : kOk;
}

// Blocks as the real one does, but not for ever: a test that forgot to complete its events gets LAUNCH_TIMEOUT.
Result cuEventSynchronize(EventPtr event) {
  ENTER("cuEventSynchronize", Needs::kContext);
  if (Result code = unsafe(s)) return code;
  const auto it = s.events.find(event);
  if (it == s.events.end()) return kInvalidHandle;
  if (it->second.captured) return kCapturedEvent;
  s.trace.push_back("synchronize " + number(event));
  const auto work = it->second.work;
  const bool done = s.events_completed.wait_for(lock, std::chrono::seconds(10), [&] { return !work || work->done(); });
  return done ? kOk : kLaunchTimeout;
}

Result cuEventDestroy_v2(EventPtr event) {
  ENTER("cuEventDestroy", Needs::kContext);
  if (!s.events.erase(event)) return kInvalidHandle;
  delete reinterpret_cast<char*>(event);
  return kOk;
}

// ---- Graphs --------------------------------------------------------------------------------------------------------

// As much of them as the probes of the driver's rules ask for: one stream, and what it fills.
Result cuStreamBeginCapture_v2(StreamPtr stream, int mode) {
  ENTER("cuStreamBeginCapture", Needs::kContext);
  StreamState* on = find(s, stream);
  if (!on || !stream || on->capturing || mode != kModeGlobal) return kInvalidValue;
  on->capturing = true;
  on->graph = std::make_unique<std::vector<Fill>>();
  s.spoiled_captures = 0;
  return kOk;
}

Result cuStreamEndCapture(StreamPtr stream, std::vector<Fill>** graph) {
  ENTER("cuStreamEndCapture", Needs::kContext);
  StreamState* on = find(s, stream);
  if (!on || !on->graph) return kInvalidValue;
  on->capturing = false;
  *graph = on->graph.release();
  return s.spoiled_captures ? kCaptureInvalidated : kOk;
}

Result cuGraphInstantiateWithFlags(std::vector<Fill>** runnable, std::vector<Fill>* graph, unsigned long long flags) {
  ENTER("cuGraphInstantiate", Needs::kContext);
  if (flags) return kInvalidValue;
  *runnable = graph;
  return kOk;
}

Result cuGraphLaunch(const std::vector<Fill>* runnable, StreamPtr stream) {
  ENTER("cuGraphLaunch", Needs::kContext);
  for (const Fill& fill : *runnable) {
    if (Result code = accessible(s, fill.at, fill.bytes)) return code;
    std::memset(pointer(fill.at), fill.value, fill.bytes);
  }
  return put(s, "graph", stream);
}

Result cuStreamSynchronize(StreamPtr stream) {
  ENTER("cuStreamSynchronize", Needs::kContext);
  if (Result code = unsafe(s)) return code;
  return find(s, stream) ? kOk : kInvalidHandle;
}
}
