// extend() and commit() for those who keep a copy of the block tables: they tell which entries they wrote. Of the first
// group that grows with the tokens, by row, then by column.

#include <algorithm>

#include "cache.h"

namespace kvmem {
namespace {

i32 entry_of(const Placement& at, i64 ordinal) {
  return at.blocks ? at.blocks[ordinal] : static_cast<i32>(at.first_block + ordinal);
}

TableWrite write_of(i64 row, i64 column, i32 block) { return {static_cast<i32>(row), static_cast<i32>(column), block}; }

}  // namespace

// A tail that others read gives way to a copy when its sequence grows, even by no token: it is looked at before.
TableWrites Cache::extend_telling(const i32* handles, const i32* counts, i64 n) {
  Lock lock = enter();
  const i64 g = token_group_, size = geometry_.groups[g].block_tokens;
  const TableView table = table_->view(g);
  seen_.clear();
  for (i64 i = 0; i < n; ++i) {
    const i64 index = sequences_.index(handles[i]), tokens = sequences_.tokens(index, g);
    const i64 last = quotient(tokens, size);
    seen_.push_back(write_of(i, last, remainder(tokens, size) == 0 ? -1 : entry_of(table.at(index), last)));
  }
  make_room(handles, counts, n, -1);
  TableWrites written;
  for (const TableWrite& before : seen_) {
    const i64 index = indices_[before.row], end = ceil_div(sequences_.tokens(index, g), size);
    for (i64 ordinal = before.column; ordinal < end; ++ordinal) {
      const i32 block = entry_of(table.at(index), ordinal);
      if (ordinal > before.column || block != before.block) written.push_back(write_of(before.row, ordinal, block));
    }
  }
  leave();
  return written;
}

// The blocks that the tokens complete may be cached already: the sequence reads those from now on (paged).
TableWrites Cache::commit_telling(const i32* handles, const i32* counts, i64 n, const i32* tokens) {
  Lock lock = enter();
  const i64 g = token_group_, size = geometry_.groups[g].block_tokens;
  const TableView table = table_->view(g);
  seen_.clear();
  for (i64 i = 0; paged_ && prefix_.on && i < n; ++i) {
    const i64 index = sequences_.index(handles[i]), done = sequences_.committed(index, g);
    const i64 after = std::min(done + std::max(counts[i], 0), sequences_.tokens(index, g));
    for (i64 ordinal = quotient(done, size); ordinal < quotient(after, size); ++ordinal) {
      seen_.push_back(write_of(i, ordinal, entry_of(table.at(index), ordinal)));
    }
  }
  commit_all(handles, counts, n, -1, tokens);
  TableWrites written;
  for (const TableWrite& before : seen_) {
    const i32 block = entry_of(table.at(indices_[before.row]), before.column);
    if (block != before.block) written.push_back({before.row, before.column, block});
  }
  leave();
  return written;
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
