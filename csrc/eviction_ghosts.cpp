#include "eviction_ghosts.h"

#include <algorithm>
#include <utility>

namespace kvmem {

void Ghosts::resize(i64 ghosts) {
  std::vector<Ghost> old(static_cast<std::size_t>(ghosts));
  old.swap(ring_);
  std::rotate(old.begin(), old.begin() + static_cast<std::ptrdiff_t>(next_), old.end());  // the oldest first
  std::size_t heads = 1;
  while (heads < ring_.size()) heads *= 2;
  heads_.assign(heads, -1);
  next_ = 0;
  for (const Ghost& ghost : old) {
    if (ghost.uses) add(ghost);
  }
}

Ghost Ghosts::remember(std::uint64_t key, std::uint32_t released, i32 uses) {
  return add({static_cast<std::uint32_t>(key >> 32), released, uses, -1});
}

Ghost Ghosts::add(Ghost ghost) {
  const i32 index = static_cast<i32>(next_);
  next_ = (next_ + 1) % ring_.size();
  Ghost& place = ring_[static_cast<std::size_t>(index)];
  const Ghost replaced = place;
  if (replaced.uses) unlink(index);
  i32& first = head(ghost.tag);
  ghost.next = std::exchange(first, index);
  place = ghost;
  return replaced;
}

Ghost Ghosts::take(std::uint64_t key) {
  const i32 index = find(static_cast<std::uint32_t>(key >> 32));
  if (index < 0) return {};
  unlink(index);
  return std::exchange(ring_[static_cast<std::size_t>(index)], Ghost{});
}

bool Ghosts::take_back(std::uint64_t key) {
  const std::size_t latest = (next_ + ring_.size() - 1) % ring_.size();
  const i32 index = find(static_cast<std::uint32_t>(key >> 32));
  if (index < 0) return false;
  take(key);
  if (static_cast<std::size_t>(index) == latest) next_ = latest;
  return true;
}

i32 Ghosts::find(std::uint32_t tag) {
  i32 index = head(tag);
  while (index >= 0 && ring_[static_cast<std::size_t>(index)].tag != tag) {
    index = ring_[static_cast<std::size_t>(index)].next;
  }
  return index;
}

void Ghosts::unlink(i32 index) {
  const Ghost& ghost = ring_[static_cast<std::size_t>(index)];
  i32* link = &head(ghost.tag);
  while (*link != index) link = &ring_[static_cast<std::size_t>(*link)].next;
  *link = ghost.next;
}

}  // namespace kvmem
