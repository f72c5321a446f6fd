"""Integers of 2 to 8 bits or floats of 8 in place of longer floats: rounded, packed, and a Hadamard rotation before."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import torch

from kvmem import _core
from kvmem.arguments import brief, check_choice, check_size
from kvmem.errors import SpecError
from kvmem.kernels.write import to_cache_dtype
from kvmem.spec.dtypes import parse_dtype

__all__ = [
    "BITS", "FLOAT8", "SCALES", "Kind", "dequantise", "dequantise_blocks", "dequantise_rows", "from_float8", "hadamard",
    "pack", "parts_of", "quantise", "quantise_blocks", "quantise_float8", "quantise_rows", "readable", "to_float8",
    "unpack",
]  # fmt: skip

#: The bits of an integer, or the dtype of a float of 8 bits.
Kind = int | torch.dtype
#: The floats of 8 bits that can have scales by token or channel, and the bits of their exponents.
FLOAT8: Final = {torch.float8_e4m3fn: 4, torch.float8_e5m2: 5}

#: The widths that ``quantise`` and ``pack`` know.
BITS: Final = (2, 3, 4, 8)
#: The dtypes of scales.
SCALES: Final = ("float16", "bfloat16", "float32")
_WORDS: Final = {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}  # bits -> codes and bytes of the shortest whole word


def quantise(
    x: torch.Tensor, bits: int, *, dim: int = -1, scale_dtype: torch.dtype = torch.float16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes, uint8 in the shape of x, and scales and zero points, in ``scale_dtype`` and without ``dim``.

    The entries along ``dim`` are a group with one scale, asymmetric: the codes 0 to ``2**bits - 1`` span the group's
    least entry, which is the zero point, to its largest. Both are rounded outward, so no entry is cut: ``dequantise``
    is off by half a scale at most, up to rounding in float32. A group of equal entries that ``scale_dtype`` holds is
    exact, with a scale of 0.

    Entries beyond the range of ``scale_dtype`` (65,504 in float16), infinities too, saturate at its end. A NaN makes
    its whole group NaN.
    """
    _check_bits(bits)
    check_choice("scale_dtype", str(parse_dtype(scale_dtype, "scale_dtype"))[6:], SCALES)
    limit = min(torch.finfo(scale_dtype).max, 2.0**126)  # high - low stays finite in float32
    x = x.float().clamp(-limit, limit)
    low, high = torch.aminmax(x, dim=dim)
    top = 2**bits - 1
    zero = -_rounded_up(-low, scale_dtype)
    scale = _rounded_up((high - zero.float()) / top, scale_dtype)
    codes = (x - zero.float().unsqueeze(dim)) * _inverse(scale).unsqueeze(dim)
    return codes.round_().clamp_(0, top).nan_to_num_(0).to(torch.uint8), scale, zero


def dequantise(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, *, dim: int = -1) -> torch.Tensor:
    """Return what ``quantise`` made codes, scales and zero points of, in float32."""
    return codes * scale.float().unsqueeze(dim) + zero.float().unsqueeze(dim)


