"""Blocks on a local disk: preallocated segment files of fixed slots, each with a header that vouches for its payload.

The index is rebuilt from the headers at opening. ``docs/format.md`` has the format, and why a crash cannot mix blocks.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final
from weakref import finalize

from kvmem.arguments import brief, check_bool, check_size, parse_bytes
from kvmem.errors import SpecError, TierError
from kvmem.tiers.base import Buffer, Capacity, Result, Status, Tier, check_batch
from kvmem.tiers.checksum import checksum
from kvmem.tiers.disk_moves import Answer, Read, Write, read_headers, zero_header
from kvmem.tiers.fault_log import FaultLog
from kvmem.tiers.file_io import DEPTH, Request, Scratch, open_io
from kvmem.tiers.files import Files
from kvmem.tiers.keys import KEY_BYTES
from kvmem.tiers.segments import Folder, Geometry, Segment
from kvmem.tiers.slot_index import Record, SlotIndex

__all__ = ["DiskTier"]

_ABSENT: Final = Result(Status.MISS, reason="the tier does not have it")
_READ_ONLY: Final = Result(Status.FAILED, reason="the tier was opened with read_only=True")
_RESCAN_SHARE: Final = 10  # a reader spends at most one part in so many looking for what the writer has added


class DiskTier(Tier):
    """A folder of blocks on a local disk. One process writes it, and others may read it at the same time.

    path: the folder; a writer makes it. capacity: the bytes of disk that it takes, all from the start; an int or a text
    such as ``"200GiB"``; readers need none. block_bytes: the largest payload. fingerprint: ``Identity.fingerprint``; a
    folder holds blocks of one. read_only: see the blocks of a writer in another process, also those to come.
    io: ``"io_uring"``, ``"threads"``, or ``"auto"``: io_uring where it works. direct: read and write past the page
    cache where the file system can. threads: of the pool. policy: what goes when the tier is full, as of an allocator.
    files: the system calls; tests replace them.

    ``SpecError`` for arguments, ``TierError`` if the folder cannot be used, which is then as it was. Waits for the disk
    as long as the operating system does. Cost of opening: one read of 4 KiB for each slot.
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
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
            raise SpecError(f"path: got {brief(path)}; name a folder")
        if not isinstance(fingerprint, bytes) or len(fingerprint) != KEY_BYTES:
            raise SpecError(
                f"fingerprint: got {brief(fingerprint)}; must be 32 bytes, as of Identity.fingerprint"
            )
        self._geometry = Geometry(check_size("block_bytes", block_bytes, most=1 << 40))
        self._read_only = check_bool("read_only", read_only)
        if capacity is None and not read_only:
            raise SpecError("capacity: got None; a writer needs the bytes of disk that it may take")
        counts = [] if read_only else self._geometry.segment_slots(parse_bytes("capacity", capacity or 0))
        check_bool("direct", direct)
        checksum(b"")  # SpecError without the package
        self._index = SlotIndex(policy)
        self._files, self._pid, self._log = files or Files(), os.getpid(), FaultLog(f"disk tier {os.fspath(path)!r}")
        self._lock = threading.Lock()  # of the index and the counts below; never held while a file is read or written
        self._idle = threading.Condition(self._lock)
        self._calls, self._closed = 0, False
        self._stuck = set[int]()  # slots that may hold any block, because they could not be read or cleared
        self._sync_lock, self._rescan_lock, self._rescan_after = threading.Lock(), threading.Lock(), 0.0
        self._scratch = Scratch(self._geometry.slot_bytes)
        self._io = open_io(io, self._files, check_size("threads", threads, most=256))
        try:
            self._folder = Folder(
                os.fspath(path), self._files, self._geometry, fingerprint, write=not read_only, direct=direct
            )
        except BaseException:
            self._io.close()
            raise
        self._closer = finalize(self, _close, self._folder, self._io)
        try:
            if not read_only:
                self._folder.resize(counts)
                self._recover()
            else:
                self._rescan()
        except BaseException:
            self._closer()
            raise

    # Opening: the index from the headers.

    def _recover(self) -> None:
        """Fill the index of a writer: records in the order in which they were put, so that the oldest goes first."""
        segments = list(self._folder.segments.values())
        self._index.reserve((max(self._folder.segments) + 1) * self._geometry.slots)
        found, free = list[tuple[int, Record]](), list[int]()
        for segment in segments:
            for slot, seen in self._headers(segment):
                if isinstance(seen, OSError):
                    self._stuck.add(slot)
                    self._log.warn("header", f"the header of slot {slot} cannot be read: {seen}")
                elif seen is None:
                    free.append(slot)
                else:
                    found.append((slot, seen))
        for slot in reversed(free):
            self._index.free(slot)
        found.sort(key=lambda one: one[1].stamp)
        lost = [self._index.fill(slot, record) for slot, record in found]
        self._clean(slot for slot in lost if slot is not None)

    def _headers(self, segment: Segment) -> Iterator[tuple[int, Record | OSError | None]]:
        first = segment.number * self._geometry.slots
        for index, seen in enumerate(read_headers(self._io, segment.fd, self._geometry, segment.count)):
            yield first + index, seen

    def _rescan(self) -> bool:
        """Bring a reader's index up to date; return whether anything may have changed. Bounded in its share of time."""
        if not self._rescan_lock.acquire(blocking=False):
            return False
        try:
            start = time.monotonic()
            if start < self._rescan_after:
                return False
            changed = False
            try:
                for segment in self._folder.refresh():
                    first = segment.number * self._geometry.slots
                    self._replace((first + i, None) for i in range(segment.count))
                for segment in self._folder.segments.values():
                    seen = self._files.stat(segment.fd)
                    if (time_ns := seen.st_mtime_ns) != segment.seen_ns:
                        segment.count = self._geometry.slots_in(seen.st_size)
                        self._replace(self._headers(segment))
                        segment.seen_ns, changed = time_ns, True
            except OSError as error:
                self._log.warn("rescan", f"what the writer has added cannot be read: {error}")
            end = time.monotonic()
            self._rescan_after = end + _RESCAN_SHARE * (end - start)
            return changed
        finally:
            self._rescan_lock.release()

    def _replace(self, headers: Iterable[tuple[int, Record | OSError | None]]) -> None:
        """Make a reader's index of these slots what their headers say."""
        seen = list(headers)
        with self._lock:
            self._index.reserve(max((slot for slot, _ in seen), default=0) + 1)
            for slot, record in seen:
                held = self._index.at(slot)
                if held is not None and held != record:
                    self._index.empty(slot)
                if isinstance(record, Record) and held != record:
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
            results, damaged = [_ABSENT] * len(keys), list[int]()
            requests = []
            for i, place in enumerate(self._find(keys)):
                if place is None:
                    continue
                slot, record = place
                if slot // self._geometry.slots not in self._folder.segments:  # the writer has just removed it
                    continue
                if len(buffers[i]) < record.length:
                    reason = f"the payload has {record.length} bytes, the buffer {len(buffers[i])}"
                    results[i] = Result(Status.MISS, reason=reason)
                else:
                    answer = partial(self._was_read, slot, record, results, i, damaged)
                    move = Read(self._scratch, record, buffers[i], answer)
                    requests.append(self._request(slot, move))
            self._io.run(requests)
            self._clean(damaged)
            return results

    def _find(self, keys: Sequence[bytes]) -> list[tuple[int, Record] | None]:
        with self._lock:
            places = [self._index.find(key) for key in keys]
        if self._read_only and None in places and self._rescan():
            with self._lock:
                places = [self._index.find(key) for key in keys]
        return places

    def _request(self, slot: int, move: Read | Write) -> Request:
        number, index = divmod(slot, self._geometry.slots)
        segment = self._folder.segments[number]
        if move.write:
            segment.dirty = True
        return Request(segment.fd, self._geometry.offset(index), move.write, move.begin, move.end)

    def _was_read(
        self, slot: int, record: Record, results: list[Result], i: int, damaged: list[int], answer: Answer
    ) -> None:
        if answer is None:
            results[i] = Result(Status.OK, record.length)
        elif isinstance(answer, OSError):
            results[i] = Result(Status.FAILED, reason=f"the disk cannot be read: {answer}")
            self._log.warn("read", results[i].reason)
        else:
            results[i] = self._misread(slot, record, damaged, answer)

    def _misread(self, slot: int, record: Record, damaged: list[int], why: str) -> Result:
        """Forget a record that was not found in its slot, and return the result."""
        with self._lock:
            if self._index.at(slot) != record:
                return Result(Status.MISS, reason="it was replaced while it was read")
            self._index.empty(slot)
        if self._read_only:
            return Result(Status.MISS, reason=f"the writer is replacing it, or it is damaged: {why}")
        damaged.append(slot)
        self._log.warn("corrupt", f"a block is damaged and counts as absent: {why}")
        return Result(Status.CORRUPT, reason=why)

    def put(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        check_batch(keys, buffers)
        with self._call():
            if self._read_only:
                return [_READ_ONLY] * len(keys)
            most = self._geometry.block_bytes
            results = [
                Result(Status.FULL, reason=f"the payload has {len(b)} bytes, a slot {most}")
                for b in buffers
            ]
            waiting = deque(i for i, buffer in enumerate(buffers) if len(buffer) <= most)
            while waiting:
                lost, requests = list[int](), list[Request]()
                while waiting and len(requests) < DEPTH and (place := self._take(keys[waiting[0]])) is not None:
                    i, (slot, stamp) = waiting.popleft(), place
                    record = Record(keys[i], len(buffers[i]), stamp)
                    answer = partial(self._was_written, slot, record, results, i, lost)
                    requests.append(self._request(slot, Write(self._scratch, record, buffers[i], answer)))
                if not requests:
                    for i in waiting:
                        results[i] = Result(Status.FULL, reason="every slot is being written")
                    break
                self._io.run(requests)
                self._clean(lost)
                self._announce(requests)
            return results

    def _take(self, key: bytes) -> tuple[int, int] | None:
        """Return a slot to write, which is then in no index, and the stamp of its record."""
        with self._lock:
            slot = self._index.take(key)
            return None if slot is None else (slot, self._index.next_stamp())

    def _was_written(
        self, slot: int, record: Record, results: list[Result], i: int, lost: list[int], answer: Answer
    ) -> None:
        if answer is None:
            with self._lock:
                loser = self._index.fill(slot, record)
            if loser is not None:
                lost.append(loser)
            results[i] = Result(Status.OK, record.length)
            return
        lost.append(slot)
        full = isinstance(answer, OSError) and answer.errno in (errno.ENOSPC, errno.EDQUOT)
        results[i] = Result(Status.FULL if full else Status.FAILED, reason=f"the disk cannot be written: {answer}")
        self._log.warn("write", results[i].reason)

    def _announce(self, requests: Sequence[Request]) -> None:
        written = {request.fd for request in requests}
        try:
            self._folder.announce([one for one in self._folder.segments.values() if one.fd in written])
        except OSError as error:
            self._log.warn("announce", f"readers will not see new blocks: {error}")

    def _clean(self, slots: Iterable[int]) -> dict[int, OSError]:
        """Overwrite the headers of slots that are in no index, and free them. Return those where that failed."""
        errors = dict[int, OSError]()
        slots = list(slots)
        self._io.run([self._request(slot, zero_header(partial(errors.__setitem__, slot))) for slot in slots])
        with self._lock:
            self._stuck.update(errors)
            for slot in slots:
                if slot not in errors:
                    self._index.free(slot)
        for slot, error in errors.items():
            self._log.warn("clean", f"slot {slot} cannot be cleared, and is not used: {error}")
        return errors

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
            # Also for what was evicted: until then its slot may still have the old block.
            errors = self._clean([*slots, *stuck])
            error = self._sync() or next(iter(errors.values()), None)
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
            slots = sum(segment.count for segment in list(self._folder.segments.values()))
            size = self._geometry.slot_bytes
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


def _close(folder: Folder, io: object) -> None:
    io.close()  # type: ignore[attr-defined]
    folder.close()
