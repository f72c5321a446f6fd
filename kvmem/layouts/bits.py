"""Integers of 2 to 8 bits in place of floats: quantised, packed, and a Hadamard rotation that spreads outliers first."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import torch

from kvmem.errors import SpecError

__all__ = ["BITS", "dequantise", "hadamard", "pack", "quantise", "unpack"]

#: The widths that ``quantise`` and ``pack`` know.
BITS: Final = (2, 3, 4, 8)
_WORDS: Final = {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}  # bits -> codes and bytes of the shortest whole word


def quantise(
    x: torch.Tensor, bits: int, *, dim: int = -1, symmetric: bool = False, scale_dtype: torch.dtype = torch.float16
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Return codes, uint8 in the shape of x, and what they are scaled by, in ``scale_dtype`` and without ``dim``:
    ``(scale, zero)``, or with ``symmetric`` ``(scale,)``.

    The entries along ``dim`` are a group with one scale. Asymmetric: the codes 0 to ``2**bits - 1`` span the group's
    least and largest entry. Symmetric: they span ``-m`` to ``m``, m the largest magnitude, with one code less, so that
    0 stays 0. Scale and zero are rounded outward, so no entry is cut: ``dequantise`` is off by half a scale at most, up
    to rounding in float32. A group of equal entries that ``scale_dtype`` holds is exact.

    Entries beyond the range of ``scale_dtype`` (65,504 in float16), infinities too, saturate at its end. A NaN makes
    its whole group NaN.
    """
    _check_bits(bits)
    limit = min(torch.finfo(scale_dtype).max, 2.0**126)  # high - low stays finite in float32
    x = x.float().clamp(-limit, limit)
    low, high = torch.aminmax(x, dim=dim)
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale = _rounded_up(torch.maximum(-low, high) / top, scale_dtype)
        codes = _divided(x, scale.unsqueeze(dim)).round_().clamp_(-top, top) + (top + 1)
        return codes.nan_to_num_(0).to(torch.uint8), (scale,)
    top = 2**bits - 1
    zero = -_rounded_up(-low, scale_dtype)
    scale = _rounded_up((high - zero.float()) / top, scale_dtype)
    codes = _divided(x - zero.float().unsqueeze(dim), scale.unsqueeze(dim)).round_().clamp_(0, top)
    return codes.nan_to_num_(0).to(torch.uint8), (scale, zero)


def dequantise(codes: torch.Tensor, bits: int, scales: tuple[torch.Tensor, ...], *, dim: int = -1) -> torch.Tensor:
    """Return what ``quantise`` made codes and scales of, in float32. Arguments as it was given and returned them."""
    scale, *zero = (s.float().unsqueeze(dim) for s in scales)
    return codes * scale + zero[0] if zero else (codes.float() - 2 ** (bits - 1)) * scale


def _rounded_up(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in another dtype, not below x; NaN stays NaN."""
    near, info = x.to(dtype), torch.finfo(dtype)
    return torch.where(near.float() < x, (x + (x.abs() + info.tiny) * info.eps).to(dtype), near)


def _divided(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """A scale of 0 is that of a group of equal entries: all are code 0."""
    return x / torch.where(scale == 0, 1, scale.float())


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes ``[..., n]`` as bytes ``[..., n * bits / 8]``, the first code in the lowest bits. Exact.

    codes: uint8. REQUIRES: each below ``2**bits``. ``SpecError`` if n codes do not fill whole bytes.
    """
    per, size = _check_bits(bits)
    n = codes.shape[-1]
    if codes.dtype != torch.uint8 or n % per:
        near = max(round(n / per), 1) * per
        raise SpecError(
            f"codes: got {n} of {codes.dtype}; must be uint8, a multiple of {per} with {bits} bits: {near}"
        )
    if per == 1:
        return codes
    places = torch.arange(per, dtype=torch.int32, device=codes.device) * bits
    words = (codes.unflatten(-1, (n // per, per)).int() << places).sum(-1, keepdim=True, dtype=torch.int32)
    return (words >> torch.arange(0, 8 * size, 8, dtype=torch.int32, device=codes.device) & 255).byte().flatten(-2)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes that ``pack`` was given."""
    per, size = _check_bits(bits)
    n = packed.shape[-1]
    if packed.dtype != torch.uint8 or n % size:
        raise SpecError(f"packed: got {n} of {packed.dtype}; must be uint8, a multiple of {size} with {bits} bits")
    if per == 1:
        return packed
    places = torch.arange(0, 8 * size, 8, dtype=torch.int32, device=packed.device)
    words = (packed.unflatten(-1, (n // size, size)).int() << places).sum(-1, keepdim=True, dtype=torch.int32)
    places = torch.arange(per, dtype=torch.int32, device=packed.device) * bits
    return (words >> places & 2**bits - 1).byte().flatten(-2)


def _check_bits(bits: int) -> tuple[int, int]:
    if isinstance(bits, bool) or bits not in BITS:
        raise SpecError(f"bits: got {bits!r}; must be one of {', '.join(map(str, BITS))}")
    return _WORDS[bits]


def hadamard(size: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return an orthogonal matrix ``[size, size]`` whose entries are all ``size ** -0.5`` or minus that, so that one
    outlier in ``x @ h`` is spread over all elements (QuaRot, arXiv:2404.00456). ``h.T`` undoes it.

    size: a power of two, or 12 or 20 times one (Paley's construction); ``SpecError``, with the nearest, for others.
    """
    legal = sorted(base << i for base in (1, 12, 20) for i in range(32))
    if isinstance(size, bool) or size not in legal:
        near = min(legal, key=lambda n: abs(n - size)) if isinstance(size, int) else 128
        raise SpecError(
            f"size: got {size!r}; a Hadamard matrix is made for a power of two, or 12 or 20 times one: use {near}"
        )
    return _hadamard(size).to(device, dtype)


@lru_cache(maxsize=16)
def _hadamard(size: int) -> torch.Tensor:
    odd = size & -size
    base = {1: 1, 3: 12, 5: 20}[size // odd]
    h = torch.ones(1, 1, dtype=torch.float64) if base == 1 else _paley(base - 1)
    while len(h) < size:
        h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), h)
    return h / size**0.5


def _paley(q: int) -> torch.Tensor:
    """A Hadamard matrix of size q + 1 from the squares modulo q, a prime that is 3 modulo 4."""
    squares = {i * i % q for i in range(1, q)}
    residue = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], dtype=torch.float64)
    index = torch.arange(q)
    skew = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = residue[(index - index.unsqueeze(1)) % q]
    return skew + torch.eye(q + 1, dtype=torch.float64)
