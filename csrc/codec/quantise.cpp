// A product and a sum stay two roundings on every machine, as in bits.py, whatever vector unit runs them.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include "codec/quantise.h"

#include <algorithm>
#include <climits>
#include <cstring>
#include <vector>

// Each function with this mark is compiled for several levels of vector unit, and the loader picks one. Its loops go
// over all numbers of a token, because a call of it cannot be inlined. Sanitizers run too late for the loader's choice.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define KVMEM_VECTORS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define KVMEM_VECTORS
#endif

namespace kvmem {
namespace {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;

inline float as_float(u32 bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline u32 as_bits(float value) {
  u32 bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// A format of floats: `get` reads one as a float. `up` returns the least one that is not below the value, and NaN for
// NaN. limit: the largest that is stored; differences of two are finite. REQUIRES of `up`: within the limits, or NaN.
struct Half {
  using Bits = u16;
  static constexpr float kLimit = 65504.0f;
  static float get(u16 h) {
    const u32 magnitude = static_cast<u32>(h & 0x7fff) << 13, sign = static_cast<u32>(h & 0x8000) << 16;
    const u32 finite = as_bits(as_float(magnitude) * 0x1p112f);
    return as_float((magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : finite) | sign);
  }
  static u16 up(float value) {
    const u32 bits = as_bits(value), magnitude = bits & 0x7fffffff;
    const bool positive = bits >> 31 == 0;
    const u32 normal = (magnitude - 0x38000000 + (positive ? 0x1fff : 0)) >> 13;
    const float steps = as_float(std::min(magnitude, u32{0x38800000})) * 0x1p24f;  // of a subnormal half
    const i32 below = static_cast<i32>(steps);
    const u32 subnormal = static_cast<u32>(below + (positive & (static_cast<float>(below) < steps)));
    const u32 small = magnitude < 0x38800000 ? ~u32{0} : 0;  // as a mask: a branch would keep the loop from vectors
    const u32 found = magnitude > 0x7f800000 ? 0x7e00 : (subnormal & small) | (normal & ~small);
    return static_cast<u16>(found | bits >> 31 << 15);
  }
};

struct Bfloat {
  using Bits = u16;
  static constexpr float kLimit = 0x1p126f;
  static float get(u16 b) { return as_float(static_cast<u32>(b) << 16); }
  static u16 up(float value) {
    const u32 bits = as_bits(value);
    const u32 found = (bits + (bits >> 31 == 0 ? 0xffff : 0)) >> 16;
    return static_cast<u16>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : found);
  }
};

struct Single {
  using Bits = float;
  static constexpr float kLimit = 0x1p126f;
  static float get(float value) { return value; }
  static float up(float value) { return value; }
};

template <class T>
inline typename T::Bits* as(unsigned char* data) {
  return reinterpret_cast<typename T::Bits*>(data);
}

// Floats as integers in the same order, in which NaNs are the largest and the least: integers have vector minima.
inline i32 ordered(float value) {
  const i32 bits = static_cast<i32>(as_bits(value));
  return bits ^ (bits >> 31 & INT_MAX);
}
inline float unordered(i32 order) { return as_float(static_cast<u32>(order ^ (order >> 31 & INT_MAX))); }
inline bool is_nan(float value) { return (as_bits(value) & 0x7fffffff) > 0x7f800000; }

// Groups of numbers that are quantised together. Arrays of one entry a group.
struct Groups {
  explicit Groups(i64 count, FloatKind kind)
      : low(count), high(count), zero(count), inverse(count), stored(2 * count * (kind == FloatKind::f32 ? 4 : 2)) {}
  std::vector<i32> low, high;  // ordered()
  std::vector<float> zero, inverse;
  std::vector<unsigned char> stored;  // as the cache holds them: all scales, then all zero points
};

// Numbers [first, first + count) of each token, one token's after the other's.
template <class T>
inline void copy_floats(const Tokens& from, i64 token, i64 tokens, i64 first, i64 count, float* out) {
  for (i64 t = token; t < token + tokens; ++t, out += count) {
    const typename T::Bits* const at = as<T>(from.data + t * from.stride) + first;
    for (i64 i = 0; i < count; ++i) out[i] = T::get(at[i]);
  }
}

KVMEM_VECTORS void to_floats(const Tokens& from, i64 token, i64 tokens, i64 first, i64 count, float* out) {
  if (from.kind == FloatKind::f16) {
    copy_floats<Half>(from, token, tokens, first, count, out);
  } else if (from.kind == FloatKind::bf16) {
    copy_floats<Bfloat>(from, token, tokens, first, count, out);
  } else {
    copy_floats<Single>(from, token, tokens, first, count, out);
  }
}

KVMEM_VECTORS void find_extremes(const float* x, i64 groups, i64 size, i32* low, i32* high) {
  for (i64 g = 0; g < groups; ++g, x += size) {
    i32 lo = INT_MAX, hi = INT_MIN;
    for (i64 i = 0; i < size; ++i) {
      lo = std::min(lo, ordered(x[i]));
      hi = std::max(hi, ordered(x[i]));
    }
    low[g] = lo;
    high[g] = hi;
  }
}

KVMEM_VECTORS void find_channel_extremes(const float* x, i64 tokens, i64 count, i32* low, i32* high) {
  std::fill(low, low + count, INT_MAX);
  std::fill(high, high + count, INT_MIN);
  for (i64 t = 0; t < tokens; ++t, x += count) {
    for (i64 i = 0; i < count; ++i) {
      low[i] = std::min(low[i], ordered(x[i]));
      high[i] = std::max(high[i], ordered(x[i]));
    }
  }
}

// Stores the scale and the zero point of each group, rounded outward, and keeps in `zero` and `inverse` the zero
// point and one over the scale as stored: a division for each number would take longer than all else.
template <class T>
inline void store(const i32* __restrict low, const i32* __restrict high, i64 count, float top, float* __restrict zero,
                  float* __restrict inverse, typename T::Bits* __restrict scales, typename T::Bits* __restrict zeros) {
  for (i64 i = 0; i < count; ++i) {
    const float l = unordered(low[i]), h = unordered(high[i]), nan = as_float(0x7fc00000);
    const bool bad = is_nan(l) | is_nan(h);  // no branch: the loop is made of vectors
    const float least = bad ? nan : std::min(std::max(l, -T::kLimit), T::kLimit);
    const float most = bad ? nan : std::min(std::max(h, -T::kLimit), T::kLimit);
    const float stored_zero = -T::get(T::up(-least));  // down is up, of the opposite
    zeros[i] = T::up(stored_zero);                     // exact
    scales[i] = T::up((most - stored_zero) / top);
    const float stored_scale = T::get(scales[i]);
    zero[i] = stored_zero;
    inverse[i] = stored_scale == 0 ? 1.0f : 1.0f / stored_scale;
  }
}

KVMEM_VECTORS void find_scales(Groups& g, i64 count, float top, FloatKind kind) {
  const i32 *const low = g.low.data(), *const high = g.high.data();
  float *const zero = g.zero.data(), *const inverse = g.inverse.data();
  unsigned char* const at = g.stored.data();
  if (kind == FloatKind::f16) {
    store<Half>(low, high, count, top, zero, inverse, as<Half>(at), as<Half>(at) + count);
  } else if (kind == FloatKind::bf16) {
    store<Bfloat>(low, high, count, top, zero, inverse, as<Bfloat>(at), as<Bfloat>(at) + count);
  } else {
    store<Single>(low, high, count, top, zero, inverse, as<Single>(at), as<Single>(at) + count);
  }
}

inline u8 code_of(float x, float zero, float inverse, float limit, float top) {
  const float place = (std::min(std::max(x, -limit), limit) - zero) * inverse;
  const float inside = place > 0 ? std::min(place, top) : 0.0f;  // NaN becomes 0
  return static_cast<u8>(as_bits(inside + 0x1p23f));             // the nearest integer, ties to even
}

KVMEM_VECTORS void codes_of_groups(const float* x, i64 groups, i64 size, const float* zero, const float* inverse,
                                   float limit, float top, u8* codes) {
  for (i64 g = 0; g < groups; ++g, x += size, codes += size) {
    for (i64 i = 0; i < size; ++i) codes[i] = code_of(x[i], zero[g], inverse[g], limit, top);
  }
}

KVMEM_VECTORS void codes_of_channels(const float* x, i64 tokens, i64 count, const float* zero, const float* inverse,
                                     float limit, float top, u8* codes) {
  for (i64 t = 0; t < tokens; ++t, x += count, codes += count) {
    for (i64 i = 0; i < count; ++i) codes[i] = code_of(x[i], zero[i], inverse[i], limit, top);
  }
}

// scales: of each head first those of its groups, then their zero points.
KVMEM_VECTORS void values_of_groups(const u8* codes, i64 heads, i64 groups, i64 size, const float* scales, float* out) {
  for (i64 h = 0; h < heads; ++h, scales += 2 * groups) {
    for (i64 g = 0; g < groups; ++g, codes += size, out += size) {
      const float scale = scales[g], zero = scales[groups + g];
      for (i64 i = 0; i < size; ++i) out[i] = static_cast<float>(codes[i]) * scale + zero;
    }
  }
}

KVMEM_VECTORS void values_of_channels(const u8* codes, i64 heads, i64 width, const float* scales, float* out) {
  for (i64 h = 0; h < heads; ++h, codes += width, out += width, scales += 2 * width) {
    for (i64 i = 0; i < width; ++i) out[i] = static_cast<float>(codes[i]) * scales[i] + scales[width + i];
  }
}

KVMEM_VECTORS void pack(const u8* codes, i64 count, int bits, unsigned char* out) {
  if (bits == 8) {
    std::memcpy(out, codes, static_cast<size_t>(count));
  } else if (bits == 4) {
    for (i64 i = 0; i < count / 2; ++i) out[i] = static_cast<u8>(codes[2 * i] | codes[2 * i + 1] << 4);
  } else if (bits == 2) {
    for (i64 i = 0; i < count / 4; ++i) {
      const u8* const c = codes + 4 * i;
      out[i] = static_cast<u8>(c[0] | c[1] << 2 | c[2] << 4 | c[3] << 6);
    }
  } else {
    for (i64 i = 0; i < count / 8; ++i) {
      u32 word = 0;
      for (int j = 0; j < 8; ++j) word |= static_cast<u32>(codes[8 * i + j]) << 3 * j;
      for (int j = 0; j < 3; ++j) out[3 * i + j] = static_cast<u8>(word >> 8 * j);
    }
  }
}

KVMEM_VECTORS void unpack(const unsigned char* packed, i64 count, int bits, u8* codes) {
  if (bits == 8) {
    std::memcpy(codes, packed, static_cast<size_t>(count));
  } else if (bits == 4) {
    for (i64 i = 0; i < count / 2; ++i) {
      codes[2 * i] = packed[i] & 15;
      codes[2 * i + 1] = packed[i] >> 4;
    }
  } else if (bits == 2) {
    for (i64 i = 0; i < count; ++i) codes[i] = packed[i / 4] >> 2 * (i % 4) & 3;
  } else {
    for (i64 i = 0; i < count / 8; ++i) {
      u32 word = 0;
      for (int j = 0; j < 3; ++j) word |= static_cast<u32>(packed[3 * i + j]) << 8 * j;
      for (int j = 0; j < 8; ++j) codes[8 * i + j] = word >> 3 * j & 7;
    }
  }
}

KVMEM_VECTORS void values_of_bytes(const u8* codes, i64 count, const float* table, float* out) {
  for (i64 i = 0; i < count; ++i) out[i] = table[codes[i]];
}

float limit_of(FloatKind kind) { return kind == FloatKind::f16 ? Half::kLimit : Single::kLimit; }
i64 bytes_of(FloatKind kind) { return kind == FloatKind::f32 ? 4 : 2; }

}  // namespace

void quantise_tokens(const Quantised& q, Tokens x, Tokens codes, Tokens scales) {
  const i64 numbers = q.heads * q.width, groups = q.width / q.size, all = q.heads * groups;
  const i64 bytes = groups * bytes_of(scales.kind);  // of the scales of a head
  const float top = static_cast<float>((1 << q.bits) - 1), limit = limit_of(scales.kind);
  std::vector<float> values(static_cast<size_t>(numbers));
  std::vector<u8> wide(static_cast<size_t>(numbers));
  Groups found(all, scales.kind);
  for (i64 t = 0; t < q.tokens; ++t) {
    to_floats(x, t, 1, 0, numbers, values.data());
    find_extremes(values.data(), all, q.size, found.low.data(), found.high.data());
    find_scales(found, all, top, scales.kind);
    for (i64 h = 0; h < q.heads; ++h) {
      unsigned char* const at = scales.data + t * scales.stride + h * 2 * bytes;
      std::memcpy(at, found.stored.data() + h * bytes, static_cast<size_t>(bytes));
      std::memcpy(at + bytes, found.stored.data() + (q.heads + h) * bytes, static_cast<size_t>(bytes));
    }
    codes_of_groups(values.data(), all, q.size, found.zero.data(), found.inverse.data(), limit, top, wide.data());
    pack(wide.data(), numbers, q.bits, codes.data + t * codes.stride);
  }
}

void dequantise_tokens(const Quantised& q, Tokens codes, Tokens scales, float* out) {
  const i64 numbers = q.heads * q.width, groups = q.width / q.size;
  std::vector<u8> wide(static_cast<size_t>(numbers));
  std::vector<float> stored(static_cast<size_t>(q.heads * 2 * groups));
  for (i64 t = 0; t < q.tokens; ++t, out += numbers) {
    unpack(codes.data + t * codes.stride, numbers, q.bits, wide.data());
    to_floats(scales, t, 1, 0, q.heads * 2 * groups, stored.data());
    values_of_groups(wide.data(), q.heads, groups, q.size, stored.data(), out);
  }
}

void quantise_channels(const Quantised& q, Tokens x, Tokens codes, Tokens scales) {
  const i64 bytes = 2 * q.width * bytes_of(scales.kind), packed = q.width * q.bits / 8;  // of a head
  const float top = static_cast<float>((1 << q.bits) - 1), limit = limit_of(scales.kind);
  std::vector<float> values(static_cast<size_t>(q.size * q.width));  // of a block and head
  std::vector<u8> wide(static_cast<size_t>(q.size * q.width));
  Groups found(q.width, scales.kind);
  for (i64 first = 0; first < q.tokens; first += q.size) {
    for (i64 h = 0; h < q.heads; ++h) {
      to_floats(x, first, q.size, h * q.width, q.width, values.data());
      find_channel_extremes(values.data(), q.size, q.width, found.low.data(), found.high.data());
      find_scales(found, q.width, top, scales.kind);
      unsigned char* const at = scales.data + first / q.size * scales.stride + h * bytes;
      std::memcpy(at, found.stored.data(), static_cast<size_t>(bytes));
      codes_of_channels(values.data(), q.size, q.width, found.zero.data(), found.inverse.data(), limit, top,
                        wide.data());
      for (i64 t = 0; t < q.size; ++t) {
        pack(wide.data() + t * q.width, q.width, q.bits, codes.data + (first + t) * codes.stride + h * packed);
      }
    }
  }
}

void dequantise_channels(const Quantised& q, i64 skip, Tokens codes, Tokens scales, float* out) {
  const i64 numbers = q.heads * q.width;
  std::vector<u8> wide(static_cast<size_t>(numbers));
  std::vector<float> stored(static_cast<size_t>(2 * numbers));  // of a block
  for (i64 t = 0, block = -1; t < q.tokens; ++t, out += numbers) {
    if ((t + skip) / q.size != block) to_floats(scales, block = (t + skip) / q.size, 1, 0, 2 * numbers, stored.data());
    unpack(codes.data + t * codes.stride, numbers, q.bits, wide.data());
    values_of_channels(wide.data(), q.heads, q.width, stored.data(), out);
  }
}

void look_up(i64 tokens, i64 numbers, Tokens codes, const float* table, float* out) {
  for (i64 t = 0; t < tokens; ++t, out += numbers) values_of_bytes(codes.data + t * codes.stride, numbers, table, out);
}

}  // namespace kvmem
