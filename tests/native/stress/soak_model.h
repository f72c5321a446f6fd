// What sequences, pins and contents ought to be, kept as simply as can be, and what each token's bytes ought to say.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "allocator/allocator.h"
#include "soak_random.h"

namespace kvmem_soak {

class Failure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// What a content is shared under: its number stands for a salt and an extra key. 0 is what open() takes.
inline kvmem::PrefixKey key_of(i64 number) {
  return {number / 2 == 0 ? "" : "salt " + std::to_string(number / 2), number % 2 ? "adapter" : "", {}};
}

// A token's writer is itself and all tokens before it, under one key in one allocator. Tokens of which the allocator is
// not told get a writer that no other token has, so that sharing one by mistake is seen.
constexpr u64 writer_after(u64 before, i32 token) {
  return mix(before, static_cast<u64>(static_cast<std::uint32_t>(token)));
}
constexpr u64 first_writer(i64 allocator, i64 key) {
  return mix(mix(0x50AC, static_cast<u64>(allocator)), static_cast<u64>(key));
}
// The bytes of a token in one arena.
constexpr u64 word_of(u64 writer, i64 group, i64 arena) { return mix(writer + static_cast<u64>(16 * group + arena)); }

constexpr i32 kUntold = -1;               // a token whose id the allocator is not told
constexpr i32 kSentinel = 1'000'000'000;  // an id that no prompt has: what is found of a prompt ends before it

struct Live {
  i32 handle = 0;
  i64 key = 0;
  std::vector<i32> ids;      // of all tokens, those reserved but not committed too
  std::vector<u64> writers;  // of each
  i64 committed = 0;
  i64 cut = 0;    // it may have written tokens up to here that it has cut off, since it last grew
  i64 known = 0;  // how many leading tokens the allocator knows the ids of
  std::vector<i64> fronts;
  std::vector<i32> script;  // what its next tokens are to be, as far as it reaches
  std::size_t script_at = 0;
  bool has_state = false;
  u64 state = 0;             // the writer of the last token that the state has seen
  bool state_ahead = false;  // it may have seen tokens that are not committed any more, or never were here

  i64 tokens() const { return static_cast<i64>(ids.size()); }
  i64 due() const { return tokens() - committed; }
};

struct Pinned {
  i64 pin = 0, key = 0;
  std::vector<i32> ids;
};

// A prefix that was committed at some time.
struct Prefix {
  i64 key = 0;
  std::vector<i32> ids;
};

}  // namespace kvmem_soak
