// Host memory that runs out: random calls over small pools, each tried with its first allocation failing, its second,
// and so on until it succeeds. After each failure the digest of all state must be what it was, and check() must find
// nothing. Calls that are refused for other reasons are held to the same.
//
//   no_memory --seed N --steps S [--libcuda FILE]      ends with 0 when nothing was wrong
//
// libcuda: the CUDA driver over that library instead of memory of the CPU. Its pages must be of 4 KiB at least, and its
// own allocations must be its own.

#include <execinfo.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "allocator/allocator.h"

namespace {
thread_local long fail_in = 0;  // the allocation of this thread that fails, counted down; 0: none
bool failed = false;            // it has been met
void* callers[24];              // there
int num_callers = 0;

void* allocate(std::size_t bytes, std::size_t alignment) {
  if (fail_in > 0 && --fail_in == 0) {
    failed = true;
    num_callers = backtrace(callers, 24);
    throw std::bad_alloc();
  }
  void* memory = nullptr;
  if (posix_memalign(&memory, alignment < sizeof(void*) ? sizeof(void*) : alignment, bytes == 0 ? 1 : bytes) != 0) {
    throw std::bad_alloc();
  }
  return memory;
}
}  // namespace

// Not inlined: a compiler that saw both sides would take new and free() for a mismatch.
[[gnu::noinline]] void* operator new(std::size_t bytes) { return allocate(bytes, alignof(std::max_align_t)); }
void* operator new[](std::size_t bytes) { return allocate(bytes, alignof(std::max_align_t)); }
void* operator new(std::size_t bytes, std::align_val_t at) { return allocate(bytes, static_cast<std::size_t>(at)); }
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete[](void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }

using namespace kvmem;

namespace {

constexpr i64 kPageBytes = 4096, kBlockTokens = 8, kMaxTokens = 240, kMaxSequences = 6, kRows = 16;

struct Layout {
  const char* name;
  i64 window = 0;                            // tokens of the second group's window; 0: no second group
  bool state = false;                        // a group of fixed size
  bool recording = false, together = false;  // together: a second allocator on the pool
  i64 events = 0, map_ahead = 0;
  Zero zero = Zero::fresh;
  const char* policy = "lru";
};

const Layout kLayouts[] = {
    {"plain"},
    {"plain, density", 0, false, false, false, 0, 0, Zero::always, "density"},
    {"window", 20, false, false, false, 0, 0, Zero::fresh, "density"},
    {"window, events", 1, false, false, false, 64},
    {"state", 0, true},
    {"state, window, recording", 40, true, true},
    {"two allocators", 0, false, false, true},
    {"map ahead, events", 0, false, false, false, 16, 32},
};

GroupGeometry group_of(bool paged, Growth growth, i64 window, i64 token_bytes) {
  GroupGeometry group;
  group.growth = growth;
  group.window_tokens = window;
  group.block_tokens = growth == Growth::fixed ? 1 : kBlockTokens;
  group.max_tokens = growth == Growth::fixed ? 1 : kMaxTokens;
  group.row_tokens = paged ? 0 : round_up(group.max_tokens * token_bytes, kPageBytes) / token_bytes;
  group.max_blocks = paged ? kReservedBlocks + kMaxSequences * 2 * ceil_div(group.max_tokens, group.block_tokens) : 0;
  const i64 row_slots = ceil_div(group.row_tokens * token_bytes, kPageBytes);
  group.token_bytes = {token_bytes, token_bytes};
  group.row_slots = {row_slots, row_slots};
  const i64 slots =
      paged ? ceil_div(group.max_blocks * group.block_tokens * token_bytes, kPageBytes) : kRows * row_slots + 1;
  group.arena_slots = {slots, slots};
  return group;
}

Geometry geometry_of(const Layout& layout, bool paged) {
  Geometry geometry;
  geometry.page_bytes = kPageBytes;
  geometry.max_sequences = kMaxSequences;
  geometry.rows = kRows;
  geometry.tail_guard_tokens = paged ? 0 : 4;
  geometry.map_ahead_tokens = paged ? 0 : layout.map_ahead;
  geometry.zero = layout.zero;
  geometry.groups.push_back(group_of(paged, Growth::token, 0, 256));
  if (layout.window > 0) geometry.groups.push_back(group_of(paged, Growth::token, layout.window, 128));
  if (layout.state) geometry.groups.push_back(group_of(paged, Growth::fixed, 0, 1024));
  return geometry;
}

struct Tokens {
  i32 handle = 0;
  i64 tokens = 0, committed = 0;
};

class World {
 public:
  World(const Layout& layout, bool paged, std::uint64_t seed, std::shared_ptr<Driver> driver)
      : layout_(layout), random_(seed) {
    pool_ = std::make_shared<PagePool>(kPageBytes, kPages, std::move(driver), false);
    PrefixOptions prefix;
    prefix.policy = layout.policy;
    prefix.event_capacity = layout.events;
    for (bool other : {false, true}) {
      if (other && !layout.together) break;
      caches_.push_back(std::make_unique<Allocator>(geometry_of(layout, paged != other), pool_, paged != other, kPages,
                                                    !layout.together, prefix));
      if (layout.recording) caches_.back()->record();
      live_.emplace_back();
      pins_.emplace_back();
    }
  }

