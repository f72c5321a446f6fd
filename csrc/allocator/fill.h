// Batches of sequences: the order in which a batch should name them, the checks that its buffers suffice, the metadata
// that the fill writes, and whether a filled batch is still valid.
//
// State: the number that identifies this allocator's fills. Invariants: every refusal comes before the first change;
// the marks of buffers that a failed write has touched are cleared. Thread safety: every function REQUIRES the pool's
// lock.
#pragma once

#include <vector>

#include "allocator/batch.h"
#include "allocator/plan.h"
#include "memory/transaction.h"

namespace kvmem {

// The part of a batch for one group.
struct GroupBuffers {
  i64 group;
  const BatchBuffers* out;
  BatchMarks* marks;  // of the last fill of these buffers
  BatchSizes sizes;   // written by this fill
};

// The buffers of one batch, each of another group.
struct BatchGroups {
  GroupBuffers* first;
  i64 count;
  GroupBuffers* begin() const { return first; }
  GroupBuffers* end() const { return first + count; }
};

class BatchFiller {
 public:
  BatchFiller(const Groups& groups, PagePool& pool, const Sequences& sequences, PageTable& table, TableState& tables)
      : number_(next_number()), groups_(groups), pool_(pool), sequences_(sequences), table_(table), tables_(tables) {}

  // --- checks: throw SpecError, and change nothing ---
  // The buffers have `rows` rows, and no sum over so many rows exceeds an int32 that it is written to.
  void check_rows(i64 rows, const BatchGroups& batch) const;
  // The buffers have room for the plan's sequences after the step, and for padding up to `rows`.
  void check_step(const StepPlan& plan, i64 rows, const BatchGroups& batch) const;
  // The same for the sequences as they are. `new_tokens` null: all tokens that are reserved and not committed.
  void check_fill(const StepPlan& plan, const i32* new_tokens, i64 rows, const BatchGroups& batch) const;

  // --- memory that kernels load ---
  // Returns whether a group lacks the null block, which padding rows read, or the padding block, which they write.
  bool lacks_padding(const BatchGroups& batch) const;
  // Makes those blocks. Throws OutOfMemory; SpecError with `follows`, because another allocator decides about memory.
  void back_padding(const BatchGroups& batch, bool follows, Transaction& tx) const;
  // Returns whether tokens that were cut off lie where kernels load them; zero_cuts() zeroes those.
  bool has_cuts(const StepPlan& plan, i64 g) const;
  void zero_cuts(const StepPlan& plan, i64 g) const;

  // --- metadata ---
  // Writes the metadata of the plan's sequences, then padding rows up to `rows`. `changes`: Allocator::changes() now.
  void write(const StepPlan& plan, const i32* new_tokens, i64 rows, const BatchGroups& batch, i64 changes) const;
  // Returns the first sequence of a fill that was freed or cut since, or whose tokens have moved; -1 if there is none.
  i64 find_stale(i64 group, const BatchBuffers& filled, const BatchMarks& marks) const;

  // --- sequences that share memory, which a kernel may read once for all of them. What counts is physical identity,
  // not token ids, so forks with unknown tokens share too. Groups with a window, and states, share nothing here ---
  // Writes to out[i], for all but the last, the number of leading whole blocks that sequences i and i + 1 share.
  void find_common_blocks(const std::vector<i64>& indices, i64 g, i64* out) const;
  // Writes a permutation of 0 .. n - 1 that makes sequences with common blocks neighbours, nested groups within outer
  // ones. A group takes the position of its first member. Cost: as find_common_blocks() in that order, and about n^2
  // small steps if groups are nested n deep.
  void find_cascade_order(const std::vector<i64>& indices, i64 g, i64* order) const;

 private:
  static i64 next_number();
  RowTotals total(const StepPlan& plan, i64 g, const i32* new_tokens) const;
  static void check_fits(const RowTotals& totals, i64 padding, const BatchBuffers& out);
  void write_group(const StepPlan& plan, const i32* new_tokens, i64 rows, GroupBuffers& group) const;
  bool is_current(i64 index, i64 g, i64 row, const BatchBuffers& filled, const BatchMarks& marks) const;
  void check_new_tokens(i64 handle, i64 index, i64 g, i64 fresh) const;
  // A window soon drops what its sequences share, and a state is copied by fork().
  bool can_share(i64 g) const { return groups_[g].window_tokens == 0 && groups_[g].growth != Growth::fixed; }
  [[noreturn]] static void refuse_narrow(const char* field, i64 rows, i64 tokens);
  [[noreturn]] void refuse_step(i64 handle, i64 index, i64 g, i64 fresh) const;

  const i64 number_;  // unique in this process
  const Groups& groups_;
  PagePool& pool_;
  const Sequences& sequences_;
  PageTable& table_;
  TableState& tables_;
};

}  // namespace kvmem
