#include "stub_state.h"

#include <sys/mman.h>
#include <sys/stat.h>

#include <cstdlib>

namespace stub {

thread_local std::vector<ContextPtr> context_stack;

namespace {
long long from_environment(const char* name, long long fallback) {
  const char* text = std::getenv(name);
  return text && *text ? std::atoll(text) : fallback;
}
}  // namespace

State::State() {
  settings["devices"] = 1;
  settings["vmm_supported"] = 1;
  settings["posix_fd_supported"] = 1;
  settings["rdma_supported"] = 1;
  settings["driver_version"] = 13000;
  settings["hold_events"] = 0;
  settings["foreign_bytes"] = 0;           // what other processes hold
  settings["unmaps_runs"] = 0;             // 1: cuMemUnmap takes several mappings, as drivers are seen to
  settings["recommended_bytes"] = 0;       // 0: as the minimum
  settings["rdma_granularity_bytes"] = 0;  // 0: as for other pages
  settings[kDead] = 0;
  streams[nullptr] = {};
  settings["memory_bytes"] = from_environment("KVMEM_STUB_MEMORY_BYTES", 1LL << 30);
  settings["granularity_bytes"] = from_environment("KVMEM_STUB_GRANULARITY_BYTES", 2LL << 20);
  memory_fd = memfd_create("cuda_stub", MFD_CLOEXEC);
}

State& state() {
  static State* only = new State;  // outlives every driver, as the real library's does
  return *only;
}

// The process ends and the library goes before its last users.
__attribute__((destructor)) void unload() { state().settings[kDead] = 4; }

bool Work::done() const {
  if (held) return false;
  for (const auto& work : after) {
    if (!work->done()) return false;
  }
  return true;
}

Result enter(State& s, const char* call, Needs needs) {
  ++s.calls[call];
  for (auto it = s.failures.begin(); it != s.failures.end(); ++it) {
    if (it->call != call || --it->countdown > 0) continue;
    const Result code = it->code;
    s.failures.erase(it);
    return code;
  }
  if (needs != Needs::kNothing && s.settings[kDead]) return static_cast<Result>(s.settings[kDead]);
  if (needs != Needs::kNothing && !s.initialized) return kNotInitialized;
  if (needs == Needs::kContext && context_stack.empty()) return kInvalidContext;
  return kOk;
}

}  // namespace stub

// ---- Hooks for tests -----------------------------------------------------------------------------------------------

extern "C" {

// Settings: see State::State.
int kvmem_stub_set(const char* name, long long value) {
  auto& s = stub::state();
  std::lock_guard<std::mutex> lock(s.mutex);
  if (!s.settings.count(name)) return -1;
  s.settings[name] = value;
  return 0;
}

// What the device holds now: reservations, allocations, mappings, events, streams, contexts, created_bytes,
// physical_bytes; and how many captures were spoiled.
long long kvmem_stub_get(const char* name) {
  auto& s = stub::state();
  std::lock_guard<std::mutex> lock(s.mutex);
  const std::string what = name;
  if (what == "reservations") return static_cast<long long>(s.reservations.size());
  if (what == "allocations") return static_cast<long long>(s.allocations.size());
  if (what == "mappings") return static_cast<long long>(s.mappings.size());
  if (what == "events") return static_cast<long long>(s.events.size());
  if (what == "streams") return static_cast<long long>(s.streams.size()) - 1;  // but the default one
  if (what == "spoiled_captures") return s.spoiled_captures;
  if (what == "created_bytes") return s.created_bytes;
  if (what == "contexts") {
    long long uses = 0;
    for (const auto& entry : s.context_uses) uses += entry.second;
    return uses;
  }
  if (what == "physical_bytes") {
    struct stat status{};
    return fstat(s.memory_fd, &status) == 0 ? static_cast<long long>(status.st_blocks) * 512 : -1;
  }
  return -1;
}

// The nth call from now of an entry point returns `code` and does nothing else.
void kvmem_stub_fail(const char* call, long long nth, int code) {
  auto& s = stub::state();
  std::lock_guard<std::mutex> lock(s.mutex);
  s.failures.push_back({call, nth, code});
}

long long kvmem_stub_pending() {
  auto& s = stub::state();
  std::lock_guard<std::mutex> lock(s.mutex);
  return static_cast<long long>(s.failures.size());
}

long long kvmem_stub_calls(const char* call) {
  auto& s = stub::state();
  std::lock_guard<std::mutex> lock(s.mutex);
  return s.calls[call];
}

void kvmem_stub_hide(const char* symbol) {
  auto& s = stub::state();
  std::lock_guard<std::mutex> lock(s.mutex);
  s.hidden.insert(symbol);
}

void kvmem_stub_complete_events() {
  auto& s = stub::state();
  std::lock_guard<std::mutex> lock(s.mutex);
  for (auto& entry : s.streams) {
    for (auto& work : entry.second.works) work->held = false;
    entry.second.works.clear();
  }
  s.events_completed.notify_all();
}

// A stream of a device's primary context, which the caller has retained.
void* kvmem_stub_stream(int device) {
  auto& s = stub::state();
  std::lock_guard<std::mutex> lock(s.mutex);
  const auto stream = reinterpret_cast<stub::StreamPtr>(new char);
  s.streams[stream].context = stub::context_of(device);
  return stream;
}

// Holds back what is put on one stream, or lets go of all of it.
void kvmem_stub_hold_stream(void* stream, int hold) {
  auto& s = stub::state();
  std::lock_guard<std::mutex> lock(s.mutex);
  auto& it = s.streams[static_cast<stub::StreamPtr>(stream)];
  it.held = hold != 0;
  if (hold) return;
  for (auto& work : it.works) work->held = false;
  it.works.clear();
  s.events_completed.notify_all();
}

void kvmem_stub_capture(void* stream, int on) {
  auto& s = stub::state();
  std::lock_guard<std::mutex> lock(s.mutex);
  s.streams[static_cast<stub::StreamPtr>(stream)].capturing = on != 0;
}

// One line for each, "what number number"; valid until the next call. `clear` forgets them.
const char* kvmem_stub_trace(int clear) {
  auto& s = stub::state();
  std::lock_guard<std::mutex> lock(s.mutex);
  static std::string text;
  text.clear();
  for (const auto& line : s.trace) text += line + "\n";
  if (clear) s.trace.clear();
  return text.c_str();
}
}
