// Blocks of token ids, packed: every id takes as many bits as the largest one that ever came. Vocabularies need 15 to
// 20 of an id's 32, and a content index keeps one id for each token that is cached.
//
// The width begins at kNarrowest and is raised when a wider id comes. All blocks are packed anew then: O(blocks), and
// at most 13 times ever. Negative ids, and the hashes that stand for images, need all 32.
#pragma once

#include <cstring>
#include <vector>

#include "types.h"

namespace kvmem {

class TokenBlocks {
 public:
  static constexpr int kNarrowest = 16, kWidest = 32;

  explicit TokenBlocks(i64 block_tokens);

  i64 block_tokens() const { return block_tokens_; }
  int bits() const { return bits_; }  // of one id
  // Blocks below `blocks` may come. Growth takes no more than it needs: no vector's doubling.
  void reserve(i64 blocks);
  // Keeps these block_tokens() ids as block `block`.
  void put(i32 block, const i32* tokens);
  // How many of tokens [0, count), count <= block_tokens(), the block begins with.
  i64 common(i32 block, const i32* tokens, i64 count) const;
  bool equal(i32 block, const i32* tokens) const { return common(block, tokens, block_tokens_) == block_tokens_; }
  // Its first `count` ids.
  void copy(i32 block, i64 count, i32* out) const;
  void prefetch(i32 block) const { __builtin_prefetch(&bytes_[block * stride_]); }

 private:
  using u64 = std::uint64_t;

  // Two ids side by side are read at once, which one load of 64 bits does at any bit it begins at: two ids of up to
  // kWidestPair bits after up to 7 bits of others, or two of 32 at a whole byte. Widths between those are not used.
  static constexpr int kWidestPair = 28;
  static int width_of(u64 bits_seen);

  u64 low_bits() const { return (u64{1} << bits_) - 1; }
  // Ids 2 * i and 2 * i + 1, 32 bits each, the first one low. Of an odd block, the last pair ends with a 0.
  u64 pair(const std::uint8_t* block, i64 i) const {
    const i64 bit = 2 * bits_ * i;
    u64 word;
    std::memcpy(&word, block + bit / 8, sizeof word);
    word >>= bit % 8;
    return (word & low_bits()) | ((word >> bits_) & low_bits()) << 32;
  }
  void widen(int bits);

  const i64 block_tokens_;
  int bits_ = kNarrowest;
  i64 stride_;                        // bytes of a block
  i64 blocks_ = 0, used_ = 0;         // room for; and those below were put
  std::vector<std::uint8_t> bytes_;   // and a word more, since pair() reads whole words
  std::vector<std::uint8_t> packed_;  // put() packs here: what it writes last runs over the block's end
};

}  // namespace kvmem
