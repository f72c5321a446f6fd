// Pins: chains of blocks that stay cached whatever becomes of the sequences that have them.
//
// State: the last node of each pin's chain. Invariants: a pin is one user of its root and a pin of each node of its
// chain, needs what each window needs of them (invariant 3), and its last node is an end in the page table, so that a
// prompt that begins with them finds all of them. Errors change nothing. REQUIRES the pool's lock.
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

  // The whole blocks of the first `tokens` tokens of a sequence (-1: all that are known), or of a prompt. SpecError
  // unless all of them could be found.
  Pinned add(i64 handle, i64 tokens, i64 index, const SequenceContents& contents);
  Pinned add(i32 root, const i32* tokens, i64 n, const PrefixKey& key);
  void remove(i64 pin);              // StaleHandle
  std::vector<Pinned> list() const;  // in the order in which they were made

  void digest(Hasher& hash) const;
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
