#include "eviction/ghosts.h"

#include <algorithm>

#include "base/check.h"

namespace kvmem {

Ghost Ghosts::add(std::uint32_t hash, Ghost ghost) {
  KVMEM_ASSERT(ghost.uses > 0 && ghost.uses <= 255, "a ghost was used, and its count has 8 bits");
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
  std::uint32_t known = 0;  // compares all tags without a branch, since most keys have no ghost
  for (std::size_t way = 0; way < kWays; ++way) known |= set.marks[way] >> 8 == tag;
  if (!known) return {};
  std::size_t found = 0;
  while (set.marks[found] >> 8 != tag) ++found;
  const Ghost ghost = set.at(found);  // an empty entry matches tag 0, and has 0 uses
  for (std::size_t way = found; way + 1 < kWays; ++way) {
    set.marks[way] = set.marks[way + 1];
    set.begun[way] = set.begun[way + 1];
  }
  set.marks[kWays - 1] = 0;
  return ghost;
}

// Restores the hash from a tag. Hashes are assigned to sets in ascending order, so those of a set lie within
// 2^32 / sets, at most 2^24, of each other, and the 24 bits of the tag identify the hash.
std::uint32_t Ghosts::hash_of(std::uint64_t set, std::uint64_t sets, std::uint32_t mark) {
  const std::uint32_t first = static_cast<std::uint32_t>(((set << 32) + sets - 1) / sets);
  return first + (((mark >> 8) - first) & kTagMask);
}

std::vector<Ghost> Ghosts::resize(i64 ghosts) {
  std::vector<Ghost> lost;
  if (ghosts <= size()) return lost;
  lost.reserve(static_cast<std::size_t>(size()));  // nothing below allocates after the first change
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
