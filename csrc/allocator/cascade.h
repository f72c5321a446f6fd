// Which sequences of a batch read the same memory, so that a kernel may read it once for all of them.
//
// What counts is physical identity, not token ids: forks with unknown tokens share as well as prefix hits. Functions of
// the page table and the lengths, without state. REQUIRE the pool's lock.
#pragma once

#include <vector>

#include "allocator/groups.h"
#include "table/page_table.h"
#include "table/sequences.h"

namespace kvmem {

// out[i]: how many leading whole blocks sequences i and i + 1 have in common, as memory. 0 throughout for groups with a
// window and for states.
void find_common_blocks(const Groups& groups, const PageTable& table, const std::vector<i64>& indices, i64 g, i64* out);

// A permutation of 0 .. n - 1 that puts sequences with common blocks side by side, nested groups within the outer ones.
// Groups stand where their first member stood. Cost: as find_common_blocks() of neighbours in that order, and what is
// left of n^2 small steps where groups are nested n deep.
void find_cascade_order(const Groups& groups, const PageTable& table, const Sequences& sequences,
                        const std::vector<i64>& indices, i64 g, i64* order);

}  // namespace kvmem
