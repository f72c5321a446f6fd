// What the stand-in for libcuda remembers, and the hooks by which tests steer it.
#pragma once

#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "driver/cuda/cuda_api.h"

namespace stub {

using kvmem::cuda::AllocationHandle;
using kvmem::cuda::ContextPtr;
using kvmem::cuda::DeviceId;
using kvmem::cuda::DevicePtr;
using kvmem::cuda::EventPtr;
using kvmem::cuda::Result;
using kvmem::cuda::StreamPtr;

// An error that every call returns once it is there: what a dead context or an unloaded driver looks like.
inline constexpr const char* kDead = "dead";

enum Code : Result {
  kOk = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kNotInitialized = 3,
  kInvalidDevice = 101,
  kInvalidContext = 201,
  kNoDevice = 100,
  kInvalidHandle = 400,
  kNotFound = 500,
  kNotReady = 600,
  kIllegalAddress = 700,
  kLaunchTimeout = 702,
  kNotSupported = 801,
  kCaptureUnsupported = 900,
  kCaptureInvalidated = 901,
  kCapturedEvent = 907,
};

struct Allocation {
  long long bytes, offset;
  int mappings = 0;
  bool shareable = false;
  bool released = false;  // cuMemRelease was called; memory goes with the last mapping
};

struct Mapping {
  long long bytes;
  AllocationHandle handle;
  bool accessible = false;
};

// What an event stands for: all that its stream had been given. Done when it is no longer held back and all that the
// stream had to wait for is done.
struct Work {
  bool held = false;
  std::vector<std::shared_ptr<Work>> after;
  bool done() const;
};

struct EventState {
  std::shared_ptr<Work> work;  // none: never recorded
  bool captured = false;
};

// What graphs of the stand-in are made of.
struct Fill {
  DevicePtr at;
  unsigned char value;
  size_t bytes;
};

struct StreamState {
  ContextPtr context = nullptr;
  bool held = false, capturing = false;
  std::unique_ptr<std::vector<Fill>> graph;  // while it is captured by cuStreamBeginCapture: instead of doing it
  std::vector<std::shared_ptr<Work>> after;  // what it was told to wait for
  std::vector<std::shared_ptr<Work>> works;  // what was recorded on it and held back
};

struct Failure {
  std::string call;
  long long countdown;
  Result code;
};

struct State {
  State();
  std::mutex mutex;
  std::condition_variable events_completed;
  // Settings: kvmem_stub_set.
  std::map<std::string, long long> settings;
  std::set<std::string> hidden;  // entry points that cuGetProcAddress does not find
  std::vector<Failure> failures;
  std::map<std::string, long long> calls;
  // The device.
  bool initialized = false;
  int memory_fd = -1;
  long long file_end = 0;
  std::map<long long, std::vector<long long>> free_offsets;  // by size
  long long created_bytes = 0;
  std::map<DevicePtr, long long> reservations;
  std::map<AllocationHandle, Allocation> allocations;
  std::map<DevicePtr, Mapping> mappings;
  AllocationHandle last_handle = 0x1000;
  std::map<EventPtr, EventState> events;
  std::map<StreamPtr, StreamState> streams;  // 0 is among them: the default stream
  std::vector<std::string> trace;            // what was put on streams, asked of events and unmapped, in order
  long long spoiled_captures = 0;
  std::map<DeviceId, int> context_uses;
};

State& state();
extern thread_local std::vector<ContextPtr> context_stack;
ContextPtr context_of(DeviceId device);
void* pointer(DevicePtr at);
Result accessible(State& s, DevicePtr at, size_t bytes);

// Counts a call and decides whether it must fail: as asked by a test, or because cuInit or a current context is
// missing.
enum class Needs { kNothing, kInit, kContext };
Result enter(State& s, const char* call, Needs needs);

// Calls that may wait for the device, or ask it, fail and spoil a capture under way, unless the calling thread has said
// that it knows what it does. All of virtual memory management is taken for such: NVIDIA does not say which calls are.
Result unsafe(State& s);

}  // namespace stub

// Counts the call, fails it where a test asked, and leaves the state locked as `s` for the rest of the function.
#define ENTER(call, needs)                    \
  State& s = state();                         \
  std::unique_lock<std::mutex> lock(s.mutex); \
  if (Result code = enter(s, call, needs)) return code

#define ENTER_UNSAFE(call)   \
  ENTER(call, Needs::kInit); \
  if (Result code = unsafe(s)) return code
