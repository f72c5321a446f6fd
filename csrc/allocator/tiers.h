// Blocks in tiers below the device, as far as the core knows them: the device's blocks go to host slots when they are
// evicted (PageTable::demote), and come back by promote(). What lies in which slot, and in tiers below, is known
// outside (kvmem/allocator/tiers/engine.py), which follows the queue of moves.
//
// State: the host slots. Thread safety: every function REQUIRES the pool's lock.
#pragma once

#include <string>
#include <vector>

#include "allocator/contents.h"
#include "allocator/event_batches.h"
#include "allocator/match.h"

namespace kvmem {

class Allocator;

class Tiers {
 public:
  Tiers(const Groups& groups, const PrefixMatcher& matcher, Sequences& sequences, PrefixIndex& index, PageTable& table,
        SequenceContents& contents)
      : moves(groups, index, index.moves(), table),
        groups_(groups),
        matcher_(matcher),
        sequences_(sequences),
        index_(index),
        table_(table),
        contents_(contents) {}

  EventBatches moves;

  // Makes `counts[g]` slots for group g. Throws SpecError unless it is the first call and content is shared.
  void open(const std::vector<i64>& counts, const std::string& policy);
  // Throws SpecError if open() was not called.
  HostSlots& slots() const;
  i64 slot_bytes(i64 group) const { return table_.slot_bytes(group); }
  // Returns the first token that the group needs of a sequence's first `tokens` tokens, where it may begin.
  i64 first_needed(i64 group, i64 tokens) const { return groups_.first_needed(group, tokens); }
  // Returns for each whole block of the tokens, and for each group, whether the device has its bytes: [block][group].
  std::vector<std::uint8_t> residency(const i32* tokens, i64 n, const PrefixKey& key) const;
  // Copies to slots what the device has of the whole blocks of `tokens`, and `wanted` names: [block][group].
  void store(const i32* tokens, i64 n, const PrefixKey& key, const std::vector<bool>& wanted, Transaction& tx);
  // Makes cached content on the device of the whole blocks of `tokens`: `slots` names a held slot for what the device
  // does not have, [block][group], and -1 elsewhere. Throws SpecError, before it changes anything, if a block would
  // lack the bytes of a full-attention group. Returns the blocks' nodes.
  std::vector<i32> promote(const i32* tokens, i64 n, const PrefixKey& key, i32 root, const std::vector<i64>& slots,
                           Transaction& tx);
  // Before the transaction: makes room for the priorities that the slots' content has.
  void expect_priorities(const std::vector<i64>& held) {
    for (i64 slot : held) {
      if (slots().priority(slot).is_set()) return index_.expect_retention();
    }
  }
  // After the transaction: the content is unreferenced, and has the priorities that it had in the slots.
  void finish_promote(const std::vector<i32>& chain, const std::vector<i64>& slots);
  // Marks an empty sequence as pending: only LockedTiers::admit() can use it. Throws if it is not live.
  void set_pending(i64 handle) {
    sequences_.index(handle);
    sequences_.set_pending(handle, true);
  }
  // Ends that for those of the handles that are pending, so that they can be freed; whoever loads for one finds that it
  // has gone. Returns them, for mark_pending_again() if the free fails.
  std::vector<i32> end_pending(const i32* handles, i64 n) {
    std::vector<i32> ended;
    for (i64 i = 0; i < n; ++i) {
      if (sequences_.is_pending(handles[i])) ended.push_back(handles[i]);
    }
    for (i32 handle : ended) sequences_.set_pending(handle, false);
    return ended;
  }
  void mark_pending_again(const std::vector<i32>& handles) {
    for (i32 handle : handles) {
      if (sequences_.is_live(handle)) sequences_.set_pending(handle, true);
    }
  }

 private:
  // Calls f(block, node) for each whole block of the tokens that the index has.
  template <class F>
  void for_chain(const i32* tokens, i64 n, const PrefixKey& key, const F& f) const {
    const i64 size = matcher_.block_tokens();
    const KeyMarks marks = placed(key.marks, tokens, n);
    i32 node = index_.find_root(key);
    for (i64 k = 0; k < n / size && node != kNoNode; ++k) {
      node = index_.find(node, tokens + k * size, matcher_.tag_at(marks, k * size));
      if (node != kNoNode) f(k, node);
    }
  }
  void check_promote(const std::vector<i32>& chain, const std::vector<i64>& slots) const;

  const Groups& groups_;
  const PrefixMatcher& matcher_;
  Sequences& sequences_;
  PrefixIndex& index_;
  PageTable& table_;
  SequenceContents& contents_;
};

// An allocator's tiers under its lock, and its calls about them, which change something.
class LockedTiers {
 public:
  explicit LockedTiers(Allocator& allocator);
  Tiers* operator->() const { return &tiers_; }

  // Tiers::promote() in a transaction. Throws OutOfMemory.
  static void promote(Allocator& a, const i32* tokens, i64 n, const PrefixKey& key, const std::vector<i64>& slots);
  // Tiers::store() in a transaction.
  static void store(Allocator& a, const i32* tokens, i64 n, const PrefixKey& key, const std::vector<bool>& wanted);
  // As Allocator::admit(), for a pending sequence, which is empty. Returns how many tokens are cached. Throws
  // StaleHandle if the sequence is not pending any more.
  static i64 admit(Allocator& a, i64 handle, const i32* tokens, i64 n, const PrefixKey& key);

 private:
  PoolLock lock_;
  Tiers& tiers_;
};

}  // namespace kvmem
