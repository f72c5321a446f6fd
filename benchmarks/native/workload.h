// The serving workload that kvmem, the C++ baseline and the peers are timed on: prompts are admitted one by one, all
// sequences decode in step, then all end. One template runs it over any manager, so only the manager differs.
//
// A manager offers
//   Manager(const Workload&)
//   void admit(i64 i, const i32* prompt)   finds what is cached of the prompt of sequence i, makes room, publishes it
//   void step(const i32* last)             publishes `last`, the tokens whose KV the previous step wrote (null at the
//                                          first step), then makes room for one more token of each sequence
//   void release(i64 i)                    ends the sequence
//   void clear()                           evicts what is cached; not timed
//   i64 blocks() const, metadata_bytes() const, checksum() const
#pragma once

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#if __has_include(<valgrind/callgrind.h>)
#include <valgrind/callgrind.h>
#else
#define CALLGRIND_ZERO_STATS std::fprintf(stderr, "compiled without valgrind's headers\n"), std::exit(2)
#endif

namespace kvmem_bench {

using i64 = std::int64_t;
using i32 = std::int32_t;

struct Workload {
  i64 sequences = 256, prompt = 2048, shared = 0, steps = 512, block = 16, pool = 49152, rounds = 2;
  bool cache = false;     // share prefixes
  bool metadata = false;  // every tensor that kernels read, not only slots and what is new in the table
  bool evict = false;     // what is cached stays from round to round: in a small pool every allocation evicts
  bool count = false;     // under callgrind: the totals leave out the first round
  std::string backend = "paged";

  i64 blocks_each() const { return (prompt + steps + block - 1) / block; }
};

struct Timings {
  std::vector<i64> admit_ns, step_ns, edge_ns, free_ns;
};

inline i64 now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

template <class Call>
i64 timed(Call call) {
  const i64 begin = now_ns();
  call();
  return now_ns() - begin;
}

// xorshift: tokens that no two sequences or rounds have in common.
struct Random {
  std::uint64_t state;
  i32 token() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return static_cast<i32>(state % 128000);
  }
};

// `valgrind --toggle-collect` takes these names. Each function has a comment of its own in its code, because compilers
// fold functions that are alike.
#define KVMEM_MEASURED(PHASE, CALL, ...)                                     \
  template <class Manager>                                                   \
  __attribute__((noinline)) void measured_##PHASE(Manager& m, __VA_ARGS__) { \
    asm volatile("# " #PHASE);                                               \
    CALL;                                                                    \
  }
KVMEM_MEASURED(admit, m.admit(i, prompt), i64 i, const i32* prompt)
KVMEM_MEASURED(step, m.step(last), const i32* last)
KVMEM_MEASURED(edge, m.step(last), const i32* last)
KVMEM_MEASURED(free, m.release(i), i64 i)

template <class Manager>
void run_round(Manager& m, const Workload& w, i64 round, Timings* out) {
  Random random{0x9E3779B97F4A7C15u * static_cast<std::uint64_t>(round + 1)};
  std::vector<i32> prompts(w.sequences * w.prompt), last(w.sequences);
  for (i32& token : prompts) token = random.token();
  for (i64 i = 1; i < w.sequences; ++i) {
    std::memcpy(&prompts[i * w.prompt], prompts.data(), static_cast<std::size_t>(w.shared) * sizeof(i32));
  }
  for (i64 i = 0; i < w.sequences; ++i) {
    out->admit_ns.push_back(timed([&] { measured_admit(m, i, &prompts[i * w.prompt]); }));
  }
  for (i64 step = 0; step < w.steps; ++step) {
    for (i32& token : last) token = random.token();
    const i32* known = step == 0 ? nullptr : last.data();
    if ((w.prompt + step) % w.block == 0) {
      out->edge_ns.push_back(timed([&] { measured_edge(m, known); }));
    } else {
      out->step_ns.push_back(timed([&] { measured_step(m, known); }));
    }
  }
  for (i64 i = 0; i < w.sequences; ++i) out->free_ns.push_back(timed([&] { measured_free(m, i); }));
  if (!w.evict) m.clear();
}

inline void print_list(const char* name, const std::vector<i64>& values) {
  std::printf("\"%s\": [", name);
  for (std::size_t i = 0; i < values.size(); ++i) {
    std::printf("%s%lld", i ? ", " : "", static_cast<long long>(values[i]));
  }
  std::printf("], ");
}

inline Workload parse(int argc, char** argv) {
  Workload w;
  const std::map<std::string, i64*> numbers = {
      {"--sequences", &w.sequences}, {"--prompt", &w.prompt}, {"--shared", &w.shared}, {"--steps", &w.steps},
      {"--block", &w.block},         {"--pool", &w.pool},     {"--rounds", &w.rounds}};
  const std::map<std::string, bool*> flags = {
      {"--cache", &w.cache}, {"--metadata", &w.metadata}, {"--evict", &w.evict}, {"--count", &w.count}};
  for (int i = 1; i < argc; ++i) {
    const auto flag = flags.find(argv[i]);
    const auto number = numbers.find(argv[i]);
    if (flag != flags.end()) {
      *flag->second = true;
    } else if (number != numbers.end() && i + 1 < argc) {
      *number->second = std::atoll(argv[++i]);
    } else if (std::string(argv[i]) == "--backend" && i + 1 < argc) {
      w.backend = argv[++i];
    } else {
      std::fprintf(stderr, "unknown word %s\nusage: [--backend paged|virtual]", argv[i]);
      for (const auto& [name, value] : numbers) std::fprintf(stderr, " [%s N]", name.c_str());
      for (const auto& [name, value] : flags) std::fprintf(stderr, " [%s]", name.c_str());
      std::fprintf(stderr, "\n"), std::exit(2);
    }
  }
  return w;
}

// Runs `rounds` rounds; the first warms up and is not reported unless it is the only one.
template <class Manager>
int run(int argc, char** argv) {
  const Workload w = parse(argc, argv);
  Manager m(w);
  Timings timings;
  for (i64 round = 0; round < w.rounds; ++round) {
    if (round == 1) {
      timings = {};
      if (w.count) CALLGRIND_ZERO_STATS;
    }
    run_round(m, w, round, &timings);
  }
  std::printf("{");
  print_list("admit_ns", timings.admit_ns), print_list("step_ns", timings.step_ns);
  print_list("edge_ns", timings.edge_ns), print_list("free_ns", timings.free_ns);
  std::printf("\"blocks\": %lld, \"metadata_bytes\": %lld, \"checksum\": %lld}\n", static_cast<long long>(m.blocks()),
              static_cast<long long>(m.metadata_bytes()), static_cast<long long>(m.checksum()));
  return 0;
}

}  // namespace kvmem_bench
