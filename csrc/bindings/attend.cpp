// kvmem._core.Attention: attention on the CPU, csrc/attend/. kvmem/kernels/cpu.py explains arguments and checks
// dtypes; what is checked again here is what memory safety needs.

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "attend/attention.h"
#include "bindings/bindings.h"

namespace nb = nanobind;
using namespace kvmem;
using namespace nb::literals;

namespace {

using Ints = nb::ndarray<const i32, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const i32, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
// A tensor as Python describes it: its address, then shape and strides, in elements. DLPack would take longer than the
// attention of a short sequence.
using Tensor = nb::tuple;

Element element_of(const std::string& name) {
  constexpr std::pair<const char*, Element> kNames[] = {
      {"float32", Element::f32},        {"bfloat16", Element::bf16},    {"float16", Element::f16},
      {"float8_e4m3fn", Element::e4m3}, {"float8_e5m2", Element::e5m2}, {"int8", Element::i8}};
  for (const auto& [known, element] : kNames) {
    if (name == known) return element;
  }
  throw SpecError("dtype: got " + name + "; csrc/attend has no kernel for it");
}

struct Plan {
  std::vector<float> sinks;
  std::unique_ptr<Attention> attention;
};

void make_plan(Plan* self, Table block_table, Ints seq_lens, Ints first_tokens, Ints cu_seqlens_q, i64 block_size,
               i64 query_heads, i64 heads, i64 width, i64 value_width, const std::string& query,
               const std::string& stored, float scale, float value_scale, float soft_cap, i64 window, bool causal,
               const std::optional<Floats>& sinks) {
  const auto rows = static_cast<i64>(seq_lens.shape(0));
  const bool fits = static_cast<i64>(block_table.shape(0)) >= rows && static_cast<i64>(first_tokens.shape(0)) >= rows &&
                    static_cast<i64>(cu_seqlens_q.shape(0)) > rows && block_size > 0 && heads > 0 && width > 0 &&
                    value_width > 0 && query_heads > 0 && query_heads % heads == 0 && window >= 0 &&
                    (!sinks || static_cast<i64>(sinks->shape(0)) == query_heads);
  if (!fits) throw SpecError("attention: shapes of batch, heads and sinks do not fit together");
  const Element query_element = element_of(query);
  if (bytes_of(query_element) == 1) throw SpecError("q: got " + query + "; must be float32, bfloat16 or float16");
  Plan plan;
  if (sinks) plan.sinks.assign(sinks->data(), sinks->data() + query_heads);
  const AttentionShape shape = {
      query_heads, heads,       width,    value_width, query_element, element_of(stored),
      scale,       value_scale, soft_cap, window,      causal,        sinks ? plan.sinks.data() : nullptr};
  const AttentionBatch batch = {block_table.data(),
                                seq_lens.data(),
                                first_tokens.data(),
                                cu_seqlens_q.data(),
                                rows,
                                static_cast<i64>(block_table.shape(1)),
                                block_size};
  plan.attention = std::make_unique<Attention>(batch, shape);
  new (self) Plan(std::move(plan));
}

struct Strided {
  unsigned char* data;
  i64 shape[4], strides[4];
};

Strided strided(const Tensor& tensor, const char* name, size_t dims, i64 bytes) {
  if (tensor.size() != 1 + 2 * dims)
    throw SpecError(std::string(name) + ": must have " + std::to_string(dims) + " dims");
  Strided found = {reinterpret_cast<unsigned char*>(nb::cast<std::uintptr_t>(tensor[0])), {}, {}};
  for (size_t i = 0; i < dims; ++i) {
    found.shape[i] = nb::cast<i64>(tensor[1 + i]), found.strides[i] = nb::cast<i64>(tensor[1 + dims + i]) * bytes;
  }
  const bool dense = found.shape[dims - 1] == 1 || found.strides[dims - 1] == bytes;
  if (!dense) throw SpecError(std::string(name) + ": the last dimension must be dense");
  return found;
}

void check_shape(const Strided& tensor, const char* name, size_t first, std::initializer_list<i64> wanted) {
  std::string text;
  bool same = true;
  for (const i64 size : wanted) {
    same &= tensor.shape[first++] == size;
    text += (text.empty() ? "" : ", ") + std::to_string(size);
  }
  if (!same)
    throw SpecError(std::string(name) + ": must be [" + (wanted.size() < first ? "blocks, " : "") + text + "]");
}

Rows rows_of(const Tensor& tensor, const char* name, const Attention& plan, i64 width) {
  const Strided t = strided(tensor, name, 3, bytes_of(plan.shape().query));
  check_shape(t, name, 0, {plan.queries(), plan.shape().query_heads, width});
  return {t.data, t.strides[0], t.strides[1]};
}

KeyValues key_values_of(const Tensor& tensor, const char* name, const Attention& plan, i64 width, i64* num_blocks) {
  const Strided t = strided(tensor, name, 4, bytes_of(plan.shape().stored));
  check_shape(t, name, 1, {plan.block_size(), plan.shape().heads, width});
  *num_blocks = std::min(*num_blocks, t.shape[0]);
  return {t.data, t.strides[0], t.strides[1], t.strides[2]};
}

// REQUIRES: the tensors are of the dtypes that the plan was made for, and live until this returns.
void run_plan(const Plan& self, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
              std::uintptr_t lse, i64 threads) {
  const Attention& plan = *self.attention;
  const AttentionShape& shape = plan.shape();
  i64 num_blocks = INT64_MAX;
  const KeyValues keys = key_values_of(k, "k", plan, shape.width, &num_blocks);
  const KeyValues values = key_values_of(v, "v", plan, shape.value_width, &num_blocks);
  const AttentionCall call = {
      rows_of(q, "q", plan, shape.width), rows_of(out, "out", plan, shape.value_width), keys, values, num_blocks,
      reinterpret_cast<float*>(lse)};
  const WithoutGil free;
  plan.run(call, threads);
}

}  // namespace

void kvmem::bind_attend(nb::module_& m) {
  nb::class_<Plan>(m, "Attention")
      .def("__init__", &make_plan, "block_table"_a, "seq_lens"_a, "first_tokens"_a, "cu_seqlens_q"_a, nb::kw_only(),
           "block_size"_a, "query_heads"_a, "heads"_a, "width"_a, "value_width"_a, "query"_a, "stored"_a, "scale"_a,
           "value_scale"_a = 1.0f, "soft_cap"_a = 0.0f, "window"_a = 0, "causal"_a = true, "sinks"_a = nb::none(),
           nb::sig("def __init__(self, block_table: object, seq_lens: object, first_tokens: object, "
                   "cu_seqlens_q: object, *, block_size: int, query_heads: int, heads: int, width: int, "
                   "value_width: int, query: str, stored: str, scale: float, value_scale: float = 1.0, "
                   "soft_cap: float = 0.0, window: int = 0, causal: bool = True, sinks: object | None = None) -> None"))
      .def("run", &run_plan, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "threads"_a,
           nb::sig("def run(self, q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], out: tuple[int, ...], "
                   "lse: int, threads: int) -> None"));
  m.def("attention_levels", [] {
    std::vector<std::string> names;
    for (const char* name : attention_levels()) names.emplace_back(name);
    return names;
  });
  m.def("use_attention_level", &use_attention_level, "name"_a);
}
