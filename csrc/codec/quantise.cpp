// A product and a sum stay two roundings on every machine, as in bits.py, whatever vector unit runs them.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off", "no-trapping-math")  // without traps, a choice needs no branch
#endif

#include "codec/quantise.h"

#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "codec/formats.h"
#include "codec/packing.h"
#include "codec/vectors.h"
#if KVMEM_CLONES
#include <immintrin.h>
#endif

namespace kvmem {
namespace {

constexpr i64 kTile = 2048;  // numbers that stay in the first cache between the passes over them

// Calls work(format) with the format of floats, or of codes.
template <class Work>
KVMEM_INLINE void with(FloatKind kind, const Work& work) {
  if (kind == FloatKind::f16) return work(Half());
  if (kind == FloatKind::bf16) return work(Bfloat());
  work(Single());
}
template <class Work>
KVMEM_INLINE void with(CodeKind code, const Work& work) {
  if (code == CodeKind::e4m3) return work(E4M3());
  if (code == CodeKind::e5m2) return work(E5M2());
  work(Integers());
}

// Calls work(size), as a constant where it is a usual one: loops of unknown length take longer to set up than to run.
template <class Work>
KVMEM_INLINE void with(i64 size, const Work& work) {
  if (size == 32) return work(std::integral_constant<i64, 32>());
  if (size == 64) return work(std::integral_constant<i64, 64>());
  if (size == 128) return work(std::integral_constant<i64, 128>());
  work(size);
}

template <class T>
KVMEM_INLINE typename T::Bits* as(unsigned char* data) {
  return reinterpret_cast<typename T::Bits*>(data);
}

// Groups of numbers that are quantised together: arrays of one entry a group.
struct Groups {
  Groups(i64 count, FloatKind kind)
      : low(count), high(count), zero(count), inverse(count), stored(2 * count * (kind == FloatKind::f32 ? 4 : 2)) {}
  std::vector<float> low, high, zero, inverse;
  std::vector<unsigned char> stored;  // as the cache holds them: all scales, then all zero points
};

// Compilers do not find the instruction that converts halves.
#if KVMEM_CLONES
__attribute__((target("arch=x86-64-v3"))) void copy_halves(const u16* at, i64 count, float* out) {
  i64 i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at + i))));
  }
  for (; i < count; ++i) out[i] = Half::get(at[i]);
}
__attribute__((target("default")))
#endif
void copy_halves(const u16* at, i64 count, float* out) {
  for (i64 i = 0; i < count; ++i) out[i] = Half::get(at[i]);
}

KVMEM_VECTORS void copy_others(FloatKind kind, const unsigned char* at, i64 count, float* out) {
  if (kind == FloatKind::f32) {
    std::memcpy(out, at, static_cast<size_t>(4 * count));
  } else {
    for (i64 i = 0; i < count; ++i) out[i] = Bfloat::get(reinterpret_cast<const u16*>(at)[i]);
  }
}

i64 bytes_of(FloatKind kind) { return kind == FloatKind::f32 ? 4 : 2; }
float limit_of(FloatKind kind) { return kind == FloatKind::f16 ? Half::kLimit : Single::kLimit; }
float top_of(const Quantised& q) {
  return q.code == CodeKind::e4m3   ? 448.0f
         : q.code == CodeKind::e5m2 ? 57344.0f
                                    : static_cast<float>((1 << q.bits) - 1);
}

// Numbers [first, first + count) of each token, one token's after the other's.
void to_floats(const Tokens& from, i64 token, i64 tokens, i64 first, i64 count, float* out) {
  for (i64 t = token; t < token + tokens; ++t, out += count) {
    const unsigned char* const at = from.data + t * from.stride + first * bytes_of(from.kind);
    if (from.kind == FloatKind::f16) {
      copy_halves(reinterpret_cast<const u16*>(at), count, out);
    } else {
      copy_others(from.kind, at, count, out);
    }
  }
}

