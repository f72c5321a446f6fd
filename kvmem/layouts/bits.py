"""Integers of 2 to 8 bits in place of floats: quantised, packed, and a Hadamard rotation before that."""

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
    limit = min(torch.finfo(scale_dtype).max, 2.0**126)  # high - low stays finite in float32
    x = x.float().clamp(-limit, limit)
    low, high = torch.aminmax(x, dim=dim)
    top = 2**bits - 1
    zero = -_rounded_up(-low, scale_dtype)
    scale = _rounded_up((high - zero.float()) / top, scale_dtype)
    codes = (x - zero.float().unsqueeze(dim)) / scale.float().unsqueeze(dim)
    # NaN: of a group of equal entries, 0 / 0, whose code is 0; or of a NaN, whatever its code.
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
    base = {1: 1, 3: 12, 5: 20}[size // (size & -size)]
    h = torch.ones(1, 1, dtype=torch.float64) if base == 1 else _paley(base - 1)
    while len(h) < size:
        h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), h)
    return h.div_(size**0.5)


def _paley(q: int) -> torch.Tensor:
    """A Hadamard matrix of size q + 1 from the squares modulo q, a prime that is 3 modulo 4."""
    squares = {i * i % q for i in range(1, q)}
    residue = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], dtype=torch.float64)
    index = torch.arange(q)
    skew = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = residue[(index - index.unsqueeze(1)) % q]
    return skew + torch.eye(q + 1, dtype=torch.float64)
