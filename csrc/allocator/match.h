// How much of a prompt is cached. The content index says what is known, the page table where it lies.
//
// State: scratch only; a match is a value. Looking changes nothing, not even what is evicted next. REQUIRES the pool's
// lock.
#pragma once

#include <string>
#include <vector>

#include "allocator/groups.h"
#include "index/prefix_index.h"
#include "table/page_table.h"

namespace kvmem {

struct PrefixOptions {
  bool on = true;              // share what sequences have in common
  bool partial = true;         // and copy the equal part of a block that is only partly equal
  std::string policy = "lru";  // what is evicted first
  int hash_bits = 64;          // fewer make hashes collide, for tests
  i64 event_capacity = 0;      // events that wait to be drained; 0: none are made
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
  block_sizes,  // those of the groups have no common multiple of kMostSharedTokens or fewer
};

// The first `tokens` tokens of the blocks in `chain` can be reused. They end in its last block.
struct Match {
  std::vector<i32> chain;  // nodes, the first block's first
  i64 tokens = 0;
  MatchEnd end = MatchEnd::off;  // only as look() returns it
  i64 row = -1;                  // where the page table found them
};

class PrefixMatcher {
 public:
  PrefixMatcher(const Groups& groups, const PrefixOptions& options, MatchEnd off, const PrefixIndex& index,
                PageTable& table)
      : groups_(groups), options_(options), off_(off), index_(index), table_(table) {}

  bool on() const { return options_.on; }
  // A block of the index: a unit of whole blocks of every group (geometry.h).
  i64 block_tokens() const { return index_.block_tokens(); }

  // The longest start of `tokens`, of all but one, that some sequence could go on from. Its last block may count in
  // part. Cost: linear in the blocks.
  void find(i32 root, const i32* tokens, i64 n, const KeyMarks& marks, Match* match);
  // The same, and why it is not longer.
  Match look(const i32* tokens, i64 n, const PrefixKey& key);
  // The most whole blocks of the first `tokens` tokens of match.chain that a sequence could go on from.
  void cut_to_blocks(i64 tokens, Match* match);
  // Whether a sequence could go on from all of the match.chain, as `blocks` whole blocks; says where then.
  bool has_all(Match* match);

  // The tag of the block that begins at token `first`, null for none; good until the next call.
  const std::string* tag_at(const KeyMarks& marks, i64 first) const {
    if (marks.empty()) return nullptr;
    tag_ = tag_of_block(marks, first, block_tokens());
    return tag_.empty() ? nullptr : &tag_;
  }
  i64 first_needed_block(i32 window, i64 tokens) const {
    return groups_.first_needed(index_.group_of(window), tokens) / block_tokens();
  }
  // Calls f(node, window) of what each window needs of the first `tokens` tokens of a chain.
  template <class F>
  void for_windows(const std::vector<i32>& chain, i64 tokens, F f) const {
    const i64 end = ceil_div(tokens, block_tokens());
    for (i32 w = 0; w < index_.windows(); ++w) {
      for (i64 k = first_needed_block(w, tokens); k < end; ++k) f(chain[k], w);
    }
  }

 private:
  bool find_part(i32 last, const i32* tokens, i64 count, const std::string* tag, Match* match);
  bool find_end(i64 tokens, Match* match) const;
  void look_along_windows(const std::vector<i32>& chain);
  bool windows_reach(const std::vector<i32>& chain, i64 tokens) const;
  MatchEnd why_not_more(const PrefixKey& key, const KeyMarks& marks, i32 root, const i32* tokens, i64 n,
                        const Match& match) const;

  const Groups& groups_;
  const PrefixOptions& options_;
  const MatchEnd off_;  // why nothing is shared, if so
  const PrefixIndex& index_;
  PageTable& table_;
  std::vector<PartOfBlock> parts_;
  std::vector<i32> runs_;  // [block of the chain][window]: how many in a row the window group has, this one included
  mutable std::string tag_;
};

}  // namespace kvmem
