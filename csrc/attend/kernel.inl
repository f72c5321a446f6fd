// The kernel, compiled once for each vector unit. The source that includes this is in a namespace of its own and has
// defined
//
//   KVMEM_TARGET, KVMEM_SIMD   attributes of the functions here: the vector unit; the same, and always inlined
//   struct Vector { kLanes, kSums, Register, zero(), all(float), load(at), store(at, r), fma(a, b, c), sums(r, out) }
//   Vector::Register read(E, const unsigned char* at)   for each E of kernel.h
//
// kLanes: floats of a register. kSums: registers that can hold sums while operands have theirs, a multiple of 4.
// fma: a * b + c. sums: of each of 4 registers. read: kLanes stored elements.

constexpr i64 kWeighedTokens = 16;  // tokens whose V is read before that of the next head

using Register = Vector::Register;

// `count` elements and, if kSome, zeroes behind them; else kLanes elements.
template <bool kSome, class E>
KVMEM_SIMD Register read_up_to(E stored, const unsigned char* at, i64 count) {
  if (!kSome) return read(stored, at);
  unsigned char some[Vector::kLanes * E::kBytes] = {};
  std::memcpy(some, at, static_cast<size_t>(count * E::kBytes));
  return read(stored, some);
}

// Adds to sums[r][t] the products of elements [i, i + kLanes) of kRows queries and kSums / kRows keys.
template <int kRows, bool kSome, class E>
KVMEM_SIMD void add_products(E stored, const float* q, i64 q_stride, const unsigned char* const* k, i64 head, i64 i,
                             i64 count, Register* sums) {
  constexpr int kTokens = Vector::kSums / kRows;
  Register query[kRows];
  for (int r = 0; r < kRows; ++r) query[r] = Vector::load(q + r * q_stride + i);
  for (int t = 0; t < kTokens; ++t) {
    const Register key = read_up_to<kSome>(stored, k[t] + head + i * E::kBytes, count);
    for (int r = 0; r < kRows; ++r) sums[r * kTokens + t] = Vector::fma(query[r], key, sums[r * kTokens + t]);
  }
}

// scores[r][t] of kRows rows and kSums / kRows tokens.
template <int kRows, class E>
KVMEM_SIMD void score(E stored, const float* q, i64 q_stride, const unsigned char* const* k, i64 head, i64 width,
                      float* scores) {
  constexpr int kTokens = Vector::kSums / kRows;
  Register sums[Vector::kSums];
  for (int s = 0; s < Vector::kSums; ++s) sums[s] = Vector::zero();
  i64 i = 0;
  for (; i + Vector::kLanes <= width; i += Vector::kLanes) {
    add_products<kRows, false>(stored, q, q_stride, k, head, i, 0, sums);
  }
  if (i < width) add_products<kRows, true>(stored, q, q_stride, k, head, i, width - i, sums);
  float found[Vector::kSums];
  for (int s = 0; s < Vector::kSums; s += 4) Vector::sums(sums + s, found + s);
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTokens; ++t) scores[r * kTileTokens + t] = found[r * kTokens + t];
  }
}

// The scores of a head for kSums tokens, as many rows at once as there are.
template <class E>
KVMEM_SIMD void score_rows(E stored, const AttentionScratch& s, i64 row, i64 rows, const unsigned char* const* k,
                           i64 head, i64 width, i64 t) {
  for (const i64 end = row + rows; row < end;) {
    const float* q = s.q.data() + row * s.width;
    float* scores = const_cast<float*>(s.scores.data()) + row * kTileTokens + t;
    if (const i64 left = end - row; left >= 4) {
      for (i64 at = 0; at < Vector::kSums; at += Vector::kSums / 4) {
        score<4>(stored, q, s.width, k + at, head, width, scores + at);
      }
      row += 4;
    } else if (left >= 2) {
      for (i64 at = 0; at < Vector::kSums; at += Vector::kSums / 2) {
        score<2>(stored, q, s.width, k + at, head, width, scores + at);
      }
      row += 2;
    } else {
      score<1>(stored, q, s.width, k, head, width, scores);
      row += 1;
    }
  }
}

