// How soon blocks are used again, learned from those that were and those that were not, and what follows for the order
// in which to give them up.
//
// A *life* of a block begins when nobody uses it any more and ends when it is used again. That it left the cache
// meanwhile does not end it, so what is learned does not depend on what was evicted. Lives are told apart by a *cell*:
// how often the block had been used, and the life's age in blocks inserted or hit since it began.
#pragma once

#include <array>

#include "eviction_lives.h"
#include "types.h"

namespace kvmem {

class ReuseStatistics {
 public:
  static constexpr i32 kClasses = 10;  // 1, 2, 3, 4 uses, then up to 8, 16, 32, 64, 128, and more
  static constexpr i32 kAges = 48;     // below 16, then half octaves; the last one is open
  static constexpr i32 kCells = kClasses * kAges;

  ReuseStatistics();

  // `now` is a clock that counts blocks inserted or hit; no call goes back in it.
  void begin(i32 uses, i64 now) { lives_.begin(class_of(uses), now); }
  void used_again(i32 uses, i64 begun, i64 now) {
    reused_[at(cell_of(uses, now - begun))] += 1;
    lost_sight(uses, begun, now);
  }
  void lost_sight(i32 uses, i64 begun, i64 now) {  // the life can be followed no further
    lives_.end(class_of(uses), begun);
    closed_[at(cell_of(uses, now - begun))] += 1;
  }

  static i32 cell_of(i32 uses, i64 age) { return class_of(uses) * kAges + age_index(age); }
  static i32 age_index(i64 age);

  // Computes density() anew. What was counted so far has `keep` of its weight the next time. O(kCells).
  void learn(i64 now, double keep);

  // Uses to expect for each unit of time that a block of this cell is kept, if it is kept for the best time.
  double density(i32 cell) const { return density_[at(cell)]; }

 private:
  using Cells = std::array<double, kCells>;
  using Ages = std::array<double, kAges>;

  static constexpr std::size_t at(i32 index) { return static_cast<std::size_t>(index); }
  static i32 class_of(i32 uses);
  static Ages pooled_hazard(const Ages& reused, const Ages& time);
  void rate(i32 cls, const Ages& hazard);

  Cells reused_{}, closed_{}, density_{};
  OpenLives<kClasses> lives_;
};

}  // namespace kvmem