KVMEM_VECTORS void find_extremes(const Tokens& x, i64 token, i64 tokens, i64 groups, i64 size, float* low,
                                 float* high) {
  with(x.kind, [&](auto format) __attribute__((always_inline)) {
    with(size, [&](auto each) __attribute__((always_inline)) {
      using T = decltype(format);
      for (i64 t = 0; t < tokens; ++t) {
        const auto* at = as<T>(x.data + (token + t) * x.stride);
        for (i64 g = 0; g < groups; ++g, at += each) {
          auto lo = std::numeric_limits<typename T::Order>::max(), hi = std::numeric_limits<typename T::Order>::min();
          for (i64 i = 0; i < each; ++i) {
            lo = std::min(lo, turned<T>(at[i]));
            hi = std::max(hi, turned<T>(at[i]));
          }
          low[t * groups + g] = as_float(static_cast<u32>(lo));
          high[t * groups + g] = as_float(static_cast<u32>(hi));
        }
      }
      for (i64 i = 0; i < tokens * groups; ++i) {  // many at a time
        low[i] = unturned<T>(static_cast<typename T::Order>(as_bits(low[i])));
        high[i] = unturned<T>(static_cast<typename T::Order>(as_bits(high[i])));
      }
    });
  });
}

KVMEM_VECTORS void find_channel_extremes(const Tokens& x, i64 token, i64 tokens, i64 first, i64 count, float* low,
                                         float* high) {
  constexpr i64 kSome = 64;
  with(x.kind, [&](auto format) __attribute__((always_inline)) {
    for (i64 done = 0; done < count; done += kSome) {
      const auto of_some = [&](auto some) __attribute__((always_inline)) {
        using T = decltype(format);
        typename T::Order lo[kSome], hi[kSome];
        std::fill(lo, lo + kSome, std::numeric_limits<typename T::Order>::max());
        std::fill(hi, hi + kSome, std::numeric_limits<typename T::Order>::min());
        for (i64 t = token; t < token + tokens; ++t) {
          const auto* const at = as<T>(x.data + t * x.stride) + first + done;
          for (i64 i = 0; i < some; ++i) {
            lo[i] = std::min(lo[i], turned<T>(at[i]));
            hi[i] = std::max(hi[i], turned<T>(at[i]));
          }
        }
        for (i64 i = 0; i < some; ++i) {
          low[done + i] = unturned<T>(lo[i]);
          high[done + i] = unturned<T>(hi[i]);
        }
      };
      count - done >= kSome ? of_some(std::integral_constant<i64, kSome>()) : of_some(count - done);
    }
  });
}

// Stores the scale and the zero point of each group, rounded outward, and keeps in `zero` and `inverse` the zero
// point and one over the scale as stored: a division for each number would take longer than all else.
template <class T, class Code>
KVMEM_INLINE void store(const float* __restrict low, const float* __restrict high, i64 count, float top,
                        float* __restrict zero, float* __restrict inverse, typename T::Bits* __restrict scales,
                        typename T::Bits* __restrict zeros) {
  for (i64 i = 0; i < count; ++i) {
    // What NaN makes NaN: no branch, so that the loop is made of vectors.
    const u32 poison = is_nan(low[i]) | is_nan(high[i]) ? 0x7fc00000 : 0;
    const float least = as_float(as_bits(clamped(low[i], T::kLimit)) | poison);
    const float most = as_float(as_bits(clamped(high[i], T::kLimit)) | poison);
    float stored_zero = 0, span = most > -least ? most : -least;
    if constexpr (Code::kZero) {
      stored_zero = -T::get(T::up(-least));  // down is up, of the opposite
      zeros[i] = T::up(stored_zero);         // exact
      span = most - stored_zero;
    }
    scales[i] = T::up(span / top);
    const float stored_scale = T::get(scales[i]);
    zero[i] = stored_zero;
    inverse[i] = stored_scale == 0 ? 1.0f : 1.0f / stored_scale;
  }
}

