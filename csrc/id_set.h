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

  void insert(i64 id) {
    for (auto& words : levels_) {
      std::uint64_t& word = words[id / 64];
      const bool others = word != 0;
      word |= std::uint64_t{1} << (id % 64);
      if (others) return;
      id /= 64;
    }
  }

  void erase(i64 id) {
    for (auto& words : levels_) {
      std::uint64_t& word = words[id / 64];
      word &= ~(std::uint64_t{1} << (id % 64));
      if (word != 0) return;
      id /= 64;
    }
  }

 private:
  std::vector<std::vector<std::uint64_t>> levels_;  // the numbers themselves first
};

}  // namespace kvmem
