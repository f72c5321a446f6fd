// Floats as integers of 2, 3, 4 or 8 bits or as floats of 8 bits, with scales for groups of numbers, and back, in one
// pass over the memory. The rules are those of kvmem/layouts/bits.py, which does the same with torch on other devices.
//
// Thread safety: functions of their arguments only.
#pragma once

#include <cstdint>

#include "base/types.h"

namespace kvmem {

enum class FloatKind { f16, bf16, f32 };
enum class CodeKind { integers, e4m3, e5m2 };

// Memory of tokens: `stride` bytes from one to the next; within a token everything is dense.
struct Tokens {
  unsigned char* data;
  i64 stride;
  FloatKind kind;  // not used for codes
};

// heads: of a token. width: numbers of a head, a multiple of what `bits` need to fill bytes. size: numbers of a group,
// which divides the width (by token); tokens that share the scales of a channel (by channel). bits: 8 for floats.
struct Quantised {
  i64 tokens, heads, width, size;
  int bits;
  CodeKind code;
  i64 parts() const { return code == CodeKind::integers ? 2 : 1; }  // scales, and zero points
};

// By token. scales: of each head first the scales of its width / size groups, then, for integers, their zero points.
void quantise_tokens(const Quantised& q, Tokens x, Tokens codes, Tokens scales);
void dequantise_tokens(const Quantised& q, Tokens codes, Tokens scales, float* out);

// By channel. What a head has of a block, the scales of its channels and then the zero points, lies spread over the
// tokens of the block: parts() * width / size of each. tokens: a multiple of size for quantise_channels. skip: tokens
// of the first block that come before the first token; `scales` begins with the block.
void quantise_channels(const Quantised& q, Tokens x, Tokens codes, Tokens scales);
void dequantise_channels(const Quantised& q, i64 skip, Tokens codes, Tokens scales, float* out);

// 8-bit floats with one scale for all.
void to_float8(const Quantised& q, float scale, Tokens x, Tokens codes);
void from_float8(const Quantised& q, float scale, Tokens codes, float* out);

}  // namespace kvmem
