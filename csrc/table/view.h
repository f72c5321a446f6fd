// What a backend shows of a group's page table. A batch reads it, entry by entry, without asking which backend it is.
#pragma once

#include <algorithm>

#include "base/types.h"

namespace kvmem {

// Where one sequence's entries of one group lie, for kernels.
struct Placement {
  const i32* blocks = nullptr;  // paged: the block table's row
  i64 first_block = 0;          // virtual: the row's first block; the others follow
  i64 row = -1;                 // virtual: the row, -1 where there are none
  i64 version = 0;              // while it stays, entries are only added at the end
};

// The page table of one group, as a batch reads it: a function from the sequence's place to its entries.
struct TableView {
  const i32* table = nullptr;               // paged: entries, `stride` of them for each sequence
  const std::uint32_t* versions = nullptr;  // paged: [sequence][group], from this group on
  i64 stride = 0, groups = 0;
  const i32* rows = nullptr;  // virtual: the row of each sequence, -1 for none yet
  i64 row_blocks = 0;

  Placement at(i64 index) const {
    if (table) return {table + index * stride, 0, -1, versions[index * groups]};
    const i64 row = rows[index] < 0 ? 0 : rows[index];
    return {nullptr, row * row_blocks, row, row};
  }
  i64 version(i64 index) const { return table ? versions[index * groups] : std::max(rows[index], 0); }
};

}  // namespace kvmem
