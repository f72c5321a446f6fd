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
using Packed = nb::ndarray<nb::ndim<3>, nb::device::cpu>;  // [tokens, heads, width]
using Blocks = nb::ndarray<nb::ndim<4>, nb::device::cpu>;  // [blocks, block_size, heads, width]

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

Rows rows_of(const Packed& tensor, const char* name, i64 tokens, i64 heads, i64 width, Element element) {
  const i64 bytes = bytes_of(element);
  const bool fits = static_cast<i64>(tensor.shape(0)) == tokens && static_cast<i64>(tensor.shape(1)) == heads &&
                    static_cast<i64>(tensor.shape(2)) == width && (width == 1 || tensor.stride(2) == 1) &&
                    tensor.dtype().bits == 8 * bytes;
  if (!fits) {
    throw SpecError(std::string(name) + ": must be [" + std::to_string(tokens) + ", " + std::to_string(heads) + ", " +
                    std::to_string(width) + "] of the dtype that the plan was made for, the last dimension dense");
  }
  return {static_cast<unsigned char*>(tensor.data()), tensor.stride(0) * bytes, tensor.stride(1) * bytes};
}

KeyValues key_values_of(const Blocks& tensor, const char* name, const Attention& plan, i64 width) {
  const i64 bytes = bytes_of(plan.shape().stored);
  const bool fits = static_cast<i64>(tensor.shape(1)) == plan.block_size() &&
                    static_cast<i64>(tensor.shape(2)) == plan.shape().heads &&
                    static_cast<i64>(tensor.shape(3)) == width && (width == 1 || tensor.stride(3) == 1) &&
                    tensor.dtype().bits == 8 * bytes;
  if (!fits) {
    throw SpecError(std::string(name) + ": must be [blocks, " + std::to_string(plan.block_size()) + ", " +
                    std::to_string(plan.shape().heads) + ", " + std::to_string(width) +
                    "] of the dtype that the plan was made for, the last dimension dense");
  }
  return {static_cast<const unsigned char*>(tensor.data()), tensor.stride(0) * bytes, tensor.stride(1) * bytes,
          tensor.stride(2) * bytes};
}

void run_plan(const Plan& self, Packed q, Blocks k, Blocks v, Packed out, std::optional<Out<float, 2>> lse,
              i64 threads) {
  const Attention& plan = *self.attention;
  const AttentionShape& shape = plan.shape();
  if (lse &&
      (static_cast<i64>(lse->shape(0)) != plan.queries() || static_cast<i64>(lse->shape(1)) != shape.query_heads)) {
    throw SpecError("lse: must be float32 [queries, query heads]");
  }
  const AttentionCall call = {rows_of(q, "q", plan.queries(), shape.query_heads, shape.width, shape.query),
                              rows_of(out, "out", plan.queries(), shape.query_heads, shape.value_width, shape.query),
                              key_values_of(k, "k", plan, shape.width),
                              key_values_of(v, "v", plan, shape.value_width),
                              static_cast<i64>(std::min(k.shape(0), v.shape(0))),
                              lse ? lse->data() : nullptr};
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
      .def("run", &run_plan, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a.none(), "threads"_a,
           nb::sig("def run(self, q: object, k: object, v: object, out: object, lse: object | None, "
                   "threads: int) -> None"));
  m.def("attention_levels", [] {
    std::vector<std::string> names;
    for (const char* name : attention_levels()) names.emplace_back(name);
    return names;
  });
  m.def("use_attention_level", &use_attention_level, "name"_a);
}
