// How soon blocks are used again, learned from those that were and those that were not, and what follows for the order
// in which to give them up.
//
// A *life* of a block begins when nobody uses it any more and ends when it is used again. That it left the cache
// meanwhile does not end it, so what is learned does not depend on what was evicted. Lives are told apart by a *cell*:
// how often the block had been used, and the life's age in blocks inserted or hit since it began.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "base/types.h"
#include "eviction/lives.h"

namespace kvmem {

class ReuseStatistics {
 public:
  static constexpr i32 kClasses = 10;  // 1, 2, 3, 4 uses, then up to 8, 16, 32, 64, 128, and more
  static constexpr i32 kAges = 48;     // below 16, then half octaves; the last one is open
  static constexpr i32 kCells = kClasses * kAges;
  static constexpr i32 kTickBits = OpenLives<kClasses>::kTickBits;

  ReuseStatistics();

  // `now` is a clock that counts blocks inserted or hit; no call goes back in it. advance() comes first at every
  // multiple of 1 << kTickBits.
  void advance(i64 now) { lives_.advance(now); }
  void begin(i32 uses, i64 now) { lives_.begin(class_of(uses), now); }
  void used_again(i32 uses, i64 begun, i64 now) { ++end(uses, begun, now).reused; }
  void lost_sight(i32 uses, i64 begun, i64 now) { end(uses, begun, now); }  // it can be followed no further

  static i32 cell_of(i32 uses, i64 age) { return class_of(uses) * kAges + age_index(age); }
  static i32 class_of(i32 uses) {
    return uses <= 4 ? uses - 1 : std::min(highest_bit(uses - 1) + 2, kClasses - 1);  // 5 to 8 uses: 4
  }
  static i32 age_index(i64 age) {
    if (age < (i64{1} << kFirstOctave)) return 0;
    const i32 bit = highest_bit(age);
    const i32 index = 1 + 2 * (bit - kFirstOctave) + static_cast<i32>((age >> (bit - 1)) & 1);
    return index < kAges ? index : kAges - 1;
  }

  // Learning is done in parts of some microseconds each: first collect(), which takes in what was counted since the
  // time before (that of before keeps `keep` of its weight), then rate() of each class, which computes its densities.
  void collect(i64 now, double keep);
  void rate(i32 cls);

  // Uses to expect for each unit of time that a block of this cell is kept, if it is kept for the best time.
  float density(i32 cell) const { return density_[at(cell)]; }

 private:
  static constexpr i32 kFirstOctave = 4;  // ages below 16 blocks are alike: less than one request

  template <class T>
  using Cells = std::array<T, kCells>;
  using Ages = std::array<double, kAges>;
  struct Counts {
    std::uint32_t ended = 0, reused = 0;  // lives that ended in this cell, and those of them that ended in a use
  };
  static constexpr std::size_t at(i32 index) { return static_cast<std::size_t>(index); }
  Counts& end(i32 uses, i64 begun, i64 now) {
    lives_.end(class_of(uses), begun, now);
    Counts& counts = counts_[at(cell_of(uses, now - begun))];
    ++counts.ended;
    return counts;
  }
  static Ages pooled_hazard(const Ages& reused, const Ages& time);

  Cells<Counts> counts_{};  // since collect()
  OpenLives<kClasses> lives_;
  // Of all times, faded: uses and ended lives. As of collect(): the time that lives spent in a cell.
  Cells<double> reused_{}, ended_{}, time_{};
  Ages pooled_{};  // hazard of all classes together
  Cells<float> density_{};
};

}  // namespace kvmem