KVMEM_VECTORS void find_scales(const Quantised& q, FloatKind kind, i64 count, Groups& g) {
  const float top = top_of(q);
  with(kind, [&](auto format) __attribute__((always_inline)) {
    with(q.code, [&](auto code) __attribute__((always_inline)) {
      using T = decltype(format);
      auto* const at = as<T>(g.stored.data());
      store<T, decltype(code)>(g.low.data(), g.high.data(), count, top, g.zero.data(), g.inverse.data(), at,
                               at + count);
    });
  });
}

// The code of a number of a group.
template <class Code>
KVMEM_INLINE u8 code_of(float x, float zero, float inverse, float limit, float top) {
  if constexpr (Code::kZero) return Code::code((clamped(x, limit) - zero) * inverse, top);
  return Code::code(x * inverse, top);
}

KVMEM_VECTORS void codes_of_groups(CodeKind code, const float* x, i64 groups, i64 size, const float* zero,
                                   const float* inverse, float limit, float top, u8* codes) {
  with(code, [&](auto format) __attribute__((always_inline)) {
    with(size, [&](auto each) __attribute__((always_inline)) {
      for (i64 g = 0; g < groups; ++g, x += each, codes += each) {
        const float low = zero[g], by = inverse[g];
        for (i64 i = 0; i < each; ++i) codes[i] = code_of<decltype(format)>(x[i], low, by, limit, top);
      }
    });
  });
}

KVMEM_VECTORS void codes_of_channels(CodeKind code, const float* x, i64 tokens, i64 count, const float* zero,
                                     const float* inverse, float limit, float top, u8* codes) {
  with(code, [&](auto format) __attribute__((always_inline)) {
    for (i64 t = 0; t < tokens; ++t, x += count, codes += count) {
      for (i64 i = 0; i < count; ++i) codes[i] = code_of<decltype(format)>(x[i], zero[i], inverse[i], limit, top);
    }
  });
}

// scales: of each head first those of its groups, then their zero points.
KVMEM_VECTORS void values_of_groups(CodeKind code, const u8* codes, i64 heads, i64 groups, i64 size,
                                    const float* scales, float* out) {
  with(code, [&](auto format) __attribute__((always_inline)) {
    using Code = decltype(format);
    for (i64 h = 0; h < heads; ++h, scales += (Code::kZero ? 2 : 1) * groups) {
      for (i64 g = 0; g < groups; ++g, codes += size, out += size) {
        const float scale = scales[g], zero = Code::kZero ? scales[groups + g] : -0.0f;  // x + -0 is x
        for (i64 i = 0; i < size; ++i) out[i] = Code::value(codes[i]) * scale + zero;
      }
    }
  });
}

KVMEM_VECTORS void values_of_channels(CodeKind code, const u8* codes, i64 heads, i64 width, const float* scales,
                                      float* out) {
  with(code, [&](auto format) __attribute__((always_inline)) {
    using Code = decltype(format);
    for (i64 h = 0; h < heads; ++h, codes += width, out += width, scales += (Code::kZero ? 2 : 1) * width) {
      for (i64 i = 0; i < width; ++i) {
        out[i] = Code::value(codes[i]) * scales[i] + (Code::kZero ? scales[width + i] : -0.0f);
      }
    }
  });
}

KVMEM_VECTORS void pack(const u8* codes, i64 count, int bits, unsigned char* out) {
  if (bits == 4) return pack_words<u16, 4>(codes, count, out);
  if (bits == 2) return pack_words<u32, 2>(codes, count, out);
  if (bits == 3) return pack_words<std::uint64_t, 3>(codes, count, out);
  std::memcpy(out, codes, static_cast<size_t>(count));
}

// Returns the codes: `room`, or where they lie already.
KVMEM_VECTORS const u8* unpack(const unsigned char* packed, i64 count, int bits, u8* room) {
  if (bits == 8) return packed;
  if (bits == 4) unpack_words<u16, 4>(packed, count, room);
  if (bits == 2) unpack_words<u32, 2>(packed, count, room);
  if (bits == 3) unpack_words<std::uint64_t, 3>(packed, count, room);
  return room;
}

