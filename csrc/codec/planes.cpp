#include "codec/planes.h"

#include <algorithm>
#include <vector>

#include "codec/vectors.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace kvmem {
namespace {

using u8 = std::uint8_t;
using u16 = std::uint16_t;

constexpr i64 kBlock = 64;

// A byte of nibbles holds those of numbers i and i + width / 2 of a unit. kCount: how many bytes, a constant, because
// loops of unknown length take longer to set up than to run.
template <int kCount>
KVMEM_INLINE void split_some(const u16* __restrict in, i64 half, u8* __restrict high, u8* __restrict mid,
                             u8* __restrict low) {
  for (int i = 0; i < kCount; ++i) high[i] = static_cast<u8>(in[i] >> 8);
  for (int i = 0; i < kCount; ++i) high[half + i] = static_cast<u8>(in[half + i] >> 8);
  for (int i = 0; i < kCount; ++i) mid[i] = static_cast<u8>((in[i] >> 4 & 15) | (in[half + i] & 0xf0));
  for (int i = 0; i < kCount; ++i) low[i] = static_cast<u8>((in[i] & 15) | in[half + i] << 4);
}

template <int kCount>
KVMEM_INLINE void join_some(const u8* __restrict high, i64 half, const u8* __restrict mid, const u8* __restrict low,
                            u16* __restrict out) {
  for (int i = 0; i < kCount; ++i) out[i] = static_cast<u16>(high[i] << 8 | (mid[i] & 15) << 4 | (low[i] & 15));
  for (int i = 0; i < kCount; ++i) {
    out[half + i] = static_cast<u16>(high[half + i] << 8 | (mid[i] & 0xf0) | low[i] >> 4);
  }
}

KVMEM_VECTORS void split_row(const u16* in, i64 units, i64 width, u8* high) {
  const i64 half = width / 2;
  u8 *mid = high + units * width, *low = mid + units * half;
  for (i64 u = 0; u < units; ++u, in += width, high += width, mid += half, low += half) {
    i64 i = 0;
    for (; i + 32 <= half; i += 32) split_some<32>(in + i, half, high + i, mid + i, low + i);
    for (; i < half; ++i) split_some<1>(in + i, half, high + i, mid + i, low + i);
  }
}

KVMEM_VECTORS void join_row(const u8* high, i64 units, i64 width, u16* out) {
  const i64 half = width / 2;
  const u8 *mid = high + units * width, *low = mid + units * half;
  for (i64 u = 0; u < units; ++u, out += width, high += width, mid += half, low += half) {
    i64 i = 0;
    for (; i + 32 <= half; i += 32) join_some<32>(high + i, half, mid + i, low + i, out + i);
    for (; i < half; ++i) join_some<1>(high + i, half, mid + i, low + i, out + i);
  }
}

// 8 rows of 8 numbers. Strides are in numbers.
#if defined(__SSE2__)
KVMEM_INLINE __m128i load(const u16* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); }

// Puts rows i and i + 4 side by side, element by element; three times that is a transpose.
KVMEM_INLINE void interleave(const __m128i* in, __m128i* out) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = _mm_unpacklo_epi16(in[i], in[i + 4]);
    out[2 * i + 1] = _mm_unpackhi_epi16(in[i], in[i + 4]);
  }
}
KVMEM_INLINE void transpose_tile(const u16* in, i64 from, u16* out, i64 to) {
  __m128i a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = load(in + i * from);
  interleave(a, b);
  interleave(b, a);
  interleave(a, b);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i * to), b[i]);
}
#else
KVMEM_INLINE void transpose_tile(const u16* in, i64 from, u16* out, i64 to) {
  for (int i = 0; i < 8; ++i) {
    for (int j = 0; j < 8; ++j) out[j * to + i] = in[i * from + j];
  }
}
#endif

// Rows of numbers and of bytes.
u16* numbers_at(const Planes& p, i64 row) { return p.numbers + row * p.stride / 2; }
u8* bytes_at(const Planes& p, i64 row) { return p.bytes + row * p.bytes_stride; }

}  // namespace

void split_planes(const Planes& p) {
  for (i64 row = 0; row < p.rows; ++row) split_row(numbers_at(p, row), p.units, p.width, bytes_at(p, row));
}

void join_planes(const Planes& p) {
  for (i64 row = 0; row < p.rows; ++row) join_row(bytes_at(p, row), p.units, p.width, numbers_at(p, row));
}

// Column c lies in row c / units of the bytes. Numbers are read 8 rows at a time, each from end to end.
void split_columns(const Planes& p) {
  const i64 columns = p.units * p.width, stride = p.stride / 2;
  std::vector<u16> turned(static_cast<size_t>(columns * kBlock));
  for (i64 block = 0; block < p.rows; block += kBlock) {
    for (i64 t = 0; t < kBlock; t += 8) {
      const u16* const rows = numbers_at(p, block + t);
      for (i64 c = 0; c < columns; c += 8) transpose_tile(rows + c, stride, turned.data() + c * kBlock + t, kBlock);
    }
    for (i64 row = 0; row < kBlock; ++row) {
      split_row(turned.data() + row * columns, columns / kBlock, kBlock, bytes_at(p, block + row));
    }
  }
}

void join_columns(const Planes& p) {
  const i64 columns = p.units * p.width, stride = p.stride / 2;
  std::vector<u16> turned(static_cast<size_t>(columns * kBlock));
  for (i64 block = 0; block < p.rows; block += kBlock) {
    for (i64 row = 0; row < kBlock; ++row) {
      join_row(bytes_at(p, block + row), columns / kBlock, kBlock, turned.data() + row * columns);
    }
    for (i64 c = 0; c < columns; c += 8) {
      const u16* const from = turned.data() + c * kBlock;
      for (i64 t = 0; t < kBlock; t += 8) transpose_tile(from + t, kBlock, numbers_at(p, block + t) + c, stride);
    }
  }
}

}  // namespace kvmem
