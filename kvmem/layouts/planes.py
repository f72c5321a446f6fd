"""16-bit floats in planes of bits, as AlignedKV (arXiv:2409.16546) stores them: cut and joined."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvmem import _core
from kvmem.layouts.bits import readable

__all__ = [
    "BLOCK", "FORMATS", "Format", "bits_of", "cut_planes", "join_planes", "open_nibbles", "split_columns",
    "split_planes",
]  # fmt: skip

#: Tokens of a block, and so of a burst of K: 64 bytes of the high plane, 32 of each nibble plane.
BLOCK = 64


@dataclass(frozen=True)
class Format:
    """How a 16-bit float is cut: into its high byte, its middle nibble and its low nibble, which lie apart.

    planes: bits of each plane. mantissa: its bits. floor: the lowest level of reading. Level 0 reads the high byte,
    1 the middle nibble too, 2 everything. The high byte of bf16 lacks a bit of the exponent, so its floor is 1: byte
    and middle nibble are always read, as one plane.
    """

    planes: tuple[int, ...]
    mantissa: int
    floor: int

    @property
    def top(self) -> int:
        """The biased exponent of infinity and NaN."""
        return 0x7FFF >> self.mantissa

    def exponents(self, bits: torch.Tensor) -> torch.Tensor:
        """Return biased exponents. That of zero and subnormal numbers is 1, which bounds them."""
        return ((bits & 0x7FFF) >> self.mantissa).clamp(min=1)

    def levels(self, delta: torch.Tensor, guard: int) -> torch.Tensor:
        """Return the levels for operands ``delta`` powers of two below what they are added to: from ``4 + guard`` on,
        the low nibble cannot be seen in the sum; from ``8 + guard`` on, the middle one neither.
        """
        return (2 - (delta >= 4 + guard).int() - (delta >= 8 + guard).int()).clamp(min=self.floor)


FORMATS = {torch.float16: Format((8, 4, 4), 10, 0), torch.bfloat16: Format((12, 4), 7, 1)}


def split_planes(values: torch.Tensor) -> torch.Tensor:
    """Return rows of bytes, ``[..., 2 * units * n]``: the high bytes of all units, then their middle nibbles,
    then their low ones.

    values: 16-bit floats ``[..., units, n]``, n even. A byte holds the nibbles of elements i and i + n / 2 of a unit.
    """
    if values.device.type == "cpu":
        rows = torch.empty(*values.shape[:-2], values.shape[-2] * values.shape[-1] * 2, dtype=torch.uint8)
        flat = values.reshape(-1, *values.shape[-2:])
        _core.split_planes(readable(flat), rows.view(-1, 1, rows.shape[-1]))
        return rows
    bits = bits_of(values)
    nibbles = ((bits >> shift) & 15 for shift in (4, 0))
    halves = (torch.tensor_split(nibble, 2, dim=-1) for nibble in nibbles)
    planes = [bits >> 8, *(low | high << 4 for low, high in halves)]
    return torch.cat([plane.flatten(-2) for plane in planes], dim=-1).to(torch.uint8)


def split_columns(k: torch.Tensor) -> torch.Tensor:
    """Return blocks of K ``[m, 64, heads, width]`` as rows of bytes ``[m, 64, 2 * heads * width]``: ``split_planes`` of
    their channels, each a unit of 64 tokens, with the same number of channels in each row.
    """
    if k.device.type == "cpu":
        rows = torch.empty(len(k) * BLOCK, 1, 2 * k[0, 0].numel(), dtype=torch.uint8)
        _core.split_columns(readable(k.flatten(0, 1)), rows)
        return rows.view(len(k), BLOCK, -1)
    return split_planes(k.permute(0, 2, 3, 1).reshape(len(k), BLOCK, -1, BLOCK))


def cut_planes(rows: torch.Tensor, units: int) -> list[torch.Tensor]:
    """Return views of the planes of such rows: ``[..., units, n]``, then twice ``[..., units, n / 2]``."""
    quarter = rows.shape[-1] // 4
    planes = torch.tensor_split(rows, (2 * quarter, 3 * quarter), dim=-1)
    return [plane.view(*plane.shape[:-1], units, plane.shape[-1] // units) for plane in planes]  # of no rows too


def join_planes(rows: torch.Tensor, units: int, dtype: torch.dtype) -> torch.Tensor:
    """Return what ``split_planes`` was given, ``[..., units, n]`` in a 16-bit dtype."""
    if rows.device.type == "cpu":
        found = torch.empty(*rows.shape[:-1], units, rows.shape[-1] // (2 * units), dtype=dtype)
        _core.join_planes(found.view(-1, *found.shape[-2:]), rows.reshape(-1, 1, rows.shape[-1]))
        return found
    high, mid, low = cut_planes(rows, units)
    return (high.int() << 8 | open_nibbles(mid) << 4 | open_nibbles(low)).to(torch.int16).view(dtype)


def open_nibbles(nibbles: torch.Tensor) -> torch.Tensor:
    return torch.cat((nibbles & 15, nibbles >> 4), dim=-1).int()


def bits_of(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int16).int() & 0xFFFF
