// Which sequences of a batch read the same memory, so that a kernel may read it once for all of them.
//
// What counts is physical identity, not token ids: forks with unknown tokens share as well as prefix hits.

#include <algorithm>
#include <numeric>
#include <unordered_map>

#include "allocator/allocator.h"

namespace kvmem {

// A window soon leaves what its sequences share behind, and a kernel masks it from each query's own position: sharing
// there is not worth reading once. A state is one entry, copied by fork().
bool Cache::can_share(i64 g) const {
  return geometry_.groups[g].window_tokens == 0 && geometry_.groups[g].growth != Growth::fixed;
}

void Cache::common_blocks(const i32* handles, i64 n, i64 group, i64* out) {
  Lock lock = enter(true);
  check_group(group);
  const i64 g = group < 0 ? token_group_ : group;
  indices_.resize(n);
  for (i64 i = 0; i < n; ++i) indices_[i] = sequences_.index(handles[i]);
  for (i64 i = 0; i + 1 < n; ++i) {
    out[i] = can_share(g) ? table_->common_blocks(indices_[i], indices_[i + 1], g, 0) : 0;
  }
}

// Appends `places` (of indices_, ascending) to the order. All of them have their first `depth` blocks in common.
void Cache::arrange(const std::vector<i64>& places, i64 depth, i64 g, i64** order) const {
  std::vector<std::vector<i64>> candidates;
  std::unordered_map<i64, std::size_t> seen;  // key of the next block -> its candidates
  for (i64 place : places) {
    const i64 index = indices_[place];
    std::size_t to = candidates.size();
    if (sequences_.front(index, g) == 0 && sequences_.committed(index, g) / geometry_.groups[g].block_tokens > depth) {
      to = seen.emplace(table_->block_key(index, g, depth), to).first->second;
    }
    if (to == candidates.size()) candidates.emplace_back();
    candidates[to].push_back(place);
  }
  std::vector<Alike> groups;
  for (std::vector<i64>& some : candidates) split(std::move(some), depth, g, &groups);
  std::sort(groups.begin(), groups.end(), [](const Alike& x, const Alike& y) { return x.places[0] < y.places[0]; });
  for (const Alike& group : groups) {
    if (group.places.size() < 3) {
      *order = std::copy(group.places.begin(), group.places.end(), *order);
    } else {
      arrange(group.places, group.blocks, g, order);
    }
  }
}

// Groups `places`, which may have one block more than `depth` in common. Nearly always all of them have.
void Cache::split(std::vector<i64> places, i64 depth, i64 g, std::vector<Alike>* groups) const {
  std::vector<i64> rest;
  for (; !places.empty(); places.swap(rest), rest.clear()) {
    Alike group{{places[0]}, INT64_MAX};
    for (std::size_t i = 1; i < places.size(); ++i) {
      const i64 blocks = table_->common_blocks(indices_[places[0]], indices_[places[i]], g, depth);
      (blocks > depth ? group.places : rest).push_back(places[i]);
      if (blocks > depth) group.blocks = std::min(group.blocks, blocks);
    }
    groups->push_back(std::move(group));
  }
}

void Cache::cascade_order(const i32* handles, i64 n, i64 group, i64* order) {
  Lock lock = enter(true);
  check_group(group);
  const i64 g = group < 0 ? token_group_ : group;
  indices_.resize(n);
  for (i64 i = 0; i < n; ++i) indices_[i] = sequences_.index(handles[i]);
  std::vector<i64> places(n);
  std::iota(places.begin(), places.end(), 0);
  if (can_share(g)) {
    arrange(places, 0, g, &order);
  } else {
    std::copy(places.begin(), places.end(), order);
  }
}

}  // namespace kvmem
