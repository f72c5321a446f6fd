// Counts the open lives of blocks (eviction/statistics.h), by class and by the interval of time in which they began. A
// recent interval is 16 ticks of the clock; older intervals are longer, but at most a fifteenth of their age. That is
// well below the width of the age classes of the statistics: if open lives were counted at a younger age than the lives
// that end, old age would look better than it is.
//
// Level s is a ring of intervals of 16 << s ticks. Once two neighbours are more than kKept intervals of the next level
// old, they are merged into one of that level. So the level of a life follows from when it began, without a search.
#pragma once

#include <algorithm>
#include <array>

#include "base/check.h"
#include "base/types.h"

namespace kvmem {

inline i32 highest_bit(i64 value) { return 63 - __builtin_clzll(static_cast<unsigned long long>(value)); }

template <i32 kClasses>
class OpenLives {
 public:
  static constexpr i32 kTickBits = 4;
  using Lives = std::array<i32, kClasses>;

  void begin(i32 cls, i64 now) { ++at(0, now >> kTickBits)[static_cast<std::size_t>(cls)]; }

  // REQUIRES: the life began less than 2^32 ticks ago; otherwise a wrong interval may be decremented.
  void end(i32 cls, i64 begun, i64 now) {
    const i32 level = level_of(begun, now);
    i32& lives = at(level, begun >> shift(level))[static_cast<std::size_t>(cls)];
    lives -= lives > 0;
  }

  // Moves the clock. Called once at each multiple of 1 << kTickBits, before any life begins there.
  void advance(i64 now) {
    KVMEM_ASSERT((now & ((i64{1} << kTickBits) - 1)) == 0, "the clock advances in whole intervals");
    for (i32 level = 0; level + 1 < kLevels && (now & ((i64{1} << shift(level + 1)) - 1)) == 0; ++level) {
      const i64 joined = (now >> shift(level + 1)) - kKept - 1;
      if (joined < 0) return;
      Lives& to = at(level + 1, joined);
      for (i64 half = 2 * joined; half < 2 * joined + 2; ++half) {
        Lives& from = at(level, half);
        for (std::size_t cls = 0; cls < kClasses; ++cls) to[cls] += from[cls];
        from = {};
      }
    }
  }

  // Calls f(age, lives by class) for each interval; the age is that of the middle of the interval.
  template <class F>
  void each(i64 now, F f) const {
    for (i32 level = 0; level < kLevels; ++level) {
      const i64 last = (now >> shift(level)) - (level == 0 ? 0 : kKept + 1);
      const i64 first = level + 1 < kLevels ? 2 * ((now >> shift(level + 1)) - kKept) : last - kKept;
      for (i64 interval = std::max(first, i64{0}); interval <= last; ++interval) {
        const i64 middle = ((2 * interval + 1) << shift(level)) / 2;
        f(std::max(now - middle, i64{0}), at(level, interval));
      }
    }
  }

 private:
  static constexpr i32 kLevels = 26;
  static constexpr i64 kKept = 15;
  static constexpr std::size_t kRing = 2 * kKept + 2;
  static_assert((kKept + 1) << (kTickBits + kLevels - 1) >= i64{1} << 32, "the levels cover 2^32 ticks");

  static constexpr i32 shift(i32 level) { return kTickBits + level; }
  Lives& at(i32 level, i64 interval) { return lives_[index(level, interval)]; }
  const Lives& at(i32 level, i64 interval) const { return lives_[index(level, interval)]; }
  static std::size_t index(i32 level, i64 interval) {
    return static_cast<std::size_t>(level) * kRing + static_cast<std::size_t>(interval) % kRing;
  }

  // Returns the first level at which the interval of `begun` has not been merged into a longer one.
  static i32 level_of(i64 begun, i64 now) {
    const i32 level = std::max(highest_bit((now - begun) | 1) - kTickBits - 4, 0);
    const i32 next = shift(level + 1);
    return std::min(level + ((now >> next) - (begun >> next) > kKept), kLevels - 1);
  }

  std::array<Lives, kLevels * kRing> lives_{};
};

}  // namespace kvmem
