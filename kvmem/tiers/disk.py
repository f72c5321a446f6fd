"""Blocks on a local disk: preallocated segment files of fixed slots, each with a header that vouches for its payload.

The index is rebuilt from the headers at opening. ``docs/format.md`` has the format, and why a crash cannot mix blocks.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final
from weakref import finalize

from kvmem.arguments import brief, check_bool, check_size, parse_bytes
from kvmem.errors import SpecError, TierError
from kvmem.tiers.base import Buffer, Capacity, Result, Status, Tier, check_batch
from kvmem.tiers.checksum import checksum
from kvmem.tiers.disk_moves import Clear, Read, ReadHeader, Scratch, Write
from kvmem.tiers.fault_log import FaultLog
from kvmem.tiers.file_io import DEPTH, PAGE, Move, PageIO, open_io, pages
from kvmem.tiers.files import Files
from kvmem.tiers.keys import KEY_BYTES
from kvmem.tiers.segments import Folder, Geometry, Segment
from kvmem.tiers.slot_index import Record, SlotIndex

__all__ = ["DiskTier"]

_ABSENT: Final = Result(Status.MISS, reason="the tier does not have it")
_BUSY: Final = Result(Status.FULL, reason="every slot is being written")
_READ_ONLY: Final = Result(Status.FAILED, reason="the tier was opened with read_only=True")
_HEADERS: Final = 256  # read at a time
_RESCAN_SHARE = 10  # a reader spends at most one part in so many looking for what the writer has added


class DiskTier(Tier):
    """A folder of blocks on a local disk. One process writes it, and others may read it at the same time.

    path: the folder; a writer makes it. capacity: the bytes of disk that it takes, all from the start; an int or a text
    such as ``"200GiB"``; readers need none. block_bytes: the largest payload. fingerprint: ``Identity.fingerprint``; a
    folder holds blocks of one. read_only: see the blocks of a writer in another process, also those to come.
    io: ``"io_uring"``, ``"threads"``, or ``"auto"``: io_uring where it works. direct: read and write past the page
    cache where the file system can. threads: of the pool. policy: what goes when the tier is full, as of an allocator.
    files: the system calls; tests replace them.

    ``SpecError`` for arguments, ``TierError`` if the folder cannot be used; no block of it was then touched. Waits for
    the disk as long as the operating system does. Cost of opening: one read of 4 KiB for each slot.
    """

    name = "disk"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        capacity: int | str | None = None,
        block_bytes: int,
        fingerprint: bytes,
        read_only: bool = False,
        io: str = "auto",
        direct: bool = True,
        threads: int = 4,
        policy: str = "lru",
        files: Files | None = None,
    ) -> None:
        folder = _folder_name(path)
        if not isinstance(fingerprint, bytes) or len(fingerprint) != KEY_BYTES:
            raise SpecError(f"fingerprint: got {brief(fingerprint)}; must be 32 bytes, as of Identity.fingerprint")
        self._geometry = Geometry(check_size("block_bytes", block_bytes, most=1 << 40))
        self._read_only = check_bool("read_only", read_only)
        if capacity is None and not read_only:
            raise SpecError("capacity: got None; a writer needs the bytes of disk that it may take")
        counts = [] if read_only else self._geometry.segment_slots(parse_bytes("capacity", capacity or 0))
        check_bool("direct", direct)
        checksum(b"")  # SpecError without the package
        self._index = SlotIndex(policy)
        self._files, self._pid, self._log = files or Files(), os.getpid(), FaultLog(f"disk tier {folder!r}")
        self._lock = threading.Lock()  # of the index and the counts below; never held while a file is read or written
        self._idle = threading.Condition(self._lock)
        self._calls, self._closed = 0, False
        self._stuck = set[int]()  # slots that may hold any block, because they could not be read or cleared
        self._sync_lock, self._rescan_lock, self._rescan_after = threading.Lock(), threading.Lock(), 0.0
        self._scratch = Scratch(self._geometry.slot_bytes)
        self._io = open_io(io, self._files, check_size("threads", threads, most=256))
        try:
            self._folder = Folder(folder, self._files, self._geometry, fingerprint, not read_only, direct)
        except BaseException:
            self._io.close()
            raise
        self._closer = finalize(self, _close, self._folder, self._io)
        self._open(counts)

    # Opening, and for readers again and again: the index from the headers.

    def _open(self, counts: list[int]) -> None:
        try:
            if self._read_only:
                self._rescan()
            else:
                self._folder.resize(counts)
                self._recover()
        except BaseException:
            self._closer()
            raise

    def _recover(self) -> None:
        """Fill the index of a writer: records in the order in which they were put, so that the oldest goes first."""
        found, free = list[tuple[int, Record]](), list[int]()
        for segment in self._folder.segments.values():
            for slot, header in self._headers(segment):
                if header.error is not None:
                    self._stuck.add(slot)
                    self._log.warn("header", f"the header of slot {slot} cannot be read: {header.error}")
                elif header.record is None:
                    free.append(slot)
                else:
                    found.append((slot, header.record))
        self._index.reserve(max(self._folder.slots(one).stop for one in self._folder.segments.values()))
        for slot in reversed(free):
            self._index.free(slot)
        found.sort(key=lambda one: one[1].stamp)
        self._clear([self._index.fill(slot, record) for slot, record in found])

    def _headers(self, segment: Segment) -> Iterator[tuple[int, ReadHeader]]:
        slots, memory, most = self._folder.slots(segment), pages(PAGE * _HEADERS), self._geometry.block_bytes
        for batch in (slots[first : first + _HEADERS] for first in range(0, len(slots), _HEADERS)):
            moves = [
                ReadHeader(segment.fd, self._folder.place(slot)[1], memory[PAGE * i :][:PAGE], most)
                for i, slot in enumerate(batch)
            ]
            self._io.run(moves)
            yield from zip(batch, moves, strict=True)

    def _rescan(self) -> bool:
        """Bring a reader's index up to date; return whether anything may have changed. Bounded in its share of time."""
        start = time.monotonic()
        if start < self._rescan_after or not self._rescan_lock.acquire(blocking=False):
            return False
        changed = False
        try:
            for segment in self._folder.refresh():
                self._replace((slot, None) for slot in self._folder.slots(segment))
            for segment in self._folder.segments.values():
                seen = self._files.stat(segment.fd)
                if seen.st_mtime_ns != segment.seen_ns:
                    before, segment.count = self._folder.slots(segment), self._geometry.slots_in(seen.st_size)
                    self._replace((slot, header.record) for slot, header in self._headers(segment))
                    self._replace((slot, None) for slot in before[segment.count :])
                    segment.seen_ns, changed = seen.st_mtime_ns, True
        except OSError as error:
            self._log.warn("rescan", f"what the writer has added cannot be read: {error}")
        finally:
            end = time.monotonic()
            self._rescan_after = end + _RESCAN_SHARE * (end - start)
            self._rescan_lock.release()
        return changed

    def _replace(self, headers: Iterable[tuple[int, Record | None]]) -> None:
        """Make a reader's index of these slots what their headers say."""
        seen = list(headers)
        with self._lock:
            self._index.reserve(max((slot for slot, _ in seen), default=0) + 1)
            for slot, record in seen:
                held = self._index.at(slot)
                if held is not None and held != record:
                    self._index.empty(slot)
                if record is not None and held != record:
                    self._index.fill(slot, record)

    # The interface.

    @contextmanager
    def _call(self) -> Iterator[None]:
        if os.getpid() != self._pid:
            raise TierError(f"the tier was opened by process {self._pid}; open it in this one, with read_only=True")
        with self._lock:
            if self._closed:
                raise TierError("the disk tier is closed")
            self._calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                self._idle.notify_all()

    def contains(self, keys: Sequence[bytes]) -> int:
        check_batch(keys)
        with self._call():
            run = self._leading_run(keys)
            if self._read_only and run < len(keys) and self._rescan():
                run = self._leading_run(keys)
            return run

    def _leading_run(self, keys: Sequence[bytes]) -> int:
        with self._lock:
            return next((i for i, key in enumerate(keys) if self._index.find(key, hit=False) is None), len(keys))

    def get(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        check_batch(keys, buffers, writable=True)
        with self._call():
            results, moves, damaged = [_ABSENT] * len(keys), dict[int, Read](), list[int]()
            for i, (place, buffer) in enumerate(zip(self._find(keys), buffers, strict=True)):
                if place is None:
                    continue
                slot, record = place
                segment, offset = self._folder.place(slot)
                if len(buffer) < record.length:
                    reason = f"the payload has {record.length} bytes, the buffer {len(buffer)}"
                    results[i] = Result(Status.MISS, reason=reason)
                elif segment is not None:
                    moves[i] = Read(segment.fd, offset, self._scratch, slot, record, buffer)
            self._io.run(list(moves.values()))
            for i, move in moves.items():
                results[i] = self._was_read(move, damaged)
            self._clear(damaged)
            return results

    def _find(self, keys: Sequence[bytes]) -> list[tuple[int, Record] | None]:
        with self._lock:
            places = [self._index.find(key) for key in keys]
        if self._read_only and None in places and self._rescan():
            with self._lock:
                places = [self._index.find(key) for key in keys]
        return places

    def _was_read(self, move: Read, damaged: list[int]) -> Result:
        if move.error is not None:
            self._log.warn("read", reason := f"the disk cannot be read: {move.error}")
            return Result(Status.FAILED, reason=reason)
        if not move.wrong:
            return Result(Status.OK, move.record.length)
        with self._lock:
            if self._index.at(move.slot) != move.record:
                return Result(Status.MISS, reason="it was replaced while it was read")
            self._index.empty(move.slot)
        if self._read_only:
            return Result(Status.MISS, reason=f"the writer is replacing it, or it is damaged: {move.wrong}")
        damaged.append(move.slot)
        self._log.warn("corrupt", f"a block is damaged and counts as absent: {move.wrong}")
        return Result(Status.CORRUPT, reason=move.wrong)

    def put(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        check_batch(keys, buffers)
        with self._call():
            if self._read_only:
                return [_READ_ONLY] * len(keys)
            most, results = self._geometry.block_bytes, [_BUSY] * len(keys)
            waiting = deque[int]()
            for i, buffer in enumerate(buffers):
                if len(buffer) <= most:
                    waiting.append(i)
                else:
                    results[i] = Result(Status.FULL, reason=f"the payload has {len(buffer)} bytes, a slot {most}")
            while moves := self._take(keys, buffers, waiting):
                segments = self._write(moves)
                lost = list[int | None]()
                for i, move in moves.items():
                    results[i] = self._was_written(move, lost)
                self._clear(lost)
                self._announce(segments)
            return results

    def _take(self, keys: Sequence[bytes], buffers: Sequence[Buffer], waiting: deque[int]) -> dict[int, Write]:
        """Take slots for the first of those that wait; a slot taken is in no index."""
        moves = dict[int, Write]()
        with self._lock:
            while waiting and len(moves) < DEPTH and (slot := self._index.take(keys[waiting[0]])) is not None:
                i = waiting.popleft()
                record = Record(keys[i], len(buffers[i]), self._index.next_stamp())
                segment, offset = self._folder.place(slot)
                assert segment is not None
                moves[i] = Write(segment.fd, offset, self._scratch, slot, record, buffers[i])
        return moves

    def _was_written(self, move: Write, lost: list[int | None]) -> Result:
        if move.error is None:
            with self._lock:
                lost.append(self._index.fill(move.slot, move.record))
            return Result(Status.OK, move.record.length)
        lost.append(move.slot)
        self._log.warn("write", reason := f"the disk cannot be written: {move.error}")
        full = move.error.errno in (errno.ENOSPC, errno.EDQUOT)
        return Result(Status.FULL if full else Status.FAILED, reason=reason)

    def _write(self, moves: Mapping[int, Move]) -> list[Segment]:
        """Run the moves, and return the segments that they write."""
        fds = {move.fd for move in moves.values()}
        segments = [segment for segment in self._folder.segments.values() if segment.fd in fds]
        for segment in segments:
            segment.dirty = True
        self._io.run(list(moves.values()))
        for segment in segments:
            segment.dirty = True  # again: a sync that began meanwhile need not cover the write
        return segments

    def _announce(self, segments: list[Segment]) -> None:
        try:
            self._folder.announce(segments)
        except OSError as error:
            self._log.warn("announce", f"readers will not see new blocks: {error}")

    def _clear(self, slots: Iterable[int | None]) -> OSError | None:
        """Overwrite the headers of slots that are in no index, and free them. Return an error if one could not be."""
        moves = dict[int, Clear]()
        for slot in slots:
            segment, offset = (None, 0) if slot is None else self._folder.place(slot)
            if slot is not None and segment is not None:
                moves[slot] = Clear(segment.fd, offset)
        self._write(moves)
        error = None
        with self._lock:
            for slot, move in moves.items():
                if move.error is None:
                    self._index.free(slot)
                else:
                    self._stuck.add(slot)
                    error = move.error
        if error is not None:
            self._log.warn("clear", f"slots cannot be cleared, and are not used: {error}")
        return error

    def delete(self, keys: Sequence[bytes]) -> list[Result]:
        """Also after a loss of power the keys are gone. Cost: a sync of the files that were written since the last."""
        check_batch(keys)
        with self._call():
            if self._read_only:
                return [_READ_ONLY] * len(keys)
            with self._lock:
                places = [self._index.find(key, hit=False) for key in dict.fromkeys(keys)]
                slots = [place[0] for place in places if place is not None]
                found = {self._index.empty(slot).key for slot in slots}
                stuck, self._stuck = self._stuck, set()
            failed = self._clear([*slots, *stuck])
            error = self._sync() or failed  # synced also for evicted blocks, which may not be overwritten yet
            if error is not None:
                reason = f"it may come back with the next opening: {error}"
                return [Result(Status.FAILED, reason=reason)] * len(keys)
            answers = dict.fromkeys(found, Result(Status.OK))
            return [answers.pop(key, _ABSENT) for key in keys]

    def _sync(self) -> OSError | None:
        with self._sync_lock:
            try:
                self._folder.sync()
            except OSError as error:
                self._log.warn("sync", f"the disk cannot be synced: {error}")
                return error
        return None

    def capacity(self) -> Capacity:
        """Return whole slots: a payload takes one, whatever its size."""
        with self._call(), self._lock:
            slots, size = sum(one.count for one in list(self._folder.segments.values())), self._geometry.slot_bytes
            return Capacity(slots * size, len(self._index) * size, len(self._index))

    def close(self) -> None:
        """Wait for calls under way, sync what was put, and release the folder."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            while self._calls:
                self._idle.wait()
        self._sync()
        self._closer()


def _folder_name(path: object) -> str:
    name = os.fspath(path) if isinstance(path, (str, os.PathLike)) else path
    if not isinstance(name, str) or not name or "\0" in name:
        raise SpecError(f"path: got {brief(path)}; must be the name of a folder")
    return name


def _close(folder: Folder, io: PageIO) -> None:
    io.close()
    folder.close()
