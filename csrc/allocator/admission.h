// Opening sequences with what is cached of their prompts.
//
// State: statistics of lookups, and the admissions of the call in progress. Invariant: an admitted sequence has the
// first `cached` tokens of its prompt, committed and known, and is a user of the node of each whole block. All of it
// can be undone until the transaction is committed; finish() comes afterwards and cannot fail. Thread safety: every
// function REQUIRES the pool's lock.
#pragma once

#include <vector>

#include "allocator/contents.h"
#include "allocator/growth.h"

namespace kvmem {

// How much cached content an admission reuses; the later values are fallbacks if memory is short.
enum class Reuse : std::uint8_t { all, whole_blocks, none };

// A use of the index's root for `key`. The destructor undoes it, unless commit() has turned it into uses by sequences.
class RootUse {
 public:
  RootUse(PrefixIndex& index, const PrefixKey& key, bool on) : index_(index) {
    if (on) node_ = index.open_root(key, &made_);
  }
  ~RootUse() {
    if (node_ != kNoNode && !committed_) index_.unopen_root(node_, made_);
  }
  RootUse(const RootUse&) = delete;
  RootUse& operator=(const RootUse&) = delete;
  i32 node() const { return node_; }
  void commit(i64 users) {
    KVMEM_ASSERT(!committed_, "a root is committed once");
    if (node_ == kNoNode || users == 0) return;
    committed_ = true;
    for (i64 i = 1; i < users; ++i) index_.acquire(node_);
  }

 private:
  PrefixIndex& index_;
  i32 node_ = kNoNode;
  bool made_ = false, committed_ = false;
};

class Admission {
 public:
  Admission(const Groups& groups, PrefixMatcher& matcher, Sequences& sequences, PrefixIndex& index, PageTable& table,
            SequenceRecords& records, SequenceGrowth& growth, SequenceContents& contents)
      : groups_(groups),
        matcher_(matcher),
        sequences_(sequences),
        index_(index),
        table_(table),
        records_(records),
        growth_(growth),
        contents_(contents) {}

  // A sequence opened by the call in progress.
  struct Admitted {
    i64 handle = 0, tokens = 0, cached = 0;
    KeyMarks marks;
    // Its part of SequenceContents::used, [first, end): the nodes that it reuses, from the first token on, then the
    // parts that windows need.
    std::size_t first = 0, end = 0;
  };

  // Throw SpecError for more tokens than a sequence can hold, and for a count that is negative or too large.
  void check_length(i64 tokens) const;
  void check_prompts(const i32* counts, i64 n) const;

  // --- in the transaction of the call ---
  // Begins a call that opens at most `n` sequences.
  void start(i64 n);
  // Opens a sequence with the prefix of `tokens`, without the last token, that is cached under `root`. Reuses less if
  // memory is short. `grows`: the sequence will get room for all its tokens. Throws OutOfMemory if all places are
  // taken.
  void open(const i32* tokens, i64 n, const PrefixKey& key, i32 root, Reuse reuse, bool grows, Transaction& tx);
  // The same for a sequence that is open and empty.
  void open_pending(i64 handle, const i32* tokens, i64 n, const PrefixKey& key, i32 root, Reuse reuse, Transaction& tx);
  // Makes room in the latest sequence for `count` more tokens than are cached or, with -1, for its whole prompt. Throws
  // OutOfMemory.
  void make_room(i64 count, Transaction& tx);
  // Opens, with room, as many of `n` prompts, in order, as there are memory and places for.
  void open_first(const i32* tokens, const i32* counts, i64 n, const PrefixKey& key, i32 root, Transaction& tx);

  // --- after the transaction ---
  // Completes all admissions of the call and counts them in the statistics. `tokens`: those of all prompts.
  void finish(const i32* tokens, i32 root);
  const std::vector<Admitted>& admitted() const { return admitted_; }

  i64 lookup_tokens() const { return lookup_tokens_; }
  i64 hit_tokens() const { return hit_tokens_; }

 private:
  // `kOpens`: the sequence is a new one.
  template <bool kOpens>
  void begin(i64 handle, const i32* tokens, i64 n, const PrefixKey& key, i32 root, Reuse reuse, bool grows,
             Transaction& tx);
  template <bool kOpens>
  bool try_adopt(const Admitted& one, bool grows, Transaction& tx);
  void finish_one(Admitted& one, const i32* tokens, i32 root);

  const Groups& groups_;
  PrefixMatcher& matcher_;
  Sequences& sequences_;
  PrefixIndex& index_;
  PageTable& table_;
  SequenceRecords& records_;
  SequenceGrowth& growth_;
  SequenceContents& contents_;
  std::vector<Admitted> admitted_;  // of the call in progress
  Match match_;                     // of the latest sequence
  i64 lookup_tokens_ = 0, hit_tokens_ = 0;
};

}  // namespace kvmem
