// Many threads over two caches, one of each kind, that share one pool of real memory. Each thread owns its sequences,
// writes a pattern into every token and reads all of it back, so that a byte that lands in another sequence's memory is
// seen. Prompts come from a small alphabet, so that most of them begin with what some thread has cached. Built with
// sanitizers by `make test-sanitize`.
//
//   stress --seed N --seconds S [--threads T]      ends with 0 when nothing was wrong

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "allocator/allocator.h"

using namespace kvmem;

namespace {

constexpr i64 kPageBytes = 4096;
constexpr i64 kBudgetPages = 1200;
constexpr i64 kMaxTokens = 600;
constexpr i64 kMaxSequences = 48;
constexpr i64 kBlockTokens = 16;
constexpr i64 kRows = 3 * kMaxSequences + 1;  // two thirds of them keep what finished sequences held
constexpr i64 kTokenBytes[] = {112, 48};      // two arenas; neither divides a page

std::atomic<bool> failed{false};

void fail(const std::string& what) {
  if (!failed.exchange(true)) std::fprintf(stderr, "stress: %s\n", what.c_str());
}

Geometry geometry_of(bool paged) {
  GroupGeometry group;
  group.block_tokens = kBlockTokens;
  group.max_tokens = kMaxTokens;
  group.row_tokens = paged ? 0 : 4096;  // a whole number of pages in both arenas
  group.max_blocks = paged ? kReservedBlocks + kMaxSequences * ceil_div(kMaxTokens, kBlockTokens) : 0;
  for (i64 bytes : kTokenBytes) {
    const i64 row_slots = group.row_tokens * bytes / kPageBytes;
    group.token_bytes.push_back(bytes);
    group.row_slots.push_back(row_slots);
    group.arena_slots.push_back(paged ? ceil_div(group.max_blocks * kBlockTokens * bytes, kPageBytes)
                                      : kRows * row_slots + 1);
  }
  Geometry geometry;
  geometry.page_bytes = kPageBytes;
  geometry.max_sequences = kMaxSequences;
  geometry.rows = kRows;
  geometry.tail_guard_tokens = paged ? 0 : 8;
  geometry.map_ahead_tokens = paged ? 0 : 64;
  geometry.groups.push_back(group);
  return geometry;
}

// A token's bytes follow from its place and its writer, which is itself and all before it: what sequences share carries
// the same words for all of them.
std::uint64_t word_of(std::uint64_t writer, i64 token, i64 arena) {
  std::uint64_t x = writer * 0x9E3779B97F4A7C15u + static_cast<std::uint64_t>(token * 2 + arena + 1);
  x ^= x >> 31;
  return x * 0xBF58476D1CE4E5B9u;
}

std::uint64_t writer_of(std::uint64_t before, std::uint64_t token) {
  return (before ^ token) * 0xD6E8FEB86659FD93u + 0x2545F4914F6CDD1Du;
}

struct Tokens {
  i32 handle = 0;
  std::uint64_t salt = 0;
  std::vector<std::uint64_t> writers;  // of each token that was written
  std::vector<i32> prompt;             // what is left of it

  std::uint64_t last_writer() const { return writers.empty() ? salt : writers.back(); }
};

class Worker {
 public:
  Worker(Allocator& cache, unsigned seed, int number)
      : cache_(cache), random_(seed), next_writer_(static_cast<std::uint64_t>(number + 1) << 40) {}

  void run(std::chrono::steady_clock::time_point end) {
    try {
      while (!failed && std::chrono::steady_clock::now() < end) step();
      for (const Tokens& t : owned_) verify(t);
      while (!owned_.empty()) release(0);
      if (pin_ != 0) cache_.unpin(pin_);
    } catch (const std::exception& e) {
      fail(e.what());
    }
  }

  i64 operations = 0, refusals = 0, hits = 0;

 private:
  static BatchBuffers buffers_over(std::vector<i32>& blocks) {
    BatchBuffers out;
    out.max_sequences = 1;
    out.max_blocks = out.max_indices = static_cast<i64>(blocks.size());
    out.max_new_tokens = kMaxTokens;
    out.block_table = blocks.data();
    return out;
  }

  i64 below(i64 n) { return static_cast<i64>(random_() % static_cast<std::uint64_t>(n)); }

