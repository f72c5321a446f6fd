#include "index/token_blocks.h"

#include <algorithm>
#include <new>
#include <type_traits>

#include "base/check.h"

namespace kvmem {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "ids are packed by whole words, lowest byte first");

using u64 = std::uint64_t;

constexpr i64 kSpare = sizeof(u64);

u64 pair_of(const i32* two) {
  u64 pair;
  std::memcpy(&pair, two, sizeof pair);
  return pair;
}

// Writes the first `bytes` bytes of a word.
template <std::size_t bytes = sizeof(u64)>
void put_word(std::uint8_t* out, u64 word) {
  std::memcpy(out, &word, bytes);
}

// Returns the two ids of a pair at a distance of `bits`.
u64 narrow(u64 pair, u64 bits) { return (pair & UINT32_MAX) | (pair >> 32) << bits; }

u64 pair_of_one(i32 last) { return static_cast<std::uint32_t>(last); }

i64 stride_of(i64 block_tokens, u64 bits) {
  return ceil_div(ceil_div(block_tokens, 2) * 2 * static_cast<i64>(bits), 8);
}

// Packs pairs of 32-bit ids at `bits` each. It writes whole words, and so up to one word past the last id.
class Writer {
 public:
  Writer(std::uint8_t* block, u64 bits) : block_(block), bits_(bits) {}
  void push(u64 pair) {
    seen_ |= pair;
    const u64 two = narrow(pair, bits_), word = begun_ | two << at_ % 8;
    std::memcpy(block_ + at_ / 8, &word, sizeof word);
    at_ += 2 * bits_;
    begun_ = two >> 1 >> (2 * bits_ - 1 - at_ % 8);  // two shifts, because a single shift by 64 is undefined
  }
  u64 seen() const { return seen_; }  // the OR of all pairs

 private:
  std::uint8_t* const block_;
  const u64 bits_;
  u64 at_ = 0;     // the next bit to write
  u64 begun_ = 0;  // the bits of its byte that are written already
  u64 seen_ = 0;
};

// Eight ids fill whole bytes. So the shifts within a run of eight are constant where the width is.
constexpr i64 kRun = 8;

// Packs whole runs with the same result as Writer, but each run at once and without writing past its end. Returns the
// OR of all pairs.
template <u64 bits>
[[gnu::noinline]] u64 put_runs(const i32* tokens, i64 runs, std::uint8_t* out) {
  static_assert(bits >= 16 && bits < 22, "two words and part of a third, in which the last pair ends");
  u64 seen = 0;
  for (const i32* const end = tokens + runs * kRun; tokens < end; tokens += kRun, out += bits) {
    const u64 a = pair_of(tokens), b = pair_of(tokens + 2), c = pair_of(tokens + 4), d = pair_of(tokens + 6);
    const u64 second = narrow(b, bits), last = narrow(d, bits);
    put_word(out, narrow(a, bits) | second << 2 * bits);
    put_word(out + 8, second >> (64 - 2 * bits) | narrow(c, bits) << (4 * bits - 64) | last << (6 * bits - 64));
    put_word<bits - 16>(out + 16, last >> (128 - 6 * bits));
    seen |= a | b | c | d;
  }
  return seen;
}

// Returns f(bits), where the widths of most vocabularies are compile-time constants: a third of the instructions.
template <class F>
auto with_width(u64 bits, F f) {
  switch (bits) {
    case 16:
      return f(std::integral_constant<u64, 16>());
    case 17:
      return f(std::integral_constant<u64, 17>());
    case 18:
      return f(std::integral_constant<u64, 18>());
    default:
      return f(bits);
  }
}

}  // namespace

TokenBlocks::TokenBlocks(i64 block_tokens) : block_tokens_(block_tokens), stride_(stride_of(block_tokens, bits_)) {}

void TokenBlocks::reserve(i64 blocks) {
  KVMEM_ASSERT(blocks >= 0, "a number of blocks");
  if (blocks <= blocks_ && bytes_) return;
  blocks = std::max(blocks, blocks_);
  void* grown = std::realloc(bytes_.get(), blocks * stride_ + kSpare);
  if (!grown) throw std::bad_alloc();
  (void)bytes_.release();
  bytes_.reset(static_cast<std::uint8_t*>(grown));
  blocks_ = blocks;
}