KVMEM_VECTORS void codes_of_all(CodeKind code, const float* x, i64 count, float scale, float top, u8* codes) {
  int exponent;
  const bool exact = std::frexp(scale, &exponent) == 0.5f;  // a power of two, of which the inverse has no rounding
  const float inverse = 1.0f / scale;
  with(code, [&](auto format) __attribute__((always_inline)) {
    using Code = decltype(format);
    if (exact) {
      for (i64 i = 0; i < count; ++i) codes[i] = Code::code(x[i] * inverse, top);
    } else {
      for (i64 i = 0; i < count; ++i) codes[i] = Code::code(x[i] / scale, top);
    }
  });
}

// An even number of bytes, for which a call of memcpy would take longer.
inline void copy_few(unsigned char* to, const unsigned char* from, i64 bytes) {
  for (i64 i = 0; i < bytes; i += 2) std::memcpy(to + i, from + i, 2);
}

// Copies between what a head has of a block and where it lies in the tokens, `each` bytes in one.
template <bool kBack>
void spread(unsigned char* head, unsigned char* rows, i64 tokens, i64 stride, i64 each) {
  for (i64 t = 0; t < tokens; ++t, head += each, rows += stride) {
    copy_few(kBack ? head : rows, kBack ? rows : head, each);
  }
}

}  // namespace

void quantise_tokens(const Quantised& q, Tokens x, Tokens codes, Tokens scales) {
  const i64 numbers = q.heads * q.width, groups = q.width / q.size, all = q.heads * groups;
  const i64 bytes = groups * bytes_of(scales.kind), tile = std::max<i64>(1, kTile / numbers);
  const float top = top_of(q), limit = limit_of(scales.kind);
  std::vector<float> values(static_cast<size_t>(tile * numbers));
  std::vector<u8> wide(static_cast<size_t>(numbers));
  Groups found(tile * all, scales.kind);
  for (i64 first = 0; first < q.tokens; first += tile) {
    const i64 some = std::min(tile, q.tokens - first);
    find_extremes(x, first, some, all, q.size, found.low.data(), found.high.data());
    find_scales(q, scales.kind, some * all, found);
    to_floats(x, first, some, 0, numbers, values.data());
    for (i64 t = 0; t < some; ++t) {
      for (i64 h = 0; h < q.heads; ++h) {
        for (i64 part = 0; part < q.parts(); ++part) {
          copy_few(scales.data + (first + t) * scales.stride + (h * q.parts() + part) * bytes,
                   found.stored.data() + ((part * some + t) * q.heads + h) * bytes, bytes);
        }
      }
      unsigned char* const row = codes.data + (first + t) * codes.stride;
      u8* const to = q.bits == 8 ? row : wide.data();
      codes_of_groups(q.code, values.data() + t * numbers, all, q.size, found.zero.data() + t * all,
                      found.inverse.data() + t * all, limit, top, to);
      if (to != row) pack(to, numbers, q.bits, row);
    }
  }
}

void dequantise_tokens(const Quantised& q, Tokens codes, Tokens scales, float* out) {
  const i64 numbers = q.heads * q.width, groups = q.width / q.size, stored = q.heads * q.parts() * groups;
  std::vector<u8> wide(static_cast<size_t>(numbers));
  std::vector<float> floats(static_cast<size_t>(stored));
  for (i64 t = 0; t < q.tokens; ++t, out += numbers) {
    to_floats(scales, t, 1, 0, stored, floats.data());
    const u8* const row = unpack(codes.data + t * codes.stride, numbers, q.bits, wide.data());
    values_of_groups(q.code, row, q.heads, groups, q.size, floats.data(), out);
  }
}

