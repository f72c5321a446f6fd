// Which sequences of a batch read the same memory, so that a kernel may read it once for all of them.
//
// What counts is physical identity, not token ids: forks with unknown tokens share as well as prefix hits.

#include <algorithm>

#include "cache.h"

namespace kvmem {

// A window soon leaves what its sequences share behind, and a kernel masks it from each query's own position: sharing
// there is not worth reading once. A state is one entry, copied by fork().
i64 Cache::common(i64 a, i64 b, i64 g) const {
  const GroupGeometry& geometry = geometry_.groups[g];
  if (geometry.window_tokens > 0 || geometry.growth == Growth::fixed) return 0;
  return table_->common_blocks(a, b, g);
}

void Cache::common_blocks(const i32* handles, i64 n, i64 group, i64* out) {
  Lock lock = enter(true);
  check_group(group);
  const i64 g = group < 0 ? token_group_ : group;
  indices_.resize(n);
  for (i64 i = 0; i < n; ++i) indices_[i] = sequences_.index(handles[i]);
  for (i64 i = 0; i + 1 < n; ++i) out[i] = common(indices_[i], indices_[i + 1], g);
}

// Appends `places` (of indices_) to the order. All of them have `depth` blocks in common.
void Cache::arrange(std::vector<i64> places, i64 depth, i64 g, i64** order) const {
  std::vector<i64> rest;
  for (; !places.empty(); places.swap(rest), rest.clear()) {
    std::vector<i64> alike{places.front()};
    i64 deeper = -1;
    for (std::size_t i = 1; i < places.size(); ++i) {
      const i64 blocks = common(indices_[places.front()], indices_[places[i]], g);
      (blocks > depth ? alike : rest).push_back(places[i]);
      if (blocks > depth) deeper = deeper < 0 ? blocks : std::min(deeper, blocks);
    }
    if (alike.size() < 3) {
      *order = std::copy(alike.begin(), alike.end(), *order);
    } else {
      arrange(std::move(alike), deeper, g, order);
    }
  }
}

void Cache::cascade_order(const i32* handles, i64 n, i64 group, i64* order) {
  Lock lock = enter(true);
  check_group(group);
  indices_.resize(n);
  std::vector<i64> places(n);
  for (i64 i = 0; i < n; ++i) {
    indices_[i] = sequences_.index(handles[i]);
    places[i] = i;
  }
  arrange(std::move(places), 0, group < 0 ? token_group_ : group, &order);
}

}  // namespace kvmem
