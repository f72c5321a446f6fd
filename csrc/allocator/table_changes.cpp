// extend(), commit() and advance() for those who keep a copy of the block tables: they tell which entries they wrote.
// By group, then by row, then by column. An entry that a window has passed is 0, whatever the page table keeps there.

#include <algorithm>

#include "allocator/allocator.h"

namespace kvmem {
namespace {

i32 entry_of(const Placement& at, i64 ordinal) {
  return at.blocks ? at.blocks[ordinal] : static_cast<i32>(at.first_block + ordinal);
}

TableWrite write_of(i64 row, i64 column, i32 block, i64 group) {
  return {static_cast<i32>(row), static_cast<i32>(column), block, static_cast<i32>(group)};
}

}  // namespace

i32 Cache::told_entry(const Placement& at, i64 index, i64 g, i64 ordinal) const {
  const i64 front = sequences_.front(index, g);
  return front > 0 && ordinal < quotient(front, geometry_.groups[g].block_tokens) ? 0 : entry_of(at, ordinal);
}

void Cache::see(i64 row, i64 index, i64 g, i64 first, i64 end) {
  if (first >= end) return;
  const Placement at = table_->view(g).at(index);
  for (i64 i = first; i < end; ++i) seen_.push_back(write_of(row, i, told_entry(at, index, g, i), g));
}

// What `count` more committed tokens may replace: blocks that the window passes, and blocks that they complete, which
// may be cached already: the sequence reads those from now on (paged).
void Cache::see_committed(i64 row, i64 index, i64 g, i64 count) {
  const bool moves = geometry_.groups[g].window_tokens > 0, merges = paged_ && prefix_.on;
  if (!moves && !merges) return;
  const i64 size = geometry_.groups[g].block_tokens, done = sequences_.committed(index, g);
  const i64 after = std::min(done + std::max(count, i64{0}), sequences_.tokens(index, g));
  i64 passed = 0;
  if (moves) {
    passed = quotient(window_front(index, g, after), size);
    see(row, index, g, quotient(sequences_.front(index, g), size), passed);
  }
  const i64 known = block_tokens();  // what completes a block of the index completes all of the group's in it
  if (merges) see(row, index, g, std::max(passed, done / known * known / size), after / known * known / size);
}

// What others read of a unit that is not full gives way to copies when the sequence grows, even by no token; after it
// all is new.
void Cache::see_last(i64 row, i64 index, i64 g) {
  const i64 size = geometry_.groups[g].block_tokens, unit = unit_tokens(geometry_.groups[g]);
  const i64 tokens = sequences_.tokens(index, g);
  see(row, index, g, quotient(tokens, unit) * quotient(unit, size), ceil_div(tokens, size));
  if (remainder(tokens, size) == 0) seen_.push_back(write_of(row, quotient(tokens, size), -1, g));
}

// Of the sequences in indices_, before commits[i] tokens of each (null: none) are committed and, if `grown`, they grow.
void Cache::see_all(const i32* commits, bool grown) {
  seen_.clear();
  const i64 n = static_cast<i64>(indices_.size());
  for (i64 g = 0; g < groups_; ++g) {
    const Growth growth = geometry_.groups[g].growth;
    for (i64 i = 0; i < n && growth == Growth::token; ++i) {
      if (commits) see_committed(i, indices_[i], g, commits[i]);
      if (grown) see_last(i, indices_[i], g);
    }
    for (i64 i = 0; i < n && grown && growth == Growth::fixed;
         ++i) {  // made when the sequence first grows, and then it stays
      if (sequences_.tokens(indices_[i], g) == 0) see_last(i, indices_[i], g);
    }
  }
}

// What of seen_ is another block now, and if the sequences have grown, all that follows the last that was seen of each.
// `writes` has room for most_written() of them.
void Cache::tell_written(bool grown, TableWrites* writes) const {
  for (std::size_t k = 0; k < seen_.size(); ++k) {
    const TableWrite& before = seen_[k];
    const i64 index = indices_[before.row], g = before.group, size = geometry_.groups[g].block_tokens;
    const Placement at = table_->view(g).at(index);
    const bool last =
        grown && (k + 1 == seen_.size() || seen_[k + 1].row != before.row || seen_[k + 1].group != before.group);
    const i64 end = last ? ceil_div(sequences_.tokens(index, g), size) : before.column + 1;
    for (i64 ordinal = before.column; ordinal < end; ++ordinal) {
      const i32 block = told_entry(at, index, g, ordinal);
      if (ordinal > before.column || block != before.block) writes->push_back(write_of(before.row, ordinal, block, g));
    }
  }
}

// As many as tell_written() may tell after the sequences in indices_ have grown by counts[i] (null: by nothing). They
// are counted before anything changes, since afterwards nothing may fail.
std::size_t Cache::most_written(const i32* counts) const {
  i64 most = static_cast<i64>(seen_.size());
  for (std::size_t k = 0; counts && k < seen_.size(); ++k) {
    const TableWrite& last = seen_[k];
    if (k + 1 < seen_.size() && seen_[k + 1].row == last.row && seen_[k + 1].group == last.group) continue;
    const i64 size = geometry_.groups[last.group].block_tokens;
    const i64 tokens = sequences_.tokens(indices_[last.row], last.group) + counts[last.row];
    most += std::max(i64{1}, ceil_div(tokens, size) - last.column);
  }
  return static_cast<std::size_t>(most);
}

TableWrites Cache::extend_telling(const i32* handles, const i32* counts, i64 n) {
  return mutate([&] {
    TableWrites writes;
    plan_extend(handles, counts, n, -1);
    see_all(nullptr, true);
    writes.reserve(most_written(counts));
    grow_planned(handles, counts, n, -1);
    tell_written(true, &writes);
    return writes;
  });
}

TableWrites Cache::commit_telling(const i32* handles, const i32* counts, i64 n, const i32* tokens) {
  return mutate([&] {
    TableWrites writes;
    indices_.resize(n);
    for (i64 i = 0; i < n; ++i) indices_[i] = sequences_.index(handles[i]);
    see_all(counts, false);
    writes.reserve(most_written(nullptr));
    commit_all(handles, counts, n, -1, tokens);
    tell_written(false, &writes);
    return writes;
  });
}

TableWrites Cache::advance_telling(i64 handle, i64 count, const i32* tokens, i64 num_tokens) {
  return mutate([&] {
    TableWrites writes;
    advance_one(handle, count, tokens, num_tokens, &writes);
    tell_written(true, &writes);
    return writes;
  });
}

void Cache::add_table(i64 row, i64 index, i64 g, TableWrites* entries) const {
  const i64 blocks = ceil_div(sequences_.tokens(index, g), geometry_.groups[g].block_tokens);
  const Placement at = table_->view(g).at(index);
  for (i64 i = 0; i < blocks; ++i) entries->push_back(write_of(row, i, told_entry(at, index, g, i), g));
}

TableWrites Cache::table(i64 handle, i64 group) {
  Lock lock = enter(true);
  check_group(group);
  const i64 index = sequences_.index(handle);
  TableWrites entries;
  for (i64 g = group_begin(group); g < group_end(group); ++g) add_table(0, index, g, &entries);
  return entries;
}

TableWrites Cache::tables(const i32* handles, i64 n) {
  Lock lock = enter(true);
  indices_.resize(n);
  for (i64 i = 0; i < n; ++i) indices_[i] = sequences_.index(handles[i]);
  TableWrites entries;
  for (i64 g = 0; g < groups_; ++g) {
    for (i64 i = 0; i < n; ++i) add_table(i, indices_[i], g, &entries);
  }
  return entries;
}

}  // namespace kvmem
