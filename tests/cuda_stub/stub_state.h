// What the stand-in for libcuda remembers, and the hooks by which tests steer it.
#pragma once

#include <condition_variable>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "cuda_api.h"

namespace stub {

using kvmem::cuda::AllocationHandle;
using kvmem::cuda::ContextPtr;
using kvmem::cuda::DeviceId;
using kvmem::cuda::DevicePtr;
using kvmem::cuda::EventPtr;
using kvmem::cuda::Result;
using kvmem::cuda::StreamPtr;

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
};

struct Allocation {
  long long bytes, offset;
  int mappings = 0;
  bool released = false;  // cuMemRelease was called; memory goes with the last mapping
};

struct Mapping {
  long long bytes;
  AllocationHandle handle;
  bool accessible = false;
};

struct EventState {
  bool recorded = false, held = false;
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
  std::set<StreamPtr> streams;
  std::map<DeviceId, int> context_uses;
};

State& state();

// Counts a call and decides whether it must fail: as asked by a test, or because cuInit or a current context is
// missing.
enum class Needs { kNothing, kInit, kContext };
Result enter(State& s, const char* call, Needs needs);

}  // namespace stub

// Counts the call, fails it where a test asked, and leaves the state locked as `s` for the rest of the function.
#define ENTER(call, needs)                    \
  State& s = state();                         \
  std::unique_lock<std::mutex> lock(s.mutex); \
  if (Result code = enter(s, call, needs)) return code
