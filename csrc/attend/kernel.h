// One task of attention, as the vector units of a machine compute it. kernel_body.h is compiled once for each of them.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "attend/attention.h"

// Sanitizers' checks make the kernel many times as long, and take minutes to compile where all is inlined.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define KVMEM_INLINED
#else
#define KVMEM_INLINED __attribute__((always_inline))
#endif

namespace kvmem {

// Tokens whose scores exist at once.
constexpr i64 kTileTokens = 64;
// Registers of no vector unit here have more floats, so that widths that are padded to it suit all.
constexpr i64 kMostLanes = 16;
// A float that is added to this is rounded to an integer, which is then in the lowest bits.
constexpr float kRound = 0x1.8p23f;

// Memory of one thread. A row is a query token and a query head; rows of the same head of K lie side by side, and of
// these the tokens of a query head.
struct AttentionScratch {
  std::vector<float> q, scores, out, top, sum;  // [rows, width], [rows, kTileTokens], [rows, value_width], [rows]
  i64 width = 0, value_width = 0;               // padded to kMostLanes
};

// Adds tokens [begin, end) to the rows of a unit: `out` has the sums of exp(score - top) * value, `sum` those of the
// exponentials, `top` the greatest score. REQUIRES: what precedes is there, at first 0, 0 and -inf; q is scaled.
struct AttentionTask {
  const Attention& plan;
  const AttentionCall& call;
  const AttentionUnit& unit;
  i64 begin, end;
};

using AttentionKernel = void (*)(const AttentionTask& task, AttentionScratch& scratch);

// Each returns null where the compiler has no such target.
AttentionKernel portable_kernel();
AttentionKernel avx2_kernel();
AttentionKernel avx512_kernel();

// Formats of stored elements, and their size.
template <Element kElement, i64 kSize>
struct Stored {
  static constexpr i64 kBytes = kSize;
};
using F32 = Stored<Element::f32, 4>;
using Bf16 = Stored<Element::bf16, 2>;
using F16 = Stored<Element::f16, 2>;
using F8E4M3 = Stored<Element::e4m3, 1>;
using F8E5M2 = Stored<Element::e5m2, 1>;
using I8 = Stored<Element::i8, 1>;

}  // namespace kvmem
