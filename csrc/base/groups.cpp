#include "base/groups.h"

#include <algorithm>
#include <string>
#include <utility>

namespace kvmem {
namespace {

i64 find_token_group(const Geometry& geometry) {
  for (std::size_t g = 0; g < geometry.groups.size(); ++g) {
    if (geometry.groups[g].growth == Growth::token) return static_cast<i64>(g);
  }
  return 0;
}

template <class F>
bool any_of(const Geometry& geometry, F f) {
  return std::any_of(geometry.groups.begin(), geometry.groups.end(), f);
}

}  // namespace

Groups::Groups(Geometry geometry)
    : geometry_(std::move(geometry)),
      count_(static_cast<i64>(geometry_.groups.size())),
      token_group_(find_token_group(geometry_)),
      has_state_(any_of(geometry_, [](const GroupGeometry& g) { return g.growth == Growth::fixed; })),
      has_window_(any_of(geometry_, [](const GroupGeometry& g) { return g.window_tokens > 0; })),
      only_grows_(count_ == 1 && geometry_.groups[0].growth == Growth::token && !has_window_) {}

void Groups::refuse(i64 group) const {
  throw SpecError("group " + std::to_string(group) + " does not exist; there are " + std::to_string(count_));
}

void Groups::refuse_own_count(i64 group, const char* verb) const {
  throw SpecError(std::string(verb) + ": group " + std::to_string(group) +
                  ((*this)[group].growth == Growth::token ? " grows with the tokens of the sequence"
                                                          : " has one state of fixed size") +
                  "; only a group that is fixed after prefill has a count of its own. Leave group out");
}

}  // namespace kvmem
