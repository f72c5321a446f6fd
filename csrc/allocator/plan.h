// Plans: what a call over several sequences will do. A Planner finds the sequences and checks all arguments before
// anything changes.
//
// State: none; a plan is a value. It is valid until the next one is made in its memory, and as long as the lock is held
// and no length has changed. A Planner reads lengths and page tables, and changes neither. Thread safety: every
// function REQUIRES the pool's lock.
#pragma once

#include <algorithm>
#include <vector>

#include "base/groups.h"
#include "memory/pages.h"
#include "table/page_table.h"
#include "table/sequences.h"

namespace kvmem {

// Sums over the rows of a batch, for one group.
struct RowTotals {
  i64 due = 0;          // tokens that are reserved and not committed before the step
  i64 fresh = 0;        // new tokens
  i64 blocks = 0;       // blocks, those of the new tokens included
  i64 blocks_most = 0;  // the blocks of the longest row
  // Adds a sequence that gets room for `count` more tokens; returns its share of `due`.
  i32 add(const Sequences::Lengths& now, i64 count, i64 block_tokens) {
    const i64 reserved = now.tokens - now.committed;
    due += reserved;
    add_row(now.tokens + count, count, block_tokens);
    return static_cast<i32>(reserved);
  }
  void add_row(i64 length, i64 new_tokens, i64 block_tokens) {
    const i64 row_blocks = ceil_div(length, block_tokens);
    fresh += new_tokens, blocks += row_blocks;
    blocks_most = std::max(blocks_most, row_blocks);
  }
};

struct StepPlan {
  explicit StepPlan(i64 max_sequences) : stamps(max_sequences, 0) {}
  StepPlan(const StepPlan&) = delete;
  StepPlan& operator=(const StepPlan&) = delete;

  const i32* handles = nullptr;
  i64 n = 0, group = -1;         // see groups.h
  const i32* more = nullptr;     // the number of tokens that each sequence gets room for; null if it does not grow
  const i32* commits = nullptr;  // the number of tokens of each that are committed; null if none are
  const i32* ids = nullptr;      // the ids of the committed tokens, one sequence's after the other's; null if unknown
  std::vector<i64> indices;      // of the sequences
  std::vector<i64> needy;        // positions in `indices`: sequences that have no room yet
  std::vector<i64> moving;       // positions in `indices`: sequences whose commit needs records
  std::vector<i32> due;          // the number of tokens of each that are reserved and not committed
  RowTotals totals;              // of the first group that grows with the tokens

  std::vector<i64> stamps;  // by sequence: the number of the last plan that named it
  i64 number = 0;           // of this plan
  std::vector<i32> ones;    // stands for counts that are null
};

class Planner {
 public:
  Planner(const Groups& groups, const PagePool& pool, const Sequences& sequences, PageTable& table)
      : groups_(groups), pool_(pool), sequences_(sequences), table_(table) {}

  // All of these throw StaleHandle for a handle that is not live, and all but find() throw SpecError for a sequence
  // that is named twice.
  //
  // Plans the indices only.
  void find(const i32* handles, i64 n, StepPlan* plan) const;
  void find_each_once(const i32* handles, i64 n, StepPlan* plan) const;
  // Plans room for counts[i] (null: one) more tokens of each. Throws SpecError for a count that is negative or too
  // large, and for a group that holds what it can.
  void extend(const i32* handles, const i32* counts, i64 n, i64 group, StepPlan* plan);
  // Plans the commit of counts[i] tokens of each. Throws SpecError if fewer are reserved.
  void commit(const i32* handles, const i32* counts, i64 n, i64 group, const i32* ids, StepPlan* plan) const;
  // Adds the commit of all reserved tokens to a plan of extend(). Throws SpecError if `ids`, unless null, are not as
  // many.
  void commit_due(const i32* ids, i64 num_ids, StepPlan* plan) const;

  // Returns whether the sequence must get the group's null and padding block before it has `tokens` tokens. Entries
  // that are out of window point to them. They are made when a sequence grows, so that commit() needs no memory.
  bool lacks_null_block(i64 g, i64 tokens) const {
    const i64 window = groups_[g].window_tokens;
    return window > 0 && tokens >= window && !table_.has_reserved(g);
  }
  // Returns the first token that the group keeps once `committed` tokens are valid.
  i64 front_after(i64 index, i64 g, i64 committed) const {
    return std::max(sequences_.front(index, g), groups_.first_needed(g, committed));
  }

 private:
  void start(const i32* handles, i64 n, i64 group, StepPlan* plan) const;
  void extend_simple(StepPlan* plan);
  bool has_room(i64 index, i64 g, i64 group, i64 count);
  void find_moving(StepPlan* plan) const;
  void mark_once(i64 index, StepPlan* plan) const {
    if (plan->stamps[index] == plan->number) refuse_twice(index);
    plan->stamps[index] = plan->number;
  }
  [[noreturn]] void refuse_twice(i64 index) const;
  [[noreturn]] static void refuse_count(i64 handle, i64 count);
  [[noreturn]] static void refuse_commit(i64 handle, i64 count, i64 reserved);
  [[noreturn]] void refuse_length(i64 index, i64 have, i64 count, i64 most) const;

  const Groups& groups_;
  const PagePool& pool_;
  const Sequences& sequences_;
  PageTable& table_;  // not const, because has_room() caches its answer
};

}  // namespace kvmem
