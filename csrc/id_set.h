// A set of numbers below a bound that knows its smallest: bits, and over each 64 of them one bit that says whether any
// of them is set, up to a single word. Every call costs at most one word of each level: four for 16 million numbers.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "types.h"

namespace kvmem {

class IdSet {
 public:
  // Numbers below `bound` may be put in from now on. Never shrinks.
  void reserve(i64 bound) {
    std::size_t level = 0;
    for (i64 words = std::max(i64{1}, ceil_div(bound, 64));; words = ceil_div(words, 64), ++level) {
      if (level == levels_.size()) {
        levels_.emplace_back();
        if (level > 0 && levels_[level - 1][0] != 0) levels_[level].push_back(1);  // what was the top is one word
      }
      if (static_cast<i64>(levels_[level].size()) < words) levels_[level].resize(words, 0);
      if (words <= 1) return;
    }
  }

  bool empty() const { return levels_.empty() || levels_.back()[0] == 0; }

  bool has(i64 id) const { return levels_[0][id / 64] >> (id % 64) & 1; }

  // The smallest. The set is not empty.
  i64 first() const {
    i64 at = 0;
    for (std::size_t level = levels_.size(); level-- > 0;) at = at * 64 + __builtin_ctzll(levels_[level][at]);
    return at;
  }

  // The smallest above `id`, -1 if there is none.
  i64 after(i64 id) const {
    for (std::size_t level = 0; level < levels_.size(); ++level, id /= 64) {
      const std::uint64_t above = levels_[level][id / 64] >> (id % 64) >> 1;
      if (above == 0) continue;
      id += 1 + __builtin_ctzll(above);
      while (level-- > 0) id = id * 64 + __builtin_ctzll(levels_[level][id]);
      return id;
    }
    return -1;
  }

  void insert(i64 id) { insert(id, 1); }
  void erase(i64 id) { erase(id, 1); }

  // The `count` numbers from `id` on.
  void insert(i64 id, i64 count) {
    each_word(id, count, [this](i64 at, std::uint64_t mask) {
      std::uint64_t& word = levels_[0][at];
      if (word == 0) tell(at, true);
      word |= mask;
    });
  }
  void erase(i64 id, i64 count) {
    each_word(id, count, [this](i64 at, std::uint64_t mask) {
      std::uint64_t& word = levels_[0][at];
      word &= ~mask;
      if (word == 0) tell(at, false);
    });
  }

 private:
  template <class F>
  static void each_word(i64 id, i64 count, F f) {
    for (i64 end = id + count; id < end;) {
      const i64 bit = id % 64, n = std::min(end - id, 64 - bit);
      f(id / 64, ~std::uint64_t{0} >> (64 - n) << bit);
      id += n;
    }
  }

  // Word `at` of the numbers has some now, or none any more.
  void tell(i64 at, bool some) {
    for (std::size_t level = 1; level < levels_.size(); ++level, at /= 64) {
      std::uint64_t& word = levels_[level][at / 64];
      const std::uint64_t bit = std::uint64_t{1} << (at % 64);
      const bool others = (word & ~bit) != 0;
      word = some ? word | bit : word & ~bit;
      if (others) return;
    }
  }

  std::vector<std::vector<std::uint64_t>> levels_;  // the numbers themselves first
};

}  // namespace kvmem
