// The kernel, compiled once for each vector unit. The source that includes this is in a namespace of its own and has
// defined
//
//   KVMEM_TARGET, KVMEM_SIMD   attributes of the functions here: the vector unit; the same, and always inlined
//   struct Vector { kLanes, kSums, Register, zero(), all(float), load(at), store(at, r), mul, div, fma, max,
//                   where_below, power, kept, sums }
//   Vector::Register read(E, const unsigned char* at)   for each E of kernel.h
//
// kLanes: floats of a register. kSums: registers that can hold sums while operands have theirs, a multiple of 4.
// fma(a, b, c): a * b + c. max(a, b): b where one is NaN. where_below(x, y, a, b): a where x < y, else b. power(r): 2^n
// for n + kRound. kept(r): r, in a register: compilers would load it again for each use. sums(r, out): out[i] is the
// sum of r[i], of 4 registers. read: kLanes stored elements.

constexpr i64 kWeighedTokens = 16;  // tokens whose V is read before that of the next head
constexpr i64 kAheadTokens = 16;    // of the next tile, whose addresses are known
constexpr i64 kPageBytes = 4096;    // of memory, as processors' prefetchers see it
constexpr float kNone = -std::numeric_limits<float>::infinity();

using Register = Vector::Register;

// `count` elements and, if kSome, zeroes behind them; else kLanes elements.
template <bool kSome, class E>
KVMEM_SIMD Register read_up_to(E stored, const unsigned char* at, i64 count) {
  if (!kSome) return read(stored, at);
  unsigned char some[Vector::kLanes * E::kBytes] = {};
  std::memcpy(some, at, static_cast<size_t>(count * E::kBytes));
  return read(stored, some);
}

// Asks for the next line of `count` tokens, a block of tokens ahead, whenever element i begins a line. With 4 rows at a
// time only: there the arithmetic takes so long that processors do not get as far ahead by themselves; and little by
// little, because many requests at once would hold up the loads that are needed now.
template <int kRows, class E>
KVMEM_SIMD void prefetch(E, const unsigned char* const* tokens, i64 count, i64 head, i64 i) {
  if (kRows < 4 || i % (64 / E::kBytes) != 0) return;
  for (i64 t = 0; t < count; ++t) __builtin_prefetch(tokens[t] + head + i * E::kBytes);
}

