#include "allocator/plan.h"

#include <string>

namespace kvmem {

void Planner::start(const i32* handles, i64 n, i64 group, StepPlan* plan) const {
  plan->handles = handles, plan->n = n, plan->group = group;
  plan->more = plan->commits = plan->ids = nullptr;
  KVMEM_ASSERT(n >= 0, "a call names a number of sequences");
  ++plan->number;
  plan->indices.resize(n);
  plan->needy.clear();
  plan->moving.clear();
}

void Planner::find(const i32* handles, i64 n, StepPlan* plan) const {
  start(handles, n, -1, plan);
  for (i64 i = 0; i < n; ++i) plan->indices[i] = sequences_.index(handles[i]);
}

void Planner::find_each_once(const i32* handles, i64 n, StepPlan* plan) const {
  start(handles, n, -1, plan);
  for (i64 i = 0; i < n; ++i) mark_once(plan->indices[i] = sequences_.index(handles[i]), plan);
}

void Planner::extend(const i32* handles, const i32* counts, i64 n, i64 group, StepPlan* plan) {
  groups_.check(group);
  start(handles, n, group, plan);
  if (!counts && static_cast<i64>(plan->ones.size()) < n) plan->ones.resize(n, 1);
  plan->more = counts ? counts : plan->ones.data();
  plan->due.resize(n);
  plan->totals = RowTotals();
  if (groups_.is_simple()) return extend_simple(plan);
  const i64 main = groups_.token_group(), size = groups_[main].block_tokens;
  for (i64 i = 0; i < n; ++i) {
    const i64 index = plan->indices[i] = sequences_.index(handles[i]), count = plan->more[i];
    mark_once(index, plan);
    if (count < 0) refuse_count(handles[i], count);
    bool room = groups_.geometry().zero != Zero::always;
    for (i64 g = groups_.begin(group); g < groups_.end(group); ++g) room = has_room(index, g, group, count) && room;
    if (!room) plan->needy.push_back(i);
    plan->due[i] = plan->totals.add(*sequences_.lengths(main, index), count, size);
  }
}

// Runs in every step for every sequence, so it keeps what it uses in local variables, which no store can change.
void Planner::extend_simple(StepPlan* plan) {
  const i64 size = groups_[0].block_tokens, most = groups_[0].max_tokens, number = plan->number, n = plan->n;
  const Sequences& sequences = sequences_;
  PageTable& table = table_;
  const Sequences::Lengths* const lengths = sequences.lengths(0, 0);
  const i32 *const handles = plan->handles, *const counts = plan->more;
  i64 *const indices = plan->indices.data(), *const stamps = plan->stamps.data();
  i32* const due = plan->due.data();
  RowTotals totals;
  for (i64 i = 0; i < n; ++i) {
    const i64 index = indices[i] = sequences.index(handles[i]), after = lengths[index].tokens + counts[i];
    if (stamps[index] == number) refuse_twice(index);
    stamps[index] = number;
    if (counts[i] < 0) refuse_count(handles[i], counts[i]);
    if (after > most) refuse_length(index, lengths[index].tokens, counts[i], most);
    if (!table.has_room(index, 0, after)) plan->needy.push_back(i);
    due[i] = totals.add(lengths[index], counts[i], size);
  }
  plan->totals = totals;
}

bool Planner::has_room(i64 index, i64 g, i64 group, i64 count) {
  const GroupGeometry& geometry = groups_[g];
  const i64 have = sequences_.tokens(index, g), after = have + count;
  if (!groups_.grows(g, group)) return geometry.growth != Growth::fixed || have > 0;
  if (after > geometry.max_tokens) refuse_length(index, have, count, geometry.max_tokens);
  if (geometry.growth != Growth::token && have > 0 && count > 0) {
    throw SpecError("group " + std::to_string(g) + " is fixed after prefill and already holds " + std::to_string(have) +
                    " tokens");
  }
  return table_.has_room(index, g, after) && !lacks_null_block(g, after);
}

void Planner::commit(const i32* handles, const i32* counts, i64 n, i64 group, const i32* ids, StepPlan* plan) const {
  groups_.check_own_count(group, "commit");
  start(handles, n, group, plan);
  for (i64 i = 0; i < n; ++i) {
    const i64 index = plan->indices[i] = sequences_.index(handles[i]);
    mark_once(index, plan);
    for (i64 g = groups_.begin(group); g < groups_.end(group); ++g) {
      if (!groups_.grows(g, group)) continue;
      const i64 reserved = sequences_.tokens(index, g) - sequences_.committed(index, g);
      if (counts[i] < 0 || counts[i] > reserved) refuse_commit(handles[i], counts[i], reserved);
    }
  }
  plan->commits = counts, plan->ids = ids;
  find_moving(plan);
}

void Planner::commit_due(const i32* ids, i64 num_ids, StepPlan* plan) const {
  if (ids && num_ids != plan->totals.due) {
    throw SpecError("step: got " + std::to_string(num_ids) + " token ids to commit, but " +
                    std::to_string(plan->totals.due) + " tokens are reserved and not committed");
  }
  KVMEM_ASSERT(static_cast<i64>(plan->due.size()) == plan->n, "the plan was made by extend()");
  plan->commits = plan->due.data(), plan->ids = ids;
  find_moving(plan);
}

// Finds the sequences of which a window moves on; all sequences if the pool is recording.
void Planner::find_moving(StepPlan* plan) const {
  if (!groups_.has_window() && !pool_.recording) return;
  const i64 group = plan->group;
  for (i64 i = 0; i < plan->n; ++i) {
    const i64 index = plan->indices[i];
    bool moves = pool_.recording;
    for (i64 g = groups_.begin(group); !moves && g < groups_.end(group); ++g) {
      if (groups_[g].window_tokens == 0 || !groups_.grows(g, group)) continue;
      moves = front_after(index, g, sequences_.committed(index, g) + plan->commits[i]) != sequences_.front(index, g);
    }
    if (moves) plan->moving.push_back(i);
  }
}

void Planner::refuse_twice(i64 index) const {
  throw SpecError("sequence handle " + std::to_string(sequences_.handle_of(index)) + " is named twice in one call");
}

void Planner::refuse_count(i64 handle, i64 count) {
  throw SpecError("asked to extend sequence handle " + std::to_string(handle) + " by " + std::to_string(count) +
                  " tokens; use truncate() to shorten it");
}

void Planner::refuse_commit(i64 handle, i64 count, i64 reserved) {
  throw SpecError("asked to commit " + std::to_string(count) + " tokens of sequence handle " + std::to_string(handle) +
                  "; " + std::to_string(reserved) + " are reserved and not committed: extend() comes first");
}

void Planner::refuse_length(i64 index, i64 have, i64 count, i64 most) const {
  throw SpecError("asked to extend sequence handle " + std::to_string(sequences_.handle_of(index)) + " from " +
                  std::to_string(have) + " by " + std::to_string(count) + " tokens; it can hold " +
                  std::to_string(most) + " (max_tokens), so at most " + std::to_string(most - have) + " more");
}

}  // namespace kvmem
