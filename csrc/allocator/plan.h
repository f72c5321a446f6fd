// What a call over several sequences is going to do: found, and every argument checked, before anything changes.
//
// A plan is good until the next one is made in its memory, and while the lock is held and no length has changed. Its
// maker reads lengths and page tables, and changes neither. REQUIRES the pool's lock.
#pragma once

#include <algorithm>
#include <vector>

#include "allocator/groups.h"
#include "memory/pages.h"
#include "table/page_table.h"
#include "table/sequences.h"

namespace kvmem {

// What the rows of a batch come to, of one group.
struct RowTotals {
  i64 due = 0;                                 // tokens reserved and not committed before the step
  i64 fresh = 0, blocks = 0, blocks_most = 0;  // new tokens; blocks when there is room for them, and of the longest row
  // Of a sequence that gets room for `count` more tokens; returns its share of `due`.
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
  const i32* more = nullptr;     // how many tokens each sequence gets room for
  const i32* commits = nullptr;  // and how many of those before are committed
  const i32* ids = nullptr;      // these, one sequence's after the other's; null where they are not known
  std::vector<i64> indices;      // of the sequences
  std::vector<i64> needy;        // positions in it: there is no room yet
  std::vector<i64> moving;       // positions in it: the commit needs records, as a window moves on
  std::vector<i32> due;          // what is reserved and not committed, of each
  RowTotals totals;              // in the first group that grows with the tokens

  std::vector<i64> stamps;  // by sequence: the last plan that named it
  i64 number = 0;           // of this plan
  std::vector<i32> ones;    // what null counts stand for
};

class Planner {
 public:
  Planner(const Groups& groups, const PagePool& pool, const Sequences& sequences, PageTable& table)
      : groups_(groups), pool_(pool), sequences_(sequences), table_(table) {}

  // Only where the sequences are. StaleHandle.
  void find(const i32* handles, i64 n, StepPlan* plan) const;
  // The same; SpecError where one stands twice.
  void find_each_once(const i32* handles, i64 n, StepPlan* plan) const;
  // Room for counts[i] (null: 1) more tokens of each. StaleHandle; SpecError where a sequence stands twice or a count
  // is none.
  void extend(const i32* handles, const i32* counts, i64 n, i64 group, StepPlan* plan);
  // counts[i] tokens of each are committed: the same errors.
  void commit(const i32* handles, const i32* counts, i64 n, i64 group, const i32* ids, StepPlan* plan) const;
  // Of one made by extend(): all that is reserved is committed. `ids` (null: unknown) must be as many.
  void commit_due(const i32* ids, i64 num_ids, StepPlan* plan) const;

  // Entries that a window has dropped point at the null block and the padding block. Those are backed before the first
  // can be dropped, when the sequence grows: commit() never needs memory.
  bool lacks_null_block(i64 g, i64 tokens) const {
    const i64 window = groups_[g].window_tokens;
    return window > 0 && tokens >= window && !table_.has_reserved(g);
  }
  // The first token that the group keeps once `committed` are valid.
  i64 front_after(i64 index, i64 g, i64 committed) const {
    return std::max(sequences_.front(index, g), groups_.first_needed(g, committed));
  }

 private:
  void start(const i32* handles, i64 n, i64 group, StepPlan* plan) const;
  void extend_simple(StepPlan* plan);
  bool has_room(i64 index, i64 g, i64 group, i64 count);
  void find_moving(StepPlan* plan) const;
  void name_once(i64 index, StepPlan* plan) const {
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
  PageTable& table_;  // has_room() notes what it finds
};

}  // namespace kvmem
