// A group's page table as batches read it, without knowing the backend.
#pragma once

#include <algorithm>

#include "base/types.h"

namespace kvmem {

// One sequence's entries of one group.
struct Placement {
  const i32* blocks = nullptr;  // paged: the sequence's row of the block table
  i64 first_block = 0;          // virtual: id of the row's first block; consecutive ids follow
  i64 row = -1;                 // virtual: the row; paged: -1
  i64 version = 0;              // while it is equal, entries were only appended
};

// A function from a sequence's index to its entries.
struct TableView {
  const i32* table = nullptr;               // paged: entries, `stride` of them for each sequence
  const std::uint32_t* versions = nullptr;  // paged: [sequence][group], starting at this group
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
