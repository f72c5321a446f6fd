"""Lists of ops as bytes, for a wire: column by column, each number in as few bytes as the column needs.

A decode step of a rank group is mostly ``length`` and ``commit`` records with small numbers: 6 to 9 bytes each
instead of the 41 of plain integers, at one numpy call a column.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Final

import numpy as np

from kvmem.allocator.ops import KINDS, Op
from kvmem.errors import SpecError

__all__ = ["pack", "unpack"]

_CODES: Final = {kind: code for code, kind in enumerate(KINDS)}
_TABLE: Final = zlib.crc32(",".join(KINDS).encode())  # another build may number the kinds in another way
_HEAD: Final = struct.Struct("<II")  # the table, the number of records
_COLUMNS: Final = 6
_TYPES: Final = {1: "<i1", 2: "<i2", 4: "<i4", 8: "<i8"}


def pack(ops: Sequence[Op]) -> bytes:
    """Return the ops as bytes, which ``unpack`` of the same build reads. Cost: linear, about a microsecond a record."""
    numbers = np.array([(_CODES[kind], *rest) for kind, *rest in ops], np.int64).reshape(-1, _COLUMNS)
    return b"".join([_HEAD.pack(_TABLE, len(ops)), *(_column(numbers[:, i]) for i in range(_COLUMNS))])


def _column(numbers: np.ndarray) -> bytes:
    """A byte with the width of the numbers, then the numbers; nothing but a 0 if all of them are 0."""
    if not numbers.any():
        return b"\0"
    low, high = int(numbers.min()), int(numbers.max())
    width = next(n for n in _TYPES if -(1 << 8 * n - 1) <= low and high < 1 << 8 * n - 1)
    return bytes([width]) + numbers.astype(_TYPES[width]).tobytes()


def unpack(data: bytes | memoryview) -> list[Op]:
    """Return the ops. ``SpecError`` if the bytes are cut off, too many, or of a build with other kinds."""
    data = memoryview(data)
    if len(data) < _HEAD.size:
        raise SpecError(f"the ops are cut off after {len(data)} bytes")
    table, count = _HEAD.unpack(data[: _HEAD.size])
    if table != _TABLE:
        raise SpecError("the ops are of another build of kvmem: run the same kvmem on all ranks")
    at, columns = _HEAD.size, []
    for _ in range(_COLUMNS):
        width = data[at] if at < len(data) else -1
        end = at + 1 + max(0, width) * count
        if (width and width not in _TYPES) or end > len(data):
            raise SpecError(f"the ops are damaged at byte {at} of {len(data)}")
        columns.append(np.frombuffer(data[at + 1 : end], _TYPES[width]).tolist() if width else [0] * count)
        at = end
    if at != len(data) or any(not 0 <= code < len(KINDS) for code in columns[0]):
        raise SpecError(f"the ops are damaged: {len(data)} bytes, of which {at} are records of known kinds")
    return [(KINDS[code], *rest) for code, *rest in zip(*columns, strict=True)]
