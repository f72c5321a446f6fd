#include "base/geometry.h"

#include <numeric>

namespace kvmem {

i64 shared_unit(const Geometry& geometry, bool* sizes) {
  i64 unit = 0;
  bool differ = false;
  if (sizes) *sizes = false;
  for (const GroupGeometry& group : geometry.groups) {
    if (group.growth == Growth::prefill) return 0;
  }
  for (const GroupGeometry& group : geometry.groups) {
    if (group.growth != Growth::token || group.block_tokens == unit) continue;
    differ = unit > 0;
    unit = differ ? std::lcm(unit, group.block_tokens) : group.block_tokens;
    if (!differ || unit <= kMostSharedTokens) continue;
    if (sizes) *sizes = true;
    return 0;
  }
  return unit;
}

Geometry with_unit(Geometry geometry, i64 unit) {
  for (GroupGeometry& group : geometry.groups) group.shared_tokens = group.growth == Growth::token ? unit : 0;
  return geometry;
}

}  // namespace kvmem
