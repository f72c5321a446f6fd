"""A folder as a tier: a file for each payload, written beside and renamed, so that any number of processes share it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from kvmem.arguments import brief, parse_bytes
from kvmem.chunks.format import atomic_file, open_plain
from kvmem.errors import SpecError, TierError
from kvmem.tiers.base import Buffer, Capacity, Result, Status, Tier
from kvmem.tiers.keys import KEY_BYTES
from kvmem.tiers.record import HEADER_BYTES, header_of, payload_bytes, verify

__all__ = ["FolderTier"]

_SUFFIX: Final = ".kvc"


class FolderTier(Tier):
    """Keeps each payload in a file of its own, named by its key; meant for chunks of a megabyte and more.

    folder: made if it is not there. memory: the most bytes of payloads, such as ``"20GiB"``; the payloads that were
    used longest ago, by any process, are deleted to make room. None: no limit. Several processes that write at once may
    pass the limit by one payload each.

    ``TierError`` for a folder that cannot be made, read or written. Cost: a put lists the folder.
    """

    name = "folder"

    def __init__(self, folder: str | os.PathLike[str], memory: int | str | None = None) -> None:
        self._limit = None if memory is None else parse_bytes("memory", memory)
        self._folder: Path | None = Path(folder)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(self._folder / "writable"):
                pass
            (self._folder / "writable").unlink(missing_ok=True)
            for left in self._folder.glob(".*.tmp"):  # of a process that was killed while it wrote
                with suppress(FileNotFoundError):
                    if time.time() - left.lstat().st_mtime > 3600:
                        left.unlink()
        except OSError as error:
            raise TierError(f"folder: cannot use {folder!s}: {error}") from error

    def contains(self, keys: Sequence[bytes]) -> int:
        for count, key in enumerate(keys):
            if not os.path.lexists(self._path(key)):
                return count
        return len(keys)

    def get(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        return [self._get(self._path(key), key, buffer) for key, buffer in zip(keys, buffers, strict=True)]

    def _get(self, path: Path, key: bytes, buffer: Buffer) -> Result:
        if not os.path.lexists(path):
            return Result(Status.MISS, reason="it is not in the folder")
        try:
            with open_plain(path) as file:
                header = file.read(HEADER_BYTES)
                length = payload_bytes(header, key)
                if isinstance(length, str):
                    return Result(Status.CORRUPT, reason=length)
                if length > len(buffer):
                    return Result(Status.MISS, reason=f"it has {length} bytes, and the buffer has {len(buffer)}")
                got = 0
                while got < length and (more := file.readinto(buffer[got:length])):  # type: ignore[attr-defined]
                    got += more
                with suppress(OSError):  # of another user's file
                    os.utime(file.fileno())  # what is used last is deleted last
        except OSError as error:  # a TierError too; FileNotFoundError where another process has deleted it
            return Result(Status.FAILED, reason=str(error))
        if why := verify(header, key, buffer[:got]):
            return Result(Status.CORRUPT, reason=why)
        return Result(Status.OK, length)

    def put(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        return [self._put(self._path(key), key, buffer) for key, buffer in zip(keys, buffers, strict=True)]

    def _put(self, path: Path, key: bytes, buffer: Buffer) -> Result:
        try:
            if self._limit is not None and not self._make_room(len(buffer) + HEADER_BYTES, path.name):
                return Result(Status.FULL, reason=f"{len(buffer)} bytes do not fit a folder of {self._limit}")
            with atomic_file(path) as file:
                file.write(header_of(key, buffer))
                file.write(buffer)
        except OSError as error:
            return Result(Status.FAILED, reason=str(error))
        return Result(Status.OK, len(buffer))

    def _make_room(self, size: int, name: str) -> bool:
        found = sorted(entry for entry in self._entries() if entry[2] != name)
        over = sum(length for _, length, _ in found) + size - (self._limit or 0)
        for _, length, other in found if size <= (self._limit or 0) else ():
            if over <= 0:
                break
            with suppress(FileNotFoundError):
                self._path_of(other).unlink()
            over -= length
        return over <= 0

    def delete(self, keys: Sequence[bytes]) -> list[Result]:
        found = []
        for path in map(self._path, keys):
            try:
                path.unlink()
                found.append(Result(Status.OK))
            except FileNotFoundError:
                found.append(Result(Status.MISS, reason="it is not in the folder"))
            except OSError as error:
                found.append(Result(Status.FAILED, reason=str(error)))
        return found

    def capacity(self) -> Capacity:
        try:
            found = self._entries()
        except OSError as error:
            if isinstance(error, TierError):
                raise
            found = []  # somebody has removed the folder
        return Capacity(self._limit, sum(size for _, size, _ in found), len(found))

    def close(self) -> None:
        self._folder = None

    def _entries(self) -> list[tuple[int, int, str]]:
        """The time of the last use, the bytes and the name of each payload."""
        found = []
        with os.scandir(self._path_of("")) as entries:
            for entry in entries:
                if entry.name.endswith(_SUFFIX):
                    with suppress(FileNotFoundError):
                        known = entry.stat(follow_symlinks=False)
                        found.append((known.st_mtime_ns, known.st_size, entry.name))
        return found

    def _path(self, key: bytes) -> Path:
        if not isinstance(key, bytes) or len(key) != KEY_BYTES:
            raise SpecError(f"keys: got {brief(key)}; must be {KEY_BYTES} bytes each")
        return self._path_of(key.hex() + _SUFFIX)

    def _path_of(self, name: str) -> Path:
        if self._folder is None:
            raise TierError("folder: this tier is closed")
        return self._folder / name