// Adds to sums[r][t] the products of elements [i, i + kLanes) of kRows queries and kSums / kRows keys.
template <int kRows, bool kSome, class E>
KVMEM_SIMD void add_products(E stored, const float* q, i64 q_stride, const unsigned char* const* k, i64 head, i64 i,
                             i64 count, Register* sums) {
  constexpr int kTokens = Vector::kSums / kRows;
  Register query[kRows];
  for (int r = 0; r < kRows; ++r) query[r] = Vector::kept(Vector::load(q + r * q_stride + i));
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
    prefetch<kRows>(stored, k + Vector::kSums, kTokens, head, i);
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
    prefetch<kRows>(stored, v + t + kWeighedTokens, 1, head, i);
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

// exp(x) for x <= 0, within 2 units in the last place; 0 below -87, where floats lose digits; NaN for NaN. 2^n exp(f)
// with |f| <= ln(2) / 2, by its Taylor polynomial.
KVMEM_SIMD Register exp_of(Register x) {
  const Register within = Vector::max(Vector::all(-87), x), round = Vector::all(kRound);
  const Register rounded = Vector::fma(within, Vector::all(1.44269504f), round);
  const Register n = Vector::fma(round, Vector::all(-1), rounded);
  const Register f = Vector::fma(n, Vector::all(2.12194440e-4f), Vector::fma(n, Vector::all(-0.693359375f), within));
  Register sum = Vector::all(1.0f / 5040);
  for (const float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    sum = Vector::fma(sum, f, Vector::all(factor));
  }
  return Vector::where_below(x, Vector::all(-87), Vector::zero(), Vector::mul(sum, Vector::power(rounded)));
}

// Near 0 by its Taylor polynomial, because the exponential would lose digits there.
KVMEM_SIMD Register tanh_of(Register x) {
  const Register minus = Vector::mul(x, Vector::all(-1)), size = Vector::max(minus, x);
  const Register shrunk = exp_of(Vector::mul(size, Vector::all(-2))), one = Vector::all(1);
  const Register far = Vector::div(Vector::fma(shrunk, Vector::all(-1), one), Vector::fma(shrunk, one, one));
  const Register square = Vector::mul(x, x);
  Register sum = Vector::all(21844.0f / 6081075);
  for (const float factor : {-1382.0f / 155925, 62.0f / 2835, -17.0f / 315, 2.0f / 15, -1.0f / 3}) {
    sum = Vector::fma(sum, square, Vector::all(factor));
  }
  const Register near = Vector::fma(Vector::mul(x, square), sum, x);
  const Register signed_far = Vector::where_below(x, Vector::zero(), Vector::mul(far, Vector::all(-1)), far);
  return Vector::where_below(size, Vector::all(0.4f), near, signed_far);
}

// Turns the scores of tokens [low, high) of a tile into weights, and all others into 0, after it has scaled down what
// was summed with a smaller `top`.
KVMEM_SIMD void to_weights(float* scores, i64 low, i64 high, float soft_cap, float* top, float* sum, float* out,
                           i64 width) {
  if (soft_cap > 0) {
    const Register cap = Vector::all(soft_cap);
    for (i64 t = 0; t < kTileTokens; t += Vector::kLanes) {
      Vector::store(scores + t, Vector::mul(cap, tanh_of(Vector::div(Vector::load(scores + t), cap))));
    }
  }
  for (i64 t = 0; t < low; ++t) scores[t] = kNone;
  for (i64 t = high; t < kTileTokens; ++t) scores[t] = kNone;
  Register tops = Vector::all(*top), sums = Vector::zero();
  for (i64 t = 0; t < kTileTokens; t += Vector::kLanes) tops = Vector::max(Vector::load(scores + t), tops);
  float each[Vector::kLanes];
  Vector::store(each, tops);
  float greatest = each[0];
  for (int i = 1; i < Vector::kLanes; ++i) greatest = each[i] > greatest ? each[i] : greatest;
  if (greatest > *top) {
    Vector::store(each, exp_of(Vector::all(*top - greatest)));
    const Register factor = Vector::all(each[0]);
    for (i64 i = 0; i < width; i += Vector::kLanes) Vector::store(out + i, Vector::mul(Vector::load(out + i), factor));
    *sum *= each[0], *top = greatest;
  }
  const Register shift = Vector::all(greatest == kNone ? 0.0f : -greatest);
  for (i64 t = 0; t < kTileTokens; t += Vector::kLanes) {
    const Register weight = exp_of(Vector::fma(Vector::load(scores + t), Vector::all(1), shift));
    Vector::store(scores + t, weight);
    sums = Vector::fma(weight, Vector::all(1), sums);
  }
  Vector::store(each, sums);
  for (int i = 0; i < Vector::kLanes; ++i) *sum += each[i];
}

// Asks for one of `parts` equal shares of `count` tokens, each with `parts` heads of `width` from `head` on, in the
// order of memory. The kernel itself reads a head of several tokens, then the next head: where a page holds more than
// one token, processors that follow one stream for each page do not recognise that.
template <class E>
KVMEM_SIMD void prefetch_share(E, const unsigned char* const* tokens, i64 count, i64 part, i64 parts, i64 head,
                               i64 width) {
  const i64 bytes = parts * width * E::kBytes, share = count * width * E::kBytes;
  i64 token = part * share / bytes, at = part * share % bytes;
  for (i64 end = share; end > 0; end -= 64, at += 64) {
    if (at >= bytes) at -= bytes, ++token;
    __builtin_prefetch(tokens[token] + head + at);
  }
}

template <class E>
KVMEM_TARGET void attend_stored(E stored, const AttentionTask& task, AttentionScratch& s) {
  const AttentionShape& shape = task.plan.shape();
  const KeyValues &k = task.call.k, &v = task.call.v;
  const AttentionUnit& unit = task.unit;
  const i64 rows = shape.query_heads / shape.heads * unit.queries;  // of a head
  const i32* blocks = task.plan.blocks().data() + unit.first_block;
  const i64 block_size = task.plan.block_size();
  const bool shares = rows == 1 && k.token < kPageBytes;
  // Behind the last token stands the last again: its scores are not used, and nothing else may be touched.
  const unsigned char *k_at[kTileTokens + kAheadTokens], *v_at[kTileTokens + kAheadTokens];
  for (i64 first = task.begin; first < task.end; first += kTileTokens) {
    const i64 tokens = std::min(kTileTokens, task.end - first);
    for (i64 t = 0; t < kTileTokens + kAheadTokens; ++t) {
      const i64 token = std::min(first + t, task.end - 1);
      const i64 block = blocks[quotient(token, block_size)], offset = remainder(token, block_size);
      k_at[t] = k.data + block * k.block + offset * k.token, v_at[t] = v.data + block * v.block + offset * v.token;
    }
    if (shares) {  // what is read next: V after K, and the next tile's K after V
      std::swap_ranges(v_at + kTileTokens, v_at + kTileTokens + kAheadTokens, k_at + kTileTokens);
      std::copy_n(v_at, kAheadTokens, k_at + kTileTokens);
    }
    for (i64 t = 0; t < tokens; t += Vector::kSums) {
      const unsigned char* const* const ahead = k_at + t + kAheadTokens;
      for (i64 h = 0; h < unit.heads; ++h) {
        if (shares) prefetch_share(stored, ahead, Vector::kSums, h, unit.heads, unit.head * k.head, shape.width);
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
      const unsigned char* const* const ahead = v_at + t + kAheadTokens;
      for (i64 h = 0; h < unit.heads; ++h) {
        if (shares) prefetch_share(stored, ahead, kWeighedTokens, h, unit.heads, unit.head * v.head, shape.value_width);
        weigh_rows(stored, s, h * rows, rows, v_at + t, (unit.head + h) * v.head, shape.value_width, t,
                   std::min(kWeighedTokens, tokens - t));
      }
    }
  }
}

KVMEM_TARGET void attend(const AttentionTask& task, AttentionScratch& scratch) {
  switch (task.plan.shape().stored) {
    case Element::f32:
      return attend_stored(F32(), task, scratch);
    case Element::bf16:
      return attend_stored(Bf16(), task, scratch);
    case Element::f16:
      return attend_stored(F16(), task, scratch);
    case Element::e4m3:
      return attend_stored(F8E4M3(), task, scratch);
    case Element::e5m2:
      return attend_stored(F8E5M2(), task, scratch);
    case Element::i8:
      return attend_stored(I8(), task, scratch);
  }
}
