// Conversions of csrc/codec/ for tensors on the CPU. kvmem/layouts/ checks shapes and dtypes; what is checked again
// here is what memory safety needs.

#include "bindings/bindings.h"
#include "codec/planes.h"
#include "codec/quantise.h"

namespace nb = nanobind;
using namespace kvmem;
using namespace nb::literals;

namespace {

// [tokens, heads, numbers], dense but for the stride of a token.
using Rows = nb::ndarray<nb::ndim<3>, nb::device::cpu>;
enum class Of { floats, singles, halves, bytes };

constexpr auto kFloat = static_cast<uint8_t>(nb::dlpack::dtype_code::Float);
constexpr auto kBfloat = static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat);

FloatKind kind_of(nb::dlpack::dtype dtype) {
  return dtype.bits == 32 ? FloatKind::f32 : dtype.code == kBfloat ? FloatKind::bf16 : FloatKind::f16;
}

bool fits(nb::dlpack::dtype dtype, Of of) {
  if (of == Of::bytes) return dtype.bits == 8;
  const bool single = dtype.code == kFloat && dtype.bits == 32;
  const bool half = (dtype.code == kFloat || dtype.code == kBfloat) && dtype.bits == 16;
  return (single && of != Of::halves) || (half && of != Of::singles);
}

Tokens tokens(const Rows& rows, const char* name, i64 tokens, i64 heads, i64 numbers, Of of) {
  constexpr const char* kNames[] = {"16 or 32-bit floats", "32-bit floats", "16-bit floats", "bytes"};
  const auto width = static_cast<i64>(rows.shape(2));
  const bool dense = rows.size() == 0 || (rows.stride(2) == 1 && (rows.shape(1) == 1 || rows.stride(1) == width));
  if (!dense || !fits(rows.dtype(), of) || static_cast<i64>(rows.shape(0)) != tokens ||
      static_cast<i64>(rows.shape(1)) != heads || width != numbers) {
    throw SpecError(std::string(name) + ": must be [" + std::to_string(tokens) + ", " + std::to_string(heads) + ", " +
                    std::to_string(numbers) + "] of " + kNames[static_cast<int>(of)] + ", dense within a token");
  }
  const i64 stride = rows.stride(0) * rows.dtype().bits / 8;
  return {static_cast<unsigned char*>(rows.data()), stride, kind_of(rows.dtype())};
}

// back: they are written, dense and float32.
Tokens numbers(const Rows& floats, const Quantised& q, bool back) {
  const Tokens x = tokens(floats, "floats", q.tokens, q.heads, q.width, back ? Of::singles : Of::floats);
  if (back && q.tokens > 1 && x.stride != q.heads * q.width * 4) throw SpecError("floats: the output must be dense");
  return x;
}

// exponent_bits: of a float of 8 bits; 0 for integers.
Quantised sizes(const Rows& floats, i64 size, int bits, int exponent_bits) {
  const auto width = static_cast<i64>(floats.shape(2)), heads = static_cast<i64>(floats.shape(1));
  const bool integers = exponent_bits == 0;
  if (integers ? (bits != 2 && bits != 3 && bits != 4 && bits != 8)
               : (bits != 8 || (exponent_bits != 4 && exponent_bits != 5))) {
    throw SpecError("bits: got " + std::to_string(bits) + ", with exponent_bits " + std::to_string(exponent_bits));
  }
  if (size < 1 || width < 1 || heads < 1 || width * bits % 8 != 0) {
    throw SpecError("bits: got " + std::to_string(bits) + " for a width of " + std::to_string(width));
  }
  const CodeKind code = integers ? CodeKind::integers : exponent_bits == 4 ? CodeKind::e4m3 : CodeKind::e5m2;
  return {static_cast<i64>(floats.shape(0)), heads, width, size, bits, code};
}

