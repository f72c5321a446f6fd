"""Integers of 2 to 8 bits in place of floats: quantised, packed, and a Hadamard rotation before that."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Final

import torch

from kvmem import _core
from kvmem.arguments import check_choice, check_size
from kvmem.errors import SpecError

__all__ = [
    "BITS", "SCALES", "dequantise", "dequantise_blocks", "dequantise_rows", "from_float8", "hadamard", "pack",
    "quantise", "quantise_blocks", "quantise_rows", "unpack",
]  # fmt: skip

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
    check_choice("scale_dtype", str(scale_dtype).removeprefix("torch."), SCALES)
    limit = min(torch.finfo(scale_dtype).max, 2.0**126)  # high - low stays finite in float32
    x = x.float().clamp(-limit, limit)
    low, high = torch.aminmax(x, dim=dim)
    top = 2**bits - 1
    zero = -_rounded_up(-low, scale_dtype)
    scale = _rounded_up((high - zero.float()) / top, scale_dtype)
    inverse = 1 / torch.where(scale == 0, 1, scale.float())  # as csrc/codec, where a division would take longer
    codes = (x - zero.float().unsqueeze(dim)) * inverse.unsqueeze(dim)
    return codes.round_().clamp_(0, top).nan_to_num_(0).to(torch.uint8), scale, zero


def dequantise(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, *, dim: int = -1) -> torch.Tensor:
    """Return what ``quantise`` made codes, scales and zero points of, in float32."""
    return codes * scale.float().unsqueeze(dim) + zero.float().unsqueeze(dim)


def _rounded_up(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x, float32, as the nearest number of another dtype that is not below it; NaN stays NaN."""
    near = x.to(dtype)
    if dtype == torch.float32:
        return near
    above = (near.view(torch.int16) + (2 * (near >= 0).short() - 1)).view(dtype)
    return torch.where(near.float() < x, above, near)


def quantise_rows(
    x: torch.Tensor, bits: int, *, size: int, scale_dtype: torch.dtype = torch.float16
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return packed codes, uint8 ``[n, heads, width * bits / 8]``, and scales, ``[n, heads, 2 * width / size]``: of
    each head first the scales of its groups of ``size`` neighbours, then their zero points.

    x: ``[n, heads, width]``. On the CPU one pass over the memory (csrc/codec).
    """
    n, heads, width = x.shape
    if x.device.type != "cpu":
        codes, *two = quantise(x.view(n, heads, width // size, size), bits, scale_dtype=scale_dtype)
        return pack(codes.flatten(-2), bits), torch.cat(two, -1)
    packed = torch.empty(n, heads, width * bits // 8, dtype=torch.uint8)
    scales = torch.empty(n, heads, 2 * (width // size), dtype=scale_dtype)
    _core.quantise_tokens(_readable(x), packed, scales, size, bits)
    return packed, scales


def dequantise_rows(
    packed: torch.Tensor, scales: torch.Tensor, bits: int, *, size: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return what ``quantise_rows`` was given, in float32 ``[n, heads, width]``; on the CPU in ``out``, if that is
    dense and float32.
    """
    n, heads, width = *packed.shape[:2], packed.shape[2] * 8 // bits
    if packed.device.type != "cpu":
        scale, zero = scales.chunk(2, -1)
        return dequantise(unpack(packed, bits).view(n, heads, -1, size), scale, zero).flatten(-2)
    out = _room(out, n, heads, width)
    _core.dequantise_tokens(out, packed, scales, size, bits)
    return out


def quantise_blocks(
    x: torch.Tensor, bits: int, *, scale_dtype: torch.dtype = torch.float16
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return packed codes, uint8 ``[m, size, heads, width * bits / 8]``, and scales, ``[m, heads, 2 * width]``: of each
    channel of a block, and then the zero points. x: ``[m, size, heads, width]``, m blocks of ``size`` tokens.
    """
    m, size, heads, width = x.shape
    if x.device.type != "cpu":
        codes, *two = quantise(x, bits, dim=1, scale_dtype=scale_dtype)
        return pack(codes, bits), torch.cat(two, -1)
    packed = torch.empty(m, size, heads, width * bits // 8, dtype=torch.uint8)
    scales = torch.empty(m, heads, 2 * width, dtype=scale_dtype)
    _core.quantise_channels(_readable(x.flatten(0, 1)), packed.flatten(0, 1), scales, size, bits)
    return packed, scales


def dequantise_blocks(
    packed: torch.Tensor, scales: torch.Tensor, bits: int, *, size: int, skip: int = 0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return tokens of ``quantise_blocks`` in float32, ``[n, heads, width]``. packed: ``[n, heads, bytes]``, from token
    ``skip`` of the first block on; scales: of all blocks that they are in. out: as for ``dequantise_rows``.
    """
    n, heads, width = *packed.shape[:2], packed.shape[2] * 8 // bits
    if packed.device.type != "cpu":
        scale, zero = scales.repeat_interleave(size, 0)[skip : skip + n].chunk(2, -1)
        return unpack(packed, bits) * scale.float() + zero.float()
    out = _room(out, n, heads, width)
    _core.dequantise_channels(out, packed, scales.contiguous(), size, bits, skip)
    return out


def from_float8(x: torch.Tensor, scale: float, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return 8-bit floats ``[n, heads, width]`` times a scale, in float32. out: as for ``dequantise_rows``."""
    if x.device.type != "cpu":
        return x.float() * scale
    out = _room(out, *x.shape)
    _core.look_up(out, x.view(torch.uint8), _all_of(x.dtype) * scale)
    return out


@cache
def _all_of(dtype: torch.dtype) -> torch.Tensor:
    """The value of every byte; torch converts 8-bit floats on a CPU one by one."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()


def _room(out: torch.Tensor | None, *shape: int) -> torch.Tensor:
    fits = out is not None and out.dtype == torch.float32 and out.is_contiguous() and out.shape == shape
    return out if out is not None and fits else torch.empty(shape)


def _readable(x: torch.Tensor) -> torch.Tensor:
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
    if isinstance(bits, bool) or bits not in BITS:
        raise SpecError(f"bits: got {bits!r}; must be one of {', '.join(map(str, BITS))}")
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
