// Random worlds with their content checked: allocators of both kinds over real memory, driven at random, beside a model
// of what ought to be. Every token carries bytes that follow from all tokens before it, so that a hit with another's
// bytes, a write that lands elsewhere and a state of other tokens are seen at once; after each refused call everything
// is compared with what it was.
//
//   soak [--backend paged|virtual] [--operations N] [--seconds S] [--seed N]
//        [--without pins,events,stats,states,finite]   leave these promises out
//        [--world N] [--shrink] [--trace]       run one world; with as few operations as show its failure; tell them
//        [--check]                              everything is compared after each operation
//        [--keep-going]                         go on after a failure
//
// Ends with 0 when nothing was wrong. The first world's seed is `--seed`, else the clock's.

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "soak_world.h"

namespace kvmem_soak {
namespace {

struct Options {
  bool paged = true, both = true, shrink = false, trace = false, check = false, keep_going = false, one_world = false;
  i64 operations = 200'000;
  double seconds = 1e9;
  u64 seed = 0;
  Promises promises;
};

Progress progress;
char current[1024];  // the world in progress, for a handler that may not allocate

void say(const char* text) {
  if (write(STDOUT_FILENO, text, std::strlen(text)) < 0) _exit(3);
}

struct sigaction before[65];  // who was to handle each signal: nobody, or a sanitizer

// What was going on when the process is ended by a signal. The instruction is tried again, for whoever was to handle
// it.
void on_crash(int signal) {
  char line[128];
  std::snprintf(line, sizeof line, "\nsoak: signal %d in operation %lld of ", signal,
                static_cast<long long>(progress.operation));
  say(line), say(current), say("\n");
  sigaction(signal, &before[signal], nullptr);
}

void describe(const Params& params) {
  std::snprintf(current, sizeof current, "--backend %s --world %llu: %s", params.paged ? "paged" : "virtual",
                static_cast<unsigned long long>(params.seed), params.text().c_str());
}

// What was wrong, "" for nothing. A world that failed is left as it is: its destructors would meet broken books.
std::string run_world(const Params& params, const Options& options, const std::vector<i64>& operations) {
  describe(params);
  World* world = nullptr;
  try {
    world = new World(params, options.promises, progress, options.trace);
    for (i64 operation : operations) {
      world->step(operation, options.check);
      if (world->poisoned()) break;
    }
    world->settle();
    if (!world->poisoned()) progress.operation = params.operations;
    world->poisoned() ? world->finish_poisoned() : world->finish();
    delete world;
    return "";
  } catch (const std::exception& e) {
    return e.what();
  }
}

std::vector<i64> all_operations(const Params& params) {
  std::vector<i64> operations(params.operations);
  std::iota(operations.begin(), operations.end(), 0);
  return operations;
}

// ---- one world with fewer operations ---------------------------------------------------------------

// What kind of failure these operations lead to, in a process of its own: the words before its first colon.
std::string kind_of(const Params& params, const Options& options, const std::vector<i64>& operations) {
  int ends[2];
  if (pipe(ends) != 0) return "pipe";
  const pid_t child = fork();
  if (child == 0) {
    close(ends[0]);
    for (int signal : {SIGSEGV, SIGBUS, SIGABRT, SIGFPE}) std::signal(signal, SIG_DFL);
    const std::string what = run_world(params, options, operations);
    if (write(ends[1], what.data(), what.size()) < 0) _exit(3);
    _exit(0);
  }
  close(ends[1]);
  std::string what(4096, '\0');
  const ssize_t n = read(ends[0], what.data(), what.size());
  close(ends[0]);
  what.resize(n > 0 ? static_cast<std::size_t>(n) : 0);
  int status = 0;
  waitpid(child, &status, 0);
  if (WIFSIGNALED(status)) return "signal " + std::to_string(WTERMSIG(status));
  return what.substr(0, what.find(':'));
}

std::vector<i64> shrink(const Params& params, Options options) {
  options.trace = false;
  std::vector<i64> left = all_operations(params);
  const std::string kind = kind_of(params, options, left);
  if (kind.empty()) return left;
  for (std::size_t chunk = left.size() / 2; chunk > 0; chunk /= 2) {
    for (std::size_t at = 0; at < left.size();) {
      std::vector<i64> fewer(left.begin(), left.begin() + static_cast<std::ptrdiff_t>(at));
      const std::size_t behind = std::min(left.size(), at + chunk);
      fewer.insert(fewer.end(), left.begin() + static_cast<std::ptrdiff_t>(behind), left.end());
      if (kind_of(params, options, fewer) == kind) {
        left = fewer;
      } else {
        at += chunk;
      }
    }
  }
  return left;
}

// ---- many worlds -----------------------------------------------------------------------------------

int run_worlds(const Options& options) {
  using Clock = std::chrono::steady_clock;
  const auto begin = Clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(Clock::now() - begin).count(); };
  std::printf("soak: --seed %llu --operations %lld\n", static_cast<unsigned long long>(options.seed),
              static_cast<long long>(options.operations));
  std::fflush(stdout);
  i64 worlds = 0, failed = 0;
  for (u64 i = 0; progress.operations < options.operations && elapsed() < options.seconds; ++i, ++worlds) {
    const Params params(options.one_world ? options.seed : mix(options.seed, i) >> 16,
                        options.both ? i % 2 == 0 : options.paged);
    const std::string what =
        run_world(params, options, options.shrink ? shrink(params, options) : all_operations(params));
    if (!what.empty()) {
      ++failed;
      std::printf("soak: %s\n  operation %lld of %s\n", what.c_str(), static_cast<long long>(progress.operation),
                  current);
      std::fflush(stdout);
      if (!options.keep_going) break;
    }
    if (options.one_world) break;
  }
  std::printf(
      "soak: %lld operations in %lld worlds in %.1f s, of which %lld ended with a poisoned pool; %lld refused, %lld "
      "driver faults, %lld hits, %lld blocks evicted; %lld failed\n",
      static_cast<long long>(progress.operations), static_cast<long long>(worlds), elapsed(),
      static_cast<long long>(progress.poisoned), static_cast<long long>(progress.refused),
      static_cast<long long>(progress.faults), static_cast<long long>(progress.hits),
      static_cast<long long>(progress.evicted), static_cast<long long>(failed));
  return failed > 0;
}

int usage(const char* word) {
  std::fprintf(stderr, "soak: unknown word %s; the words are at the top of tests/native/stress/soak.cpp\n", word);
  return 2;
}

int run(int argc, char** argv) {
  Options options;
  options.seed = static_cast<u64>(std::chrono::system_clock::now().time_since_epoch().count()) >> 16;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i], next = i + 1 < argc ? argv[i + 1] : "";
    options.shrink = options.shrink || word == "--shrink", options.trace = options.trace || word == "--trace";
    options.check = options.check || word == "--check",
    options.keep_going = options.keep_going || word == "--keep-going";
    if (word == "--shrink" || word == "--trace" || word == "--check" || word == "--keep-going") continue;
    if (i + 1 == argc) return usage(argv[i]);
    ++i;
    if (word == "--backend") {
      options.both = next == "both", options.paged = next == "paged";
    } else if (word == "--operations") {
      options.operations = std::atoll(next.c_str());
    } else if (word == "--seconds") {
      options.seconds = std::atof(next.c_str());
    } else if (word == "--seed" || word == "--world") {
      options.seed = std::strtoull(next.c_str(), nullptr, 10), options.one_world = word == "--world";
    } else if (word == "--without") {
      options.promises.pins = next.find("pins") == std::string::npos;
      options.promises.events = next.find("events") == std::string::npos;
      options.promises.stats = next.find("stats") == std::string::npos;
      options.promises.states = next.find("states") == std::string::npos;
      options.promises.finite = next.find("finite") == std::string::npos;
    } else {
      return usage(argv[i - 1]);
    }
  }
  struct sigaction tell{};
  tell.sa_handler = on_crash;
  for (int signal : {SIGSEGV, SIGBUS, SIGABRT, SIGFPE}) sigaction(signal, &tell, &before[signal]);
  if (options.trace) std::setvbuf(stdout, nullptr, _IONBF, 0);
  return run_worlds(options);
}

}  // namespace
}  // namespace kvmem_soak

int main(int argc, char** argv) { return kvmem_soak::run(argc, argv); }
