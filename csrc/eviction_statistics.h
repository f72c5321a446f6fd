// How soon blocks are used again, learned from those that were and those that were not, and what follows for the order
// in which to give them up.
//
// A *life* of a block begins when nobody uses it any more and ends when it is used again. That it left the cache
// meanwhile does not end it, so what is learned does not depend on what was evicted. Lives are told apart by a *cell*:
// how often the block had been used, and the life's age in blocks inserted or hit since it began.
#pragma once

#include <array>

#include "types.h"

namespace kvmem {

class ReuseStatistics {
 public:
  static constexpr i32 kClasses = 10;  // 1, 2, 3, 4 uses, then up to 8, 16, 32, 64, 128, and more
  static constexpr i32 kAges = 48;     // below 16, then half octaves; the last one is open
  static constexpr i32 kCells = kClasses * kAges;

  ReuseStatistics();

  static i32 cell_of(i32 uses, i64 age) { return class_of(uses) * kAges + age_index(age); }
  static i32 age_index(i64 age);

  void used_again(i32 cell) {  // a life ended
    reused_[at(cell)] += 1;
    closed_[at(cell)] += 1;
  }
  void lost_sight(i32 cell) { closed_[at(cell)] += 1; }  // a life can be followed no further
  void still_open(i32 cell) { open_[at(cell)] += 1; }    // for each open life once before learn()

  // Computes density() from all that, lets the past fade, and forgets the open lives. O(kCells).
  void learn();

  // Uses to expect for each unit of time that a block of this cell is kept, if it is kept for the best time.
  double density(i32 cell) const { return density_[at(cell)]; }

 private:
  using Cells = std::array<double, kCells>;
  using Ages = std::array<double, kAges>;

  static constexpr std::size_t at(i32 index) { return static_cast<std::size_t>(index); }
  static i32 class_of(i32 uses);
  void rate(i32 cls, const Ages& hazard);

  Cells reused_{}, closed_{}, open_{}, density_{};
};

}  // namespace kvmem
