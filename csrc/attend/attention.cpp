#include "attend/attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <new>

#include "attend/kernel.h"
#include "attend/workers.h"
#include "codec/formats.h"

namespace kvmem {
namespace {

constexpr i64 kTasks = 64;              // that a batch is divided into, if it is long enough
constexpr i64 kLeastPartTokens = 256;   // of a sequence: below, merging costs more than a second thread saves
constexpr i64 kMostRows = 256;          // of a unit, for which q and out stay in the second cache
constexpr i64 kFewTasks = 4;            // below, heads are tasks of their own, if they have
constexpr i64 kLeastHeadBytes = 32768;  // of K and V, so that a task takes longer than to wake a thread

struct Level {
  const char* name;
  AttentionKernel kernel;
};

std::vector<Level> supported_levels() {
  std::vector<Level> found = {{"portable", portable_kernel()}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2) found.push_back({"avx2", avx2_kernel()});
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    found.push_back({"avx512", avx512_kernel()});
  }
#endif
  return found;
}

const std::vector<Level>& levels() {
  static const std::vector<Level> found = supported_levels();
  return found;
}

std::atomic<AttentionKernel>& chosen_kernel() {
  static std::atomic<AttentionKernel> chosen{levels().back().kernel};
  return chosen;
}

template <class Format>
void scale_halves(const unsigned char* from, i64 count, float scale, float* to) {
  for (i64 i = 0; i < count; ++i) {
    u16 bits;
    std::memcpy(&bits, from + 2 * i, sizeof(bits));
    to[i] = scale * Format::get(bits);
  }
}

// to[i] = scale * element i.
void scale_elements(Element element, const unsigned char* from, i64 count, float scale, float* to) {
  if (element == Element::bf16) return scale_halves<Bfloat>(from, count, scale, to);
  if (element == Element::f16) return scale_halves<Half>(from, count, scale, to);
  std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
  for (i64 i = 0; i < count; ++i) to[i] *= scale;
}

// The nearest bfloat16 or fp16, ties to even.
u16 half_of(float value) {
  const u32 bits = as_bits(value), size = bits & 0x7fffffff, sign = bits >> 31 << 15;
  if (size > 0x7f800000) return static_cast<u16>(sign | 0x7e00);
  if (size >= 0x477ff000) return static_cast<u16>(sign | 0x7c00);  // what rounds to 65536 and more
  if (size < 0x38800000) {                                         // subnormal: the addition rounds
    return static_cast<u16>(sign | (as_bits(as_float(size) + 0.5f) - as_bits(0.5f)));
  }
  return static_cast<u16>(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
}
u16 bfloat_of(float value) {
  const u32 bits = as_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<u16>(bits >> 16 | 0x40);
  return static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void write(Element element, unsigned char* at, float value) {
  if (element == Element::f32) {
    std::memcpy(at, &value, sizeof(value));
  } else {
    const u16 bits = element == Element::f16 ? half_of(value) : bfloat_of(value);
    std::memcpy(at, &bits, sizeof(bits));
  }
}

// What one call needs beside its arguments: partial results of units with more than one task, and how many of their
// tasks are left.
struct Partials {
  Partials(const std::vector<AttentionUnit>& units, i64 rows, i64 width)
      : out(new float[static_cast<size_t>(rows * width)]),
        top(new float[static_cast<size_t>(rows)]),
        sum(new float[static_cast<size_t>(rows)]),
        left(new std::atomic<i64>[units.size()]) {
    for (size_t i = 0; i < units.size(); ++i) left[i].store(units[i].parts);
  }
  std::unique_ptr<float[]> out, top, sum;
  std::unique_ptr<std::atomic<i64>[]> left;
};

class Run {
 public:
  Run(const Attention& plan, const AttentionCall& call)
      : plan_(plan),
        shape_(plan.shape()),
        call_(call),
        kernel_(chosen_kernel().load()),
        width_(round_up(shape_.width, kMostLanes)),
        value_width_(round_up(shape_.value_width, kMostLanes)) {}

  void attend(const AttentionUnit& unit, i64 part, AttentionScratch& s) const {
    const i64 rows = rows_of(unit);
    s.width = width_, s.value_width = value_width_;
    s.q.resize(std::max(s.q.size(), static_cast<size_t>(rows * width_)));
    s.scores.resize(std::max(s.scores.size(), static_cast<size_t>(rows * kTileTokens)));
    s.out.assign(static_cast<size_t>(rows * value_width_), 0.0f);
    s.top.assign(static_cast<size_t>(rows), -std::numeric_limits<float>::infinity());
    s.sum.assign(static_cast<size_t>(rows), 0.0f);
    for (i64 row = 0; row < rows; ++row) {
      const unsigned char* from = call_.q.data + place(call_.q, unit, row);
      float* to = s.q.data() + row * width_;
      scale_elements(shape_.query, from, shape_.width, shape_.scale, to);
      std::fill(to + shape_.width, to + width_, 0.0f);
    }
    const i64 begin = unit.begin + part * plan_.part_tokens();
    kernel_({plan_, call_, unit, begin, std::min(unit.end, begin + plan_.part_tokens())}, s);
  }

  // Divides by the sums, and writes. A sink adds to the sum only.
  void finish(const AttentionUnit& unit, AttentionScratch& s) const {
    for (i64 row = 0; row < rows_of(unit); ++row) {
      const i64 token = token_of(unit, row), head = query_head(unit, row);
      float top = s.top[row], sum = s.sum[row], factor = shape_.value_scale;
      if (shape_.sinks) {
        const float sink = shape_.sinks[head], greatest = std::max(top, sink), shrink = std::exp(top - greatest);
        sum = sum * shrink + std::exp(sink - greatest), factor *= shrink, top = greatest;
      }
      const bool nothing = sum == 0.0f;
      factor = nothing ? 0.0f : factor / sum;
      unsigned char* to = call_.out.data + place(call_.out, unit, row);
      for (i64 i = 0; i < shape_.value_width; ++i) {
        const float value = nothing ? 0.0f : s.out[row * value_width_ + i] * factor;
        write(shape_.query, to + i * bytes_of(shape_.query), value);
      }
      if (call_.lse) {
        call_.lse[token * shape_.query_heads + head] =
            nothing ? -std::numeric_limits<float>::infinity() : top + std::log(sum);
      }
    }
  }

  i64 rows_of(const AttentionUnit& unit) const {
    return unit.heads * unit.queries * (shape_.query_heads / shape_.heads);
  }
  i64 value_width() const { return value_width_; }

 private:
  i64 token_of(const AttentionUnit& unit, i64 row) const { return unit.query + row % unit.queries; }
  i64 query_head(const AttentionUnit& unit, i64 row) const {
    return unit.head * (shape_.query_heads / shape_.heads) + row / unit.queries;
  }
  i64 place(const Rows& rows, const AttentionUnit& unit, i64 row) const {
    return token_of(unit, row) * rows.token + query_head(unit, row) * rows.head;
  }

  const Attention& plan_;
  const AttentionShape& shape_;
  const AttentionCall& call_;
  const AttentionKernel kernel_;
  const i64 width_, value_width_;
};

void keep(const AttentionScratch& s, i64 rows, i64 at, Partials& partials) {
  std::copy_n(s.out.data(), rows * s.value_width, partials.out.get() + at * s.value_width);
  std::copy_n(s.top.data(), rows, partials.top.get() + at);
  std::copy_n(s.sum.data(), rows, partials.sum.get() + at);
}

// Merges the parts of a unit, in their order, into the scratch memory of the thread that was the last.
void merge(const AttentionUnit& unit, i64 rows, const Partials& partials, AttentionScratch& s) {
  const i64 at = unit.first_partial;
  for (i64 row = 0; row < rows; ++row) {
    float top = partials.top[at + row];
    for (i64 part = 1; part < unit.parts; ++part) top = std::max(top, partials.top[at + part * rows + row]);
    float* out = s.out.data() + row * s.value_width;
    std::fill_n(out, s.value_width, 0.0f);
    float sum = 0;
    for (i64 part = 0; part < unit.parts; ++part) {
      const i64 from = at + part * rows + row;
      if (partials.sum[from] == 0.0f) continue;  // saw nothing: its top is -inf
      const float factor = std::exp(partials.top[from] - top);
      sum += factor * partials.sum[from];
      for (i64 i = 0; i < s.value_width; ++i) out[i] += factor * partials.out[from * s.value_width + i];
    }
    s.top[row] = top, s.sum[row] = sum;
  }
}

}  // namespace

i64 bytes_of(Element element) {
  if (element == Element::f32) return 4;
  return element == Element::bf16 || element == Element::f16 ? 2 : 1;
}

Attention::Attention(const AttentionBatch& batch, const AttentionShape& shape)
    : shape_(shape), block_size_(batch.block_size) {
  i64 total = 0;
  for (i64 row = 0; row < batch.rows; ++row) {
    const i64 queries = batch.cu_seqlens_q[row + 1] - batch.cu_seqlens_q[row], length = batch.seq_lens[row];
    if (length < 0 || queries < 0 || (shape.causal && queries > length)) {
      throw SpecError("batch: row " + std::to_string(row) + " has " + std::to_string(length) + " tokens, " +
                      std::to_string(queries) + " of them new");
    }
    total += length;
  }
  queries_ = batch.rows ? batch.cu_seqlens_q[batch.rows] : 0;
  part_tokens_ = std::max(kLeastPartTokens, round_up(total / kTasks + 1, kTileTokens));
  const i64 bytes = total * shape.heads * (shape.width + shape.value_width) * bytes_of(shape.stored);
  const bool few = ceil_div(total, part_tokens_) < kFewTasks && bytes >= shape.heads * kLeastHeadBytes;
  for (i64 row = 0; row < batch.rows; ++row) add_row(batch, row, few ? 1 : shape.heads);
}

void Attention::add_row(const AttentionBatch& batch, i64 row, i64 heads) {
  const i64 first = batch.cu_seqlens_q[row], count = batch.cu_seqlens_q[row + 1] - first;
  const i64 length = batch.seq_lens[row], start = std::max(i64{0}, length - count);
  if (count == 0) return;
  const i64 held = std::max<i64>(batch.first_tokens[row], shape_.window ? start - shape_.window + 1 : 0);
  const i64 first_block = copy_blocks(batch, row, held);
  const i64 most = std::max(i64{1}, kMostRows / shape_.query_heads);
  for (i64 query = 0; query < count; query += most) {
    const i64 queries = std::min(most, count - query), position = start + query;
    const i64 end = shape_.causal ? position + queries : length;
    const i64 seen = std::max<i64>(batch.first_tokens[row], shape_.window ? position - shape_.window + 1 : 0);
    const i64 begin = std::min(end, std::max(i64{0}, seen));
    for (i64 head = 0; head < shape_.heads; head += heads) {
      add_unit({first + query, queries, head, std::min(heads, shape_.heads - head), position, begin, end,
                std::max(i64{1}, ceil_div(end - begin, part_tokens_)), first_block, 0, 0});
    }
  }
}

void Attention::add_unit(AttentionUnit unit) {
  unit.first_task = static_cast<i64>(unit_of_task_.size()), unit.first_partial = partial_rows_;
  unit_of_task_.insert(unit_of_task_.end(), static_cast<size_t>(unit.parts), static_cast<i64>(units_.size()));
  if (unit.parts > 1) partial_rows_ += unit.parts * unit.heads * unit.queries * (shape_.query_heads / shape_.heads);
  units_.push_back(unit);
}

// Returns where they begin. Blocks before that of token `first` are copied, but may be anything.
i64 Attention::copy_blocks(const AttentionBatch& batch, i64 row, i64 first) {
  const i64 count = ceil_div(batch.seq_lens[row], block_size_), at = static_cast<i64>(blocks_.size());
  if (count > batch.table_blocks) {
    throw SpecError("block_table: row " + std::to_string(row) + " has " + std::to_string(batch.seq_lens[row]) +
                    " tokens, and the table " + std::to_string(batch.table_blocks) + " blocks of " +
                    std::to_string(block_size_) + " a row");
  }
  const i32* table = batch.block_table + row * batch.table_blocks;
  blocks_.insert(blocks_.end(), table, table + count);
  for (i64 i = quotient(std::max(i64{0}, first), block_size_); i < count; ++i) {
    if (table[i] < 0)
      throw SpecError("block_table: row " + std::to_string(row) + " has block " + std::to_string(table[i]));
    greatest_block_ = std::max(greatest_block_, table[i]);
  }
  return at;
}

void Attention::run(const AttentionCall& call, i64 threads) const try {
  if (greatest_block_ >= call.num_blocks) {
    throw SpecError("block_table: has block " + std::to_string(greatest_block_) + " of a cache of " +
                    std::to_string(call.num_blocks) + " blocks");
  }
  const Run run(*this, call);
  Partials partials(units_, partial_rows_, run.value_width());
  const auto work = [&](i64 task) {
    thread_local AttentionScratch scratch;
    const auto index = static_cast<size_t>(unit_of_task_[static_cast<size_t>(task)]);
    const AttentionUnit& unit = units_[index];
    const i64 part = task - unit.first_task, rows = run.rows_of(unit);
    run.attend(unit, part, scratch);
    if (unit.parts > 1) {
      keep(scratch, rows, unit.first_partial + part * rows, partials);
      if (partials.left[index].fetch_sub(1) > 1) return;
      merge(unit, rows, partials, scratch);
    }
    run.finish(unit, scratch);
  };
  run_tasks(static_cast<i64>(unit_of_task_.size()), threads, work);
} catch (const std::bad_alloc&) {
  throw OutOfMemory("attention: no host memory for its partial results");
}

std::vector<const char*> attention_levels() {
  std::vector<const char*> names;
  for (const Level& level : levels()) names.push_back(level.name);
  return names;
}

void use_attention_level(const std::string& name) {
  for (const Level& level : levels()) {
    if (name == level.name) return chosen_kernel().store(level.kernel);
  }
  throw SpecError("level: got " + name + "; this machine has others");
}

}  // namespace kvmem
