// The sizes with which the deciding half calculates: how much memory a token takes, and at which offset it lies.
// kvmem/geometry/ makes a Geometry from a CacheSpec.
#pragma once

#include <algorithm>
#include <vector>

#include "base/types.h"

namespace kvmem {

enum class Growth : std::uint8_t {
  token,    // one entry for each token of the sequence
  prefill,  // one entry for each encoder token, written once at prefill (cross attention)
  fixed,    // one entry for each sequence (recurrent state)
};

enum class Zero : std::uint8_t {
  never,   // memory is never zeroed
  fresh,   // a page is zeroed when it is mapped, unless this allocator has owned it before
  always,  // as `fresh`, and memory is also zeroed each time a sequence receives it
};

// A group of layers and components whose tokens live and die together. It has `token_bytes.size()` arenas, one for each
// `interleave` layers or for each part of such a run. Tokens are contiguous in an arena, with a stride of
// `token_bytes[i]` in arena i.
struct GroupGeometry {
  Growth growth = Growth::token;
  i64 block_tokens = 16;  // tokens of a block
  i64 window_tokens = 0;  // size of the sliding window, which also bounds what is retained; 0: full attention
  i64 max_tokens = 0;     // longest sequence that this group can hold
  i64 row_tokens = 0;     // virtual backend: distance between the starts of two rows, in tokens
  i64 max_blocks = 0;     // paged backend: block ids are in [0, max_blocks)
  std::vector<i64> token_bytes;
  std::vector<i64> row_slots;    // virtual backend: slots of one row, for each arena
  std::vector<i64> arena_slots;  // slots of the whole arena, for each arena
  // The tokens of a block do not lie one after the other (head-major, or packed by a kernel): part of a block is copied
  // as the whole block. Such a group has no guard, and nothing matches inside its blocks.
  bool whole_blocks = false;
  i64 shared_tokens = 0;  // tokens of a sharing unit, which is whole blocks (shared_unit()); 0: one block
};

// Returns the granularity in tokens at which the group shares content and at which its window releases blocks.
inline i64 unit_tokens(const GroupGeometry& group) { return std::max(group.shared_tokens, group.block_tokens); }

// Of the first `tokens` tokens of the group: how many lie in front of all bytes that later tokens may write, and how
// many are moved with them. Both are `tokens` where tokens lie one after the other.
inline i64 settled_tokens(const GroupGeometry& group, i64 tokens) {
  return group.whole_blocks ? tokens / group.block_tokens * group.block_tokens : tokens;
}
inline i64 moved_tokens(const GroupGeometry& group, i64 tokens) {
  return group.whole_blocks ? (tokens + group.block_tokens - 1) / group.block_tokens * group.block_tokens : tokens;
}

// Returns the first token that the group's window still needs once `committed` tokens are valid. The next token, at
// position p = committed, attends to p - window + 1 .. p. The result is rounded down to a whole unit, after
// `guard_tokens` are subtracted for kernels that load whole tiles.
inline i64 window_first(const GroupGeometry& group, i64 guard_tokens, i64 committed) {
  if (group.window_tokens == 0) return 0;
  const i64 first = committed - group.window_tokens + 1 - guard_tokens;
  return first <= 0 ? 0 : first / unit_tokens(group) * unit_tokens(group);
}

struct Geometry {
  i64 page_bytes = 0;
  i64 max_sequences = 0;
  i64 rows = 0;  // virtual backend: row 0, one row for each sequence, and rows that cache the content of finished ones
  i64 tail_guard_tokens = 0;  // tokens past a sequence's length that stay mapped, for kernels that load whole tiles
  i64 map_ahead_tokens = 0;   // further tokens that the mapper thread maps ahead of time
  Zero zero = Zero::fresh;
  bool debug = false;  // run check() after each call that changes state
  std::vector<GroupGeometry> groups;
};

// The longest sharing unit of groups whose block sizes differ. Above it a partly filled unit wastes more memory than
// sharing saves, and nothing is shared.
constexpr i64 kMostSharedTokens = 4096;

// Returns the sharing unit in tokens: the least common multiple of the block sizes of all groups that grow by token.
// Returns 0 where nothing can be shared: with a `prefill` group, whose content depends on an input that the token ids
// do not identify; or with different block sizes whose unit exceeds kMostSharedTokens, and then `*sizes` is true.
i64 shared_unit(const Geometry& geometry, bool* sizes = nullptr);
// Returns `geometry` with `unit` entered in each group that grows by token, and 0 in the others.
Geometry with_unit(Geometry geometry, i64 unit);

// Blocks 0 and 1 belong to no sequence. Block 0 is the null block: it is zero and stays zero, and table entries of
// unused or out-of-window blocks and padding rows of a batch point to it. Block 1 is the padding block: padding tokens
// are written to it. The virtual backend keeps both in row 0.
constexpr i32 kNullBlock = 0;
constexpr i32 kPaddingBlock = 1;
constexpr i64 kReservedBlocks = 2;
static_assert(kNullBlock != kPaddingBlock && kNullBlock < kReservedBlocks && kPaddingBlock < kReservedBlocks,
              "the null block and the padding block are the first kReservedBlocks blocks");

}  // namespace kvmem
