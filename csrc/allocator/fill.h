// Batches: checks that the buffers of a step suffice, makes ready what kernels will load, writes the metadata, and says
// whether a batch still holds.
//
// State: the number that marks of this allocator's fills carry. Invariant: what could be refused is, before anything
// has changed. Buffers that a failed write has touched are marked as unknown. REQUIRES the pool's lock.
#pragma once

#include "allocator/batch.h"
#include "allocator/plan.h"
#include "memory/transaction.h"

namespace kvmem {

// One group's part of a batch.
struct GroupBuffers {
  i64 group;
  const BatchBuffers* out;
  BatchMarks* marks;  // what the last fill of the same buffers left there
  BatchSizes sizes;   // what this one has written
};

// The buffers of one batch: no group twice.
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

  // That no sum over so many rows passes an int32 where that is what it is written to.
  void check_rows(i64 rows, const BatchGroups& batch) const;
  // That the buffers take what the plan makes of its sequences, and padding up to `rows`.
  void check_step(const StepPlan& plan, i64 rows, const BatchGroups& batch) const;
  // The same of the sequences as they are; `new_tokens` null: all that is reserved and not committed.
  void check_fill(const StepPlan& plan, const i32* new_tokens, i64 rows, const BatchGroups& batch) const;
  // Padding rows read the null block and write the padding block: some group has not got them yet.
  bool lacks_padding(const BatchGroups& batch) const;
  // Makes them. `follows`: another allocator decides about memory, so SpecError.
  void back_padding(const BatchGroups& batch, bool follows, Transaction& tx) const;
  // True if tokens that were cut off, and that nothing has grown over since, lie where kernels load them.
  bool has_cuts(const StepPlan& plan, i64 g) const;
  void zero_cuts(const StepPlan& plan, i64 g) const;
  // Writes the metadata of the plan's sequences, then padding rows up to `rows`. `changes`: the allocator's count now.
  void write(const StepPlan& plan, const i32* new_tokens, i64 rows, const BatchGroups& batch, i64 changes) const;
  // The first of a fill's sequences that was freed or cut since, or whose tokens no longer lie where the buffers say;
  // -1 if there is none.
  i64 find_stale(i64 group, const BatchBuffers& filled, const BatchMarks& marks) const;

 private:
  static i64 next_number();
  RowTotals total(const StepPlan& plan, i64 g, const i32* new_tokens) const;
  static void check_fits(const RowTotals& totals, i64 padding, const BatchBuffers& out);
  void write_group(const StepPlan& plan, const i32* new_tokens, i64 rows, GroupBuffers& group) const;
  bool lies_as(i64 index, i64 g, i64 row, const BatchBuffers& filled, const BatchMarks& marks) const;
  void check_new_tokens(i64 handle, i64 index, i64 g, i64 fresh) const;
  [[noreturn]] static void refuse_narrow(const char* field, i64 rows, i64 tokens);
  [[noreturn]] void refuse_step(i64 handle, i64 index, i64 g, i64 fresh) const;

  const i64 number_;  // of this process's fillers; never given out twice
  const Groups& groups_;
  PagePool& pool_;
  const Sequences& sequences_;
  PageTable& table_;
  TableState& tables_;
};

}  // namespace kvmem
