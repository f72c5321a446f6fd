"""What the disk tier reads and writes: a slot with its payload, and headers alone."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from typing import Final, TypeAlias

from kvmem.tiers.base import Buffer
from kvmem.tiers.file_io import PAGE, PageIO, Request, Scratch, padded, slot_views
from kvmem.tiers.record import HEADER_BYTES, header_of, key_in, payload_bytes, stamp_in, verify
from kvmem.tiers.segments import Geometry
from kvmem.tiers.slot_index import Record

__all__ = ["Answer", "Read", "Write", "read_headers", "zero_header"]

Answer: TypeAlias = "OSError | str | None"
"""How a move ended: None if all is well, the error of the system, or what is wrong with the bytes."""

_HEADERS: Final = 256  # read at a time
_MOST_STAMP: Final = 1 << 63  # no count gets there


class _Move:
    write = False

    def __init__(self, scratch: Scratch, record: Record, buffer: Buffer, answer: Callable[[Answer], None]) -> None:
        self._scratch, self._record, self._buffer, self._answer = scratch, record, buffer, answer
        self._piece: memoryview | None = None
        self._whole = 0  # bytes of the payload that move between file and buffer without a copy

    def _views(self) -> list[Buffer]:
        self._piece = self._scratch.take()
        views, self._whole = slot_views(self._piece, self._buffer, self._record.length)
        return views

    def end(self, error: OSError | None) -> None:
        answer: Answer = error
        if self._piece is not None:
            if error is None:
                answer = self._check(self._piece)
            self._scratch.give(self._piece)
        self._answer(answer)

    def _check(self, piece: Buffer) -> Answer:
        return None


class Read(_Move):
    """Reads a slot into a buffer, and verifies it there. REQUIRES: the buffer has room for the record's payload."""

    def begin(self) -> list[Buffer]:
        return self._views()

    def _check(self, piece: Buffer) -> Answer:
        length, whole = self._record.length, self._whole
        self._buffer[whole:length] = piece[PAGE + whole : PAGE + length]
        header = piece[:HEADER_BYTES]
        why = verify(header, self._record.key, self._buffer[:length])
        if not why and stamp_in(header) != self._record.stamp:  # the disk lost a write that it had confirmed
            why = "the block is an older one of its key"
        return why or None


class Write(_Move):
    """Writes header and payload of a slot at once."""

    write = True

    def begin(self) -> list[Buffer]:
        views, (key, length, stamp), whole = self._views(), self._record, self._whole
        piece = self._piece
        assert piece is not None
        header = header_of(key, self._buffer, stamp)
        piece[:PAGE] = header.ljust(PAGE, b"\0")
        piece[PAGE + whole : PAGE + length] = self._buffer[whole:]
        piece[PAGE + length : PAGE + padded(length)] = bytes(padded(length) - length)
        return views


def zero_header(failed: Callable[[OSError], object]) -> Write:
    """Return a move that makes a slot's header invalid. failed: called with the error."""
    return _Zeros(failed)


_PAGE_OF_ZEROS: Final = memoryview(mmap.mmap(-1, PAGE)).toreadonly()


class _Zeros(Write):
    def __init__(self, failed: Callable[[OSError], object]) -> None:
        self._failed = failed

    def begin(self) -> list[Buffer]:
        return [_PAGE_OF_ZEROS]

    def end(self, error: OSError | None) -> None:
        if error is not None:
            self._failed(error)


def read_headers(io: PageIO, fd: int, geometry: Geometry, count: int) -> Iterator[Record | OSError | None]:
    """Yield what each of the first ``count`` slots holds: a record, None for none, or the error of the read."""
    memory = memoryview(mmap.mmap(-1, PAGE * max(1, min(count, _HEADERS))))
    for first in range(0, count, _HEADERS):
        batch = range(first, min(first + _HEADERS, count))
        seen: dict[int, Record | OSError | None] = {}
        io.run([_header_request(fd, geometry, index, memory[PAGE * (index - first) :][:PAGE], seen) for index in batch])
        yield from (seen[index] for index in batch)


def _header_request(
    fd: int, geometry: Geometry, index: int, page: Buffer, seen: dict[int, Record | OSError | None]
) -> Request:
    def end(error: OSError | None) -> None:
        seen[index] = error or _record_in(page[:HEADER_BYTES], geometry.block_bytes)

    return Request(fd, geometry.offset(index), False, lambda: [page], end)


def _record_in(header: Buffer, most: int) -> Record | None:
    length = payload_bytes(header)
    if isinstance(length, str) or length > most or stamp_in(header) >= _MOST_STAMP:
        return None
    return Record(key_in(header), length, stamp_in(header))
