// The numbers that the deciding half works on: what a token takes, and where. Made by kvmem/layouts.py from a
// CacheSpec.
#pragma once

#include <algorithm>
#include <vector>

#include "base/types.h"

namespace kvmem {

enum class Growth : std::uint8_t {
  token,    // one entry per token of the sequence
  prefill,  // grows once, by its own count (cross attention), then stays
  fixed,    // one entry per sequence (recurrent state)
};

enum class Zero : std::uint8_t {
  never,   // pages come as they are
  fresh,   // a page that this allocator has not owned before is zeroed when it is mapped
  always,  // besides, memory is zeroed each time it is given to a sequence
};

// One group of layers and components whose tokens live and die together. Its tokens lie in `token_bytes.size()` arenas
// (one for each `interleave` layers, or each part of one), token after token, `token_bytes[i]` apart in arena i.
struct GroupGeometry {
  Growth growth = Growth::token;
  i64 block_tokens = 16;  // tokens of a block
  i64 window_tokens = 0;  // keep only what a window of this many tokens needs; 0 keeps all
  i64 max_tokens = 0;     // the longest sequence this group can hold
  i64 row_tokens = 0;     // virtual: tokens between the starts of two rows
  i64 max_blocks = 0;     // paged: block ids are in [0, max_blocks)
  std::vector<i64> token_bytes;
  std::vector<i64> row_slots;    // virtual: slots of one row, per arena
  std::vector<i64> arena_slots;  // slots of the whole arena, per arena
  i64 shared_tokens = 0;         // whole blocks that are shared, and that a window lets go of, at once; 0: one block
};

// What is shared at once of the group, and what a window of it lets go of at once.
inline i64 unit_tokens(const GroupGeometry& group) { return std::max(group.shared_tokens, group.block_tokens); }

// The first token that a window of the group still needs once `committed` are valid: the next one, at position p,
// attends to tokens p - window + 1 .. p. Whole units before that are not needed; the guard allows for kernels that load
// whole tiles.
inline i64 window_first(const GroupGeometry& group, i64 guard_tokens, i64 committed) {
  if (group.window_tokens == 0) return 0;
  const i64 first = committed - group.window_tokens + 1 - guard_tokens;
  return first <= 0 ? 0 : first / unit_tokens(group) * unit_tokens(group);
}

struct Geometry {
  i64 page_bytes = 0;
  i64 max_sequences = 0;
  i64 rows = 0;  // virtual: row 0, one for each sequence, and those that may keep the content of finished ones
  i64 tail_guard_tokens = 0;  // the frontier is kept this far ahead of the length
  i64 map_ahead_tokens = 0;   // and the mapper maps this much further
  Zero zero = Zero::fresh;
  bool debug = false;  // run check() after each call that changes something
  std::vector<GroupGeometry> groups;
};

// Sharing works in units that are whole blocks of every group that grows with the tokens: the least common multiple of
// their sizes. Where sizes differ, a longer unit than this is not worth its memory: nothing is shared then.
constexpr i64 kMostSharedTokens = 4096;

// Tokens of such a unit; 0 if there is none. What is fixed after prefill depends on an input that the tokens do not
// tell, so a model with such a group has none either; `*sizes`: whether that is due to block sizes alone.
i64 shared_unit(const Geometry& geometry, bool* sizes = nullptr);
// With the unit noted in each group that grows with the tokens, or with none.
Geometry with_unit(Geometry geometry, i64 unit);

// Blocks 0 and 1 belong to nobody. Padding rows of a batch, and table entries of dropped blocks, read block 0, which is
// zero and stays so; padding tokens are written to block 1. In the virtual backend they lie in row 0.
constexpr i32 kReadTrash = 0;
constexpr i32 kWriteTrash = 1;
constexpr i64 kTrashBlocks = 2;

}  // namespace kvmem
