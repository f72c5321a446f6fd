// How many lives are open, by class and by when they began. Beginnings are told apart the better the more recent they
// are: an interval of them that was merged is no longer than an eighth of its age, well below the width of the ages
// that statistics are kept for (open lives counted at a younger age than the lives that end would make old age look
// good).
#pragma once

#include <array>

#include "types.h"

namespace kvmem {

template <i32 kClasses>
class OpenLives {
 public:
  // Not earlier than the begin() before it.
  void begin(i32 cls, i64 now) {
    if (count_ == 0 || now - intervals_[at(count_ - 1)].begin >= kShortest) append(now);
    ++intervals_[at(count_ - 1)].lives[at(cls)];
  }
  void end(i32 cls, i64 begun) { --intervals_[at(find(begun))].lives[at(cls)]; }

  // Calls f(cls, a time within the interval, number of lives).
  template <class F>
  void each(i64 now, F f) const {
    for (i32 i = 0; i < count_; ++i) {
      const i64 middle = (intervals_[at(i)].begin + end_of(i, now)) / 2;
      for (i32 cls = 0; cls < kClasses; ++cls) {
        if (intervals_[at(i)].lives[at(cls)]) f(cls, middle, intervals_[at(i)].lives[at(cls)]);
      }
    }
  }

 private:
  static constexpr i32 kMost = 512;
  static constexpr i64 kShortest = 16;

  struct Interval {
    i64 begin = 0;
    std::array<i32, kClasses> lives{};
  };

  static constexpr std::size_t at(i32 index) { return static_cast<std::size_t>(index); }
  i64 end_of(i32 index, i64 now) const { return index + 1 < count_ ? intervals_[at(index + 1)].begin : now; }

  // The last interval that begins at or before `begun`.
  i32 find(i64 begun) const {
    i32 low = 0, high = count_;
    while (high - low > 1) {
      const i32 middle = (low + high) / 2;
      (intervals_[at(middle)].begin <= begun ? low : high) = middle;
    }
    return low;
  }

  void append(i64 now) {
    if (count_ == kMost) merge(now);
    intervals_[at(count_)] = Interval{};
    intervals_[at(count_++)].begin = now;
  }

  // An interval joins the one before it while both together are no longer than an eighth of the age of the later end.
  // What is left grows by an eighth at every second interval: 2 * log(age / 16) / log(9 / 8), 424 for an age of 2^40.
  void merge(i64 now) {
    i32 last = 0;
    for (i32 i = 1; i < count_; ++i) {
      const i64 end = end_of(i, now);
      if (8 * (end - intervals_[at(last)].begin) <= now - end) {
        for (i32 cls = 0; cls < kClasses; ++cls)
          intervals_[at(last)].lives[at(cls)] += intervals_[at(i)].lives[at(cls)];
      } else {
        intervals_[at(++last)] = intervals_[at(i)];
      }
    }
    count_ = last + 1;
  }

  std::array<Interval, kMost> intervals_;
  i32 count_ = 0;
};

}  // namespace kvmem
