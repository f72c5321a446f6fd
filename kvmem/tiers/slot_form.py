"""The two forms of a block's bytes: as they lie on the device and in host slots, and the canonical form of all other
tiers.

Canonical is ``[layer][component][token][head][width]`` without padding, whatever backend and interleave wrote it, so
that another process, another machine and a file read the same bytes. With heads before tokens it is
``[layer][component][block][bytes]`` (joined components are one): blocks may be packed, and their order is
part of the spec's fingerprint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm
from typing import TYPE_CHECKING

import numpy as np

from kvmem.geometry.group_layout import GroupLayout
from kvmem.spec import CacheSpec, Group

if TYPE_CHECKING:
    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]

__all__ = ["SlotForm", "largest_block_bytes"]


@dataclass(frozen=True)
class _Piece:
    """One component of one layer: where its rows (a token each, or a whole block) lie in a slot, and in the canonical
    form."""

    slot_offset: int
    stride: int
    row_bytes: int
    canonical_offset: int
    rows: int


class SlotForm:
    """Converts blocks of one group.

    layout: of the group. tokens: of a block; 1 for a state of fixed size.

    Attributes: ``slot_bytes`` in a slot, ``canonical_bytes`` in the canonical form (at most as many).
    """

    def __init__(self, layout: GroupLayout, tokens: int) -> None:
        self._pieces: list[_Piece] = []
        starts = np.cumsum([0, *(tokens * size for size in layout.token_bytes)]).tolist()
        self.slot_bytes = starts[-1]
        unit = 1 if layout.group.block_order == "tokens" else layout.group.block_size
        at = 0
        for layer, names in _parts(layout.group):
            where = layout.slice(layer, names[0])
            row = unit * sum(layout.group.row_bytes(name, layer) for name in names)
            stride = unit * layout.token_bytes[where.arena]
            offset = starts[where.arena] + where.offset_bytes
            self._pieces.append(_Piece(offset, stride, row, at, tokens // unit))
            at += tokens // unit * row
        self.canonical_bytes = at
        same = all(p.slot_offset == p.canonical_offset and p.stride == p.row_bytes for p in self._pieces)
        #: Whether both forms are equal, so that nothing needs to be converted.
        self.is_canonical = same and self.slot_bytes == self.canonical_bytes

    def to_canonical(self, slot: Bytes, out: Bytes) -> None:
        """Write the canonical form of ``slot``, uint8 [slot_bytes], to ``out``, uint8 [canonical_bytes]."""
        for here, there in self._rows(slot, out):
            there[:] = here

    def from_canonical(self, canonical: Bytes, slot: Bytes) -> None:
        """The inverse of ``to_canonical``. Padding of the slot keeps what it held."""
        for here, there in self._rows(slot, canonical):
            here[:] = there

    def _rows(self, slot: Bytes, canonical: Bytes) -> list[tuple[npt.NDArray[np.void], npt.NDArray[np.void]]]:
        """Views of each piece, one element of opaque bytes for each row: numpy copies them row by row."""
        found = []
        for piece in self._pieces:
            kind = np.dtype(f"V{piece.row_bytes}")
            here = np.ndarray((piece.rows,), kind, slot, piece.slot_offset, (piece.stride,))
            found.append((here, np.ndarray((piece.rows,), kind, canonical, piece.canonical_offset)))
        return found


def _parts(group: Group) -> Iterator[tuple[int, list[str]]]:
    """What has one range of bytes in a block: a layer, and of which components."""
    for layer in group.layers:
        names = [c.name for c in group.components if c.scope == "layer" or layer == group.layers[0]]
        yield from [(layer, names)] if group.block_order == "joined" else ((layer, [name]) for name in names)


def largest_block_bytes(spec: CacheSpec) -> int:
    """Return the bytes of the largest payload that an allocator of the spec gives to a tier."""
    size = lcm(*(g.block_size for g in spec.groups if g.growth == "token"))
    return max(
        SlotForm(GroupLayout(g, "none"), 1 if g.growth == "fixed" else size).canonical_bytes for g in spec.groups
    )