// Adds to out[r] the elements [i, i + kParts * kLanes) of `tokens` values, each times weights[r][t].
template <int kRows, int kParts, bool kSome, class E>
KVMEM_SIMD void add_values(E stored, const float* weights, i64 tokens, const unsigned char* const* v, i64 head, i64 i,
                           i64 count, float* out, i64 out_stride) {
  Register sums[kRows * kParts];
  for (int r = 0; r < kRows; ++r) {
    for (int p = 0; p < kParts; ++p) sums[r * kParts + p] = Vector::load(out + r * out_stride + i + p * Vector::kLanes);
  }
  for (i64 t = 0; t < tokens; ++t) {
    Register value[kParts];
    for (int p = 0; p < kParts; ++p) {
      value[p] = read_up_to<kSome>(stored, v[t] + head + (i + p * Vector::kLanes) * E::kBytes, count);
    }
    for (int r = 0; r < kRows; ++r) {
      const Register weight = Vector::all(weights[r * kTileTokens + t]);
      for (int p = 0; p < kParts; ++p) sums[r * kParts + p] = Vector::fma(weight, value[p], sums[r * kParts + p]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int p = 0; p < kParts; ++p) Vector::store(out + r * out_stride + i + p * Vector::kLanes, sums[r * kParts + p]);
  }
}

// All elements of `width` from i on, kParts registers at once, then fewer.
template <int kRows, int kParts, class E>
KVMEM_SIMD void weigh(E stored, const float* weights, i64 tokens, const unsigned char* const* v, i64 head, i64 i,
                      i64 width, float* out, i64 out_stride) {
  constexpr i64 kWidth = kParts * Vector::kLanes;
  for (; i + kWidth <= width; i += kWidth) {
    add_values<kRows, kParts, false>(stored, weights, tokens, v, head, i, 0, out, out_stride);
  }
  if constexpr (kParts > 1) {
    if (i < width) weigh<kRows, kParts / 2>(stored, weights, tokens, v, head, i, width, out, out_stride);
  } else if (i < width) {
    add_values<kRows, 1, true>(stored, weights, tokens, v, head, i, width - i, out, out_stride);
  }
}

template <class E>
KVMEM_SIMD void weigh_rows(E stored, AttentionScratch& s, i64 row, i64 rows, const unsigned char* const* v, i64 head,
                           i64 width, i64 t, i64 tokens) {
  for (const i64 end = row + rows; row < end;) {
    const float* weights = s.scores.data() + row * kTileTokens + t;
    float* out = s.out.data() + row * s.value_width;
    if (const i64 left = end - row; left >= 4) {
      weigh<4, Vector::kSums / 4>(stored, weights, tokens, v, head, 0, width, out, s.value_width), row += 4;
    } else if (left >= 2) {
      weigh<2, Vector::kSums / 2>(stored, weights, tokens, v, head, 0, width, out, s.value_width), row += 2;
    } else {
      weigh<1, Vector::kSums>(stored, weights, tokens, v, head, 0, width, out, s.value_width), row += 1;
    }
  }
}

// Turns the scores of tokens [low, high) of a tile into weights, and all others into 0, after it has scaled down what
// was summed with a smaller `top`.
KVMEM_TARGET void to_weights(float* scores, i64 low, i64 high, float soft_cap, float* top, float* sum, float* out,
                             i64 width) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  if (soft_cap > 0) {
    for (i64 t = 0; t < kTileTokens; ++t) scores[t] = soft_cap * tanh_of(scores[t] / soft_cap);
  }
  for (i64 t = 0; t < low; ++t) scores[t] = kNone;
  for (i64 t = high; t < kTileTokens; ++t) scores[t] = kNone;
  float tops[16], sums[16] = {};
  for (int j = 0; j < 16; ++j) tops[j] = *top;
  for (i64 t = 0; t < kTileTokens; t += 16) {
    for (int j = 0; j < 16; ++j) tops[j] = scores[t + j] > tops[j] ? scores[t + j] : tops[j];
  }
  float greatest = tops[0];
  for (int j = 1; j < 16; ++j) greatest = tops[j] > greatest ? tops[j] : greatest;
  if (greatest > *top) {
    const float factor = exp_of(*top - greatest);
    for (i64 i = 0; i < width; ++i) out[i] *= factor;
    *sum *= factor, *top = greatest;
  }
  const float shift = greatest == kNone ? 0.0f : greatest;
  for (i64 t = 0; t < kTileTokens; t += 16) {
    for (int j = 0; j < 16; ++j) sums[j] += scores[t + j] = exp_of(scores[t + j] - shift);
  }
  for (int j = 0; j < 16; ++j) *sum += sums[j];
}

