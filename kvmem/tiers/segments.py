"""The folder of a disk tier: its lock and its preallocated segment files. ``docs/format.md`` gives the layout."""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
import struct
import time
from contextlib import suppress
from typing import Final
from weakref import WeakSet

from kvmem.arguments import INT32_MAX, format_bytes
from kvmem.errors import SpecError, TierError
from kvmem.tiers.checksum import checksum
from kvmem.tiers.file_io import PAGE, padded, pages
from kvmem.tiers.files import Files

__all__ = ["Folder", "Geometry", "Segment"]

SEGMENT_BYTES = 1 << 30  # the largest segment, unless one slot is larger; part of the format
LOCK_NAME: Final = "kvmem.lock"
_SEGMENTS: Final = 100_000
_NAME: Final = re.compile(r"segment-(\d{5})\.kvmem")
_MAGIC: Final = b"kvmemseg"
_VERSION: Final = 1
_FIELDS: Final = struct.Struct("<8sI32sQ")  # magic, version, fingerprint, block_bytes; then their checksum


class Geometry:
    """The sizes that follow from the largest payload."""

    def __init__(self, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self.slot_bytes = PAGE + padded(block_bytes)  # a page with the header in front
        self.slots = max(1, (SEGMENT_BYTES - PAGE) // self.slot_bytes)  # of a full segment

    def slots_in(self, file_bytes: int) -> int:
        return max(0, min(self.slots, (file_bytes - PAGE) // self.slot_bytes))

    def file_bytes(self, slots: int) -> int:
        return PAGE + slots * self.slot_bytes

    def segment_slots(self, capacity: int) -> list[int]:
        """Return the number of slots of each segment, which together take at most ``capacity`` bytes."""
        full, rest = divmod(capacity, self.file_bytes(self.slots))
        most = min(_SEGMENTS, INT32_MAX // self.slots - 1)  # their names have five digits, and ids of slots are int32
        if full >= most:
            raise SpecError(
                f"capacity: got {capacity}; with block_bytes={self.block_bytes} the largest capacity that works is "
                f"{most * self.file_bytes(self.slots) - 1}"
            )
        counts = [self.slots] * full + [max(0, rest - PAGE) // self.slot_bytes]
        counts = [count for count in counts if count]
        if not counts:
            least = self.file_bytes(1)
            raise SpecError(f"capacity: got {capacity}; one block of {self.block_bytes} bytes takes {least}: give more")
        return counts


class Segment:
    """An open segment file."""

    def __init__(self, name: str, fd: int) -> None:
        self.name, self.fd, self.number = name, fd, int(name[8:13])
        self.count = 0  # slots
        self.blank = False  # nothing was ever written to it: whoever made it did not get to its end
        self.dirty = False  # written to since the last sync
        self.seen_ns = -1  # the time of its last change when its headers were read, for readers


class Folder:
    """An open folder, its lock if it was opened for writing, and its segments.

    ``TierError`` says what is wrong with the folder. Nothing in it was then changed, but for the lock file's text.
    """

    def __init__(self, path: str, files: Files, geometry: Geometry, fingerprint: bytes, write: bool, direct: bool):
        self.path, self._files, self._geometry = path, files, geometry
        self._superblock = _superblock(fingerprint, geometry.block_bytes)
        self._flags, self._direct = os.O_RDWR if write else os.O_RDONLY, direct
        self._fds: list[int] = []
        self.segments: dict[int, Segment] = {}
        self._clock_ns = 0
        try:
            if write:
                files.make_folder(path)
            self._fd = self._keep(files.open_folder(path))
            if write:
                self._lock()
            for name in sorted(filter(_NAME.fullmatch, files.names(self._fd))):
                self._add(name)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError) and not isinstance(error, TierError):
                raise self._error(error) from error
            raise
        _OPEN.add(self)

    def _keep(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    def _error(self, error: OSError) -> TierError:
        cure = {
            errno.ENOTDIR: "name a folder",
            errno.EEXIST: "name a folder",
            errno.ENOENT: "a writer makes the folder: open one first",
            errno.EACCES: "give this user the permission, or choose another folder",
            errno.EROFS: "choose a folder that is writable, or open it with read_only=True",
            errno.ENOSPC: "choose a smaller capacity, or another file system",
        }.get(error.errno or 0, "choose another folder")
        return TierError(f"path: {self.path!r} cannot be used: {error.strerror or error}; {cure}")

    def _lock(self) -> None:
        fd = self._keep(self._checked_open(LOCK_NAME, os.O_RDWR | os.O_CREAT))
        try:
            self._files.lock(fd)
        except BlockingIOError as e:
            text = bytearray(80)
            count = self._files.preadv(fd, [memoryview(text)], 0)
            holder = bytes(text[:count]).decode("ascii", "replace").strip() or "another process"
            raise TierError(
                f"path: {self.path!r} is being written by {holder}; a folder has one writer: close it, choose another "
                "folder, or open this one with read_only=True"
            ) from e
        self._files.truncate(fd, 0)
        self._files.pwritev(fd, [memoryview(f"process {os.getpid()} on {socket.gethostname()}\n".encode())], 0)

    def _checked_open(self, name: str, flags: int) -> int:
        """Open a regular file of this folder. ``TierError`` for a link or anything else of that name."""
        try:
            fd = self._files.open(self._fd, name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise self._refused(name, "is no regular file") from error
            raise
        try:
            if not stat.S_ISREG(self._files.stat(fd).st_mode):
                raise self._refused(name, "is no regular file")
        except BaseException:
            self._files.close(fd)
            raise
        return fd

    def _refused(self, name: str, why: str) -> TierError:
        return TierError(f"path: {name} in {self.path!r} {why}; remove it, or choose another folder")

    def _add(self, name: str, create: int = 0) -> None:
        """Open a segment, past the page cache where the file system allows it, and check its superblock."""
        for direct in (True, False) if self._direct else (False,):
            fd = -1
            try:
                fd = self._checked_open(name, self._flags | create | (os.O_DIRECT if direct else 0))
                self._check(Segment(name, fd))
                return
            except BaseException as error:
                if fd >= 0:
                    self._files.close(fd)
                if not direct or not isinstance(error, OSError) or error.errno != errno.EINVAL:
                    raise

    def _check(self, segment: Segment) -> None:
        page = pages(PAGE)
        found = bytes(page[: self._files.preadv(segment.fd, [page], 0)])
        if found[: len(self._superblock)] != self._superblock:
            if found.strip(b"\0"):
                raise TierError(f"path: {segment.name} in {self.path!r} {_difference(found, self._superblock)}")
            segment.blank = True
        segment.count = self._geometry.slots_in(self._files.stat(segment.fd).st_size)
        self._keep(segment.fd)
        self.segments[segment.number] = segment

    def resize(self, counts: list[int]) -> None:
        """Make the segments have these numbers of slots: create, preallocate, cut off and remove.

        ``TierError`` if there is no room; what was created is then removed again.
        """
        files, created = self._files, list[str]()
        sizes = [self._geometry.file_bytes(count) for count in counts]
        try:
            self._check_room(sum(sizes))
            for number, size in enumerate(sizes):
                if number not in self.segments:
                    created.append(name := f"segment-{number:05}.kvmem")
                    self._add(name, os.O_CREAT)
                segment = self.segments[number]
                files.allocate(segment.fd, size)
                if segment.blank:
                    page = pages(PAGE)
                    page[:] = self._superblock.ljust(PAGE, b"\0")
                    files.pwritev(segment.fd, [page], 0)
                    segment.blank = False
                if files.stat(segment.fd).st_size > size:
                    files.truncate(segment.fd, size)
                segment.count = counts[number]
            for number in [number for number in self.segments if number >= len(counts)]:
                files.unlink(self._fd, self.segments.pop(number).name)
            files.sync(self._fd)
        except OSError as error:
            for name in created:
                with suppress(OSError):  # it was not made
                    files.unlink(self._fd, name)
            if isinstance(error, TierError):
                raise
            raise self._error(error) from error

    def _check_room(self, size: int) -> None:
        held = sum(self._files.stat(segment.fd).st_blocks * 512 for segment in self.segments.values())
        free = self._files.free_bytes(self._fd)
        if size > held + free:
            raise TierError(
                f"capacity: {self.path!r} needs {format_bytes(size - held)} more, and its file system has "
                f"{format_bytes(free)}; the largest capacity that works is {held + free}"
            )

    def slots(self, segment: Segment) -> range:
        """Return the numbers of a segment's slots."""
        first = segment.number * self._geometry.slots
        return range(first, first + segment.count)

    def place(self, slot: int) -> tuple[Segment | None, int]:
        """Return the segment of a slot, None if the writer has removed it, and the slot's offset."""
        number, index = divmod(slot, self._geometry.slots)
        return self.segments.get(number), self._geometry.file_bytes(index)

    def refresh(self) -> list[Segment]:
        """For readers: open segments that are new, forget those that were removed, and return these; their files stay
        open for gets that are under way. ``OSError`` if the folder cannot be read."""
        gone = [segment for segment in self.segments.values() if self._files.stat(segment.fd).st_nlink == 0]
        for segment in gone:
            del self.segments[segment.number]
        for name in filter(_NAME.fullmatch, self._files.names(self._fd)):
            if int(name[8:13]) not in self.segments:
                self._add(name)
        return gone

    def announce(self, segments: list[Segment]) -> None:
        """Give segments a new time of change, once what was written can be read: the time of the write itself is too
        early, as a reader might have looked in between.
        """
        self._clock_ns = max(self._clock_ns + 1, time.time_ns())
        for segment in segments:
            self._files.touch(segment.fd, self._clock_ns)

    def sync(self) -> None:
        """Wait until all that was written is on the disk. ``OSError`` if it is not."""
        for segment in self.segments.values():
            if segment.dirty:
                segment.dirty = False
                try:
                    self._files.sync(segment.fd)
                except OSError:
                    segment.dirty = True
                    raise

    def close(self) -> None:
        """Close all files, which releases the lock."""
        _OPEN.discard(self)
        while self._fds:
            with suppress(OSError):  # the descriptor is closed all the same
                self._files.close(self._fds.pop())


_OPEN: WeakSet[Folder] = WeakSet()


def _close_all() -> None:
    """In a child that was forked: it must not keep its parent's lock."""
    for folder in list(_OPEN):
        folder.close()


os.register_at_fork(after_in_child=_close_all)


def _superblock(fingerprint: bytes, block_bytes: int) -> bytes:
    fields = _FIELDS.pack(_MAGIC, _VERSION, fingerprint, block_bytes)
    return fields + checksum(fields)


def _difference(found: bytes, wanted: bytes) -> str:
    """Return what is wrong with a superblock, for a message."""
    if len(found) < len(wanted) or found[:8] != _MAGIC:
        return "is no segment of kvmem; remove it, or choose another folder"
    _, version, fingerprint, block_bytes = _FIELDS.unpack(found[: _FIELDS.size])
    if version != _VERSION:
        return f"has format version {version}, and this kvmem reads version {_VERSION}; choose another folder"
    if checksum(found[: _FIELDS.size]) != found[_FIELDS.size : len(wanted)]:
        return "has a damaged superblock; remove it"
    if fingerprint != wanted[12:44]:
        return (
            f"holds blocks of another model, spec or rank (fingerprint {fingerprint[:4].hex()}, not "
            f"{wanted[12:16].hex()}); give each its own folder"
        )
    return f"has block_bytes={block_bytes}; open it with that, or choose another folder"
