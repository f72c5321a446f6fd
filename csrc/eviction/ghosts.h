// What is remembered of blocks that left the cache: how often each had been used, and when last. A key belongs to one
// set of eight places, one cache line; in a full set the ghost that came first makes room.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "base/types.h"

namespace kvmem {

struct Ghost {
  std::uint32_t begun = 0;  // lower half of the policy's clock when its life began
  i32 uses = 0;             // 1 to 255; 0: none
};

class Ghosts {
 public:
  // To room for at least as many, never less than before. Keeps what there is; returns the few that found no place.
  std::vector<Ghost> resize(i64 ghosts);
  i64 size() const { return kWays * static_cast<i64>(sets_.size()); }

  // Returns the ghost it replaces.
  Ghost remember(std::uint64_t key, Ghost ghost) { return add(hash_of(key), ghost); }
  // Returns the ghost of `key` and forgets it. A key that is taken for another (2^-32) distorts one count.
  Ghost take(std::uint64_t key);
  // Its set is most often not in the processor's cache when take() comes for it.
  void prefetch(std::uint64_t key) const { __builtin_prefetch(&sets_[index_of(hash_of(key))], 1); }

 private:
  static constexpr i32 kWays = 8;
  static constexpr i64 kLeastSets = 256;
  static constexpr std::uint32_t kTagMask = 0xffffff;

  // The latest first, empty places last. A mark is 24 bits of the hash and 8 of the uses.
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
