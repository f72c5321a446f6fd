// x86-64 with AVX-512: Intel servers from 2017, AMD from 2022 on.
#include "attend/kernel.h"

#if defined(__x86_64__)

#include <immintrin.h>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own header of AVX-512
#endif

#define KVMEM_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#define KVMEM_SIMD inline __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))) KVMEM_INLINED

namespace kvmem {
namespace avx512 {

struct Vector {
  using Register = __m512;
  static constexpr int kLanes = 16, kSums = 16;
  static KVMEM_SIMD Register zero() { return _mm512_setzero_ps(); }
  static KVMEM_SIMD Register all(float x) { return _mm512_set1_ps(x); }
  static KVMEM_SIMD Register load(const float* at) { return _mm512_loadu_ps(at); }
  static KVMEM_SIMD void store(float* at, Register r) { _mm512_storeu_ps(at, r); }
  static KVMEM_SIMD Register fma(Register a, Register b, Register c) { return _mm512_fmadd_ps(a, b, c); }
  static KVMEM_SIMD Register mul(Register a, Register b) { return _mm512_mul_ps(a, b); }
  static KVMEM_SIMD Register div(Register a, Register b) { return _mm512_div_ps(a, b); }
  static KVMEM_SIMD Register max(Register a, Register b) { return _mm512_max_ps(a, b); }
  static KVMEM_SIMD Register where_below(Register x, Register y, Register a, Register b) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, y, _CMP_LT_OQ), b, a);
  }
  static KVMEM_SIMD Register power(Register r) {
    const __m512i n = _mm512_sub_epi32(_mm512_castps_si512(r), _mm512_castps_si512(all(kRound)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23));
  }
  static KVMEM_SIMD Register kept(Register r) {
    __asm__("" : "+v"(r));
    return r;
  }
  static KVMEM_SIMD void sums(const Register* r, float* out) {
    for (int i = 0; i < 4; ++i) out[i] = _mm512_reduce_add_ps(r[i]);
  }
};

KVMEM_SIMD __m256i load_32(const unsigned char* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }
KVMEM_SIMD __m128i load_16(const unsigned char* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); }

KVMEM_SIMD __m512 read(F32, const unsigned char* at) { return _mm512_loadu_ps(at); }
KVMEM_SIMD __m512 read(Bf16, const unsigned char* at) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_32(at)), 16));
}
KVMEM_SIMD __m512 read(F16, const unsigned char* at) { return _mm512_cvtph_ps(load_32(at)); }
KVMEM_SIMD __m512 read(F8E5M2, const unsigned char* at) {  // the upper half of an fp16
  return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(load_16(at)), 8));
}
KVMEM_SIMD __m512 read(F8E4M3, const unsigned char* at) {  // an fp16 whose exponent is 8 too small, but for NaN
  const __m256i bits = _mm256_cvtepi8_epi16(load_16(at)), size = _mm256_and_si256(bits, _mm256_set1_epi16(0x7f));
  const __m256i nan = _mm256_and_si256(_mm256_cmpeq_epi16(size, _mm256_set1_epi16(0x7f)), _mm256_set1_epi16(0x7e00));
  const __m256i sign = _mm256_and_si256(bits, _mm256_set1_epi16(static_cast<short>(0x8000)));
  const __m256i half = _mm256_or_si256(_mm256_or_si256(_mm256_slli_epi16(size, 7), sign), nan);
  return _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256));
}
KVMEM_SIMD __m512 read(I8, const unsigned char* at) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_16(at))); }

#include "attend/kernel_body.h"

}  // namespace avx512

AttentionKernel avx512_kernel() { return &avx512::attend; }

}  // namespace kvmem

#undef KVMEM_TARGET
#undef KVMEM_SIMD

#else

kvmem::AttentionKernel kvmem::avx512_kernel() { return nullptr; }

#endif
