"""The file of a worker: regions of pages of one size, given out and taken back by number, read and written directly."""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress

from kvmem.errors import TierError
from kvmem.tiers.base import Buffer
from kvmem.tiers.disk.file_io import Move, PageIO, pages

__all__ = ["Region", "Scratch", "open_file"]


def open_file(folder: str, size: int) -> int:
    """Return a new file of ``size`` bytes in the folder, without a name, so that the system removes it when its last
    process ends; past the page cache where the file system can. ``TierError`` if there is no room.
    """
    try:
        fd, name = tempfile.mkstemp(prefix="kvmem-", dir=folder)
        os.unlink(name)
    except OSError as error:
        raise TierError(f"folder: cannot make a file in {folder}: {error.strerror}") from error
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        os.close(fd)
        raise TierError(f"capacity: {folder} cannot give {size} bytes: {error.strerror}") from error
    with suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    return fd


class Scratch:
    """Memory that begins with a page and is used again and again: what ``take`` gave before is overwritten."""

    def __init__(self) -> None:
        self._memory = pages(mmap.PAGESIZE)

    def take(self, size: int) -> memoryview:
        """Return ``size`` bytes of any content."""
        if size > len(self._memory):
            self._memory = pages(size + size // 2)
        return self._memory[:size]


class _Piece(Move):
    def __init__(self, fd: int, offset: int, view: Buffer, write: bool) -> None:
        super().__init__(fd, offset)
        self._view, self.write = view, write

    def begin(self) -> list[Buffer]:
        return [self._view]


class Region:
    """``count`` pages of ``page_bytes``, a multiple of 4,096, from byte ``begin`` of a file on."""

    def __init__(self, fd: int, io: PageIO, begin: int, page_bytes: int, count: int) -> None:
        self._fd, self._io, self._begin, self.page_bytes, self.count = fd, io, begin, page_bytes, count
        self._fresh, self._given_back = 0, list[int]()

    @property
    def used(self) -> int:
        """Pages that are given out."""
        return self._fresh - len(self._given_back)

    def take(self, count: int) -> list[int]:
        """Return the numbers of ``count`` pages, neighbours if possible. ``TierError`` if there are fewer."""
        if count > self.count - self.used:
            raise TierError(
                f"the disk has {self.count - self.used} of {self.count} pages of {self.page_bytes} bytes free, and "
                f"{count} are needed: free sequences, or open it with more capacity"
            )
        fresh = min(count, self.count - self._fresh)
        found = list(range(self._fresh, self._fresh + fresh))
        self._fresh += fresh
        return found + [self._given_back.pop() for _ in range(count - fresh)]

    def give(self, numbers: Sequence[int]) -> None:
        """Take pages back."""
        self._given_back.extend(numbers)
        if not self.used:
            self._fresh, self._given_back = 0, []

    def write(self, numbers: Sequence[int], memory: memoryview) -> None:
        """Write one page after the other from ``memory``. ``TierError`` if one fails."""
        self._run(True, self._joined(numbers, memory))

    def read(
        self, parts: Sequence[tuple[Sequence[int], memoryview]], begin: int = 0, end: int | None = None
    ) -> None:  # fmt: skip
        """Read bytes ``[begin, end)`` of pages, multiples of 4,096, into memory, one behind the other. ``TierError`` if
        one fails. parts: pages, and the memory for them.
        """
        if (begin, end) in ((0, None), (0, self.page_bytes)):
            return self._run(False, (piece for part in parts for piece in self._joined(*part)))
        size = (self.page_bytes if end is None else end) - begin
        self._run(False, (
            (self._begin + number * self.page_bytes + begin, memory[i * size : (i + 1) * size])
            for numbers, memory in parts
            for i, number in enumerate(numbers)
        ))  # fmt: skip

    def _joined(self, numbers: Sequence[int], memory: memoryview) -> Iterator[tuple[int, memoryview]]:
        """Runs of neighbours: their place in the file, and their part of the memory."""
        size, first = self.page_bytes, 0
        for i in range(1, len(numbers) + 1):
            if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
                yield self._begin + numbers[first] * size, memory[first * size : i * size]
                first = i

    def _run(self, write: bool, pieces: Iterator[tuple[int, memoryview]]) -> None:
        moves = [_Piece(self._fd, at, view, write) for at, view in pieces if view]
        self._io.run(moves)
        error = next((move.error for move in moves if move.error is not None), None)
        if error is not None:
            raise TierError(f"the disk cannot be {'written' if write else 'read'}: {error}") from error
