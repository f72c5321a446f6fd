#include "allocator/cascade.h"

#include <algorithm>
#include <numeric>
#include <unordered_map>
#include <utility>

namespace kvmem {
namespace {

// A window soon leaves what its sequences share behind, and a kernel masks it from each query's own position: sharing
// there is not worth reading once. A state is one entry, copied by fork().
bool can_share(const GroupGeometry& group) { return group.window_tokens == 0 && group.growth != Growth::fixed; }

// The places of a batch in one group, arranged.
class Arrangement {
 public:
  Arrangement(const PageTable& table, const Sequences& sequences, const std::vector<i64>& indices, i64 g,
              i64 block_tokens)
      : table_(table), sequences_(sequences), indices_(indices), g_(g), block_tokens_(block_tokens) {}

  // Appends `places` (ascending) to the order. All of them have their first `depth` blocks in common.
  void arrange(const std::vector<i64>& places, i64 depth, i64** order) const {
    std::vector<std::vector<i64>> candidates;
    std::unordered_map<i64, std::size_t> seen;  // key of the next block -> its candidates
    for (i64 place : places) {
      const i64 index = indices_[place];
      std::size_t to = candidates.size();
      if (sequences_.front(index, g_) == 0 && sequences_.committed(index, g_) / block_tokens_ > depth) {
        to = seen.emplace(table_.block_key(index, g_, depth), to).first->second;
      }
      if (to == candidates.size()) candidates.emplace_back();
      candidates[to].push_back(place);
    }
    std::vector<Alike> alike;
    for (std::vector<i64>& some : candidates) split(std::move(some), depth, &alike);
    std::sort(alike.begin(), alike.end(), [](const Alike& x, const Alike& y) { return x.places[0] < y.places[0]; });
    for (const Alike& some : alike) {
      if (some.places.size() < 3) {
        *order = std::copy(some.places.begin(), some.places.end(), *order);
      } else {
        arrange(some.places, some.blocks, order);
      }
    }
  }

 private:
  struct Alike {  // sequences with `blocks` blocks in common
    std::vector<i64> places;
    i64 blocks;
  };

  // Groups `places`, which may have one block more than `depth` in common. Nearly always all of them have.
  void split(std::vector<i64> places, i64 depth, std::vector<Alike>* alike) const {
    std::vector<i64> rest;
    for (; !places.empty(); places.swap(rest), rest.clear()) {
      Alike some{{places[0]}, INT64_MAX};
      for (std::size_t i = 1; i < places.size(); ++i) {
        const i64 blocks = table_.common_blocks(indices_[places[0]], indices_[places[i]], g_, depth);
        (blocks > depth ? some.places : rest).push_back(places[i]);
        if (blocks > depth) some.blocks = std::min(some.blocks, blocks);
      }
      alike->push_back(std::move(some));
    }
  }

  const PageTable& table_;
  const Sequences& sequences_;
  const std::vector<i64>& indices_;
  const i64 g_, block_tokens_;
};

}  // namespace

void find_common_blocks(const Groups& groups, const PageTable& table, const std::vector<i64>& indices, i64 g,
                        i64* out) {
  for (std::size_t i = 0; i + 1 < indices.size(); ++i) {
    out[i] = can_share(groups[g]) ? table.common_blocks(indices[i], indices[i + 1], g, 0) : 0;
  }
}

void find_cascade_order(const Groups& groups, const PageTable& table, const Sequences& sequences,
                        const std::vector<i64>& indices, i64 g, i64* order) {
  std::vector<i64> places(indices.size());
  std::iota(places.begin(), places.end(), 0);
  if (can_share(groups[g])) {
    Arrangement(table, sequences, indices, g, groups[g].block_tokens).arrange(places, 0, &order);
  } else {
    std::copy(places.begin(), places.end(), order);
  }
}

}  // namespace kvmem
