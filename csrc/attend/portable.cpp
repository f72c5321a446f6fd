// For processors without a kernel of their own: 16 floats at a time, in whatever registers the compiler has for them.
#include "attend/kernel.h"
#include "codec/formats.h"

#define KVMEM_TARGET
#define KVMEM_SIMD inline KVMEM_INLINED

namespace kvmem {
namespace portable {

struct Vector {
  struct Register {
    float at[16];
  };
  static constexpr int kLanes = 16, kSums = 4;
  template <class Of>
  static KVMEM_SIMD Register each(const Of& of) {
    Register r;
    for (int i = 0; i < kLanes; ++i) r.at[i] = of(i);
    return r;
  }
  static KVMEM_SIMD Register all(float x) {
    return each([&](int) { return x; });
  }
  static KVMEM_SIMD Register zero() { return all(0); }
  static KVMEM_SIMD Register load(const float* at) {
    return each([&](int i) { return at[i]; });
  }
  static KVMEM_SIMD void store(float* at, const Register& r) { std::memcpy(at, r.at, sizeof(r.at)); }
  static KVMEM_SIMD Register mul(const Register& a, const Register& b) {
    return each([&](int i) { return a.at[i] * b.at[i]; });
  }
  static KVMEM_SIMD Register div(const Register& a, const Register& b) {
    return each([&](int i) { return a.at[i] / b.at[i]; });
  }
  static KVMEM_SIMD Register fma(const Register& a, const Register& b, const Register& c) {
    return each([&](int i) { return a.at[i] * b.at[i] + c.at[i]; });
  }
  static KVMEM_SIMD Register max(const Register& a, const Register& b) {
    return each([&](int i) { return a.at[i] > b.at[i] ? a.at[i] : b.at[i]; });
  }
  static KVMEM_SIMD Register where_below(const Register& x, const Register& y, const Register& a, const Register& b) {
    return each([&](int i) { return x.at[i] < y.at[i] ? a.at[i] : b.at[i]; });
  }
  static KVMEM_SIMD Register power(const Register& r) {
    return each([&](int i) { return as_float((as_bits(r.at[i]) - as_bits(kRound) + 127) << 23); });
  }
  static KVMEM_SIMD const Register& kept(const Register& r) { return r; }
  static KVMEM_SIMD void sums(const Register* r, float* out) {
    for (int i = 0; i < 4; ++i) {
      float part[4] = {};
      for (int j = 0; j < kLanes; ++j) part[j % 4] += r[i].at[j];
      out[i] = (part[0] + part[1]) + (part[2] + part[3]);
    }
  }
};

inline float value_of(F32, const unsigned char* at) {
  float value;
  std::memcpy(&value, at, sizeof(value));
  return value;
}
inline u16 half_at(const unsigned char* at) {
  u16 bits;
  std::memcpy(&bits, at, sizeof(bits));
  return bits;
}
inline float value_of(Bf16, const unsigned char* at) { return Bfloat::get(half_at(at)); }
inline float value_of(F16, const unsigned char* at) { return Half::get(half_at(at)); }
inline float value_of(F8E4M3, const unsigned char* at) { return E4M3::value(*at); }
inline float value_of(F8E5M2, const unsigned char* at) { return E5M2::value(*at); }
inline float value_of(I8, const unsigned char* at) { return static_cast<float>(static_cast<signed char>(*at)); }

template <class E>
KVMEM_SIMD Vector::Register read(E stored, const unsigned char* at) {
  return Vector::each([&](int i) { return value_of(stored, at + i * E::kBytes); });
}

#include "attend/kernel_body.h"

}  // namespace portable

AttentionKernel portable_kernel() { return &portable::attend; }

}  // namespace kvmem

#undef KVMEM_TARGET
#undef KVMEM_SIMD
