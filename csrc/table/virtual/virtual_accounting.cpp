// Counting: bytes in use, parked pages, and what rows have in common. No function here changes state.

#include <algorithm>

#include "table/shared_bytes.h"
#include "table/virtual/virtual_table.h"

namespace kvmem {

// Compares from the front, not by bisection: two rows that each computed a block may share a later page.
i64 VirtualTable::common_blocks(i64 a, i64 b, i64 group, i64 known) const {
  const i64 row = rows_.row_of(a), other = rows_.row_of(b);
  if (row < 0 || other < 0 || sequences_.front(a, group) > 0 || sequences_.front(b, group) > 0) return 0;
  i64 tokens = std::min(sequences_.committed(a, group), sequences_.committed(b, group));
  for (i64 i = first_[group]; i < first_[group + 1]; ++i) {
    const auto mine = rows_.extent(row, i).pages.begin(), others = rows_.extent(other, i).pages.begin();
    const i64 from = known * geometry_.groups[group].block_tokens * token_bytes(group, i) / page_bytes();
    const i64 end = ceil_div(tokens * token_bytes(group, i), page_bytes());
    const i64 same = std::mismatch(mine + from, mine + end, others + from).first - mine;
    tokens = std::min(tokens, same * page_bytes() / token_bytes(group, i));
  }
  return tokens / geometry_.groups[group].block_tokens;
}

i64 VirtualTable::block_key(i64 index, i64 group, i64 block) const {
  const i64 a = first_[group], start = block * geometry_.groups[group].block_tokens * token_bytes(group, a);
  return rows_.extent(rows_.row_of(index), a).pages[start / page_bytes()];
}

i64 VirtualTable::tokens_that_fit(i64 index, i64 group, i64 pages) const {
  i64 low = sequences_.tokens(index, group), high = geometry_.groups[group].max_tokens;
  while (low < high) {  // the need grows with the tokens
    const i64 middle = (low + high + 1) / 2;
    i64 need = 0;
    for (i64 a = first_[group]; a < first_[group + 1]; ++a) {
      const i64 hi = rows_.row_of(index) < 0 ? 0 : rows_.extent(rows_.row_of(index), a).hi;
      need += std::max(i64{0}, rows_.high_slot(group, a, middle) - hi);
    }
    if (need <= pages) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

i64 VirtualTable::parked_pages() const {
  i64 pages = 0;
  std::unordered_map<i32, i32> shared;  // by page: how many of its mappings no sequence needs
  const auto count = [&](const Row& row, const Extent& e, i64 from, i64 to) {
    for (i64 slot = from; slot < to; ++slot) {
      if (e.pages[slot] < 0) continue;
      row.maybe_shared ? ++shared[e.pages[slot]] : ++pages;
    }
  };
  for (i64 row = 1; row < rows_.size(); ++row) {
    if (rows_[row].slots == 0) continue;
    for (i64 a = 0, g = 0; a < arenas_; ++a) {
      while (a >= first_[g + 1]) ++g;
      const Extent& e = rows_.extent(row, a);
      i64 lo, hi;
      rows_.needed(row, g, a, &lo, &hi);
      count(rows_[row], e, e.lo, std::min(lo, e.hi));
      count(rows_[row], e, std::max(hi, e.lo), e.hi);
    }
  }
  for (const auto& [page, mappings] : shared) pages += pool_.refs(page) == mappings;
  return pages;
}

// Adds the parts of bytes [from, to) of a row that other rows show too; returns how many bytes they have.
i64 VirtualTable::add_shared(const Extent& e, i64 from, i64 to, std::vector<SharedPart>* shared) const {
  i64 bytes = 0;
  for (i64 slot = from / page_bytes(); slot * page_bytes() < to; ++slot) {
    if (pool_.refs(e.pages[slot]) <= 1) continue;
    const i64 start = slot * page_bytes();
    shared->push_back({e.pages[slot], std::max(from - start, i64{0}), std::min(to - start, page_bytes())});
    bytes += shared->back().to - shared->back().from;
  }
  return bytes;
}

void VirtualTable::count_bytes(i64 group, std::vector<i64>* used_bytes, i64* shared_bytes) const {
  std::vector<SharedPart> shared;
  for (i64 a = first_[group]; a < first_[group + 1]; ++a) {
    i64 bytes = 0;
    shared.clear();
    for (i64 index = 0; index < sequences_.capacity(); ++index) {
      const i64 row = rows_.row_of(index);
      if (row < 0) continue;
      const i64 from = sequences_.front(index, group) * token_bytes(group, a);
      const i64 to = sequences_.tokens(index, group) * token_bytes(group, a);
      bytes += to - from;
      if (!rows_[row].maybe_shared || from == to) continue;
      bytes -= add_shared(rows_.extent(row, a), from, to, &shared);
    }
    const SharedCount count = count_shared(shared);
    used_bytes->push_back(bytes + count.length);
    *shared_bytes += count.pieces * page_bytes();
  }
}

// Blocks that begin alike share the page of their beginnings. Cost: proportional to the blocks of the rows that may
// share pages.
i64 VirtualTable::common_bytes() const {
  std::vector<SharedPart> shared;
  i64 bytes = 0;
  for (i64 row = 1; row < rows_.size(); ++row) {
    for (i64 k = 0; rows_[row].maybe_shared && k < rows_.blocks_of(row); ++k) {
      const i32 node = rows_[row].holds[k].node;
      for (i64 g = 0; g < groups_; ++g) {
        const i32 w = index_.window_of(g);
        const bool counted = w < 0 ? rows_.first_holder(node) == row && !index_.used(node)
                                   : rows_.first_part_row(node, w) == row && index_.needs(node, w) == 0;
        if (!counted || geometry_.groups[g].growth != Growth::token) continue;
        for (i64 a = first_[g]; a < first_[g + 1]; ++a) {
          const i64 size = index_.block_tokens() * token_bytes(g, a);
          bytes += add_shared(rows_.extent(row, a), k * size, (k + 1) * size, &shared);
        }
      }
    }
  }
  return bytes - count_shared(shared).length;
}

i64 VirtualTable::mapped_extent_slots(i64 group, i64 arena_in_group) const {
  const i64 a = first_[group] + arena_in_group;
  for (i64 row = rows_.size() - 1; row >= 0; --row) {
    if (rows_.extent(row, a).count > 0) return rows_.slot_of(row, group, a) + rows_.extent(row, a).hi;
  }
  return 0;
}

}  // namespace kvmem
