// Pins: chains of blocks that stay cached until they are unpinned, whether or not sequences use them.
//
// State: the last node of each pin's chain. Invariants: a pin is one user of its root and pins each node of its chain;
// it needs the parts that a window needs of them (invariant 3); and its last node is an end in the page table, so that
// a prompt that begins with the chain finds all of it. Thread safety: every function REQUIRES the pool's lock. A call
// that fails changes nothing.
#pragma once

#include <string>
#include <unordered_map>
#include <vector>

#include "allocator/match.h"
#include "base/digest.h"

namespace kvmem {

class SequenceContents;

class Pins {
 public:
  struct Pinned {
    i64 pin, tokens;
  };

  Pins(const Groups& groups, PrefixMatcher& matcher, PrefixIndex& index, PageTable& table)
      : groups_(groups), matcher_(matcher), index_(index), table_(table) {}

  // Pin the whole blocks of the first `tokens` tokens of a sequence (-1: all known ones), or of a prompt. Throw
  // SpecError unless all of them are cached and usable.
  Pinned add(i64 handle, i64 tokens, i64 index, const SequenceContents& contents);
  Pinned add(i32 root, const i32* tokens, i64 n, const PrefixKey& key);
  void remove(i64 pin);              // throws StaleHandle if it was unpinned before
  std::vector<Pinned> list() const;  // the oldest pin first

  void digest(Hasher& hash) const;
  // Counts each pin as a user of its nodes.
  void count_users(std::vector<i32>* users) const;

 private:
  Pinned pin_match();
  void unneed_windows(const std::vector<i32>& chain);

  const Groups& groups_;
  PrefixMatcher& matcher_;
  PrefixIndex& index_;
  PageTable& table_;
  std::unordered_map<i64, i32> ends_;  // pin -> the last node of its chain
  i64 made_ = 0;
  Match match_;  // of the call in progress
};

}  // namespace kvmem
