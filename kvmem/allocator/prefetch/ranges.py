"""Ranges of memory in the order in which they are read, as arrays: a long sequence is a few rows, not many objects."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvmem.errors import SpecError

if TYPE_CHECKING:
    import numpy.typing as npt

    Int64s = npt.NDArray[np.int64]

__all__ = ["Ranges", "expand", "first_seen"]

ADDRESS, BYTES, COUNT, STRIDE = range(4)


class Ranges:
    """Bytes of memory, in the order in which something reads them. Immutable; it holds addresses, not the bytes.

    rows: int64 [n, 4], one for each range: address, bytes, count, stride: ``count`` pieces of ``bytes`` bytes each,
        whose starts are ``stride`` bytes apart. No byte is in two of them.
    memory: what keeps the bytes alive, if anything has to.
    """

    def __init__(self, rows: Int64s, memory: object = None) -> None:
        self.rows, self.memory = rows, memory

    @staticmethod
    def of(tensor: torch.Tensor) -> Ranges:
        """Return the bytes of a tensor, such as a weight, in the order of its memory. ``SpecError`` unless it is dense,
        in any order of its dimensions.
        """
        dense = sorted(zip(tensor.stride(), tensor.shape, strict=True))
        step = 1
        for stride, size in dense:
            if size > 1 and stride != step:
                raise SpecError(
                    f"tensor: got shape {tuple(tensor.shape)} with strides {tensor.stride()}; must be dense"
                )
            step *= size
        size = tensor.numel() * tensor.element_size()
        return Ranges(np.array([[tensor.data_ptr(), size, 1, size]][: size > 0], np.int64).reshape(-1, 4), tensor)

    @cached_property
    def num_bytes(self) -> int:
        """How many bytes these are."""
        return int((self.rows[:, BYTES] * self.rows[:, COUNT]).sum())

    @cached_property
    def table(self) -> Int64s:
        """The same bytes in as few rows as neighbours allow, int64 [m, 4]: what a prefetch is given."""
        address, size, count, stride = self.rows.T
        dense = (stride == size) | (count == 1)
        rows = np.stack(
            [
                address,
                np.where(dense, size * count, size),
                np.where(dense, 1, count),
                np.where(dense, size * count, stride),
            ],
            1,
        )
        joins = dense[1:] & dense[:-1] & (rows[:-1, ADDRESS] + rows[:-1, BYTES] == rows[1:, ADDRESS])
        starts = np.flatnonzero(np.r_[True, ~joins][: len(rows)])
        joined = rows[starts]
        if len(starts) < len(rows):
            joined[:, BYTES] = np.add.reduceat(rows[:, BYTES], starts)
            joined[:, STRIDE] = np.where(joined[:, COUNT] == 1, joined[:, BYTES], joined[:, STRIDE])
        return joined

    def pieces(self) -> Int64s:
        """Return [begin, end) of every piece, int64 [pieces, 2]."""
        return self._pieces()[1]

    def _pieces(self) -> tuple[Int64s, Int64s]:
        address, size, count, stride = self.rows.T
        row, k = expand(count)
        begin = address[row] + k * stride[row]
        return row, np.stack([begin, begin + size[row]], 1)

    def cut(self, most_bytes: int) -> Ranges:
        """Return the first ``most_bytes`` of these bytes, or all."""
        if most_bytes >= self.num_bytes:
            return self
        ends = np.cumsum(self.rows[:, BYTES] * self.rows[:, COUNT])
        whole = int(np.searchsorted(ends, most_bytes, "right"))
        address, size, _, stride = self.rows[whole].tolist()
        pieces, rest = divmod(most_bytes - int(ends[whole - 1] if whole else 0), size)
        parts = [[address, size, pieces, stride]] * (pieces > 0)
        parts += [[address + pieces * stride, rest, 1, stride]] * (rest > 0)
        rows = np.concatenate([self.rows[:whole], np.array(parts, np.int64).reshape(-1, 4)])
        return self._part(np.minimum(np.arange(len(rows)), whole), rows)

    def without(self, earlier: Sequence[object]) -> Ranges:
        """Return what of these bytes is in none of ``earlier``. Cost: a comparison for each of these, or linear in the
        pieces where the memory that they span overlaps.
        """
        near = [e for e in earlier if isinstance(e, Ranges) and self._meets(e)]
        if not near:
            return self
        row, mine = self._pieces()
        others = np.concatenate([e.pieces() for e in near])
        source, spans = first_seen(np.concatenate([others, mine]))
        kept = source >= len(others)
        begin, size = spans[kept, 0], spans[kept, 1] - spans[kept, 0]
        source = row[source[kept] - len(others)]
        # A stride that is not one of dense bytes tells which token a piece belongs to.
        return self._part(source, np.stack([begin, size, np.ones_like(size), self.rows[source, STRIDE]], 1))

    def _meets(self, other: Ranges) -> bool:
        return bool(len(self.rows) and len(other.rows)) and (
            self._bounds[0] < other._bounds[1] and other._bounds[0] < self._bounds[1]
        )

    @cached_property
    def _bounds(self) -> tuple[int, int]:
        address, size, count, stride = self.rows.T
        return int(address.min()), int((address + (count - 1) * stride + size).max())

    def _part(self, source: Int64s, rows: Int64s) -> Ranges:
        """Return ranges of ``rows``, each of which lies in the row ``source`` of these."""
        return Ranges(rows, self.memory)

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_bytes} bytes in {len(self)} ranges)"


def expand(counts: Int64s) -> tuple[Int64s, Int64s]:
    """Return (i, k) for each i and each k below ``counts[i]``, int64 [sum] each."""
    source = np.repeat(np.arange(len(counts)), counts)
    return source, np.arange(len(source)) - np.repeat(np.cumsum(counts) - counts, counts)


def first_seen(spans: Int64s) -> tuple[Int64s, Int64s]:
    """Return the parts of the spans [begin, end) that no earlier span has, in order: of which span each is, and the
    parts. No two of them overlap. spans: int64 [n, 2], none empty.
    """
    order = np.argsort(spans[:, 0], kind="stable")
    if (spans[order[1:], 0] >= spans[order[:-1], 1]).all():
        return np.arange(len(spans)), spans
    bounds = np.unique(spans)  # no part begins or ends anywhere else
    first, end = np.searchsorted(bounds, spans[:, 0]), np.searchsorted(bounds, spans[:, 1])
    source, k = expand(end - first)
    part = first[source] + k
    at = np.sort(np.unique(part, return_index=True)[1])
    return source[at], np.stack([bounds[part[at]], bounds[part[at] + 1]], 1)
