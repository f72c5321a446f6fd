// What is remembered of blocks that left the cache: how often each had been used, and when last. A ring of bounded size
// found by hash; the oldest makes room.
#pragma once

#include <cstdint>
#include <vector>

#include "types.h"

namespace kvmem {

struct Ghost {
  std::uint32_t tag = 0;       // upper half of the key; a wrong match distorts one count and nothing else
  std::uint32_t released = 0;  // lower half of the policy's clock: a ghost is gone long before that comes round
  i32 uses = 0;                // 0: an empty place
  i32 next = -1;               // with the same hash
};

class Ghosts {
 public:
  void resize(i64 ghosts);  // to more; keeps what there is
  i64 size() const { return static_cast<i64>(ring_.size()); }

  // Returns the ghost it replaces.
  Ghost remember(std::uint64_t key, std::uint32_t released, i32 uses);
  // Returns the ghost of `key` and forgets it.
  Ghost take(std::uint64_t key);
  // Undoes remember(): the place in the ring is free again if nothing came after. False if `key` is not there.
  bool take_back(std::uint64_t key);

 private:
  i32& head(std::uint32_t tag) { return heads_[tag & (heads_.size() - 1)]; }
  Ghost add(Ghost ghost);
  i32 find(std::uint32_t tag);
  void unlink(i32 index);

  std::vector<Ghost> ring_;
  std::vector<i32> heads_;
  std::size_t next_ = 0;
};

}  // namespace kvmem
