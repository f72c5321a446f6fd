// Conversions of csrc/codec/ for tensors on the CPU. kvmem/layouts/ checks shapes and dtypes; what is checked again
// here is what memory safety needs.

#include "bindings/bindings.h"
#include "codec/quantise.h"

namespace nb = nanobind;
using namespace kvmem;
using namespace nb::literals;

namespace {

// [tokens, heads, numbers], dense but for the stride of a token.
using Rows = nb::ndarray<nb::ndim<3>, nb::device::cpu>;

constexpr auto kFloat = static_cast<uint8_t>(nb::dlpack::dtype_code::Float);
constexpr auto kBfloat = static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat);

FloatKind kind_of(nb::dlpack::dtype dtype) {
  return dtype.bits == 32 ? FloatKind::f32 : dtype.code == kBfloat ? FloatKind::bf16 : FloatKind::f16;
}

Tokens tokens(const Rows& rows, const char* name, i64 tokens, i64 heads, i64 numbers, bool floats) {
  const auto width = static_cast<i64>(rows.shape(2));
  const bool dense = rows.size() == 0 || (rows.stride(2) == 1 && (rows.shape(1) == 1 || rows.stride(1) == width));
  const auto [code, bits, lanes] = rows.dtype();
  const bool right =
      floats ? (code == kFloat && (bits == 16 || bits == 32)) || (code == kBfloat && bits == 16) : bits == 8;
  if (!dense || !right || static_cast<i64>(rows.shape(0)) != tokens || static_cast<i64>(rows.shape(1)) != heads ||
      width != numbers) {
    throw SpecError(std::string(name) + ": must be [" + std::to_string(tokens) + ", " + std::to_string(heads) + ", " +
                    std::to_string(numbers) + "] of " + (floats ? "16 or 32-bit floats" : "bytes") +
                    ", dense within a token");
  }
  const i64 stride = rows.stride(0) * rows.dtype().bits / 8;
  return {static_cast<unsigned char*>(rows.data()), stride, kind_of(rows.dtype())};
}

Quantised sizes(const Rows& floats, i64 size, int bits) {
  const auto width = static_cast<i64>(floats.shape(2));
  if ((bits != 2 && bits != 3 && bits != 4 && bits != 8) || size < 1 || width * bits % 8 != 0) {
    throw SpecError("bits: got " + std::to_string(bits) + " for a width of " + std::to_string(width));
  }
  return {static_cast<i64>(floats.shape(0)), static_cast<i64>(floats.shape(1)), width, size, bits};
}

// Tensors of any package; nanobind would name NumPy's arrays.
constexpr const char* kArguments =
    "(floats: object, codes: object, scales: object, size: int, bits: int, skip: int = 0) -> None";

void bind(nb::module_& m, const char* name, bool back, bool channels) {
  m.def(
      name,
      [back, channels](Rows floats, Rows codes, Rows scales, i64 size, int bits, i64 skip) {
        const Quantised q = sizes(floats, size, bits);
        if (channels ? (skip < 0 || skip >= size || (!back && q.tokens % size != 0)) : q.width % size != 0) {
          throw SpecError("size: got " + std::to_string(size) + ", with skip " + std::to_string(skip));
        }
        const i64 groups = channels ? q.width : q.width / size;
        const i64 rows = channels ? ceil_div(q.tokens + skip, size) : q.tokens;
        const Tokens x = tokens(floats, "floats", q.tokens, q.heads, q.width, true);
        const Tokens c = tokens(codes, "codes", q.tokens, q.heads, q.width * bits / 8, false);
        const Tokens s = tokens(scales, "scales", rows, q.heads, 2 * groups, true);
        if (back && (x.kind != FloatKind::f32 || x.stride != q.heads * q.width * 4)) {
          throw SpecError("floats: the output must be dense float32");
        }
        const WithoutGil free;
        float* const out = reinterpret_cast<float*>(x.data);
        if (channels) {
          back ? dequantise_channels(q, skip, c, s, out) : quantise_channels(q, x, c, s);
        } else {
          back ? dequantise_tokens(q, c, s, out) : quantise_tokens(q, x, c, s);
        }
      },
      "floats"_a, "codes"_a, "scales"_a, "size"_a, "bits"_a, "skip"_a = 0,
      nb::sig(("def " + std::string(name) + kArguments).c_str()));
}

void bind_look_up(nb::module_& m) {
  m.def(
      "look_up",
      [](Rows floats, Rows codes, Out<const float> table) {
        const auto heads = static_cast<i64>(floats.shape(1)), width = static_cast<i64>(floats.shape(2));
        const auto rows = static_cast<i64>(floats.shape(0));
        const Tokens x = tokens(floats, "floats", rows, heads, width, true);
        const Tokens c = tokens(codes, "codes", rows, heads, width, false);
        if (x.kind != FloatKind::f32 || (rows > 1 && x.stride != heads * width * 4) || table.shape(0) != 256) {
          throw SpecError("floats: the output must be dense float32, and the table have 256 floats");
        }
        const WithoutGil free;
        look_up(rows, heads * width, c, table.data(), reinterpret_cast<float*>(x.data));
      },
      "floats"_a, "codes"_a, "table"_a, nb::sig("def look_up(floats: object, codes: object, table: object) -> None"));
}

}  // namespace

void kvmem::bind_codec(nb::module_& m) {
  bind(m, "quantise_tokens", false, false);
  bind(m, "dequantise_tokens", true, false);
  bind(m, "quantise_channels", false, true);
  bind(m, "dequantise_channels", true, true);
  bind_look_up(m);
}
