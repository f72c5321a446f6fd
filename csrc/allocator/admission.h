// How sequences begin with what is cached of their prompts.
//
// State: the statistics of look-ups; the rest is the call's in progress. Invariant: a sequence that was admitted holds
// the first `cached` tokens of its prompt, committed and known, with the node of each whole block in use. Until the
// transaction is committed all of it can be taken back; finish() comes after that and cannot fail. REQUIRES the pool's
// lock.
#pragma once

#include <vector>

#include "allocator/contents.h"
#include "allocator/room.h"

namespace kvmem {

// How much of what is cached an admission reuses: the fallbacks of one that is short of memory.
enum class Reuse : std::uint8_t { all, whole_blocks, none };

// A root of the index in use until this ends; or by keep(), for as many sequences.
class RootUse {
 public:
  RootUse(PrefixIndex& index, const PrefixKey& key, bool on) : index_(index) {
    if (on) node_ = index.open_root(key, &made_);
  }
  ~RootUse() {
    if (node_ != kNoNode && !kept_) index_.unopen_root(node_, made_);
  }
  RootUse(const RootUse&) = delete;
  RootUse& operator=(const RootUse&) = delete;
  i32 node() const { return node_; }
  void keep(i64 users) {
    if (node_ == kNoNode || users == 0) return;
    kept_ = true;
    for (i64 i = 1; i < users; ++i) index_.acquire(node_);
  }

 private:
  PrefixIndex& index_;
  i32 node_ = kNoNode;
  bool made_ = false, kept_ = false;
};

class Admission {
 public:
  Admission(const Groups& groups, PrefixMatcher& matcher, Sequences& sequences, PrefixIndex& index, PageTable& table,
            SequenceRecords& records, Room& room, SequenceContents& contents)
      : groups_(groups),
        matcher_(matcher),
        sequences_(sequences),
        index_(index),
        table_(table),
        records_(records),
        room_(room),
        contents_(contents) {}

  // A sequence opened by the call in progress.
  struct Admitted {
    i64 handle = 0, tokens = 0, cached = 0;
    KeyMarks marks;
    // In `used` from `first` to before `end`: the nodes that it reuses, from the start on, then what windows need.
    std::size_t first = 0, end = 0;
  };

  void check_length(i64 tokens) const;  // SpecError for more tokens than a sequence can hold
  void check_prompts(const i32* counts, i64 n) const;

  // --- in the call's transaction ---
  void start(i64 n);
  // Opens a sequence with as much of `tokens`, without the last one, as is cached in the root's part of the index.
  // Short of memory it takes less. `grows`: it will get room for all of them. OutOfMemory when all places are taken.
  void open(const i32* tokens, i64 n, const PrefixKey& key, i32 root, Reuse reuse, bool grows, Transaction& tx);
  // Room for `count` more tokens than are cached, or (-1) for all of the latest one's. OutOfMemory.
  void give_room(i64 count, Transaction& tx);
  // As many of `n` prompts, in their order, as there is memory and places for.
  void open_some(const i32* tokens, const i32* counts, i64 n, const PrefixKey& key, i32 root, Transaction& tx);

  // --- after it ---
  void finish(const i32* tokens, i32 root);  // of all; counts them, too
  const std::vector<Admitted>& admitted() const { return admitted_; }

  i64 lookup_tokens() const { return lookup_tokens_; }
  i64 hit_tokens() const { return hit_tokens_; }

 private:
  bool try_adopt(const Admitted& one, bool grows, Transaction& tx);
  void finish_one(Admitted& one, const i32* tokens, i32 root);

  const Groups& groups_;
  PrefixMatcher& matcher_;
  Sequences& sequences_;
  PrefixIndex& index_;
  PageTable& table_;
  SequenceRecords& records_;
  Room& room_;
  SequenceContents& contents_;
  std::vector<Admitted> admitted_;  // by the call in progress
  Match match_;                     // of the latest
  i64 lookup_tokens_ = 0, hit_tokens_ = 0;
};

}  // namespace kvmem
