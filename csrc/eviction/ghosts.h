// Ghosts: what is remembered of evicted blocks, namely how often each was used and when its life began. The table is
// set-associative: a key belongs to one set of eight ghosts, which is one cache line. A new ghost replaces the oldest
// of a full set.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "base/types.h"

namespace kvmem {

struct Ghost {
  std::uint32_t begun = 0;  // lower 32 bits of the policy's clock when its life began
  i32 uses = 0;             // 1 to 255; 0 means no ghost
};

class Ghosts {
 public:
  // Grows the table to hold at least `ghosts`; it never shrinks. Keeps all ghosts except the few that it returns, for
  // which their new set had no room. May throw std::bad_alloc, and has changed nothing then.
  std::vector<Ghost> resize(i64 ghosts);
  i64 size() const { return kWays * static_cast<i64>(sets_.size()); }

  // Adds a ghost and returns the one that it replaced (uses 0: none). REQUIRES: 1 <= uses <= 255.
  Ghost remember(std::uint64_t key, Ghost ghost) { return add(hash_of(key), ghost); }
  // Removes and returns the ghost of `key` (uses 0: none). Two keys are mistaken for each other with probability 2^-32;
  // that distorts one count of the statistics.
  Ghost take(std::uint64_t key);
  // Prefetches the set of `key`, which is rarely in the processor's cache.
  void prefetch(std::uint64_t key) const { __builtin_prefetch(&sets_[index_of(hash_of(key))], 1); }

 private:
  static constexpr i32 kWays = 8;
  static constexpr i64 kLeastSets = 256;
  static_assert(kLeastSets << 24 >= i64{1} << 32, "the tags within a set are unique: its hashes span at most 2^24");
  static constexpr std::uint32_t kTagMask = 0xffffff;

  // The ghosts of a set, newest first, empty entries last. A mark is 24 bits of the hash (the tag) and 8 of the uses.
  struct alignas(64) Set {
    std::array<std::uint32_t, kWays> marks{}, begun{};
    Ghost at(std::size_t way) const { return {begun[way], static_cast<i32>(marks[way] & 0xff)}; }
  };

  static std::uint32_t hash_of(std::uint64_t key) { return static_cast<std::uint32_t>(key >> 32); }
  static std::uint32_t hash_of(std::uint64_t set, std::uint64_t sets, std::uint32_t mark);
  std::size_t index_of(std::uint32_t hash) const { return (std::uint64_t{hash} * sets_.size()) >> 32; }
  Set& set_of(std::uint32_t hash) { return sets_[index_of(hash)]; }
  Ghost add(std::uint32_t hash, Ghost ghost);

  std::vector<Set> sets_;
};

}  // namespace kvmem