  void step() {
    ++operations;
    const i64 choice = below(100);
    try {
      if (owned_.empty() || choice < 10) {
        admit();
      } else if (choice < 60) {
        grow(owned_[below(owned_.size())], choice < 50 ? 1 + below(3) : 1 + below(200));
      } else if (choice < 72) {
        Tokens& t = owned_[below(owned_.size())];
        verify(t);
        const i64 keep = below(static_cast<i64>(t.writers.size()) + 1);
        try {
          cache_.truncate(t.handle, keep);
        } catch (const SpecError&) {  // some of it is pinned
          return;
        }
        t.writers.resize(keep);
        t.prompt.clear();
      } else if (choice < 84) {
        const Tokens& parent = owned_[below(owned_.size())];
        Tokens child = parent;
        child.handle = static_cast<i32>(cache_.fork(parent.handle));
        owned_.push_back(child);
      } else if (choice < 95) {
        release(below(owned_.size()));
      } else if (choice < 96) {
        pin();
      } else if (choice < 97) {
        if (below(4) == 0) cache_.clear_cache();
        cache_.trim(below(2) ? -1 : 40 * kPageBytes);
      } else {
        cache_.set_memory(kBudgetPages - below(200));
        cache_.stats();
      }
    } catch (const OutOfMemory&) {
      ++refusals;
      if (!owned_.empty()) release(below(owned_.size()));
    }
  }

  // Mostly along one script, so that prompts part late and come together often.
  i32 next_token(i64 position) { return static_cast<i32>(below(60) == 0 ? below(3) : position % 5); }

  void admit() {
    Tokens t;
    t.salt = static_cast<std::uint64_t>(below(2));
    std::vector<i32> prompt(below(260));
    for (std::size_t i = 0; i < prompt.size(); ++i) prompt[i] = next_token(static_cast<i64>(i));
    PrefixKey key;
    key.salt = std::to_string(t.salt);
    cache_.match(prompt.data(), static_cast<i64>(prompt.size()), key);
    i64 cached = 0;
    t.handle = static_cast<i32>(cache_.admit(prompt.data(), static_cast<i64>(prompt.size()), key, &cached));
    for (i64 i = 0; i < cached; ++i) t.writers.push_back(writer_of(t.last_writer(), prompt[i]));
    t.prompt.assign(prompt.begin() + cached, prompt.end());
    hits += cached > 0;
    owned_.push_back(t);
    verify(t);
  }

  void pin() {
    if (pin_ != 0) {
      cache_.unpin(pin_);
      pin_ = 0;
      return;
    }
    const Tokens& t = owned_[below(owned_.size())];
    try {
      if (below(2)) pin_ = cache_.pin(t.handle, -1).pin;
    } catch (const SpecError&) {  // it fills no block yet, or what its window needs is gone
    }
  }

  // The rest of the prompt first, then tokens of the script, now and then some that nobody is told.
  void grow(Tokens& t, i64 count) {
    const i64 old = static_cast<i64>(t.writers.size());
    const i32 n = static_cast<i32>(std::min(count, kMaxTokens - old));
    if (below(2)) {
      cache_.extend(&t.handle, &n, 1, -1);
    } else {
      GroupBuffers group{0, &out_, &marks_, {}};
      cache_.step(&t.handle, &n, 1, nullptr, 0, 0, &group, 1);
    }
    const bool told = below(30) != 0;
    std::vector<i32> ids(n);
    for (i32 i = 0; i < n; ++i) {
      ids[i] = i < static_cast<i32>(t.prompt.size()) ? t.prompt[i] : next_token(old + i);
      t.writers.push_back(writer_of(t.last_writer(), told ? static_cast<std::uint64_t>(ids[i]) : ++next_writer_));
    }
    t.prompt.erase(t.prompt.begin(), t.prompt.begin() + std::min<i64>(n, static_cast<i64>(t.prompt.size())));
    each_token(t, old, [](std::uint64_t* at, std::uint64_t word) { *at = word; });
    cache_.commit(&t.handle, &n, 1, -1, told ? ids.data() : nullptr);
  }

  void verify(const Tokens& t) {
    each_token(t, 0, [](const std::uint64_t* at, std::uint64_t word) {
      if (*at != word) fail("a token does not hold what was written");
    });
  }

  void release(i64 which) {
    verify(owned_[which]);
    cache_.free(&owned_[which].handle, 1);
    std::swap(owned_[which], owned_.back());
    owned_.pop_back();
  }