  void run(i64 steps) {
    for (i64 i = 0; i < steps; ++i) {
      now_ = static_cast<std::size_t>(below(static_cast<i64>(caches_.size())));
      step();
    }
    while (!live_[now_].empty()) release(0);
  }

  i64 calls = 0, faults = 0, refusals = 0, late = 0;

 private:
  static constexpr i64 kPages = 60;

  i64 below(i64 n) { return static_cast<i64>(random_() % static_cast<std::uint64_t>(n)); }
  Allocator& cache() { return *caches_[now_]; }
  Tokens& any() { return live_[now_][static_cast<std::size_t>(below(static_cast<i64>(live_[now_].size())))]; }

  std::vector<i32> prompt(i64 length) {
    std::vector<i32> ids(static_cast<std::size_t>(length));
    for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<i32>(below(30) == 0 ? below(1 << 20) : i);
    return ids;
  }

  static void fail(const char* call, const std::string& what, long nth) {
    std::fprintf(stderr, "no_memory: %s, allocation %ld: %s\n", call, nth, what.c_str());
    std::fflush(stdout);
    if (nth > 0) backtrace_symbols_fd(callers, num_callers, 2);  // names by -rdynamic, lines by addr2line
    std::_Exit(1);
  }

  void compare(const char* call, const std::pair<std::uint64_t, i64>& before, long nth) {
    for (const auto& c : caches_) {
      const std::vector<std::string> found = c->check();
      if (!found.empty()) fail(call, found.front(), nth);
    }
    const auto now = cache().digest();
    if (now.second != before.second) {  // a piece of the call stands, or the driver had written, or the order has aged
      ++late;
    } else if (now != before) {
      fail(call, "a failed call has changed something", nth);
    }
  }

  // True if it came through in the end.
  bool call(const char* name, const std::function<void()>& f) {
    ++calls;
    for (long nth = 1;; ++nth) {
      const auto before = cache().digest();
      failed = false;
      fail_in = nth;
      bool right = true;
      try {
        f();
        fail_in = 0;
        return true;
      } catch (const std::bad_alloc&) {
        right = failed;
      } catch (const DeviceError& e) {  // of the fault only: nothing else is wrong with the device
        if (!failed) fail(name, e.what(), 0);
      } catch (const Error&) {  // a refusal, of this call or because of the fault
      }
      fail_in = 0;
      if (!right) fail(name, "a bad_alloc that was none", nth);
      compare(name, before, nth);
      if (!failed) return ++refusals, false;
      ++faults;
    }
  }

