"""The system calls of the disk tier, in one place, so that tests count them, make them fail, and record them."""

from __future__ import annotations

import fcntl
import os

__all__ = ["Files"]


class Files:
    """Calls of the operating system on a folder's descriptor and on files in it. Each raises ``OSError``."""

    close = staticmethod(os.close)
    stat = staticmethod(os.fstat)
    truncate = staticmethod(os.ftruncate)
    preadv = staticmethod(os.preadv)
    pwritev = staticmethod(os.pwritev)
    sync = staticmethod(os.fsync)  # of a folder: the names of its files

    def make_folder(self, path: str) -> None:
        os.makedirs(path, exist_ok=True)

    def open_folder(self, path: str) -> int:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def free_bytes(self, folder: int) -> int:
        found = os.fstatvfs(folder)
        return found.f_bavail * found.f_frsize

    def names(self, folder: int) -> list[str]:
        return os.listdir(folder)

    def open(self, folder: int, name: str, flags: int) -> int:
        return os.open(name, flags | os.O_CLOEXEC, 0o666, dir_fd=folder)

    def unlink(self, folder: int, name: str) -> None:
        os.unlink(name, dir_fd=folder)

    def lock(self, fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def allocate(self, fd: int, size: int) -> None:
        os.posix_fallocate(fd, 0, size)

    def touch(self, fd: int, time_ns: int) -> None:
        os.utime(fd, ns=(time_ns, time_ns))
