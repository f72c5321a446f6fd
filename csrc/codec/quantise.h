// Floats as integers of 2, 3, 4 or 8 bits, with a scale and a zero point for each group, and back, in one pass over the
// memory. The rules are those of kvmem/layouts/bits.py, which does the same with torch on other devices.
//
// Thread safety: functions of their arguments only.
#pragma once

#include <cstdint>

#include "base/types.h"

namespace kvmem {

enum class FloatKind { f16, bf16, f32 };

// Memory of tokens: `stride` bytes from one to the next; within a token everything is dense.
struct Tokens {
  unsigned char* data;
  i64 stride;
  FloatKind kind;  // not used for codes
};

// heads: of a token. width: numbers of a head, a multiple of what `bits` need to fill bytes. size: numbers of a group,
// which divides the width (by token); tokens that share the scales of a channel (by channel).
struct Quantised {
  i64 tokens, heads, width, size;
  int bits;
};

// By token. scales: of each head first the scales of its width / size groups, then their zero points.
void quantise_tokens(const Quantised& q, Tokens x, Tokens codes, Tokens scales);
void dequantise_tokens(const Quantised& q, Tokens codes, Tokens scales, float* out);

// By channel. A token here is a block in `scales`: of each head first the scales of its channels, then the zero points.
// tokens: a multiple of size for quantise_channels. skip: tokens of the first block that come before the first token.
void quantise_channels(const Quantised& q, Tokens x, Tokens codes, Tokens scales);
void dequantise_channels(const Quantised& q, i64 skip, Tokens codes, Tokens scales, float* out);

// Bytes as floats, by a table of 256: 8-bit floats, whose conversion is slow one by one.
void look_up(i64 tokens, i64 numbers, Tokens codes, const float* table, float* out);

}  // namespace kvmem