void bind_groups(nb::module_& m, const char* name, bool back, bool channels) {
  m.def(
      name,
      [back, channels](Rows floats, Rows codes, Rows scales, i64 size, int bits, int exponent_bits, i64 skip) {
        const Quantised q = sizes(floats, size, bits, exponent_bits);
        const i64 of_head = q.parts() * q.width;
        if (channels ? (skip < 0 || skip >= size || (!back && q.tokens % size != 0) || of_head % size != 0)
                     : q.width % size != 0) {
          throw SpecError("size: got " + std::to_string(size) + ", with skip " + std::to_string(skip));
        }
        const i64 rows = channels ? ceil_div(q.tokens + skip, size) * size : q.tokens;
        const Tokens x = numbers(floats, q, back);
        const Tokens c = tokens(codes, "codes", q.tokens, q.heads, q.width * bits / 8, Of::bytes);
        const Tokens s = tokens(scales, "scales", rows, q.heads, of_head / size, Of::floats);
        const WithoutGil free;
        float* const out = reinterpret_cast<float*>(x.data);
        if (channels) {
          back ? dequantise_channels(q, skip, c, s, out) : quantise_channels(q, x, c, s);
        } else {
          back ? dequantise_tokens(q, c, s, out) : quantise_tokens(q, x, c, s);
        }
      },
      "floats"_a, "codes"_a, "scales"_a, "size"_a, "bits"_a, "exponent_bits"_a = 0, "skip"_a = 0,
      nb::sig(("def " + std::string(name) +  // tensors of any package; nanobind would name NumPy's arrays
               "(floats: object, codes: object, scales: object, size: int, bits: int, exponent_bits: int = 0, "
               "skip: int = 0) -> None")
                  .c_str()));
}

void bind_float8(nb::module_& m, const char* name, bool back) {
  m.def(
      name,
      [back](Rows floats, Rows codes, float scale, int exponent_bits) {
        const Quantised q = sizes(floats, 1, 8, exponent_bits ? exponent_bits : -1);
        const Tokens x = numbers(floats, q, back), c = tokens(codes, "codes", q.tokens, q.heads, q.width, Of::bytes);
        const WithoutGil free;
        back ? from_float8(q, scale, c, reinterpret_cast<float*>(x.data)) : to_float8(q, scale, x, c);
      },
      "floats"_a, "codes"_a, "scale"_a, "exponent_bits"_a,
      nb::sig(("def " + std::string(name) + "(floats: object, codes: object, scale: float, exponent_bits: int) -> None")
                  .c_str()));
}

void bind_planes(nb::module_& m, const char* name, void (*convert)(const Planes&), bool columns) {
  m.def(
      name,
      [convert, columns](Rows numbers, Rows planes) {
        const auto rows = static_cast<i64>(numbers.shape(0)), units = static_cast<i64>(numbers.shape(1));
        const auto width = static_cast<i64>(numbers.shape(2));
        if (columns ? (rows % 64 != 0 || units * width % 64 != 0) : width % 2 != 0) {
          throw SpecError("numbers: got a width of " + std::to_string(width));
        }
        const Tokens n = tokens(numbers, "numbers", rows, units, width, Of::halves);
        const Tokens p = tokens(planes, "planes", rows, 1, 2 * units * width, Of::bytes);
        const WithoutGil free;
        convert({rows, units, width, reinterpret_cast<uint16_t*>(n.data), n.stride, p.data, p.stride});
      },
      "numbers"_a, "planes"_a,
      nb::sig(("def " + std::string(name) + "(numbers: object, planes: object) -> None").c_str()));
}

}  // namespace

void kvmem::bind_codec(nb::module_& m) {
  bind_groups(m, "quantise_tokens", false, false);
  bind_groups(m, "dequantise_tokens", true, false);
  bind_groups(m, "quantise_channels", false, true);
  bind_groups(m, "dequantise_channels", true, true);
  bind_float8(m, "to_float8", false);
  bind_float8(m, "from_float8", true);
  bind_planes(m, "split_planes", split_planes, false);
  bind_planes(m, "join_planes", join_planes, false);
  bind_planes(m, "split_columns", split_columns, true);
  bind_planes(m, "join_columns", join_columns, true);
}
