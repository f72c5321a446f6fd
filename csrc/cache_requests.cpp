// extend(), commit() and advance() for those who keep a copy of the block tables: they tell which entries they wrote.
// Of the first group that grows with the tokens, by row, then by column.

#include <algorithm>

#include "cache.h"

namespace kvmem {
namespace {

i32 entry_of(const Placement& at, i64 ordinal) {
  return at.blocks ? at.blocks[ordinal] : static_cast<i32>(at.first_block + ordinal);
}

TableWrite write_of(i64 row, i64 column, i32 block) { return {static_cast<i32>(row), static_cast<i32>(column), block}; }

}  // namespace

void Cache::see(i64 row, i64 index, i64 ordinal) {
  seen_.push_back(write_of(row, ordinal, entry_of(table_->view(token_group_).at(index), ordinal)));
}

// A tail that others read gives way to a copy when its sequence grows, even by no token; after it all is new.
void Cache::see_last(i64 row, i64 index) {
  const i64 g = token_group_, size = geometry_.groups[g].block_tokens, tokens = sequences_.tokens(index, g);
  if (remainder(tokens, size) == 0) {
    seen_.push_back(write_of(row, quotient(tokens, size), -1));
  } else {
    see(row, index, quotient(tokens, size));
  }
}

// The blocks that `count` more tokens complete may be cached already: the sequence reads those from now on (paged).
void Cache::see_completed(i64 row, i64 index, i64 count) {
  if (!paged_ || !prefix_.on) return;
  const i64 g = token_group_, size = geometry_.groups[g].block_tokens, done = sequences_.committed(index, g);
  const i64 after = std::min(done + std::max(count, i64{0}), sequences_.tokens(index, g));
  for (i64 ordinal = quotient(done, size); ordinal < quotient(after, size); ++ordinal) see(row, index, ordinal);
}

// What of seen_ is another block now, and if the sequences have grown, all that follows the last that was seen of each.
// `writes` has room for most_written() of them.
void Cache::tell_written(bool grown, TableWrites* writes) const {
  const i64 g = token_group_, size = geometry_.groups[g].block_tokens;
  const TableView table = table_->view(g);
  for (std::size_t k = 0; k < seen_.size(); ++k) {
    const TableWrite& before = seen_[k];
    const i64 index = indices_[before.row];
    const bool last = grown && (k + 1 == seen_.size() || seen_[k + 1].row != before.row);
    const i64 end = last ? ceil_div(sequences_.tokens(index, g), size) : before.column + 1;
    for (i64 ordinal = before.column; ordinal < end; ++ordinal) {
      const i32 block = entry_of(table.at(index), ordinal);
      if (ordinal > before.column || block != before.block) writes->push_back(write_of(before.row, ordinal, block));
    }
  }
}

// As many as tell_written() may tell after the sequences in indices_ have grown by counts[i] (null: by nothing). They
// are counted before anything changes, since afterwards nothing may fail.
std::size_t Cache::most_written(const i32* counts) const {
  const i64 g = token_group_, size = geometry_.groups[g].block_tokens;
  i64 most = static_cast<i64>(seen_.size());
  for (std::size_t k = 0; counts && k < seen_.size(); ++k) {
    if (k + 1 < seen_.size() && seen_[k + 1].row == seen_[k].row) continue;
    const i64 row = seen_[k].row;
    most += ceil_div(sequences_.tokens(indices_[row], g) + counts[row], size) - seen_[k].column;
  }
  return static_cast<std::size_t>(most);
}

TableWrites Cache::extend_telling(const i32* handles, const i32* counts, i64 n) {
  return mutate([&] {
    TableWrites writes;
    plan_extend(handles, counts, n, -1);
    seen_.clear();
    for (i64 i = 0; i < n; ++i) see_last(i, indices_[i]);
    writes.reserve(most_written(counts));
    grow_planned(handles, counts, n, -1);
    tell_written(true, &writes);
    return writes;
  });
}

TableWrites Cache::commit_telling(const i32* handles, const i32* counts, i64 n, const i32* tokens) {
  return mutate([&] {
    TableWrites writes;
    seen_.clear();
    for (i64 i = 0; i < n; ++i) see_completed(i, sequences_.index(handles[i]), counts[i]);
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

TableWrites Cache::table(i64 handle, i64 group) {
  Lock lock = enter(true);
  check_group(group);
  const i64 g = group < 0 ? token_group_ : group, size = geometry_.groups[g].block_tokens;
  const i64 index = sequences_.index(handle), first = quotient(sequences_.front(index, g), size);
  const Placement at = table_->view(g).at(index);
  TableWrites entries;
  for (i64 ordinal = 0; ordinal < ceil_div(sequences_.tokens(index, g), size); ++ordinal) {
    entries.push_back(write_of(0, ordinal, ordinal < first ? 0 : entry_of(at, ordinal)));
  }
  return entries;
}

}  // namespace kvmem