void TokenBlocks::put(i32 block, const i32* tokens) {
  KVMEM_ASSERT(block >= 0 && block < blocks_, "reserve() made room for the block");
  std::uint8_t* const at = &bytes_[block * stride_];
  const i64 runs = block_tokens_ / kRun;
  i64 done = 0;
  u64 seen = with_width(bits_, [=, &done](auto bits) -> u64 {
    if constexpr (std::is_same_v<decltype(bits), u64>)
      return 0;
    else
      return done = runs * kRun, put_runs<bits>(tokens, runs, at);
  });
  if (done < block_tokens_) seen |= put_rest(at, tokens, done);
  used_ = std::max(used_, i64{block} + 1);
  const u64 ids = (seen | seen >> 32) & UINT32_MAX;
  if (ids >> bits_ == 0) return;
  widen(ids);  // the ids did not fit, so the block is packed again
  put(block, tokens);
}

// Packs the ids from `done` on, a multiple of kRun, and returns the OR of their pairs. REQUIRES: the ids before them
// are packed. The writer overwrites the first word of the next block, which is saved and restored.
u64 TokenBlocks::put_rest(std::uint8_t* at, const i32* tokens, i64 done) {
  u64 behind;  // the first word of the next block
  std::memcpy(&behind, at + stride_, sizeof behind);
  Writer writer(at + done / kRun * static_cast<i64>(bits_), bits_);
  for (; done + 2 <= block_tokens_; done += 2) writer.push(pair_of(tokens + done));
  if (done < block_tokens_) writer.push(pair_of_one(tokens[done]));
  std::memcpy(at + stride_, &behind, sizeof behind);
  return writer.seen();
}

i64 TokenBlocks::common(i32 block, const i32* tokens, i64 count) const {
  return with_width(bits_, [at = &bytes_[block * stride_], tokens, count](auto bits) {
    const std::uint8_t* run = at;
    i64 i = 0;
    for (; i + kRun <= count; i += kRun, run += bits) {
      Reader reader(run, bits);
      for (i64 k = 0; k < kRun; k += 2) {
        const u64 differ = reader.next_pair() ^ pair_of(tokens + i + k);
        if (differ != 0) return i + k + ((differ & UINT32_MAX) != 0 ? 0 : 1);
      }
    }
    Reader reader(run, bits);
    for (; i + 2 <= count; i += 2) {
      const u64 differ = reader.next_pair() ^ pair_of(tokens + i);
      if (differ != 0) return i + ((differ & UINT32_MAX) != 0 ? 0 : 1);
    }
    return i < count && (reader.next_pair() & UINT32_MAX) == pair_of_one(tokens[i]) ? count : i;
  });
}

void TokenBlocks::copy(i32 block, i64 count, i32* out) const {
  Reader reader = read(block);
  for (i64 i = 0; i < count; i += 2) {
    const u64 pair = reader.next_pair();
    out[i] = static_cast<i32>(pair & UINT32_MAX);
    if (i + 1 < count) out[i + 1] = static_cast<i32>(pair >> 32);
  }
}

void TokenBlocks::widen(u64 bits_seen) {
  KVMEM_ASSERT(bits_seen >> bits_ != 0, "some id does not fit the present width");
  TokenBlocks wide(block_tokens_);
  wide.bits_ = 64 - __builtin_clzll(bits_seen);
  if (wide.bits_ > kWidestPair) wide.bits_ = kWidest;
  wide.stride_ = stride_of(block_tokens_, wide.bits_);
  wide.reserve(blocks_);
  std::vector<i32> tokens(block_tokens_);
  for (i64 block = 0; block < used_; ++block) {
    copy(static_cast<i32>(block), block_tokens_, tokens.data());
    wide.put(static_cast<i32>(block), tokens.data());
  }
  bits_ = wide.bits_;
  stride_ = wide.stride_;
  bytes_.swap(wide.bytes_);
}

}  // namespace kvmem
