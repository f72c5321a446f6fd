// Statistics of reuse: how soon blocks are used again, learned from blocks that were and blocks that were not. They
// yield the hit density of a block, by which density.cpp orders its evictions.
//
// A *life* of a block begins when it is released and ends when it is used again. An eviction in between does not end
// the life, so what is learned does not depend on what was evicted. Lives are grouped into *cells*: by class (how often
// the block had been used) and by age (the number of blocks inserted or hit since the life began).
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
  static constexpr i32 kAges = 48;     // ages below 16, then half octaves; the last one has no upper end
  static constexpr i32 kCells = kClasses * kAges;
  static constexpr i32 kTickBits = OpenLives<kClasses>::kTickBits;

  ReuseStatistics();

  // `now` is a clock that counts the blocks inserted or hit; it never goes back from one call to the next. REQUIRES:
  // advance() is the first call at each multiple of 1 << kTickBits.
  void advance(i64 now) { lives_.advance(now); }
  void begin(i32 uses, i64 now) { lives_.begin(class_of(uses), now); }
  void used_again(i32 uses, i64 begun, i64 now) { ++end(uses, begun, now).reused; }
  // The life is followed no further, and counts as ended without a use.
  void lost_sight(i32 uses, i64 begun, i64 now) { end(uses, begun, now); }

  static i32 cell_of(i32 uses, i64 age) { return class_of(uses) * kAges + age_index(age); }
  static i32 class_of(i32 uses) {
    return uses <= 4 ? uses - 1 : std::min(highest_bit(uses - 1) + 2, kClasses - 1);  // e.g. 5 to 8 uses: class 4
  }
  static i32 age_index(i64 age) {
    if (age < (i64{1} << kFirstOctave)) return 0;
    const i32 bit = highest_bit(age);
    const i32 index = 1 + 2 * (bit - kFirstOctave) + static_cast<i32>((age >> (bit - 1)) & 1);
    return index < kAges ? index : kAges - 1;
  }

  // Learning has two phases, each call a few microseconds long. collect() adds what was counted since the last
  // collect() to the totals, whose old value is first multiplied by `keep`. Then rate() computes the densities of one
  // class.
  void collect(i64 now, double keep);
  void rate(i32 cls);

  // Returns the uses to expect for each unit of time that a block of this cell stays cached, if it stays for the best
  // time.
  float density(i32 cell) const { return density_[at(cell)]; }

 private:
  static constexpr i32 kFirstOctave = 4;  // younger than 16 blocks is less than one request, hence one age class
  static_assert(kFirstOctave + kAges / 2 <= 32, "OpenLives distinguishes ages up to 2^32 ticks");

  template <class T>
  using Cells = std::array<T, kCells>;
  using Ages = std::array<double, kAges>;
  struct Counts {
    std::uint32_t ended = 0, reused = 0;  // lives that ended in this cell; of these, the ones that ended in a use
  };
  static constexpr std::size_t at(i32 index) { return static_cast<std::size_t>(index); }
  Counts& end(i32 uses, i64 begun, i64 now) {
    lives_.end(class_of(uses), begun, now);
    Counts& counts = counts_[at(cell_of(uses, now - begun))];
    ++counts.ended;
    return counts;
  }
  static Ages pooled_hazard(const Ages& reused, const Ages& time);

  Cells<Counts> counts_{};  // since the last collect()
  OpenLives<kClasses> lives_;
  // Decayed totals of lives that ended in a use and of all lives that ended; and the time that lives spent in a cell,
  // as of the last collect().
  Cells<double> reused_{}, ended_{}, time_{};
  Ages pooled_{};  // hazard of all classes together, by age
  Cells<float> density_{};
};

}  // namespace kvmem
