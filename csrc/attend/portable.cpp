// For processors without a kernel of their own: 16 floats at a time, in whatever registers the compiler has for them.
#include "attend/kernel.h"
#include "attend/math.h"

#define KVMEM_TARGET
#define KVMEM_SIMD inline __attribute__((always_inline))

namespace kvmem {
namespace portable {

struct Vector {
  struct Register {
    float at[16];
  };
  static constexpr int kLanes = 16, kSums = 4;
  static KVMEM_SIMD Register all(float x) {
    Register r;
    for (float& a : r.at) a = x;
    return r;
  }
  static KVMEM_SIMD Register zero() { return all(0); }
  static KVMEM_SIMD Register load(const float* at) {
    Register r;
    std::memcpy(r.at, at, sizeof(r.at));
    return r;
  }
  static KVMEM_SIMD void store(float* at, const Register& r) { std::memcpy(at, r.at, sizeof(r.at)); }
  static KVMEM_SIMD Register fma(const Register& a, const Register& b, Register c) {
    for (int i = 0; i < kLanes; ++i) c.at[i] += a.at[i] * b.at[i];
    return c;
  }
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
  Vector::Register r;
  for (i64 i = 0; i < Vector::kLanes; ++i) r.at[i] = value_of(stored, at + i * E::kBytes);
  return r;
}

#include "attend/kernel.inl"

}  // namespace portable

AttentionKernel portable_kernel() { return &portable::attend; }

}  // namespace kvmem

#undef KVMEM_TARGET
#undef KVMEM_SIMD
