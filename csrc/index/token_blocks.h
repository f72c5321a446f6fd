// Packed blocks of token ids. The index stores one id for each cached token. Vocabularies need 15 to 20 of an id's 32
// bits, so all ids are stored at the width of the widest id seen so far.
//
// The width begins at kNarrowest. A wider id raises it, and all blocks are packed again: O(blocks), at most 13 times.
// Negative ids, and hashes that stand for images, need all 32 bits.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "base/types.h"

namespace kvmem {

class TokenBlocks {
 public:
  static constexpr std::uint64_t kNarrowest = 16, kWidest = 32;

  explicit TokenBlocks(i64 block_tokens);

  i64 block_tokens() const { return block_tokens_; }
  i64 blocks() const { return blocks_; }
  i64 bits() const { return static_cast<i64>(bits_); }  // the width of an id
  // Allows block numbers below `blocks` from now on. Takes exactly the memory for these, not twice as much as a growing
  // vector would. May throw std::bad_alloc.
  void reserve(i64 blocks);
  // Stores these block_tokens() ids as block `block`. May throw std::bad_alloc where the width grows; the other blocks
  // are unchanged then.
  void put(i32 block, const i32* tokens);
  // A hint that put() of this block will likely follow.
  void prefetch(i32 block) const { __builtin_prefetch(&bytes_[block * stride_], 1); }
  // Returns how many of tokens [0, count) equal the block's first ids. REQUIRES: count <= block_tokens().
  i64 common(i32 block, const i32* tokens, i64 count) const;
  bool equal(i32 block, const i32* tokens) const { return common(block, tokens, block_tokens_) == block_tokens_; }
  // Writes the first `count` ids.
  void copy(i32 block, i64 count, i32* out) const;

 private:
  using u64 = std::uint64_t;

  // Two neighbouring ids are read by one 64-bit load from the byte in which they begin. So an id may have kWidestPair
  // bits, after up to 7 bits of the id before; or 32 bits, since such a pair begins at a whole byte. Widths in between
  // are not used.
  static constexpr u64 kWidestPair = 28;
  static_assert(7 + 2 * kWidestPair <= 64 && 2 * kWidest <= 64, "a pair lies within one word");

  // Reads ids from the start of a block. It does not know where the block ends.
  class Reader {
   public:
    Reader(const std::uint8_t* block, u64 bits) : block_(block), bits_(bits), low_((u64{1} << bits) - 1) {}
    // Returns the next two ids, 32 bits each, the first in the low half. A block of odd length ends with an extra 0.
    u64 next_pair() {
      u64 word;
      std::memcpy(&word, block_ + at_ / 8, sizeof word);
      word >>= at_ % 8;
      at_ += 2 * bits_;
      return (word & low_) | ((word >> bits_) & low_) << 32;
    }

   private:
    const std::uint8_t* const block_;
    const u64 bits_, low_;
    u64 at_ = 0;  // the next bit to read
  };

  Reader read(i32 block) const { return Reader(&bytes_[block * stride_], bits_); }
  [[gnu::noinline]] u64 put_rest(std::uint8_t* at, const i32* tokens, i64 done);
  [[gnu::noinline]] void widen(u64 bits_seen);

  const i64 block_tokens_;
  u64 bits_ = kNarrowest;
  i64 stride_;                 // bytes of a block
  i64 blocks_ = 0, used_ = 0;  // blocks there is room for; upper bound of those that were put
  // One word longer than the blocks, because they are read and written by whole words. malloc() maps large memory
  // lazily: blocks that were never put take addresses only.
  std::unique_ptr<std::uint8_t[], void (*)(void*)> bytes_{nullptr, std::free};
};

}  // namespace kvmem