  // Addresses from the batch's slots, as a kernel would find them. The first and last words of each token are touched.
  template <class Touch>
  void each_token(const Tokens& t, i64 from, Touch touch) {
    const i64 end = static_cast<i64>(t.writers.size());
    if (from == end) return;
    GroupBuffers group{0, &out_, &marks_, {}};
    cache_.fill(&t.handle, 1, nullptr, 0, &group, 1);
    for (i64 a = 0; a < 2; ++a) {
      const i32 arena = static_cast<i32>(cache_.first_arena(0) + a);
      const Address base = cache_.pool().space()->arena_base(arena);
      for (i64 token = from; token < end; ++token) {
        const i64 slot = i64{blocks_[token / kBlockTokens]} * kBlockTokens + token % kBlockTokens;
        auto* words = reinterpret_cast<std::uint64_t*>(base + static_cast<Address>(slot * kTokenBytes[a]));
        const std::uint64_t word = word_of(t.writers[token], token, a);
        touch(words, word);
        touch(words + kTokenBytes[a] / 8 - 1, ~word);
      }
    }
  }

  Allocator& cache_;
  std::mt19937_64 random_;
  std::uint64_t next_writer_;
  i64 pin_ = 0;
  std::vector<Tokens> owned_;
  // One row for whichever sequence is looked at: each fill meets what another one left.
  std::vector<i32> blocks_ = std::vector<i32>(ceil_div(kMaxTokens, kBlockTokens));
  BatchBuffers out_ = buffers_over(blocks_);
  BatchMarks marks_{out_};
};

bool healthy(Allocator& cache) {
  const std::vector<std::string> found = cache.check();
  for (const std::string& what : found) fail(what);
  return found.empty();
}

int stress(unsigned seed, int seconds, int threads) {
  std::printf("stress: --seed %u --seconds %d --threads %d\n", seed, seconds, threads);
  std::fflush(stdout);
  auto pool = std::make_shared<PagePool>(kPageBytes, kBudgetPages, make_host_driver(), false);
  auto virtual_cache =
      std::make_unique<Allocator>(geometry_of(false), pool, false, kBudgetPages, false, PrefixOptions());
  auto paged_cache = std::make_unique<Allocator>(geometry_of(true), pool, true, kBudgetPages, false, PrefixOptions());
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
  std::vector<std::unique_ptr<Worker>> workers;
  std::vector<std::thread> running;
  for (int i = 0; i < threads; ++i) {
    workers.push_back(std::make_unique<Worker>(i % 2 ? *paged_cache : *virtual_cache, seed + i, i));
  }
  for (const auto& worker : workers) running.emplace_back(&Worker::run, worker.get(), end);
  while (!failed && std::chrono::steady_clock::now() < end) {
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    if (!healthy(*virtual_cache) || !healthy(*paged_cache)) break;
  }
  for (std::thread& thread : running) thread.join();
  i64 operations = 0, refusals = 0, hits = 0;
  for (const auto& worker : workers) {
    operations += worker->operations, refusals += worker->refusals, hits += worker->hits;
  }
  const i64 evicted = virtual_cache->stats().evicted_blocks + paged_cache->stats().evicted_blocks;
  std::printf("stress: %lld operations, %lld refused for memory, %lld prompts found cached, %lld blocks evicted\n",
              static_cast<long long>(operations), static_cast<long long>(refusals), static_cast<long long>(hits),
              static_cast<long long>(evicted));
  healthy(*virtual_cache);
  healthy(*paged_cache);
  virtual_cache.reset();
  paged_cache.reset();
  if (pool->mapped_pages() != 0) fail("pages are still mapped after both caches are gone");
  return failed || operations == 0 || hits == 0 || evicted == 0;
}

}  // namespace

int main(int argc, char** argv) {
  unsigned seed = 1;
  int seconds = 5, threads = 6;
  for (int i = 1; i + 1 < argc; i += 2) {
    const int value = std::atoi(argv[i + 1]);
    if (!std::strcmp(argv[i], "--seed")) seed = static_cast<unsigned>(std::strtoul(argv[i + 1], nullptr, 10));
    if (!std::strcmp(argv[i], "--seconds")) seconds = value;
    if (!std::strcmp(argv[i], "--threads")) threads = value;
  }
  return stress(seed, seconds, threads);
}
