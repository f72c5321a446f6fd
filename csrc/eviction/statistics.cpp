#include "eviction/statistics.h"

#include <algorithm>
#include <cmath>

namespace kvmem {
namespace {

constexpr i32 kAges = ReuseStatistics::kAges;
// Before anything is seen a use is expected at rate 0.1 / age. Any rate that falls with age orders blocks by recency.
constexpr double kPriorRate = 0.1;
// A class is believed against all classes together once it has seen about this many lives reach an age.
constexpr double kPriorLives = 8;
// Only slopes count, so a factor on all that follows changes nothing; without a floor rounding would decide there.
constexpr double kLeastAlive = 1e-6;

constexpr double first_age(i32 index) {
  if (index == 0) return 0;
  const double octave = static_cast<double>(i64{16} << ((index - 1) / 2));
  return (index - 1) % 2 ? 1.5 * octave : octave;
}

// Looked up, since learning asks thousands of times.
struct AgeTable {
  constexpr AgeTable() {
    for (i32 age = 0; age < kAges; ++age) {
      const double first = first_age(age), end = first_age(age + 1);
      width[static_cast<std::size_t>(age)] = end - first;
      middle[static_cast<std::size_t>(age)] = first + (end - first) / 2;
    }
  }
  std::array<double, kAges> width{}, middle{};
};
constexpr AgeTable kTable;

double width(i32 age) { return kTable.width[static_cast<std::size_t>(age)]; }

double middle(i32 age) { return kTable.middle[static_cast<std::size_t>(age)]; }

}  // namespace

ReuseStatistics::ReuseStatistics() {
  collect(0, 1);
  for (i32 cls = 0; cls < kClasses; ++cls) rate(cls);
}

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

// Time that lives of a class spent at an age: the whole width for each that got beyond it, half for each that ended
// within; an open life counts as if it ended now. Uses divided by that time is the hazard of the age.
void ReuseStatistics::collect(i64 now, double keep) {
  std::array<OpenLives<kClasses>::Lives, kAges> open{};
  lives_.each(now, [&](i64 age, const OpenLives<kClasses>::Lives& lives) {
    OpenLives<kClasses>::Lives& of_age = open[at(age_index(age))];
    for (std::size_t cls = 0; cls < kClasses; ++cls) of_age[cls] += lives[cls];
  });
  Ages pooled_reused{}, pooled_time{};
  for (i32 cls = 0; cls < kClasses; ++cls) {
    double beyond = 0;
    for (i32 age = kAges - 1; age >= 0; --age) {
      const std::size_t cell = at(cls * kAges + age);
      const Counts counts = counts_[cell];
      counts_[cell] = {};
      reused_[cell] = keep * reused_[cell] + counts.reused;
      ended_[cell] = keep * ended_[cell] + counts.ended;
      const double ended = ended_[cell] + open[at(age)][at(cls)];
      time_[cell] = (beyond + ended / 2) * width(age);
      beyond += ended;
      pooled_reused[at(age)] += reused_[cell];
      pooled_time[at(age)] += time_[cell];
    }
  }
  pooled_ = pooled_hazard(pooled_reused, pooled_time);
}

// Keeping a block from age a to age b yields P(used in between) for E(time kept, at most b - a). The best b makes the
// quotient largest. With both summed from age 0 that quotient is a slope between two points of one curve, the factor
// P(life reaches a) cancels, and the best b for every a at once is the next corner of the curve's upper hull.
void ReuseStatistics::rate(i32 cls) {
  std::array<double, kAges + 1> kept, used;
  kept[0] = used[0] = 0;
  double alive = 1;
  for (i32 age = 0; age < kAges; ++age) {
    const std::size_t cell = at(cls * kAges + age);
    const double prior_time = kPriorLives * width(age);
    const double hazard = (reused_[cell] + pooled_[at(age)] * prior_time) / (time_[cell] + prior_time);
    const double ends = alive * -std::expm1(-hazard * width(age));
    used[at(age + 1)] = used[at(age)] + ends;
    kept[at(age + 1)] = kept[at(age)] + ends / hazard;
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
    double steepest = slope(corners - 1);
    for (double next; corners > 1 && (next = slope(corners - 2)) >= steepest; --corners) steepest = next;
    density_[at(cls * kAges + age)] = static_cast<float>(steepest);
    hull[at(corners++)] = age;
  }
}

}  // namespace kvmem