def quantise_float8(
    x: torch.Tensor, dtype: torch.dtype, *, dim: int = -1, scale_dtype: torch.dtype = torch.float16
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return 8-bit floats, as uint8 in the shape of x, and scales, in ``scale_dtype`` and without ``dim``.

    The largest absolute value along ``dim`` becomes the largest number of the dtype, or less, as scales are rounded up.
    Saturation and NaN: as for ``quantise``.
    """
    limit, x = min(torch.finfo(scale_dtype).max, 2.0**126), x.float()
    scale = _rounded_up(x.abs().amax(dim).clamp(max=limit) / torch.finfo(dtype).max, scale_dtype)
    codes = to_cache_dtype(x * _inverse(scale).unsqueeze(dim), dtype)
    return codes.view(torch.uint8), scale


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return 1 / torch.where(scale == 0, 1, scale.float())  # as csrc/codec, where a division would take longer


def _rounded_up(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x, float32, as the nearest number of another dtype that is not below it; NaN stays NaN."""
    near = x.to(dtype)
    if dtype == torch.float32:
        return near
    above = (near.view(torch.int16) + (2 * (near >= 0).short() - 1)).view(dtype)
    return torch.where(near.float() < x, above, near)


# --- K and V: rows of tokens. On the CPU one pass over the memory (csrc/codec), elsewhere the functions above ---


def parts_of(kind: Kind) -> int:
    """Return how many numbers a group has beside its codes: a scale, and for integers a zero point."""
    return 1 if isinstance(kind, torch.dtype) else 2


def _how(kind: Kind) -> tuple[int, int]:
    """Return the bits of a code, and those of an exponent in it: 0 for integers."""
    return (8, FLOAT8[kind]) if isinstance(kind, torch.dtype) else (kind, 0)


def _to_codes(x: torch.Tensor, kind: Kind, dim: int, scale_dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    if isinstance(kind, torch.dtype):
        return quantise_float8(x, kind, dim=dim, scale_dtype=scale_dtype)
    return quantise(x, kind, dim=dim, scale_dtype=scale_dtype)


def _from_codes(codes: torch.Tensor, kind: Kind, scales: torch.Tensor, dim: int) -> torch.Tensor:
    """scales: and zero points, one after the other in the last dimension."""
    if isinstance(kind, torch.dtype):
        return codes.view(kind).float() * scales.float().unsqueeze(dim)
    return dequantise(codes, *scales.chunk(2, -1), dim=dim)


def quantise_rows(
    x: torch.Tensor, kind: Kind, *, size: int, scale_dtype: torch.dtype = torch.float16
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return packed codes, uint8 ``[n, heads, width * bits / 8]``, and scales, ``[n, heads, parts * width / size]``: of
    each head first the scales of its groups of ``size`` neighbours, then, for integers, their zero points.

    x: ``[n, heads, width]``.
    """
    n, heads, width = x.shape
    if x.device.type != "cpu":
        codes, *parts = _to_codes(x.view(n, heads, width // size, size), kind, -1, scale_dtype)
        return pack(codes.flatten(-2), _how(kind)[0]), torch.cat(parts, -1)
    packed = torch.empty(n, heads, width * _how(kind)[0] // 8, dtype=torch.uint8)
    scales = torch.empty(n, heads, parts_of(kind) * (width // size), dtype=scale_dtype)
    _core.quantise_tokens(readable(x), packed, scales, size, *_how(kind))
    return packed, scales


def dequantise_rows(
    packed: torch.Tensor, scales: torch.Tensor, kind: Kind, *, size: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return what ``quantise_rows`` was given, in float32 ``[n, heads, width]``; on the CPU in ``out``, if that is
    dense and float32.
    """
    n, heads, width = *packed.shape[:2], packed.shape[2] * 8 // _how(kind)[0]
    if packed.device.type != "cpu":
        codes = unpack(packed, _how(kind)[0]).view(n, heads, -1, size)
        return _from_codes(codes, kind, scales, -1).flatten(-2)
    out = _room(out, n, heads, width)
    _core.dequantise_tokens(out, packed, scales, size, *_how(kind))
    return out


def quantise_blocks(
    x: torch.Tensor, kind: Kind, *, scale_dtype: torch.dtype = torch.float16
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return packed codes, uint8 ``[m, size, heads, width * bits / 8]``, and scales, ``[m, size, heads, parts * width /
    size]``: what a head has of a block, the scales of its channels and then the zero points, spread over its tokens.

    x: ``[m, size, heads, width]``, m blocks of ``size`` tokens. REQUIRES: size divides ``parts_of(kind) * width``.
    """
    m, size, heads, width = x.shape
    each = parts_of(kind) * width // size
    if x.device.type != "cpu":
        codes, *parts = _to_codes(x, kind, 1, scale_dtype)
        return pack(codes, _how(kind)[0]), torch.cat(parts, -1).view(m, heads, size, each).transpose(1, 2)
    packed = torch.empty(m, size, heads, width * _how(kind)[0] // 8, dtype=torch.uint8)
    scales = torch.empty(m, size, heads, each, dtype=scale_dtype)
    _core.quantise_channels(readable(x.flatten(0, 1)), packed.flatten(0, 1), scales.flatten(0, 1), size, *_how(kind))
    return packed, scales


def dequantise_blocks(
    packed: torch.Tensor, scales: torch.Tensor, kind: Kind, *, size: int, skip: int = 0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return tokens of ``quantise_blocks`` in float32, ``[n, heads, width]``. packed: ``[n, heads, bytes]``, from token
    ``skip`` of the first block on; scales: ``[k * size, heads, ...]``, of all blocks that they are in. out: as for
    ``dequantise_rows``.
    """
    n, heads, width = *packed.shape[:2], packed.shape[2] * 8 // _how(kind)[0]
    if packed.device.type != "cpu":
        of_blocks = scales.view(-1, size, heads, scales.shape[-1]).transpose(1, 2).flatten(-2)
        each = of_blocks.repeat_interleave(size, 0)[skip : skip + n]
        return _from_codes(unpack(packed, _how(kind)[0]).unsqueeze(1), kind, each, 1).squeeze(1)
    out = _room(out, n, heads, width)
    _core.dequantise_channels(out, packed, scales, size, *_how(kind), skip)
    return out


def to_float8(x: torch.Tensor, dtype: torch.dtype, scale: float, *, name: str = "values") -> torch.Tensor:
    """Return ``x / scale`` in a dtype of 8 bits, as ``to_cache_dtype``. x: ``[n, heads, width]``."""
    if x.device.type != "cpu" or dtype not in FLOAT8 or not x.is_floating_point() or x.dtype.itemsize == 1:
        return to_cache_dtype(x, dtype, scale=scale, name=name)
    found = torch.empty(x.shape, dtype=torch.uint8)
    _core.to_float8(readable(x), found, scale, FLOAT8[dtype])
    return found.view(dtype)


def from_float8(x: torch.Tensor, scale: float, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return 8-bit floats ``[n, heads, width]`` times a scale, in float32. out: as for ``dequantise_rows``."""
    if x.device.type != "cpu" or x.dtype not in FLOAT8:
        return x.float() * scale
    out = _room(out, *x.shape)
    _core.from_float8(out, x.view(torch.uint8), scale, FLOAT8[x.dtype])
    return out


def _room(out: torch.Tensor | None, *shape: int) -> torch.Tensor:
    fits = out is not None and out.dtype == torch.float32 and out.is_contiguous() and out.shape == shape
    return out if out is not None and fits else torch.empty(shape)


def readable(x: torch.Tensor) -> torch.Tensor:
    """In a dtype that csrc/codec reads, dense within a token."""
    x = x.float() if x.dtype not in (torch.float16, torch.bfloat16, torch.float32) else x
    return x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous()


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes ``[..., n]`` as bytes ``[..., n * bits / 8]``, the first code in the lowest bits. Exact.

    codes: uint8. REQUIRES: each below ``2**bits``. ``SpecError`` if n codes do not fill whole bytes.
    """
    per, size = _check_bits(bits)
    return _regroup("codes", codes, per, bits, size, 8)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes that ``pack`` was given."""
    per, size = _check_bits(bits)
    return _regroup("packed", packed, size, 8, per, bits)


def _regroup(field: str, x: torch.Tensor, count: int, bits: int, to_count: int, to_bits: int) -> torch.Tensor:
    """Each ``count`` numbers of ``bits`` bits as ``to_count`` numbers of ``to_bits`` bits."""
    if not isinstance(x, torch.Tensor):
        raise SpecError(f"{field}: got {brief(x)}; must be a tensor of uint8")
    n = x.shape[-1]
    if x.dtype != torch.uint8 or n % count:
        raise SpecError(
            f"{field}: got {n} of {x.dtype}; must be uint8, a multiple of {count}: {max(round(n / count), 1) * count}"
        )
    if count == to_count:
        return x
    places, to_places = (torch.arange(0, 24, step, device=x.device) for step in (bits, to_bits))
    words = x.view(*x.shape[:-1], n // count, count).int() << places[:count]
    found: torch.Tensor = words.sum(-1, keepdim=True) >> to_places[:to_count] & 2**to_bits - 1
    return found.to(torch.uint8).flatten(-2)


def _check_bits(bits: int) -> tuple[int, int]:
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in BITS:
        raise SpecError(f"bits: got {brief(bits)}; must be one of {', '.join(map(str, BITS))}")
    return _WORDS[bits]


def hadamard(
    size: int, *, field: str = "size", dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Return an orthogonal matrix ``[size, size]`` whose entries are all ``size ** -0.5`` or minus that, so that one
    outlier in ``x @ h`` is spread over all elements (QuaRot, arXiv:2404.00456). ``h.T`` undoes it.

    The constructions are Sylvester's and Paley's first: sizes ``2 ** k`` and ``2 ** k * (p + 1)`` for a prime p = 3 mod
    4, among them all multiples of 32 up to 1,152. ``SpecError``, with the nearest, for others. Cost: a copy to the
    device.
    """
    if not _core_size(check_size(field, size, 1, 1 << 13)):
        near = min(filter(_core_size, range(1, 2 * size)), key=lambda n: abs(n - size))
        raise SpecError(f"{field}: got {size}; no Hadamard matrix of that size is known here: use {near}")
    return _hadamard(size).to(device, dtype, copy=True)


@lru_cache(maxsize=16)
def _hadamard(size: int) -> torch.Tensor:
    core = _core_size(size)
    matrix, p = torch.ones(1, 1, dtype=torch.float64), core - 1
    if p:  # Paley: from the squares modulo p
        squares = torch.full((p,), -1.0, dtype=torch.float64)
        squares[torch.arange(p) ** 2 % p], squares[0] = 1.0, 0.0
        matrix = torch.eye(core, dtype=torch.float64)
        matrix[0, 1:], matrix[1:, 0] = 1.0, -1.0
        matrix[1:, 1:] += squares[(torch.arange(p).unsqueeze(1) - torch.arange(p)) % p]
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return torch.as_tensor(matrix * size**-0.5)


def _core_size(size: int) -> int:
    """Return 1 or p + 1, whichever doubles to this size; 0 if none does."""
    halves = (size >> k for k in range(size.bit_length()) if size % (1 << k) == 0)
    return next((n for n in halves if n == 1 or (n % 4 == 0 and all((n - 1) % d for d in range(3, n - 1, 2)))), 0)
