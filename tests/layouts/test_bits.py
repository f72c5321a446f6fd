"""Rounding, packing and rotation in torch; and the codec in C++ against them, bit for bit, at every edge of the formats."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support import LONG

import kvmem
from kvmem import _core
from kvmem.kernels.write import to_cache_dtype
from kvmem.layouts import bits as codec
from kvmem.layouts import planes
from kvmem.layouts.bits import BITS, FLOAT8, dequantise, hadamard, pack, quantise, quantise_float8, unpack

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
every_scale = pytest.mark.parametrize("scales", FLOATS[:3], ids=str)
every_bits = pytest.mark.parametrize("bits", BITS)


@every_bits
def test_every_code_at_every_place_is_packed_exactly(bits: int) -> None:
    for n in range(8, 73, 8):
        codes = (torch.arange(2**bits).unsqueeze(1) + torch.arange(n) * 5).remainder(2**bits).byte()
        packed = pack(codes, bits)
        text = ["".join(f"{code:0{bits}b}" for code in reversed(row)) for row in codes.tolist()]
        assert [int.from_bytes(bytes(row), "little") for row in packed.tolist()] == [int(row, 2) for row in text]
        assert packed.shape[-1] == n * bits // 8 and torch.equal(unpack(packed, bits), codes)
    assert pack(codes[:0], bits).shape == (0, 72 * bits // 8)


@every_scale
@every_bits
@pytest.mark.parametrize("spread", [1e-6, 1.0, 3e4])
def test_rounding_is_within_half_a_step(bits: int, scales: torch.dtype, spread: float, seed: int) -> None:
    for dim, offset in ((0, 0.0), (1, 0.3), (-1, -2e4)):
        x = torch.randn(6, 32, 16, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1) * spread + offset
        codes, scale, zero = quantise(x, bits, dim=dim, scale_dtype=scales)
        error = (dequantise(codes, scale, zero, dim=dim).double() - x).abs()
        assert (error <= scale.double().unsqueeze(dim) / 2 + 4 * 2**-23 * (abs(offset) + spread)).all()
        # The step is what the entries span, after at most one rounding of the zero point and one of the scale.
        span, info = x.double().amax(dim) - x.double().amin(dim), torch.finfo(scales)
        widest = (span + (abs(offset) + spread + info.tiny) * info.eps) / (2**bits - 1)
        assert (scale.double() <= widest * (1 + info.eps) + info.tiny * info.eps).all()


@every_bits
def test_groups_that_are_equal_zero_infinite_or_nan(bits: int) -> None:
    x = torch.tensor([[0.0] * 3, [-0.0] * 3, [1.5] * 3, [-3.0] * 3, [torch.inf, -torch.inf, 1e9], [1, torch.nan, 2]])
    codes, scale, zero = quantise(x, bits)
    back = dequantise(codes, scale, zero)
    assert torch.equal(back[:4], x[:4]) and not scale[:4].any() and not codes[:4].any()
    torch.testing.assert_close(back[4], torch.tensor([65504.0, -65504.0, 65504.0]), rtol=0, atol=float(scale[4]) / 2)
    assert back[5].isnan().all() and not codes[5].any()


@pytest.mark.parametrize("size", [1, 2, 12, 16, 20, 24, 80, 96, 128, 160])
def test_hadamard_matrices_are_orthogonal_and_spread(size: int) -> None:
    h = hadamard(size, dtype=torch.float64)
    torch.testing.assert_close(h @ h.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(h.abs(), torch.full_like(h, size**-0.5), rtol=0, atol=1e-15)
    h.zero_()
    assert hadamard(size, dtype=torch.float64).all(), "each caller has its own"


def numbers(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> list[torch.Tensor]:
    """Normal and subnormal numbers, near every limit of the formats; equal ones, zeros of both signs, infinities, NaN;
    and any pattern of bits.
    """
    draw, info = torch.Generator().manual_seed(seed), torch.finfo(dtype)
    plain = torch.randn(shape, generator=draw, dtype=torch.float64)
    limits = (info.tiny, info.smallest_normal * info.eps, info.max, 6e-8, 6.1e-5, 65504.0, 65519.0, 65520.0, 2.0**126)
    found = [plain * limit for limit in limits] + [limit * (1 + plain * 1e-3) for limit in limits]
    found += [plain, plain * 0 + 0.1, plain * 0, -plain * 0, plain * 2.0 ** (40 * plain)]
    for special in ([torch.nan], [torch.inf], [-torch.inf, torch.inf], [torch.inf, torch.nan], [-0.0]):
        found += [plain.clone(), torch.full_like(plain, special[0])]
        for each in found[-2:]:
            each.view(-1)[-len(special) :] = torch.tensor(special)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    info = torch.iinfo(integers)
    patterns = torch.randint(info.min, info.max, shape, generator=draw, dtype=integers).view(dtype)
    return [*(each.to(dtype) for each in found), patterns]


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal bits, but for the payload of a NaN; and the sign of zero, since minima in torch may have either."""
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@every_scale
@every_bits
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_codec_rounds_as_torch_does(bits: int, dtype: torch.dtype, scales: torch.dtype, seed: int) -> None:
    for tokens, heads, width in ((8, 1, 8), (24, 3, 40), (8, 2, 128)) if LONG else ((24, 3, 40),):
        for x in numbers(dtype, (tokens, heads, width), seed):
            for size in (1, 4, width):
                packed, stored = codec.quantise_rows(x, bits, size=size, scale_dtype=scales)
                codes, *two = quantise(x.view(tokens, heads, -1, size), bits, scale_dtype=scales)
                assert torch.equal(packed, pack(codes.flatten(-2), bits))
                assert_same(stored, torch.cat(two, -1))
                back = codec.dequantise_rows(packed, stored, bits, size=size)
                assert_same(back, dequantise(codes, *stored.view(tokens, heads, 2, -1).unbind(2)).flatten(-2))
            blocks = x.view(-1, 8, heads, width)
            packed, stored = codec.quantise_blocks(blocks, bits, scale_dtype=scales)
            codes, *two = quantise(blocks, bits, dim=1, scale_dtype=scales)
            assert torch.equal(packed, pack(codes, bits))
            of_blocks = stored.transpose(1, 2).flatten(-2)
            assert_same(of_blocks, torch.cat(two, -1))
            wanted = dequantise(codes, *of_blocks.chunk(2, -1), dim=1).flatten(0, 1)
            for skip, end in ((0, tokens), (3, tokens - 2), (7, 8)):
                part = packed.flatten(0, 1)[skip:end], stored.flatten(0, 1)[: -(-end // 8) * 8]
                assert_same(codec.dequantise_blocks(*part, bits, size=8, skip=skip), wanted[skip:end])


@every_scale
@pytest.mark.parametrize("kind", list(FLOAT8), ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_codec_rounds_8_bit_floats_as_torch_does(
    kind: torch.dtype, dtype: torch.dtype, scales: torch.dtype, seed: int
) -> None:
    """With scales by token, by channel, and one for all."""
    tokens, heads, width = 24, 3, 40
    for x in numbers(dtype, (tokens, heads, width), seed):
        for size in (1, 4, width):
            found, stored = codec.quantise_rows(x, kind, size=size, scale_dtype=scales)
            codes, scale = quantise_float8(x.view(tokens, heads, -1, size), kind, scale_dtype=scales)
            assert_same(found.view(kind).float(), codes.flatten(-2).view(kind).float())
            assert_same(stored, scale)
            wanted = (codes.view(kind).float() * scale.float().unsqueeze(-1)).flatten(-2)
            assert_same(codec.dequantise_rows(found, stored, kind, size=size), wanted)
        blocks = x.view(-1, 8, heads, width)
        found, stored = codec.quantise_blocks(blocks, kind, scale_dtype=scales)
        codes, scale = quantise_float8(blocks, kind, dim=1, scale_dtype=scales)
        assert_same(found.view(kind).float(), codes.view(kind).float())
        assert_same(stored.transpose(1, 2).flatten(-2), scale)
        wanted = (codes.view(kind).float() * scale.float().unsqueeze(1)).flatten(0, 1)
        part = found.flatten(0, 1)[3:], stored.flatten(0, 1)
        assert_same(codec.dequantise_blocks(*part, kind, size=8, skip=3), wanted[3:])
        for scale in (1.0, 0.3, 2.0**-20, 2.0**127, 3e5):
            codes = to_cache_dtype(x, kind, scale=scale)
            found = codec.to_float8(x, kind, scale)
            same = found.view(torch.uint8) == codes.view(torch.uint8)  # zeros have signs
            assert (same | (found.float().isnan() & codes.float().isnan())).all()
            assert_same(codec.from_float8(found, scale), codes.float() * scale)


def on_a_gpu(module: ModuleType) -> Any:
    """The module as it runs where csrc/codec does not: every choice by device falls the other way."""
    text = Path(str(module.__file__)).read_text()
    swapped = re.sub(r'device\.type ([=!])= "cpu"', lambda m: f'device.type {"!" if m[1] == "=" else "="}= "cpu"', text)
    assert swapped != text
    made = ModuleType(f"{module.__name__}_on_a_gpu")
    sys.modules[made.__name__] = made  # where dataclasses look for it
    exec(compile(swapped, str(module.__file__), "exec"), vars(made))
    return made


@pytest.mark.parametrize("kind", [*BITS, *FLOAT8], ids=str)
def test_torch_gives_the_same_on_other_devices(kind: int | torch.dtype, seed: int) -> None:
    other, x = on_a_gpu(codec), torch.randn(24, 3, 40, generator=torch.Generator().manual_seed(seed))
    for size in (4, 40):
        found = codec.quantise_rows(x, kind, size=size)
        assert all(map(torch.equal, found, other.quantise_rows(x, kind, size=size)))
        wanted = other.dequantise_rows(*found, kind, size=size)
        assert torch.equal(codec.dequantise_rows(*found, kind, size=size), wanted)
    blocks = codec.quantise_blocks(x.view(3, 8, 3, 40), kind)
    assert all(map(torch.equal, blocks, other.quantise_blocks(x.view(3, 8, 3, 40), kind)))
    part = blocks[0].flatten(0, 1)[3:22], blocks[1].flatten(0, 1)
    assert torch.equal(*(each.dequantise_blocks(*part, kind, size=8, skip=3) for each in (codec, other)))
    if isinstance(kind, torch.dtype):
        codes = other.to_float8(x, kind, 0.3)
        assert torch.equal(codec.to_float8(x, kind, 0.3).view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(codec.from_float8(codes, 0.3), other.from_float8(codes, 0.3))


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize(("heads", "width"), [(4, 16), (1, 64), (2, 96), (32, 2)])
def test_torch_cuts_the_same_planes_on_other_devices(dtype: torch.dtype, heads: int, width: int, seed: int) -> None:
    other, draw = on_a_gpu(planes), torch.Generator().manual_seed(seed)
    k = torch.randint(-(1 << 15), 1 << 15, (3, 64, heads, width), generator=draw, dtype=torch.int16).view(dtype)
    rows = planes.split_planes(k)
    assert torch.equal(rows, other.split_planes(k)) and torch.equal(planes.split_columns(k), other.split_columns(k))
    joined = (each.join_planes(rows, heads, dtype).view(torch.int16) for each in (planes, other))
    assert all(torch.equal(found, k.view(torch.int16)) for found in joined)


@pytest.mark.core
@every_bits
def test_the_codec_reads_tokens_that_lie_apart(bits: int, seed: int) -> None:
    """As rows of a cache do, beside other components; and any strides, gradients and empty tensors."""
    x = torch.randn(8, 5, 3, generator=torch.Generator().manual_seed(seed)).repeat(1, 1, 8).transpose(0, 1)
    wanted = codec.quantise_rows(x.contiguous(), bits, size=24)
    for given in (x, torch.cat((x, x), 1)[:, :8], x.clone().requires_grad_()):
        assert all(map(torch.equal, codec.quantise_rows(given, bits, size=24), wanted))
    apart = [torch.cat((part.view(torch.uint8).flatten(1),) * 2, 1) for part in wanted]
    held = [a[:, : a.shape[1] // 2].view(part.dtype).view(part.shape) for a, part in zip(apart, wanted, strict=True)]
    assert torch.equal(codec.dequantise_rows(*held, bits, size=24), codec.dequantise_rows(*wanted, bits, size=24))
    assert codec.dequantise_rows(*codec.quantise_rows(x[:0], bits, size=24), bits, size=24).shape == (0, 8, 24)
    assert codec.quantise_blocks(x.view(5, 1, 8, 24)[:0], bits)[0].shape == (0, 1, 8, 3 * bits)


@pytest.mark.core
def test_the_codec_refuses_what_it_would_misread() -> None:
    """It writes nothing then."""
    x, codes, scales = torch.ones(4, 2, 8), torch.zeros(4, 2, 4, dtype=torch.uint8), torch.zeros(4, 2, 2)
    spread = codes.transpose(1, 2).contiguous().transpose(1, 2)
    for given, message in [
        ((x.double(), codes, scales, 8, 4), "floats: must be .4, 2, 8. of 16 or 32-bit floats"),
        ((x.transpose(0, 1), codes, scales, 8, 4), "floats: .* dense within a token"),
        ((x, codes, scales.short(), 8, 4), "scales: must be"),
        ((x, codes[:3], scales, 8, 4), "codes: must be .4, 2, 4. of bytes"),
        ((x, spread, scales, 8, 4), "codes: .* dense"),
        ((x, codes, scales, 3, 4), "size: got 3"),
        ((x, codes, scales, 8, 5), "bits: got 5"),
    ]:
        with pytest.raises(kvmem.SpecError, match=message):
            _core.quantise_tokens(*given)
    with pytest.raises(kvmem.SpecError, match="size: got 3, with skip 0"):
        _core.quantise_channels(x, codes, scales, 3, 4)
    with pytest.raises(kvmem.SpecError, match="with skip 4"):
        _core.dequantise_channels(x, codes, scales[:1], 4, 4, 0, 4)
    assert not codes.any() and not scales.any()


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_8_bit_float_is_looked_up(dtype: torch.dtype) -> None:
    """NaN, infinities and both zeros too, from rows with a stride."""
    rows = torch.zeros(4, 2, 48, dtype=torch.uint8).view(dtype)[:, :, :32]
    rows = rows.view(torch.uint8)[:, :1].copy_(torch.arange(128, dtype=torch.uint8).view(4, 1, 32)).view(dtype)
    rest = (rows.view(torch.uint8) + 128).view(dtype)
    for x in (rows, rest):
        found, wanted = codec.from_float8(x, 0.5), x.float() * 0.5
        assert torch.equal(found.nan_to_num(7), wanted.nan_to_num(7)) and torch.equal(found.isnan(), wanted.isnan())
    with pytest.raises(kvmem.SpecError, match="exponent_bits 3"):
        _core.from_float8(torch.empty(4, 1, 32), rows.view(torch.uint8), 1.0, 3)
    with pytest.raises(kvmem.SpecError, match="floats: must be .4, 1, 32. of 32-bit floats"):
        _core.from_float8(torch.empty(4, 1, 32).half(), rows.view(torch.uint8), 1.0, 4)