  void step() {
    std::vector<Tokens>& live = live_[now_];
    const i64 choice = live.empty() ? 0 : below(100);
    if (choice < 12) {
      admit();
    } else if (choice < 18) {
      admit_batch();
    } else if (choice < 40) {
      grow(any());
    } else if (choice < 52) {
      batch();
    } else if (choice < 60) {
      Tokens& t = any();
      const i64 keep = below(t.tokens + 1);
      if (!call("truncate", [&] { cache().truncate(t.handle, keep); })) return;
      t.tokens = keep, t.committed = std::min(keep, t.committed);
    } else if (choice < 68) {
      Tokens child = any();
      if (!call("fork", [&] { child.handle = static_cast<i32>(cache().fork(child.handle)); })) return;
      child.tokens = child.committed;
      live.push_back(child);
    } else if (choice < 76) {
      release(static_cast<std::size_t>(below(static_cast<i64>(live.size()))));
    } else {
      keep(choice);
    }
  }

  void keep(i64 choice) {
    if (choice < 79) {
      pin();
    } else if (choice < 82) {
      call("snapshot", [&] { cache().snapshot(any_handle_); });
    } else if (choice < 85) {
      const i64 start = below(40);
      call("retain", [&] { cache().retain(any_handle_, start, start + 60, 10, 100); });
    } else if (choice < 88) {
      call("compact", [&] { cache().compact(-1); });
    } else if (choice < 91) {
      const i64 bytes = below(2) ? -1 : 8 * kPageBytes;
      call("trim", [&] { cache().trim(bytes); });
    } else if (choice < 93) {
      call("clear_cache", [&] { cache().clear_cache(); });
    } else if (choice < 97) {
      const i64 pages = kPages - 40 + below(80);
      call("set_memory", [&] { cache().set_memory(pages); });
    } else {
      call("drain_events", [&] { cache().drain_events(0, -1, below(2) == 0); });
      if (layout_.recording) call("take_ops", [&] { cache().take_ops(); });
    }
    any_handle_ = live_[now_].empty() ? 0 : any().handle;
  }

  void admit() {
    const std::vector<i32> ids = prompt(below(100));
    PrefixKey key;
    key.salt = "a salt that is longer than a string holds by itself, number " + std::to_string(below(3));
    Tokens t;
    i64 cached = 0;
    const auto admit = [&] { return cache().admit(ids.data(), static_cast<i64>(ids.size()), key, &cached); };
    if (!call("admit", [&] { t.handle = static_cast<i32>(admit()); })) return;
    t.tokens = t.committed = cached;
    live_[now_].push_back(t);
  }

  void admit_batch() {
    const i32 counts[] = {static_cast<i32>(below(60)), static_cast<i32>(below(60)), static_cast<i32>(below(60))};
    const std::vector<i32> ids = prompt(counts[0] + counts[1] + counts[2]);
    i32 handles[3], cached[3];
    i64 done = 0;
    const bool through =
        call("admit_batch", [&] { done = cache().admit_batch(ids.data(), counts, 3, PrefixKey(), handles, cached); });
    for (i64 i = 0; through && i < done; ++i) live_[now_].push_back({handles[i], counts[i], cached[i]});
  }

  void grow(Tokens& t) {
    const i32 n = static_cast<i32>(std::min(below(below(4) ? 12 : 80), kMaxTokens - t.tokens));
    TableChanges changes;
    const bool extended = below(2) ? call("extend", [&] { cache().extend(&t.handle, &n, 1, -1); })
                                   : call("extend, told", [&] { cache().extend(&t.handle, &n, 1, -1, &changes); });
    if (!extended) return;
    t.tokens += n;
    const i32 due = static_cast<i32>(t.tokens - t.committed);
    const std::vector<i32> ids = ids_from(t.committed, due);
    const i32* known = below(12) == 0 ? nullptr : ids.data();
    const bool committed = below(2)
                               ? call("commit", [&] { cache().commit(&t.handle, &due, 1, -1, known); })
                               : call("commit, told", [&] { cache().commit(&t.handle, &due, 1, -1, known, &changes); });
    if (committed) t.committed = t.tokens;
  }

