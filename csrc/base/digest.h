// One number for all that a later call could see: what an allocator and its pool know, walked and mixed. Two states
// with equal digests are equal but for a chance of 2^-64. Each class adds its own members, in its own file. Left out is
// what follows from the rest (counts, caches of answers, hints where to look first), and what belongs to the call in
// progress.
//
// For tests and debug builds: a refused call must leave it as it was.
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
  // Members of a set that comes in no order: `one` is made for each, and they are summed up.
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
