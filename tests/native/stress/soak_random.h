// Random numbers that follow from a seed and nothing else, so that a world can be repeated exactly.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "base/types.h"

namespace kvmem_soak {

using kvmem::i32;
using kvmem::i64;
using u64 = std::uint64_t;

// splitmix64's finaliser: equal inputs, equal outputs, and every bit of the input moves all of the output.
constexpr u64 mix(u64 x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}
constexpr u64 mix(u64 a, u64 b) { return mix(mix(a) ^ b); }

class Random {
 public:
  explicit Random(u64 seed) : state_(seed) {}
  u64 next() { return mix(state_++); }
  i64 below(i64 n) { return static_cast<i64>(next() % static_cast<u64>(n)); }
  i64 between(i64 low, i64 high) { return low + below(high - low + 1); }  // both can come
  bool one_in(i64 n) { return below(n) == 0; }
  double fraction() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  template <class T>
  T pick(std::initializer_list<T> values) {
    return values.begin()[below(static_cast<i64>(values.size()))];
  }
  template <class T>
  T& pick(std::vector<T>& values) {
    return values[below(static_cast<i64>(values.size()))];
  }

 private:
  u64 state_;
};

}  // namespace kvmem_soak
