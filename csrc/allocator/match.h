// Prefix matching: how much of a prompt is cached. The content index finds the blocks, the page table says whether a
// sequence can be made of them.
//
// State: scratch memory only; a match is a value. Matching changes nothing, not even the eviction order. Thread safety:
// every function REQUIRES the pool's lock.
#pragma once

#include <string>
#include <vector>

#include "base/groups.h"
#include "index/prefix_index.h"
#include "table/page_table.h"

namespace kvmem {

struct PrefixOptions {
  bool on = true;              // share equal prefixes
  bool partial = true;         // copy the equal part of a block that is only partly equal
  bool append_only = false;    // a table entry never becomes another block
  std::string policy = "lru";  // the eviction policy
  int hash_bits = 64;          // fewer make hashes collide, for tests
  i64 event_capacity = 0;      // events that can wait to be drained; 0: no events are made
  i64 move_capacity = 0;       // the same for the moves that tiers follow
};

// Why a match is not longer.
enum class MatchEnd : std::uint8_t {
  complete,
  short_block,
  other_salt,
  evicted,
  no_snapshot,
  window,
  never_seen,
  off,
  block_sizes,  // the block sizes of the groups have no common multiple of kMostSharedTokens or fewer
};

// The first `tokens` tokens of the blocks in `chain` can be reused; the last of them lies in the last block.
struct Match {
  std::vector<i32> chain;  // nodes, the first block's first
  i64 tokens = 0;
  MatchEnd end = MatchEnd::off;  // set by match() only
  i64 cookie = -1;               // PageTable::find_memory()
};

class PrefixMatcher {
 public:
  // `off`: the reason to give if nothing is shared.
  PrefixMatcher(const Groups& groups, const PrefixOptions& options, MatchEnd off, const PrefixIndex& index,
                PageTable& table)
      : groups_(groups), options_(options), off_(off), index_(index), table_(table) {}

  bool on() const { return options_.on; }
  // Returns the size of an index block: a unit of whole blocks of every group (geometry.h).
  i64 block_tokens() const { return index_.block_tokens(); }

  // Writes the longest prefix of `tokens`, without the last token, from which a sequence can continue; part of its last
  // block may match. Cost: linear in the blocks.
  void find(i32 root, const i32* tokens, i64 n, const KeyMarks& marks, Match* match);
  // Returns the same for a key, and why the match is not longer.
  Match match(const i32* tokens, i64 n, const PrefixKey& key);
  // Shortens the match to the most whole blocks of its first `tokens` tokens from which a sequence can continue.
  void cut_to_blocks(i64 tokens, Match* match);
  // Returns whether a sequence can continue from all of match->chain, as whole blocks; sets `tokens` and `row` if so.
  bool can_use_all(Match* match);

  // Returns the tag of the block that begins at token `first`, null if it has none. Valid until the next call.
  const std::string* tag_at(const KeyMarks& marks, i64 first) const {
    if (marks.empty()) return nullptr;
    tag_ = tag_of_block(marks, first, block_tokens());
    return tag_.empty() ? nullptr : &tag_;
  }
  // Returns the first block that the window group needs of a sequence of `tokens` tokens.
  i64 first_needed_block(i32 window, i64 tokens) const {
    return groups_.first_needed(index_.group_of(window), tokens) / block_tokens();
  }
  // Calls f(node, window) for each part that windows need of the first `tokens` tokens of a chain.
  template <class F>
  void for_windows(const std::vector<i32>& chain, i64 tokens, F f) const {
    const i64 end = ceil_div(tokens, block_tokens());
    for (i32 w = 0; w < index_.windows(); ++w) {
      for (i64 k = first_needed_block(w, tokens); k < end; ++k) f(chain[k], w);
    }
  }

 private:
  bool find_part(i32 last, const i32* tokens, i64 count, const std::string* tag, Match* match);
  bool try_end(i64 tokens, Match* match) const;
  void count_runs(const std::vector<i32>& chain);
  bool windows_reach(const std::vector<i32>& chain, i64 tokens) const;
  MatchEnd reason(const PrefixKey& key, const KeyMarks& marks, i32 root, const i32* tokens, i64 n,
                  const Match& match) const;

  const Groups& groups_;
  const PrefixOptions& options_;
  const MatchEnd off_;
  const PrefixIndex& index_;
  PageTable& table_;
  std::vector<PartOfBlock> parts_;
  std::vector<i32> runs_;  // [block][window]: consecutive blocks, up to this one, that the window group has
  mutable std::string tag_;
};

}  // namespace kvmem
