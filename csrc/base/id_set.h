// A set of ids below a bound, with fast access to the smallest one: a bitmap, and over each 64 bits one summary bit,
// recursively up to a single word. Every call touches at most one word of each level: four levels for 16 million ids.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/types.h"
#include "base/zero_vector.h"

namespace kvmem {

class IdSet {
 public:
  // Allows ids below `bound` from now on. Never shrinks.
  void reserve(i64 bound) {
    i64 words = std::max(i64{1}, ceil_div(bound, 64));
    for (std::size_t level = 0;; words = ceil_div(words, 64), ++level) {
      Words& bits = levels_[level];
      if (bits.empty() && level > 0 && levels_[level - 1][0] != 0) bits.push_back(1);  // summary of the former top
      if (static_cast<i64>(bits.size()) < words) bits.resize(words);
      top_ = std::max(top_, level);
      if (words <= 1) return;
    }
  }

  bool empty() const { return levels_[top_].empty() || levels_[top_][0] == 0; }
  bool has(i64 id) const { return levels_[0][word_of(id)] >> bit_of(id) & 1; }

  // Returns the smallest id. REQUIRES: the set is not empty.
  i64 first() const {
    KVMEM_ASSERT(!empty(), "an empty set has no smallest id");
    i64 at = 0;
    for (std::size_t level = top_ + 1; level-- > 0;) at = at * 64 + __builtin_ctzll(levels_[level][at]);
    return at;
  }

  // Removes and returns the smallest id. REQUIRES: the set is not empty.
  i64 take_first() {
    const i64 id = first();
    erase(id);
    return id;
  }

  // Returns the length of the run of consecutive ids that starts at `id`, as far as the end of its word. REQUIRES: `id`
  // is in the set.
  i64 run(i64 id) const {
    const std::uint64_t gaps = ~(levels_[0][word_of(id)] >> bit_of(id));
    return std::min(i64{64} - bit_of(id), gaps == 0 ? i64{64} : i64{__builtin_ctzll(gaps)});
  }

  // Returns the smallest id above `id`, or -1.
  i64 after(i64 id) const {
    for (std::size_t level = 0; level <= top_; ++level, id = word_of(id)) {
      const std::uint64_t above = levels_[level][word_of(id)] >> bit_of(id) >> 1;
      if (above == 0) continue;
      id += 1 + __builtin_ctzll(above);
      while (level-- > 0) id = id * 64 + __builtin_ctzll(levels_[level][id]);
      return id;
    }
    return -1;
  }

  void insert(i64 id) { add(word_of(id), std::uint64_t{1} << bit_of(id)); }
  void erase(i64 id) { remove(word_of(id), std::uint64_t{1} << bit_of(id)); }

  // The same for the `count` ids from `id` on.
  void insert(i64 id, i64 count) {
    each_word(id, count, [this](i64 at, std::uint64_t mask) { add(at, mask); });
  }
  void erase(i64 id, i64 count) {
    each_word(id, count, [this](i64 at, std::uint64_t mask) { remove(at, mask); });
  }

 private:
  using Words = ZeroVector<std::uint64_t>;

  // The division is unsigned because a division of signed numbers by 64 is not a single shift.
  static i64 word_of(i64 id) { return static_cast<i64>(static_cast<std::uint64_t>(id) / 64); }
  static i64 bit_of(i64 id) { return static_cast<i64>(static_cast<std::uint64_t>(id) % 64); }

  template <class F>
  static void each_word(i64 id, i64 count, F f) {
    for (const i64 end = id + count; id < end;) {
      const i64 bit = bit_of(id), n = std::min(end - id, 64 - bit);
      f(word_of(id), ~std::uint64_t{0} >> (64 - n) << bit);
      id += n;
    }
  }

  void add(i64 at, std::uint64_t mask) {
    KVMEM_ASSERT(at < static_cast<i64>(levels_[0].size()), "ids are below the bound given to reserve()");
    std::uint64_t before = std::exchange(levels_[0][at], levels_[0][at] | mask);
    for (std::size_t level = 1; before == 0 && level <= top_; ++level, at = word_of(at)) {
      std::uint64_t& word = levels_[level][word_of(at)];
      before = std::exchange(word, word | std::uint64_t{1} << bit_of(at));
    }
  }

  void remove(i64 at, std::uint64_t mask) {
    KVMEM_ASSERT(at < static_cast<i64>(levels_[0].size()), "ids are below the bound given to reserve()");
    std::uint64_t left = levels_[0][at] &= ~mask;
    for (std::size_t level = 1; left == 0 && level <= top_; ++level, at = word_of(at)) {
      left = levels_[level][word_of(at)] &= ~(std::uint64_t{1} << bit_of(at));
    }
  }

  static constexpr std::size_t kLevels = 7;
  static_assert(6 * kLevels >= 31, "the levels cover every id that fits an int32");

  std::array<Words, kLevels> levels_;  // level 0 is the bitmap itself
  std::size_t top_ = 0;                // the level that consists of one word
};

}  // namespace kvmem
