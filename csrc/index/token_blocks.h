// Blocks of token ids, packed: every id takes as many bits as the largest one that ever came. Vocabularies need 15 to
// 20 of an id's 32, and a content index keeps one id for each token that is cached.
//
// The width begins at kNarrowest and is raised when a wider id comes. All blocks are packed anew then: O(blocks), and
// at most 13 times ever. Negative ids, and the hashes that stand for images, need all 32.
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
  i64 bits() const { return static_cast<i64>(bits_); }  // of one id
  // Blocks below `blocks` may come. Growth takes no more than it needs: no vector's doubling.
  void reserve(i64 blocks);
  // Keeps these block_tokens() ids as block `block`.
  void put(i32 block, const i32* tokens);
  // put() of this block will likely follow.
  void prefetch(i32 block) const { __builtin_prefetch(&bytes_[block * stride_], 1); }
  // How many of tokens [0, count), count <= block_tokens(), the block begins with.
  i64 common(i32 block, const i32* tokens, i64 count) const;
  bool equal(i32 block, const i32* tokens) const { return common(block, tokens, block_tokens_) == block_tokens_; }
  // Its first `count` ids.
  void copy(i32 block, i64 count, i32* out) const;

 private:
  using u64 = std::uint64_t;

  // Two ids side by side are read at once, which one load of 64 bits does at any bit it begins at: two ids of up to
  // kWidestPair bits after up to 7 bits of others, or two of 32 at a whole byte. Widths between those are not used.
  static constexpr u64 kWidestPair = 28;

  // Reads from a block's beginning, and knows nothing of its end.
  class Reader {
   public:
    Reader(const std::uint8_t* block, u64 bits) : block_(block), bits_(bits), low_((u64{1} << bits) - 1) {}
    // The next two ids, 32 bits each, the first one low. Of an odd block, the last pair ends with a 0.
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
    u64 at_ = 0;  // the next bit
  };

  Reader read(i32 block) const { return Reader(&bytes_[block * stride_], bits_); }
  [[gnu::noinline]] u64 put_rest(std::uint8_t* at, const i32* tokens, i64 done);
  [[gnu::noinline]] void widen(u64 bits_seen);

  const i64 block_tokens_;
  u64 bits_ = kNarrowest;
  i64 stride_;                 // bytes of a block
  i64 blocks_ = 0, used_ = 0;  // room for; and those below were put
  // And a word more: blocks are read and written by whole words. What was never put takes no memory, only addresses.
  std::unique_ptr<std::uint8_t[], void (*)(void*)> bytes_{nullptr, std::free};
};

}  // namespace kvmem
