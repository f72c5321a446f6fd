#include "allocator/table_changes.h"

#include <algorithm>

namespace kvmem {
namespace {

TableWrite write_of(i64 row, i64 column, i32 block, i64 group) {
  return {static_cast<i32>(row), static_cast<i32>(column), block, static_cast<i32>(group)};
}

}  // namespace

i32 TableDiff::entry(const Placement& at, i64 index, i64 g, i64 ordinal) const {
  const i64 front = sequences_.front(index, g);
  if (front > 0 && ordinal < quotient(front, groups_[g].block_tokens)) return 0;
  return at.blocks ? at.blocks[ordinal] : static_cast<i32>(at.first_block + ordinal);
}

void TableDiff::note_range(i64 row, i64 index, i64 g, i64 first, i64 end) {
  if (first >= end) return;
  const Placement at = table_.view(g).at(index);
  for (i64 i = first; i < end; ++i) before_.push_back(write_of(row, i, entry(at, index, g, i), g));
}

// Notes the entries that `count` more committed tokens may replace: blocks that get out of window, and blocks that the
// tokens complete, if the sequence may use cached ones in their place.
void TableDiff::note_commit(i64 row, i64 index, i64 g, i64 count) {
  const bool moves = groups_[g].window_tokens > 0;
  if (!moves && !merges_) return;
  const i64 size = groups_[g].block_tokens, done = sequences_.committed(index, g), after = done + count;
  i64 out = 0;
  if (moves) {
    out = quotient(planner_.front_after(index, g, after), size);
    note_range(row, index, g, quotient(sequences_.front(index, g), size), out);
  }
  const i64 known = index_.block_tokens();  // an index block consists of whole blocks of the group
  if (merges_) note_range(row, index, g, std::max(out, done / known * known / size), after / known * known / size);
}

// Notes the entries of the last unit, if it is not full: growth, even by no token, replaces what is shared of it by a
// copy. All entries after it are new.
void TableDiff::note_last(i64 row, i64 index, i64 g) {
  const i64 size = groups_[g].block_tokens, unit = unit_tokens(groups_[g]), tokens = sequences_.tokens(index, g);
  note_range(row, index, g, quotient(tokens, unit) * quotient(unit, size), ceil_div(tokens, size));
  if (remainder(tokens, size) == 0) before_.push_back(write_of(row, quotient(tokens, size), -1, g));
}

void TableDiff::note_before(const StepPlan& plan, TableChanges* changes) {
  before_.clear();
  for (i64 g = 0; g < groups_.count(); ++g) {
    const Growth growth = groups_[g].growth;
    for (i64 i = 0; i < plan.n && growth == Growth::token; ++i) {
      if (plan.commits) note_commit(i, plan.indices[i], g, plan.commits[i]);
      if (plan.more) note_last(i, plan.indices[i], g);
    }
    for (i64 i = 0; i < plan.n && plan.more && growth == Growth::fixed; ++i) {
      // A state is made when the sequence first grows, and its entry does not change afterwards.
      if (sequences_.tokens(plan.indices[i], g) == 0) note_last(i, plan.indices[i], g);
    }
  }
  changes->main = static_cast<i32>(groups_.token_group());
  changes->writes.clear();
  changes->writes.reserve(most_written(plan));
}

void TableDiff::write_changes(const StepPlan& plan, TableChanges* changes) const {
  std::vector<TableWrite>& writes = changes->writes;
  KVMEM_ASSERT(writes.empty(), "note_before() comes first");
  for (std::size_t k = 0; k < before_.size(); ++k) {
    const TableWrite& before = before_[k];
    const i64 index = plan.indices[before.row], g = before.group;
    const Placement at = table_.view(g).at(index);
    const i64 blocks = ceil_div(sequences_.tokens(index, g), groups_[g].block_tokens);
    const i64 end = plan.more && is_last(k) ? blocks : before.column + 1;
    for (i64 ordinal = before.column; ordinal < end; ++ordinal) {
      const i32 block = entry(at, index, g, ordinal);
      if (ordinal == before.column && block == before.block) continue;
      KVMEM_ASSERT(writes.size() < writes.capacity(), "note_before() has reserved memory for all writes");
      writes.push_back(write_of(before.row, ordinal, block, g));
    }
  }
}

// Returns the most entries that write_changes() may write, so that it needs no memory.
std::size_t TableDiff::most_written(const StepPlan& plan) const {
  i64 most = static_cast<i64>(before_.size());
  for (std::size_t k = 0; plan.more && k < before_.size(); ++k) {
    if (!is_last(k)) continue;
    const TableWrite& last = before_[k];
    const i64 tokens = sequences_.tokens(plan.indices[last.row], last.group) + plan.more[last.row];
    most += std::max(i64{1}, ceil_div(tokens, groups_[last.group].block_tokens) - last.column);
  }
  return static_cast<std::size_t>(most);
}

void TableDiff::add_table(i64 row, i64 index, i64 g, TableChanges* entries) const {
  const i64 blocks = ceil_div(sequences_.tokens(index, g), groups_[g].block_tokens);
  const Placement at = table_.view(g).at(index);
  for (i64 i = 0; i < blocks; ++i) entries->writes.push_back(write_of(row, i, entry(at, index, g, i), g));
}

}  // namespace kvmem
