#include "eviction/ghosts.h"

#include <algorithm>

namespace kvmem {

Ghost Ghosts::add(std::uint32_t hash, Ghost ghost) {
  Set& set = set_of(hash);
  const Set old = set;
  for (std::size_t way = 1; way < kWays; ++way) {
    set.marks[way] = old.marks[way - 1];
    set.begun[way] = old.begun[way - 1];
  }
  set.marks[0] = hash << 8 | static_cast<std::uint32_t>(ghost.uses);
  set.begun[0] = ghost.begun;
  return old.at(kWays - 1);
}

Ghost Ghosts::take(std::uint64_t key) {
  Set& set = set_of(hash_of(key));
  const std::uint32_t tag = hash_of(key) & kTagMask;
  std::uint32_t known = 0;  // mostly none is: all are compared at once, without a branch
  for (std::size_t way = 0; way < kWays; ++way) known |= set.marks[way] >> 8 == tag;
  if (!known) return {};
  std::size_t found = 0;
  while (set.marks[found] >> 8 != tag) ++found;
  const Ghost ghost = set.at(found);  // none, if an empty place looked like tag 0
  for (std::size_t way = found; way + 1 < kWays; ++way) {
    set.marks[way] = set.marks[way + 1];
    set.begun[way] = set.begun[way + 1];
  }
  set.marks[kWays - 1] = 0;
  return ghost;
}

// Hashes are spread over the sets in order, so those of one set are no further apart than 2^32 / sets, which is at
// most 2^24: the tag says which of them it is.
std::uint32_t Ghosts::hash_of(std::uint64_t set, std::uint64_t sets, std::uint32_t mark) {
  const std::uint32_t first = static_cast<std::uint32_t>(((set << 32) + sets - 1) / sets);
  return first + (((mark >> 8) - first) & kTagMask);
}

std::vector<Ghost> Ghosts::resize(i64 ghosts) {
  std::vector<Ghost> lost;
  if (ghosts <= size()) return lost;
  lost.reserve(static_cast<std::size_t>(size()));  // all memory comes first
  std::vector<Set> old(static_cast<std::size_t>(std::max(ceil_div(ghosts, kWays), kLeastSets)));
  old.swap(sets_);
  for (std::size_t set = 0; set < old.size(); ++set) {
    for (std::size_t way = kWays; way-- > 0;) {
      const Ghost ghost = old[set].at(way);
      if (ghost.uses == 0) continue;
      const Ghost replaced = add(hash_of(set, old.size(), old[set].marks[way]), ghost);
      if (replaced.uses > 0) lost.push_back(replaced);
    }
  }
  return lost;
}

}  // namespace kvmem