template <class E>
KVMEM_TARGET void attend_stored(E stored, const AttentionTask& task, AttentionScratch& s) {
  const AttentionShape& shape = task.plan.shape();
  const KeyValues &k = task.call.k, &v = task.call.v;
  const AttentionUnit& unit = task.unit;
  const i64 rows = shape.query_heads / shape.heads * unit.queries;  // of a head
  const i32* blocks = task.plan.blocks().data() + unit.first_block;
  const i64 block_size = task.plan.block_size();
  const unsigned char *k_at[kTileTokens + Vector::kSums], *v_at[kTileTokens];
  for (i64 first = task.begin; first < task.end; first += kTileTokens) {
    const i64 tokens = std::min(kTileTokens, task.end - first);
    for (i64 t = 0; t < tokens; ++t) {
      const i64 block = blocks[quotient(first + t, block_size)], offset = remainder(first + t, block_size);
      k_at[t] = k.data + block * k.block + offset * k.token, v_at[t] = v.data + block * v.block + offset * v.token;
    }
    for (i64 t = tokens; t < tokens + Vector::kSums; ++t) k_at[t] = k_at[tokens - 1];  // scores that are not used
    for (i64 t = 0; t < tokens; t += Vector::kSums) {
      for (i64 h = 0; h < unit.heads; ++h) {
        score_rows(stored, s, h * rows, rows, k_at + t, (unit.head + h) * k.head, shape.width, t);
      }
    }
    for (i64 row = 0; row < unit.heads * rows; ++row) {
      const i64 position = unit.position + row % unit.queries;
      const i64 low = shape.window ? position - shape.window + 1 - first : 0;
      const i64 high = shape.causal ? position + 1 - first : tokens;
      to_weights(s.scores.data() + row * kTileTokens, std::min(std::max(low, i64{0}), tokens),
                 std::min(std::max(high, i64{0}), tokens), shape.soft_cap, &s.top[row], &s.sum[row],
                 s.out.data() + row * s.value_width, s.value_width);
    }
    for (i64 t = 0; t < tokens; t += kWeighedTokens) {
      for (i64 h = 0; h < unit.heads; ++h) {
        weigh_rows(stored, s, h * rows, rows, v_at + t, (unit.head + h) * v.head, shape.value_width, t,
                   std::min(kWeighedTokens, tokens - t));
      }
    }
  }
}

KVMEM_TARGET void attend(const AttentionTask& task, AttentionScratch& scratch) {
  switch (task.plan.shape().stored) {
    case Element::f32: return attend_stored(F32(), task, scratch);
    case Element::bf16: return attend_stored(Bf16(), task, scratch);
    case Element::f16: return attend_stored(F16(), task, scratch);
    case Element::e4m3: return attend_stored(F8E4M3(), task, scratch);
    case Element::e5m2: return attend_stored(F8E5M2(), task, scratch);
    case Element::i8: return attend_stored(I8(), task, scratch);
  }
}
