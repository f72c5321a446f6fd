// Counting: bytes in use, and what sequences have in common. No function here changes state.

#include <algorithm>

#include "table/paged/paged_table.h"
#include "table/shared_bytes.h"

namespace kvmem {

i64 PagedTable::common_blocks(i64 a, i64 b, i64 group, i64 known) const {
  if (sequences_.front(a, group) > 0 || sequences_.front(b, group) > 0) return 0;
  const Blocks& blocks = blocks_[group];
  const i64 whole = std::min(sequences_.committed(a, group), sequences_.committed(b, group)) / blocks.tokens;
  const i32 *mine = &blocks.table[a * blocks.per_sequence], *others = &blocks.table[b * blocks.per_sequence];
  return std::mismatch(mine + known, mine + whole, others + known).first - mine;
}

i64 PagedTable::tokens_that_fit(i64 index, i64 group, i64 pages) const {
  const Blocks& b = blocks_[group];
  i64 blocks = ceil_div(sequences_.tokens(index, group), b.tokens) + b.ready.size() + b.cached;
  // Ready blocks lie on parked pages; the other pages back further blocks, in the order in which make_ready() would.
  i64 left = pages - blocks_.unreferenced_pages();
  std::vector<i64> next(b.classes.size(), 0);  // by class: slots before it are counted
  for (i64 block = b.cursor; block < b.max_blocks && blocks * b.tokens < geometry_.groups[group].max_tokens; ++block) {
    if (b.backed[block]) continue;
    for (std::size_t k = 0; k < b.classes.size(); ++k) {
      const SlotClass& c = b.classes[k];
      for (i64 slot = std::max(blocks_.first_slot(c, block), next[k]); slot < blocks_.end_slot(c, block); ++slot) {
        if (c.slots[slot].mapped == 0) left -= static_cast<i64>(c.arenas.size());
      }
      next[k] = blocks_.end_slot(c, block);
    }
    if (left < 0) break;
    ++blocks;
  }
  return std::min(geometry_.groups[group].max_tokens, blocks * b.tokens);
}

void PagedTable::count_bytes(i64 group, std::vector<i64>* used_bytes, i64* shared_bytes) const {
  const Blocks& b = blocks_[group];
  i64 tokens = 0;
  std::vector<SharedPart> shared;  // the unit is a token of a block
  for (i64 index = 0; index < sequences_.capacity(); ++index) {
    const i64 first = sequences_.front(index, group), end = sequences_.tokens(index, group);
    tokens += end - first;
    if (b.extra_refs == 0) continue;
    for (i64 ordinal = first / b.tokens; ordinal * b.tokens < end; ++ordinal) {
      const i32 block = blocks_.entry(index, group, ordinal);
      if (b.info[block].refs <= 1) continue;
      const i64 start = ordinal * b.tokens;
      shared.push_back({block, std::max(first - start, i64{0}), std::min(end - start, b.tokens)});
      tokens -= shared.back().to - shared.back().from;
    }
  }
  const SharedCount count = count_shared(shared);
  for (i64 token_bytes : geometry_.groups[group].token_bytes) {
    used_bytes->push_back((tokens + count.length) * token_bytes);
    *shared_bytes += count.pieces * b.tokens * token_bytes;
  }
}

i64 PagedTable::held_bytes() const {
  i64 bytes = 0;
  for (i64 g = 0; g < groups_; ++g) {
    const Blocks& b = blocks_[g];
    i64 blocks = blocks_.has_reserved(g) ? kReservedBlocks : 0;
    for (i64 index = 0; index < sequences_.capacity(); ++index) {
      blocks += ceil_div(sequences_.tokens(index, g), b.tokens) - sequences_.front(index, g) / b.tokens;
    }
    i64 block_bytes = 0;
    for (const SlotClass& c : b.classes) block_bytes += c.block_bytes * static_cast<i64>(c.arenas.size());
    bytes += (blocks - b.extra_refs) * block_bytes;
  }
  return bytes;
}

// Cost: proportional to the slots, and to their blocks where a block lies on several slots.
i64 PagedTable::cached_beside_bytes() const {
  i64 bytes = 0;
  for (i64 g = 0; g < groups_; ++g) {
    const Blocks& b = blocks_[g];
    if (b.cached == 0) continue;
    for (const SlotClass& c : b.classes) {
      const i64 each = static_cast<i64>(c.arenas.size());
      const bool whole = remainder(page_bytes(), c.block_bytes) == 0;  // blocks lie within a slot
      for (i64 slot = 0; slot < static_cast<i64>(c.slots.size()); ++slot) {
        if (c.slots[slot].users == 0 || c.slots[slot].cached == 0) continue;
        bytes += each * (whole ? c.slots[slot].cached * c.block_bytes : cached_bytes_on(b, c, slot));
      }
    }
  }
  return bytes;
}

// Returns the bytes of cached, unreferenced blocks on the slot.
i64 PagedTable::cached_bytes_on(const Blocks& b, const SlotClass& c, i64 slot) const {
  const i64 from = slot * page_bytes(), to = from + page_bytes();
  i64 bytes = 0;
  for (i64 block = from / c.block_bytes; block < std::min(b.max_blocks, ceil_div(to, c.block_bytes)); ++block) {
    if (b.info[block].refs > 0 || b.info[block].node == kNoNode) continue;
    bytes += std::min(to, (block + 1) * c.block_bytes) - std::max(from, block * c.block_bytes);
  }
  return bytes;
}

i64 PagedTable::mapped_extent_slots(i64 group, i64 arena_in_group) const {
  const ZeroVector<ZeroId>& pages = blocks_.pages(first_[group] + arena_in_group);
  i64 slots = static_cast<i64>(pages.size());
  while (slots > 0 && pages[slots - 1] < 0) --slots;
  return slots;
}

}  // namespace kvmem