  std::vector<i32> ids_from(i64 first, i64 count) {
    std::vector<i32> ids = prompt(first + count);
    ids.erase(ids.begin(), ids.begin() + first);
    return ids;
  }

  // A step of all sequences, with padding, into buffers of all groups; or an extend of all.
  void batch() {
    std::vector<i32> handles, counts, ids;
    for (const Tokens& t : live_[now_]) {
      handles.push_back(t.handle);
      counts.push_back(static_cast<i32>(std::min(below(20), kMaxTokens - t.tokens)));
      for (i32 id : ids_from(t.committed, t.tokens - t.committed)) ids.push_back(id);
    }
    const i64 n = static_cast<i64>(handles.size());
    if (below(3) == 0) {
      if (!call("extend of all", [&] { cache().extend(handles.data(), counts.data(), n, -1); })) return;
      for (std::size_t i = 0; i < handles.size(); ++i) live_[now_][i].tokens += counts[i];
      return;
    }
    BatchBuffers out;
    out.max_sequences = 2 * kMaxSequences;
    out.max_new_tokens = out.max_indices = out.max_blocks = 4096;
    std::vector<BatchMarks> marks(cache().groups().count(), BatchMarks(out));
    std::vector<GroupBuffers> groups;
    for (std::size_t g = 0; g < marks.size(); ++g) groups.push_back({static_cast<i64>(g), &out, &marks[g], {}});
    const auto step = [&] {
      cache().step(handles.data(), counts.data(), n, ids.data(), static_cast<i64>(ids.size()), n + below(2),
                   groups.data(), static_cast<i64>(groups.size()));
    };
    if (!call("step", step)) return;
    for (std::size_t i = 0; i < handles.size(); ++i) {
      live_[now_][i].committed = live_[now_][i].tokens;
      live_[now_][i].tokens += counts[i];
    }
  }

  void pin() {
    std::vector<i64>& pins = pins_[now_];
    if (!pins.empty()) {
      call("unpin", [&] { cache().unpin(pins.back()); });
      pins.pop_back();
      return;
    }
    i64 pin = 0;
    if (call("pin", [&] { pin = cache().pin(any_handle_, -1).pin; })) pins.push_back(pin);
  }

  void release(std::size_t which) {
    std::vector<Tokens>& live = live_[now_];
    if (!call("free", [&] { cache().free(&live[which].handle, 1); })) fail("free", "was refused", 0);
    std::swap(live[which], live.back());
    live.pop_back();
  }

  const Layout& layout_;
  std::mt19937_64 random_;
  std::shared_ptr<PagePool> pool_;
  std::vector<std::unique_ptr<Allocator>> caches_;
  std::size_t now_ = 0;  // the one that is called
  std::vector<std::vector<Tokens>> live_;
  std::vector<std::vector<i64>> pins_;
  i32 any_handle_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  std::uint64_t seed = 1;
  i64 steps = 250;
  std::string libcuda;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::string(argv[i]) == "--seed") seed = std::strtoull(argv[i + 1], nullptr, 10);
    if (std::string(argv[i]) == "--steps") steps = std::atoll(argv[i + 1]);
    if (std::string(argv[i]) == "--libcuda") libcuda = argv[i + 1];
  }
  std::printf("no_memory: --seed %llu --steps %lld\n", static_cast<unsigned long long>(seed),
              static_cast<long long>(steps));
  for (const Layout& layout : kLayouts) {
    for (bool paged : {false, true}) {
      World world(layout, paged, seed, libcuda.empty() ? make_host_driver() : make_cuda_driver(0, libcuda));
      world.run(steps);
      std::printf("%s, %s: %lld calls, %lld failed allocations, %lld refused otherwise\n", paged ? "paged" : "virtual",
                  layout.name, static_cast<long long>(world.calls), static_cast<long long>(world.faults),
                  static_cast<long long>(world.refusals));
      std::fflush(stdout);
      if (world.faults - world.late < world.calls / 2) {
        std::fprintf(stderr, "no_memory: too few allocations were met to prove anything\n");
        return 1;
      }
    }
  }
}
