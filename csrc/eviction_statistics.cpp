#include "eviction_statistics.h"

#include <algorithm>
#include <cmath>

namespace kvmem {
namespace {

constexpr i32 kFirstOctave = 4;  // ages below 16 blocks are alike: less than one request
// Before anything is seen a use is expected at rate 0.1 / age. Any rate that falls with age orders blocks by recency.
constexpr double kPriorRate = 0.1;
// A class is believed against all classes together once it has seen about this many lives reach an age.
constexpr double kPriorLives = 8;
// Only slopes count, so a factor on all that follows changes nothing; without a floor rounding would decide there.
constexpr double kLeastAlive = 1e-6;

i32 highest_bit(i64 value) { return 63 - __builtin_clzll(static_cast<unsigned long long>(value)); }

constexpr double first_age(i32 index) {
  if (index == 0) return 0;
  const double octave = static_cast<double>(i64{1} << (kFirstOctave + (index - 1) / 2));
  return (index - 1) % 2 ? 1.5 * octave : octave;
}

// Looked up, since learn() asks thousands of times.
struct AgeTable {
  constexpr AgeTable() {
    for (i32 age = 0; age < ReuseStatistics::kAges; ++age) {
      const double first = first_age(age), end = first_age(age + 1);
      width[static_cast<std::size_t>(age)] = end - first;
      middle[static_cast<std::size_t>(age)] = first + (end - first) / 2;
    }
  }
  std::array<double, ReuseStatistics::kAges> width{}, middle{};
};
constexpr AgeTable kTable;

double width(i32 age) { return kTable.width[static_cast<std::size_t>(age)]; }

double middle(i32 age) { return kTable.middle[static_cast<std::size_t>(age)]; }

}  // namespace

i32 ReuseStatistics::age_index(i64 age) {
  if (age < (i64{1} << kFirstOctave)) return 0;
  const i32 bit = highest_bit(age);
  const i32 index = 1 + 2 * (bit - kFirstOctave) + static_cast<i32>((age >> (bit - 1)) & 1);
  return index < kAges ? index : kAges - 1;
}

i32 ReuseStatistics::class_of(i32 uses) {
  if (uses <= 4) return uses - 1;
  const i32 index = highest_bit(uses - 1) + 2;  // 5 to 8 uses: 4
  return index < kClasses ? index : kClasses - 1;
}

ReuseStatistics::ReuseStatistics() { learn(0, 1); }

// An age that no life has reached yet continues those before it: were it expected to do better, the oldest blocks would
// be kept for being old.
ReuseStatistics::Ages ReuseStatistics::pooled_hazard(const Ages& reused, const Ages& time) {
  Ages hazard;
  double expected = kPriorRate;  // hazard times age
  for (i32 age = 0; age < kAges; ++age) {
    const double one_life = width(age);
    hazard[at(age)] = (reused[at(age)] + expected / middle(age) * one_life) / (time[at(age)] + one_life);
    expected = hazard[at(age)] * middle(age);
  }
  return hazard;
}

void ReuseStatistics::learn(i64 now, double keep) {
  // Time that lives of a class spent at an age: the whole width for each that got beyond it, half for each that ended
  // within. Uses divided by that time is the hazard of the age.
  Cells ended = closed_, time;  // an open life counts as if it ended now
  lives_.each(now, [&](i32 cls, i64 begun, i32 lives) { ended[at(cls * kAges + age_index(now - begun))] += lives; });
  Ages pooled_reused{}, pooled_time{}, hazard;
  for (i32 cls = 0; cls < kClasses; ++cls) {
    double beyond = 0;
    for (i32 age = kAges - 1; age >= 0; --age) {
      const std::size_t cell = at(cls * kAges + age);
      time[cell] = (beyond + ended[cell] / 2) * width(age);
      beyond += ended[cell];
      pooled_reused[at(age)] += reused_[cell];
      pooled_time[at(age)] += time[cell];
    }
  }
  const Ages pooled = pooled_hazard(pooled_reused, pooled_time);
  for (i32 cls = 0; cls < kClasses; ++cls) {
    for (i32 age = 0; age < kAges; ++age) {
      const std::size_t cell = at(cls * kAges + age);
      const double prior_time = kPriorLives * width(age);
      hazard[at(age)] = (reused_[cell] + pooled[at(age)] * prior_time) / (time[cell] + prior_time);
    }
    rate(cls, hazard);
  }
  for (i32 cell = 0; cell < kCells; ++cell) {
    reused_[at(cell)] *= keep;
    closed_[at(cell)] *= keep;
  }
}

// Keeping a block from age a to age b yields P(used in between) for E(time kept, at most b - a). The best b makes the
// quotient largest. With both summed from age 0 that quotient is a slope between two points of one curve, the factor
// P(life reaches a) cancels, and the best b for every a at once is the next corner of the curve's upper hull.
void ReuseStatistics::rate(i32 cls, const Ages& hazard) {
  std::array<double, kAges + 1> kept, used;
  kept[0] = used[0] = 0;
  double alive = 1;
  for (i32 age = 0; age < kAges; ++age) {
    const double ends = alive * -std::expm1(-hazard[at(age)] * width(age));
    used[at(age + 1)] = used[at(age)] + ends;
    kept[at(age + 1)] = kept[at(age)] + ends / hazard[at(age)];
    alive = std::max(alive - ends, kLeastAlive);
  }
  std::array<i32, kAges + 1> hull;
  i32 corners = 1;
  hull[0] = kAges;
  for (i32 age = kAges - 1; age >= 0; --age) {
    const auto slope = [&](i32 corner) {
      const std::size_t to = at(hull[at(corner)]);
      return (used[to] - used[at(age)]) / (kept[to] - kept[at(age)]);
    };
    while (corners > 1 && slope(corners - 2) >= slope(corners - 1)) --corners;
    density_[at(cls * kAges + age)] = slope(corners - 1);
    hull[at(corners++)] = age;
  }
}

}  // namespace kvmem
