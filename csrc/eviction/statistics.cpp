#include "eviction/statistics.h"

#include <algorithm>
#include <cmath>

namespace kvmem {
namespace {

constexpr i32 kAges = ReuseStatistics::kAges;
// Without any observation, a use is expected at rate 0.1 / age. Every rate that falls with age orders blocks by
// recency.
constexpr double kPriorRate = 0.1;
// The weight of the pooled hazard in that of a class: a class counts for more once about this many lives of its own
// have reached an age.
constexpr double kPriorLives = 8;
// A common factor does not change slopes, and only slopes matter. The lower bound keeps rounding errors from deciding.
constexpr double kLeastAlive = 1e-6;

constexpr double first_age(i32 index) {
  if (index == 0) return 0;
  const double octave = static_cast<double>(i64{16} << ((index - 1) / 2));
  return (index - 1) % 2 ? 1.5 * octave : octave;
}

// Precomputed, because learning looks them up thousands of times.
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

// An age that no life has reached yet extrapolates the ages before it. If it promised more, the oldest blocks would
// stay cached because they are old.
ReuseStatistics::Ages ReuseStatistics::pooled_hazard(const Ages& reused, const Ages& time) {
  Ages hazard;
  double expected = kPriorRate;  // hazard times age, as of the age before
  for (i32 age = 0; age < kAges; ++age) {
    const double one_life = width(age);
    hazard[at(age)] = (reused[at(age)] + expected / middle(age) * one_life) / (time[at(age)] + one_life);
    expected = hazard[at(age)] * middle(age);
  }
  return hazard;
}

// The time that lives of a class spent at an age is the whole width of that age for each life that grew older, and half
// the width for each that ended there; an open life counts as if it ended now. The hazard of an age is its uses divided
// by that time.
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

// A block that stays cached from age a to age b yields P(used in between) at the cost E(time cached, at most b - a).
// Its density is that quotient for the best b. With both terms summed up from age 0, the quotient is the slope between
// two points of one curve, and the factor P(life reaches a) cancels. So the best b, for every a at once, is the next
// corner of the curve's upper hull.
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
