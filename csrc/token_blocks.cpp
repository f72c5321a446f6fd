#include "token_blocks.h"

#include <algorithm>

namespace kvmem {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "ids are packed by whole words, lowest byte first");

using u64 = std::uint64_t;

constexpr i64 kSpare = sizeof(u64);  // pair() reads, and put() writes, at most so many bytes too many

u64 join(i32 first, i32 second) {
  return static_cast<std::uint32_t>(first) | static_cast<u64>(static_cast<std::uint32_t>(second)) << 32;
}

i64 stride_of(i64 block_tokens, int bits) { return ceil_div(ceil_div(block_tokens, 2) * 2 * bits, 8); }

}  // namespace

TokenBlocks::TokenBlocks(i64 block_tokens)
    : block_tokens_(block_tokens),
      stride_(stride_of(block_tokens, bits_)),
      packed_(stride_of(block_tokens, kWidest) + kSpare) {}

void TokenBlocks::reserve(i64 blocks) {
  blocks_ = std::max(blocks_, blocks);
  bytes_.reserve(blocks_ * stride_ + kSpare);
  bytes_.resize(blocks_ * stride_ + kSpare);
}

int TokenBlocks::width_of(u64 bits_seen) {
  const int bits = bits_seen == 0 ? 0 : 64 - __builtin_clzll(bits_seen);
  return bits <= kWidestPair ? std::max(bits, kNarrowest) : kWidest;
}

void TokenBlocks::put(i32 block, const i32* tokens) {
  std::uint32_t seen = 0;
  for (i64 i = 0; i < block_tokens_; ++i) seen |= static_cast<std::uint32_t>(tokens[i]);
  if (seen >> (bits_ - 1) > 1) widen(width_of(seen));
  u64 word = 0;
  int filled = 0;  // bits of it
  std::uint8_t* out = packed_.data();
  for (i64 i = 0; i < block_tokens_; i += 2) {
    const u64 both = join(tokens[i], i + 1 < block_tokens_ ? tokens[i + 1] : 0);
    const u64 narrow = (both & low_bits()) | (both >> 32) << bits_;
    word |= narrow << filled;
    std::memcpy(out, &word, sizeof word);
    filled += 2 * bits_;
    out += filled / 8;
    word = filled % 8 == 0 ? 0 : narrow >> (2 * bits_ - filled % 8);
    filled %= 8;
  }
  std::memcpy(&bytes_[block * stride_], packed_.data(), stride_);
  used_ = std::max(used_, i64{block} + 1);
}

i64 TokenBlocks::common(i32 block, const i32* tokens, i64 count) const {
  const std::uint8_t* at = &bytes_[block * stride_];
  i64 i = 0;
  for (; i + 2 <= count; i += 2) {
    const u64 differ = pair(at, i / 2) ^ join(tokens[i], tokens[i + 1]);
    if (differ != 0) return static_cast<std::uint32_t>(differ) != 0 ? i : i + 1;
  }
  return i < count && pair(at, i / 2) << 32 == join(0, tokens[i]) ? count : i;
}

void TokenBlocks::copy(i32 block, i64 count, i32* out) const {
  const std::uint8_t* at = &bytes_[block * stride_];
  for (i64 i = 0; i < count; ++i) {
    const u64 both = pair(at, i / 2);
    out[i] = static_cast<i32>(static_cast<std::uint32_t>(i % 2 == 0 ? both : both >> 32));
  }
}

void TokenBlocks::widen(int bits) {
  TokenBlocks wide(block_tokens_);
  wide.bits_ = bits;
  wide.stride_ = stride_of(block_tokens_, bits);
  wide.reserve(blocks_);
  std::vector<i32> tokens(block_tokens_);
  for (i64 block = 0; block < used_; ++block) {
    copy(static_cast<i32>(block), block_tokens_, tokens.data());
    wide.put(static_cast<i32>(block), tokens.data());
  }
  bits_ = bits;
  stride_ = wide.stride_;
  bytes_.swap(wide.bytes_);
}

}  // namespace kvmem
