"""A disk in memory in the place of system calls: it counts them, makes them fail, and loses power."""

from __future__ import annotations

import errno
import os
import random
import stat
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from kvmem.tiers.base import Buffer
from kvmem.tiers.files import Files

FOLDER = 1  # the descriptor of the one folder
KINDS = (
    "make_folder",
    "open_folder",
    "names",
    "free_bytes",
    "open",
    "unlink",
    "stat",
    "lock",
    "allocate",
    "truncate",
    "preadv",
    "pwritev",
    "sync",
    "touch",
)


class Inode:
    """A file: what a reader sees, what is safe, and what was written since the last sync, as (offset, bytes)."""

    def __init__(self, content: bytes = b"") -> None:
        self.content, self.safe = bytearray(content), bytes(content)
        self.pending: list[tuple[int, bytes]] = []
        self.mtime_ns = 0
        self.links = 1

    def resize(self, size: int) -> None:
        self.content = self.content[:size].ljust(size, b"\0")


class SimulatedFiles(Files):
    """``before(kind, number)`` is called before each system call, and may raise. ``number`` counts from 1.

    shorten: the next transfer moves so many bytes fewer.
    """

    def __init__(self, inodes: dict[str, Inode] | None = None) -> None:
        self.inodes = inodes or {}
        self.safe_names = dict(self.inodes)
        self._fds: dict[int, Inode] = {}
        self._next = FOLDER + 1
        self.before: Callable[[str, int], None] = lambda kind, number: None
        self.after_write: Callable[[], None] = lambda: None
        self.number = self.clock = self.shorten = 0
        self.locked: Inode | None = None

    def __getattribute__(self, name: str) -> Any:
        call = super().__getattribute__(name)
        if name not in KINDS:
            return call

        def counted(*args: Any) -> Any:
            self.number += 1
            self.before(name, self.number)
            return call(*args)

        return counted

    def make_folder(self, path: str) -> None: ...

    def open_folder(self, path: str) -> int:
        return FOLDER

    def names(self, folder: int) -> list[str]:
        return list(self.inodes)

    def free_bytes(self, folder: int) -> int:
        return 1 << 40

    def open(self, folder: int, name: str, flags: int) -> int:
        if name not in self.inodes:
            if not flags & os.O_CREAT:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            self.inodes[name] = Inode()
        self._next += 1
        self._fds[self._next] = self.inodes[name]
        return self._next

    def close(self, fd: int) -> None:
        if fd != FOLDER and self._fds.pop(fd) is self.locked:
            self.locked = None

    def unlink(self, folder: int, name: str) -> None:
        if name not in self.inodes:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        self.inodes.pop(name).links = 0

    def stat(self, fd: int) -> Any:
        inode = self._fds[fd]
        size = len(inode.content)
        return SimpleNamespace(
            st_mode=stat.S_IFREG,
            st_size=size,
            st_blocks=-(-size // 512),
            st_nlink=inode.links,
            st_mtime_ns=inode.mtime_ns,
        )

    def lock(self, fd: int) -> None:
        if self.locked is not None:
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK))
        self.locked = self._fds[fd]

    def allocate(self, fd: int, size: int) -> None:
        inode = self._fds[fd]
        inode.resize(max(size, len(inode.content)))

    def truncate(self, fd: int, size: int) -> None:
        self._fds[fd].resize(size)

    def preadv(self, fd: int, views: Sequence[Buffer], offset: int) -> int:
        content, count = self._fds[fd].content, 0
        most = sum(map(len, views)) - self.shorten
        self.shorten = 0
        for view in views:
            part = content[offset + count : offset + min(most, count + len(view))]
            view[: len(part)] = part
            count += len(part)
        return count

    def pwritev(self, fd: int, views: Sequence[Buffer], offset: int) -> int:
        data = b"".join(views)
        data = data[: max(0, len(data) - self.shorten)]
        self.shorten = 0
        inode = self._fds[fd]
        self.clock += 1
        inode.mtime_ns = self.clock
        inode.content[offset : offset + len(data)] = data
        inode.pending.append((offset, data))
        self.after_write()
        return len(data)

    def sync(self, fd: int) -> None:
        if fd == FOLDER:
            self.safe_names = dict(self.inodes)
        else:
            inode = self._fds[fd]
            inode.safe, inode.pending = bytes(inode.content), []

    def touch(self, fd: int, time_ns: int) -> None:
        self._fds[fd].mtime_ns = time_ns

    def copy(self) -> SimulatedFiles:
        return SimulatedFiles({name: Inode(bytes(inode.content)) for name, inode in self.inodes.items()})

    def after_power_loss(self, rng: random.Random) -> SimulatedFiles:
        """The disk as a loss of power might leave it: of what was not synced, any sectors, in any order; files whose
        names were not synced may be gone, and their sizes what they were."""
        inodes = {}
        for name, inode in self.inodes.items():
            if name not in self.safe_names and rng.random() < 0.5:
                continue
            content = bytearray(inode.safe)
            if len(content) != len(inode.content) and rng.random() < 0.5:
                content = content[: len(inode.content)].ljust(len(inode.content), b"\0")
            size, lost = rng.choice((512, 4096)), rng.choice((0.0, 0.1, 0.5, 0.9, 1.0))
            sectors = [
                (offset + at, data[at : at + size])
                for offset, data in inode.pending
                for at in range(0, len(data), size)
                if rng.random() >= lost
            ]
            if rng.random() < 0.5:
                rng.shuffle(sectors)
            for offset, data in sectors:
                if offset + len(data) <= len(content):
                    content[offset : offset + len(data)] = data
            inodes[name] = Inode(bytes(content))
        return SimulatedFiles(inodes)
