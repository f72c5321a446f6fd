// Formats of numbers, one by one and without branches, so that loops over them become vector instructions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "base/types.h"

namespace kvmem {

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
inline bool is_nan(float value) { return (as_bits(value) & 0x7fffffff) > 0x7f800000; }
// As a mask, because compilers make branches of two comparisons of one number, and no vectors of those. Below 2^31.
inline u32 all_ones_below(u32 a, u32 b) { return static_cast<u32>(static_cast<i32>(a - b) >> 31); }
inline float clamped(float value, float limit) {  // NaN stays
  const float low = value < -limit ? -limit : value;
  return low > limit ? limit : low;
}

// A format of floats: `get` reads one as a float. `up` returns the least one that is not below the value, and NaN for
// NaN. limit: the largest that is stored; differences of two are finite. REQUIRES of `up`: within the limits, or NaN.
// Order: integers that sort as the floats do if `turned`, with NaNs at both ends: they have vector minima.
struct Half {
  using Bits = u16;
  using Order = std::int16_t;
  static constexpr float kLimit = 65504.0f;
  static float get(u16 h) {
    const u32 magnitude = static_cast<u32>(h & 0x7fff) << 13, sign = static_cast<u32>(h & 0x8000) << 16;
    const u32 finite = as_bits(as_float(magnitude) * 0x1p112f);
    return as_float((magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : finite) | sign);
  }
  static u16 up(float value) {
    const u32 bits = as_bits(value), magnitude = bits & 0x7fffffff, up = ~bits >> 31;  // 1 for positive numbers
    const u32 normal = (magnitude - 0x38000000 + up * 0x1fff) >> 13;
    const float steps = as_float(std::min(magnitude, u32{0x38800000})) * 0x1p24f;  // of a subnormal half
    const i32 below = static_cast<i32>(steps);
    const u32 subnormal = static_cast<u32>(below) + (up & static_cast<u32>(static_cast<float>(below) < steps));
    const u32 small = all_ones_below(magnitude, 0x38800000);
    const u32 found = (subnormal & small) | (normal & ~small) | (all_ones_below(0x7f800000, magnitude) & 0x7e00);
    return static_cast<u16>(found | bits >> 31 << 15);
  }
};

struct Bfloat {
  using Bits = u16;
  using Order = std::int16_t;
  static constexpr float kLimit = 0x1p126f;
  static float get(u16 b) { return as_float(static_cast<u32>(b) << 16); }
  static u16 up(float value) {
    const u32 bits = as_bits(value);
    const u32 found = (bits + (bits >> 31 == 0 ? 0xffff : 0)) >> 16;
    return static_cast<u16>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : found);
  }
};

struct Single {
  using Bits = u32;
  using Order = i32;
  static constexpr float kLimit = 0x1p126f;
  static float get(u32 bits) { return as_float(bits); }
  static u32 up(float value) { return as_bits(value); }
};

template <class T>
inline typename T::Order turned(typename T::Bits bits) {  // its own inverse
  using Order = typename T::Order;
  const auto order = static_cast<Order>(bits);
  return static_cast<Order>(order ^ (order >> (8 * sizeof(order) - 1) & std::numeric_limits<Order>::max()));
}

template <class T>
inline float unturned(typename T::Order order) {
  using Bits = typename T::Bits;
  return T::get(static_cast<Bits>(turned<T>(static_cast<Bits>(order))));
}

// A format of codes. top: what the largest number of a group becomes. zero: whether groups have a zero point. `code`:
// of a number that is divided by the scale already. `value`: of a code.
struct Integers {
  static constexpr bool kZero = true;
  static u8 code(float place, float top) {
    const float positive = place > 0 ? place : 0.0f;                               // NaN becomes 0
    return static_cast<u8>(as_bits((positive < top ? positive : top) + 0x1p23f));  // nearest, ties to even
  }
  static float value(u8 code) { return static_cast<float>(code); }
};

// 8-bit floats with kMantissa bits behind the exponent, whose bias is kBias. kFinite: the largest finite number.
template <int kMantissa, int kBias, u8 kFinite>
struct Float8 {
  static constexpr bool kZero = false;
  static constexpr u32 kDrop = 23 - kMantissa, kNan = 0x7f;
  static u8 code(float place, float top) {
    const u32 bits = as_bits(clamped(place, top)), magnitude = bits & 0x7fffffff;
    constexpr u32 kMagic = (128 - kBias + kDrop) << 23;
    const u32 subnormal = as_bits(as_float(magnitude) + as_float(kMagic)) - kMagic;  // the addition rounds
    const u32 even = magnitude + ((1u << (kDrop - 1)) - 1) + (magnitude >> kDrop & 1);
    const u32 normal = (even - ((127u - kBias) << 23)) >> kDrop;
    const u32 finite = magnitude < (128u - kBias) << 23 ? subnormal : normal;
    return static_cast<u8>((magnitude > 0x7f800000 ? kNan : finite) | (bits >> 24 & 0x80));
  }
  static float value(u8 code) {
    const u32 magnitude = code & 0x7f, sign = static_cast<u32>(code & 0x80) << 24;
    const u32 finite = as_bits(as_float(magnitude << kDrop) * as_float((254u - kBias) << 23));
    const u32 special = kFinite + 1 < kNan && magnitude == kFinite + 1 ? 0x7f800000 : 0x7fc00000;
    return as_float((magnitude > kFinite ? special : finite) | sign);
  }
};
using E4M3 = Float8<3, 7, 0x7e>;  // without infinity
using E5M2 = Float8<2, 15, 0x7b>;

}  // namespace kvmem
