"""The system calls of the disk tier, in one place, so that tests count them, make them fail, and record them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence

from kvmem.tiers.base import Buffer

__all__ = ["Files"]


class Files:
    """Calls of the operating system. Each raises ``OSError``."""

    def open_folder(self, path: str) -> int:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def make_folder(self, path: str) -> None:
        os.makedirs(path, exist_ok=True)

    def names(self, folder: int) -> list[str]:
        return os.listdir(folder)

    def free_bytes(self, folder: int) -> int:
        found = os.fstatvfs(folder)
        return found.f_bavail * found.f_frsize

    def open(self, folder: int, name: str, flags: int) -> int:
        return os.open(name, flags | os.O_CLOEXEC, 0o666, dir_fd=folder)

    def close(self, fd: int) -> None:
        os.close(fd)

    def unlink(self, folder: int, name: str) -> None:
        os.unlink(name, dir_fd=folder)

    def stat(self, fd: int) -> os.stat_result:
        return os.fstat(fd)

    def lock(self, fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def allocate(self, fd: int, size: int) -> None:
        os.posix_fallocate(fd, 0, size)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def preadv(self, fd: int, views: Sequence[Buffer], offset: int) -> int:
        return os.preadv(fd, views, offset)

    def pwritev(self, fd: int, views: Sequence[Buffer], offset: int) -> int:
        return os.pwritev(fd, views, offset)

    def sync(self, fd: int) -> None:
        """Data, and what is needed to read it; of a folder: its names."""
        os.fsync(fd)

    def touch(self, fd: int, time_ns: int) -> None:
        os.utime(fd, ns=(time_ns, time_ns))