void quantise_channels(const Quantised& q, Tokens x, Tokens codes, Tokens scales) {
  const i64 bytes = q.width * bytes_of(scales.kind), each = q.parts() * bytes / q.size;
  const i64 heads = std::clamp<i64>(8 * kTile / (q.size * q.width), 1, q.heads),
            channels = heads * q.width;  // at a time
  const float top = top_of(q), limit = limit_of(scales.kind);
  std::vector<float> values(static_cast<size_t>(q.size * channels));  // of a block
  std::vector<u8> wide(static_cast<size_t>(q.size * channels));
  std::vector<unsigned char> of_head(static_cast<size_t>(2 * bytes));
  Groups found(channels, scales.kind);
  for (i64 first = 0; first < q.tokens; first += q.size) {
    for (i64 head = 0; head < q.heads; head += heads) {
      const i64 some = std::min(heads, q.heads - head), count = some * q.width;
      find_channel_extremes(x, first, q.size, head * q.width, count, found.low.data(), found.high.data());
      find_scales(q, scales.kind, count, found);
      for (i64 h = 0; h < some; ++h) {
        std::memcpy(of_head.data(), found.stored.data() + h * bytes, static_cast<size_t>(bytes));
        std::memcpy(of_head.data() + bytes, found.stored.data() + (some + h) * bytes, static_cast<size_t>(bytes));
        unsigned char* const rows = scales.data + first * scales.stride + (head + h) * each;
        spread<false>(of_head.data(), rows, q.size, scales.stride, each);
      }
      to_floats(x, first, q.size, head * q.width, count, values.data());
      codes_of_channels(q.code, values.data(), q.size, count, found.zero.data(), found.inverse.data(), limit, top,
                        wide.data());
      for (i64 t = 0; t < q.size; ++t) {
        unsigned char* const row = codes.data + (first + t) * codes.stride + head * q.width * q.bits / 8;
        pack(wide.data() + t * count, count, q.bits, row);
      }
    }
  }
}

void dequantise_channels(const Quantised& q, i64 skip, Tokens codes, Tokens scales, float* out) {
  const i64 numbers = q.heads * q.width, of_head = q.parts() * q.width * bytes_of(scales.kind), each = of_head / q.size;
  std::vector<u8> wide(static_cast<size_t>(numbers));
  std::vector<unsigned char> stored(static_cast<size_t>(q.heads * of_head));  // of a block
  std::vector<float> floats(static_cast<size_t>(q.parts() * numbers));
  for (i64 t = 0, block = -1; t < q.tokens; ++t, out += numbers) {
    if ((t + skip) / q.size != block) {
      block = (t + skip) / q.size;
      unsigned char* const rows = scales.data + block * q.size * scales.stride;
      for (i64 h = 0; h < q.heads; ++h) {
        spread<true>(stored.data() + h * of_head, rows + h * each, q.size, scales.stride, each);
      }
      to_floats({stored.data(), 0, scales.kind}, 0, 1, 0, q.parts() * numbers, floats.data());
    }
    const u8* const row = unpack(codes.data + t * codes.stride, numbers, q.bits, wide.data());
    values_of_channels(q.code, row, q.heads, q.width, floats.data(), out);
  }
}

void to_float8(const Quantised& q, float scale, Tokens x, Tokens codes) {
  const i64 numbers = q.heads * q.width;
  std::vector<float> values(static_cast<size_t>(numbers));
  for (i64 t = 0; t < q.tokens; ++t) {
    to_floats(x, t, 1, 0, numbers, values.data());
    codes_of_all(q.code, values.data(), numbers, scale, top_of(q), codes.data + t * codes.stride);
  }
}

void from_float8(const Quantised& q, float scale, Tokens codes, float* out) {
  const i64 numbers = q.heads * q.width;
  for (i64 t = 0; t < q.tokens; ++t, out += numbers) {
    values_of_groups(q.code, codes.data + t * codes.stride, 1, 1, numbers, &scale, out);
  }
}

}  // namespace kvmem
