// The serving workload that kvmem, the floor and the peers are timed on: prompts come in one by one, all sequences
// decode in step, then all end. One template runs it over any manager, so that what is timed differs in nothing else.
//
// A manager offers
//   Manager(const Workload&)
//   void admit(i64 i, const i32* prompt)   room for the prompt of sequence i, what is cached found, all of it published
//   void step(const i32* last)             `last`: the tokens whose KV the step before wrote, null at the first step.
//                                          Publishes them, then makes room for one more of each sequence
//   void release(i64 i)                    the sequence ends
//   void forget()                          what is cached is given up; not timed
//   i64 blocks() const, metadata_bytes() const, checksum() const
#pragma once

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
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
  bool evict = false;     // keep what is cached from round to round: in a small pool every allocation evicts
  bool count = false;     // under callgrind: the totals are of the rounds after the first
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

// xorshift: tokens that no two sequences or rounds have in common.
struct Random {
  std::uint64_t state;
  i32 token() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return static_cast<i32>(state % 128000);
  }
};

// The names are what `valgrind --toggle-collect` is told. Each has a comment of its own in its code, because compilers
// fold functions that are alike.
#define KVMEM_MEASURED __attribute__((noinline))
template <class Manager>
KVMEM_MEASURED void measured_admit(Manager& m, i64 i, const i32* prompt) {
  asm volatile("# admit");
  m.admit(i, prompt);
}
template <class Manager>
KVMEM_MEASURED void measured_step(Manager& m, const i32* last) {
  asm volatile("# step");
  m.step(last);
}
template <class Manager>
KVMEM_MEASURED void measured_edge(Manager& m, const i32* last) {
  asm volatile("# edge");
  m.step(last);
}
template <class Manager>
KVMEM_MEASURED void measured_free(Manager& m, i64 i) {
  asm volatile("# free");
  m.release(i);
}

template <class Manager>
void run_round(Manager& m, const Workload& w, i64 round, Timings* out) {
  Random random{0x9E3779B97F4A7C15u * static_cast<std::uint64_t>(round + 1)};
  std::vector<i32> prompts(w.sequences * w.prompt), last(w.sequences);
  for (i32& token : prompts) token = random.token();
  for (i64 i = 1; i < w.sequences; ++i) {
    std::memcpy(&prompts[i * w.prompt], prompts.data(), static_cast<std::size_t>(w.shared) * sizeof(i32));
  }
  for (i64 i = 0; i < w.sequences; ++i) {
    const i64 begin = now_ns();
    measured_admit(m, i, &prompts[i * w.prompt]);
    out->admit_ns.push_back(now_ns() - begin);
  }
  for (i64 step = 0; step < w.steps; ++step) {
    for (i32& token : last) token = random.token();
    const i32* known = step == 0 ? nullptr : last.data();
    const bool edge = (w.prompt + step) % w.block == 0;
    const i64 begin = now_ns();
    if (edge) {
      measured_edge(m, known);
    } else {
      measured_step(m, known);
    }
    (edge ? out->edge_ns : out->step_ns).push_back(now_ns() - begin);
  }
  for (i64 i = 0; i < w.sequences; ++i) {
    const i64 begin = now_ns();
    measured_free(m, i);
    out->free_ns.push_back(now_ns() - begin);
  }
  if (!w.evict) m.forget();
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
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const auto take = [&](const char* name, i64* value) {
      if (word != name || i + 1 >= argc) return false;
      *value = std::atoll(argv[++i]);
      return true;
    };
    if (take("--sequences", &w.sequences) || take("--prompt", &w.prompt) || take("--shared", &w.shared) ||
        take("--steps", &w.steps) || take("--block", &w.block) || take("--pool", &w.pool) ||
        take("--rounds", &w.rounds)) {
      continue;
    }
    if (word == "--cache") {
      w.cache = true;
    } else if (word == "--metadata") {
      w.metadata = true;
    } else if (word == "--count") {
      w.count = true;
    } else if (word == "--evict") {
      w.evict = true;
    } else if (word == "--backend" && i + 1 < argc) {
      w.backend = argv[++i];
    } else {
      std::fprintf(
          stderr,
          "unknown word %s\nusage: [--sequences N] [--prompt N] [--shared N] [--steps N] [--block N] "
          "[--pool BLOCKS] [--rounds N] [--cache] [--metadata] [--evict] [--count] [--backend paged|virtual]\n",
          word.c_str());
      std::exit(2);
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
  print_list("admit_ns", timings.admit_ns);
  print_list("step_ns", timings.step_ns);
  print_list("edge_ns", timings.edge_ns);
  print_list("free_ns", timings.free_ns);
  std::printf("\"blocks\": %lld, \"metadata_bytes\": %lld, \"checksum\": %lld}\n", static_cast<long long>(m.blocks()),
              static_cast<long long>(m.metadata_bytes()), static_cast<long long>(m.checksum()));
  return 0;
}

}  // namespace kvmem_bench
