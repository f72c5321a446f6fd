// Codes of few bits, one in each byte, as dense bytes, and back: a word at a time.
#pragma once

#include <cstring>

#include "codec/formats.h"
#include "codec/vectors.h"

namespace kvmem {

// `count` codes, which fill whole words, as bytes.
template <class Word, int kBits>
KVMEM_INLINE void pack_words(const u8* codes, i64 count, unsigned char* out) {
  constexpr int kCodes = sizeof(Word);  // of a word
  for (i64 i = 0; i < count / kCodes; ++i) {
    Word word, packed = 0;
    std::memcpy(&word, codes + i * kCodes, sizeof(word));
    for (int j = 0; j < kCodes; ++j) packed |= word >> (8 - kBits) * j & Word{(1 << kBits) - 1} << kBits * j;
    for (int j = 0; j < kCodes * kBits / 8; ++j) out[kCodes * kBits / 8 * i + j] = static_cast<u8>(packed >> 8 * j);
  }
}

template <class Word, int kBits>
KVMEM_INLINE void unpack_words(const unsigned char* packed, i64 count, u8* codes) {
  constexpr int kCodes = sizeof(Word), kBytes = kCodes * kBits / 8;
  for (i64 i = 0; i < count / kCodes; ++i) {
    Word bytes = 0, word = 0;
    for (int j = 0; j < kBytes; ++j) bytes |= Word{packed[kBytes * i + j]} << 8 * j;
    for (int j = 0; j < kCodes; ++j) word |= (bytes >> kBits * j & Word{(1 << kBits) - 1}) << 8 * j;
    std::memcpy(codes + i * kCodes, &word, sizeof(word));
  }
}

}  // namespace kvmem
