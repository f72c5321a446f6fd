// exp and tanh without branches, so that loops over them become vector instructions.
#pragma once

#include "codec/formats.h"

namespace kvmem {

// exp(x) for x <= 0, within 2 units in the last place; 0 below -87, where a float has no more digits; NaN for NaN.
// 2^n exp(f) with |f| <= ln(2) / 2, by its Taylor polynomial.
inline __attribute__((always_inline)) float exp_of(float x) {
  constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f, kRound = 0x1.8p23f;
  const float within = x < -87.0f ? -87.0f : x;
  const float rounded = within * kLog2e + kRound, n = rounded - kRound;
  const float f = within - n * kLn2High - n * kLn2Low;
  float sum = 1.0f / 5040;
  sum = sum * f + 1.0f / 720;
  sum = sum * f + 1.0f / 120;
  sum = sum * f + 1.0f / 24;
  sum = sum * f + 1.0f / 6;
  sum = sum * f + 0.5f;
  sum = sum * f + 1.0f;
  sum = sum * f + 1.0f;
  const float power = as_float((as_bits(rounded) - as_bits(kRound) + 127) << 23);
  return x < -87.0f ? 0.0f : sum * power;
}

// tanh(x): its Taylor polynomial near 0, where the exponential would lose digits.
inline __attribute__((always_inline)) float tanh_of(float x) {
  const float size = x < 0 ? -x : x, square = x * x;
  const float shrunk = exp_of(-2.0f * size), far = (1.0f - shrunk) / (1.0f + shrunk);
  float sum = 21844.0f / 6081075;
  sum = sum * square - 1382.0f / 155925;
  sum = sum * square + 62.0f / 2835;
  sum = sum * square - 17.0f / 315;
  sum = sum * square + 2.0f / 15;
  sum = sum * square - 1.0f / 3;
  const float near = x + x * square * sum;
  return size < 0.4f ? near : x < 0 ? -far : far;
}

}  // namespace kvmem
