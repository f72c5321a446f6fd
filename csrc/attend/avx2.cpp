// x86-64 with AVX2, FMA and F16C: Intel from 2013, AMD from 2015 on.
#include "attend/kernel.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define KVMEM_TARGET __attribute__((target("avx2,fma,f16c")))
#define KVMEM_SIMD inline __attribute__((target("avx2,fma,f16c"))) KVMEM_INLINED

namespace kvmem {
namespace avx2 {

struct Vector {
  using Register = __m256;
  static constexpr int kLanes = 8, kSums = 8;
  static KVMEM_SIMD Register zero() { return _mm256_setzero_ps(); }
  static KVMEM_SIMD Register all(float x) { return _mm256_set1_ps(x); }
  static KVMEM_SIMD Register load(const float* at) { return _mm256_loadu_ps(at); }
  static KVMEM_SIMD void store(float* at, Register r) { _mm256_storeu_ps(at, r); }
  static KVMEM_SIMD Register fma(Register a, Register b, Register c) { return _mm256_fmadd_ps(a, b, c); }
  static KVMEM_SIMD Register mul(Register a, Register b) { return _mm256_mul_ps(a, b); }
  static KVMEM_SIMD Register div(Register a, Register b) { return _mm256_div_ps(a, b); }
  static KVMEM_SIMD Register max(Register a, Register b) { return _mm256_max_ps(a, b); }
  static KVMEM_SIMD Register where_below(Register x, Register y, Register a, Register b) {
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, y, _CMP_LT_OQ));
  }
  static KVMEM_SIMD Register power(Register r) {
    const __m256i n = _mm256_sub_epi32(_mm256_castps_si256(r), _mm256_castps_si256(all(kRound)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }
  static KVMEM_SIMD Register kept(Register r) {
    __asm__("" : "+x"(r));
    return r;
  }
  static KVMEM_SIMD void sums(const Register* r, float* out) {
    const Register pairs = _mm256_hadd_ps(_mm256_hadd_ps(r[0], r[1]), _mm256_hadd_ps(r[2], r[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
  }
};

KVMEM_SIMD __m128i load_16(const unsigned char* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); }
KVMEM_SIMD __m128i load_8(const unsigned char* at) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)); }

KVMEM_SIMD __m256 read(F32, const unsigned char* at) { return _mm256_loadu_ps(reinterpret_cast<const float*>(at)); }
KVMEM_SIMD __m256 read(Bf16, const unsigned char* at) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_16(at)), 16));
}
KVMEM_SIMD __m256 read(F16, const unsigned char* at) { return _mm256_cvtph_ps(load_16(at)); }
KVMEM_SIMD __m256 read(F8E5M2, const unsigned char* at) {  // the upper half of an fp16
  return _mm256_cvtph_ps(_mm_unpacklo_epi8(_mm_setzero_si128(), load_8(at)));
}
KVMEM_SIMD __m256 read(F8E4M3, const unsigned char* at) {  // an fp16 whose exponent is 8 too small, but for NaN
  const __m128i bits = _mm_cvtepi8_epi16(load_8(at)), size = _mm_and_si128(bits, _mm_set1_epi16(0x7f));
  const __m128i nan = _mm_and_si128(_mm_cmpeq_epi16(size, _mm_set1_epi16(0x7f)), _mm_set1_epi16(0x7e00));
  const __m128i sign = _mm_and_si128(bits, _mm_set1_epi16(static_cast<short>(0x8000)));
  const __m128i half = _mm_or_si128(_mm_or_si128(_mm_slli_epi16(size, 7), sign), nan);
  return _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256));
}
KVMEM_SIMD __m256 read(I8, const unsigned char* at) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load_8(at))); }

#include "attend/kernel_body.h"

}  // namespace avx2

AttentionKernel avx2_kernel() { return &avx2::attend; }

}  // namespace kvmem

#undef KVMEM_TARGET
#undef KVMEM_SIMD

#else

kvmem::AttentionKernel kvmem::avx2_kernel() { return nullptr; }

#endif
