// A digest of all state that a later call could observe: an allocator and its pool feed their members to a Hasher. Two
// different states have equal digests with probability 2^-64. Each class feeds its own members, in its own source file.
// Not included: what can be derived from other members (counts, cached answers, search hints), and scratch state of the
// call in progress.
//
// Tests and debug builds compare digests before and after a call that failed (invariant 5).
#pragma once

#include <string>
#include <vector>

#include "base/types.h"

namespace kvmem {

class Hasher {
 public:
  template <class... Numbers>
  void add(Numbers... numbers) {
    (mix(static_cast<std::uint64_t>(numbers)), ...);
  }
  template <class T, class Allocator>
  void add_all(const std::vector<T, Allocator>& numbers) {
    add(numbers.size());
    for (const T number : numbers) add(number);
  }
  void add_text(const std::string& text) {
    add(text.size());
    for (const char c : text) add(static_cast<unsigned char>(c));
  }
  // Adds one member of an unordered set. The caller hashes each member with a Hasher of its own; the sum of these does
  // not depend on their order.
  void add_member(const Hasher& one) { sum_ += one.state_ * kOdd; }

  std::uint64_t value() const {
    Hasher last = *this;
    last.mix(sum_);
    return last.state_;
  }

 private:
  static constexpr std::uint64_t kOdd = 0x9e3779b97f4a7c15u;

  void mix(std::uint64_t number) {
    state_ = (state_ ^ number) * 0xbf58476d1ce4e5b9u;
    state_ ^= state_ >> 29;
    state_ = state_ * kOdd + 1;
    state_ ^= state_ >> 32;
  }

  std::uint64_t state_ = 0, sum_ = 0;
};

}  // namespace kvmem
