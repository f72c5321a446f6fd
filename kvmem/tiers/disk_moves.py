"""What the disk tier moves: a slot with its payload, a header alone, and the page that clears a header."""

from __future__ import annotations

from collections import deque
from typing import Final

import numpy as np

from kvmem.tiers.base import Buffer
from kvmem.tiers.file_io import DEPTH, PAGE, Move, padded, pages
from kvmem.tiers.record import HEADER_BYTES, header_of, key_in, payload_bytes, stamp_in, verify
from kvmem.tiers.slot_index import Record

__all__ = ["Clear", "Read", "ReadHeader", "Scratch", "Write"]

_MOST_STAMP: Final = 1 << 63  # no count gets there


class Scratch:
    """Memory for the parts of a slot that do not lie in the caller's buffer. Thread-safe.

    size: bytes of a slot. Memory of at most ``DEPTH`` slots is kept.
    """

    def __init__(self, size: int) -> None:
        self._size, self._free = size, deque[memoryview](maxlen=DEPTH)

    def take(self) -> memoryview:
        """Return memory for a slot, with any content."""
        try:
            return self._free.pop()
        except IndexError:
            return pages(self._size)

    def give(self, memory: memoryview) -> None:
        self._free.append(memory)


class _SlotMove(Move):
    """Whole pages of a payload move straight between the file and an aligned buffer. The header's page, the last page,
    and all of a buffer that is not aligned move by way of ``scratch``, at their offset in the slot."""

    _own: memoryview | None = None
    _direct = 0  # bytes of the payload that move without a copy

    def __init__(self, fd: int, offset: int, scratch: Scratch, slot: int, record: Record, buffer: Buffer) -> None:
        super().__init__(fd, offset)
        self.slot, self.record, self._scratch, self._buffer = slot, record, scratch, buffer[: record.length]

    def begin(self) -> list[Buffer]:
        length = self.record.length
        self._own, whole = self._scratch.take(), length - length % PAGE
        if not whole or np.frombuffer(self._buffer, np.uint8).ctypes.data % PAGE:
            return [self._own[: PAGE + padded(length)]]
        self._direct = whole
        parts = [self._own[:PAGE], self._buffer[:whole], self._own[PAGE + whole : PAGE + padded(length)]]
        return [part for part in parts if part]

    def end(self, error: OSError | None) -> None:
        if self._own is not None:
            if error is None:
                self.finish(self._own, PAGE + self._direct, self._buffer[self._direct :])
            self._scratch.give(self._own)
        self.error = error

    def finish(self, own: Buffer, at: int, rest: Buffer) -> None:
        """Called when all was moved. rest: the part of the payload that lies in ``own``, at ``at``."""


class Read(_SlotMove):
    """Reads a slot into a buffer and verifies it there. wrong: what is wrong with it, ``""`` for nothing.

    REQUIRES: the buffer has room for the record's payload.
    """

    wrong = ""

    def finish(self, own: Buffer, at: int, rest: Buffer) -> None:
        rest[:] = own[at : at + len(rest)]
        header = own[:HEADER_BYTES]
        self.wrong = verify(header, self.record.key, self._buffer)
        if not self.wrong and stamp_in(header) != self.record.stamp:  # the disk lost a write that it had confirmed
            self.wrong = "the block is an older one of its key"


class Write(_SlotMove):
    """Writes the header and the payload of a slot."""

    write = True

    def begin(self) -> list[Buffer]:
        views, (key, length, stamp) = super().begin(), self.record
        own, at, rest = self._own, PAGE + self._direct, self._buffer[self._direct :]
        assert own is not None
        own[:PAGE] = header_of(key, self._buffer, stamp).ljust(PAGE, b"\0")
        own[at : at + len(rest)] = rest
        own[PAGE + length : PAGE + padded(length)] = bytes(padded(length) - length)
        return views


class Clear(Move):
    """Overwrites the header of a slot."""

    write = True
    _zeros = pages(PAGE)

    def begin(self) -> list[Buffer]:
        return [self._zeros]


class ReadHeader(Move):
    """Reads the header of a slot. record: what it says, None if it is not valid.

    page: memory for it. most: the largest length that can be true.
    """

    record: Record | None = None

    def __init__(self, fd: int, offset: int, page: Buffer, most: int) -> None:
        super().__init__(fd, offset)
        self._page, self._most = page, most

    def begin(self) -> list[Buffer]:
        return [self._page]

    def end(self, error: OSError | None) -> None:
        self.error = error
        if error is None:
            header = self._page[:HEADER_BYTES]
            length = payload_bytes(header)
            if not isinstance(length, str) and length <= self._most and stamp_in(header) < _MOST_STAMP:
                self.record = Record(key_in(header), length, stamp_in(header))
