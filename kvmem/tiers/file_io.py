"""Reads and writes of pages, many at a time: by a pool of threads with preadv and pwritev, or by io_uring."""

from __future__ import annotations

import errno
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Final, NamedTuple, Protocol

import numpy as np

from kvmem.arguments import check_choice
from kvmem.errors import SpecError, TierError
from kvmem.tiers.base import Buffer
from kvmem.tiers.files import Files

__all__ = [
    "DEPTH",
    "PAGE",
    "PageIO",
    "Request",
    "Scratch",
    "ThreadIO",
    "UringIO",
    "open_io",
    "padded",
    "slot_views",
    "transfer",
]

PAGE: Final = 4096  # what offsets, lengths and addresses are multiples of: enough for O_DIRECT on every file system
DEPTH: Final = 32  # requests of one call that are under way at a time
_STALLS: Final = 16  # signals and short transfers without progress, after which a request has failed


def padded(size: int) -> int:
    """Return ``size``, rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


class Request(NamedTuple):
    """One contiguous transfer. ``begin`` returns the memory when the transfer starts; ``end`` is called once with None
    when every byte was moved, else with the error. Both may run in another thread, and raise nothing but ``OSError``
    (``begin``)."""

    fd: int
    offset: int
    write: bool
    begin: Callable[[], Sequence[Buffer]]
    end: Callable[[OSError | None], None]


class PageIO(Protocol):
    """A way to read and write. Thread-safe."""

    name: str

    def run(self, requests: Sequence[Request]) -> None:
        """Return when every request has ended. Requests run in any order."""

    def close(self) -> None:
        """Release threads or rings. REQUIRES: no ``run`` is under way."""


class Scratch:
    """Page-aligned memory for headers, last pages, and payloads of buffers that are not aligned. Thread-safe.

    size: bytes of each piece. At most ``DEPTH`` pieces are kept for the next request.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._free: deque[memoryview] = deque(maxlen=DEPTH)

    def take(self) -> memoryview:
        """Return a piece with any content; ``OSError`` without memory."""
        try:
            return self._free.pop()
        except IndexError:
            return memoryview(mmap.mmap(-1, self._size))

    def give(self, piece: memoryview) -> None:
        """Take a piece back."""
        self._free.append(piece)


def slot_views(scratch: Buffer, buffer: Buffer, length: int) -> tuple[list[Buffer], int]:
    """Return the memory of a slot, header's page first, and how many bytes of the payload lie in the buffer itself.

    Those are the whole pages of a buffer that is aligned. The rest lies in ``scratch``, where it has the same offset as
    in the slot.
    """
    whole = length - length % PAGE
    if whole and np.frombuffer(buffer, np.uint8).ctypes.data % PAGE:
        whole = 0
    if not whole:
        return [scratch[: PAGE + padded(length)]], 0
    views = [scratch[:PAGE], buffer[:whole]]
    if whole < length:
        views.append(scratch[PAGE + whole : PAGE + padded(length)])
    return views, whole


class _Move:
    """A request under way: which of its bytes are left after short transfers."""

    def __init__(self, request: Request) -> None:
        self.request, self.views = request, list(request.begin())
        self.offset, self._stalls = request.offset, 0

    def rest(self) -> list[Buffer]:
        return self.views

    def moved(self, count: int) -> bool:
        """Note that so many bytes were moved; return whether all are. ``OSError`` if there is no progress."""
        if count == sum(map(len, self.views)):
            return True
        pages = count - count % PAGE  # O_DIRECT goes on at a page
        self.offset += pages
        if count == 0 and not self.request.write:
            raise OSError(errno.EIO, "the file ends within the slot")
        self.stalled(not pages)
        while pages:
            pages -= (step := min(pages, len(self.views[0])))
            self.views[0] = self.views[0][step:]
            if not self.views[0]:
                del self.views[0]
        return False

    def stalled(self, yes: bool = True) -> None:
        self._stalls = self._stalls + 1 if yes else 0
        if self._stalls > _STALLS:
            raise OSError(errno.EIO, "transfers stop short, again and again")


def transfer(files: Files, request: Request) -> None:
    """Run one request in this thread."""
    try:
        move = _Move(request)
        call = files.pwritev if request.write else files.preadv
        while True:
            try:
                if move.moved(call(request.fd, move.rest(), move.offset)):
                    break
            except InterruptedError:
                move.stalled()
    except OSError as error:
        request.end(error)
    else:
        request.end(None)


class ThreadIO:
    """A pool of threads. A request alone runs in the thread of its caller, and so do all without other threads."""

    name = "threads"

    def __init__(self, files: Files, threads: int) -> None:
        self._files, self._threads = files, threads
        self._pool = ThreadPoolExecutor(threads, "kvmem-disk")

    def run(self, requests: Sequence[Request]) -> None:
        waiting = iter(requests)  # the threads take from it in turn

        def work() -> None:
            for request in waiting:
                transfer(self._files, request)

        if len(requests) <= 1 or self._threads == 1:
            return work()
        futures = [self._pool.submit(work) for _ in range(min(self._threads, len(requests)))]
        try:
            for future in futures:
                future.result()
        finally:
            wait(futures)  # an exception, say of ctrl-C, must not leave buffers in use

    def close(self) -> None:
        self._pool.shutdown()


class UringIO:
    """io_uring through the package liburing: a ring for each call under way, kept for the next one.

    The package's own waits hold the GIL; here an eventfd announces completions, and Python waits for it without.
    """

    name = "io_uring"

    def __init__(self) -> None:
        try:
            import liburing
        except ImportError as e:
            raise SpecError("io: 'io_uring' needs the package liburing: pip install 'kvmem[io_uring]'") from e
        self._lib, self._rings = liburing, deque[_Ring]()
        try:
            self._rings.append(_Ring(liburing))
        except OSError as e:
            raise TierError(f"io: the kernel refuses io_uring ({e.strerror}); use io='threads'") from e

    def run(self, requests: Sequence[Request]) -> None:
        try:
            ring = self._rings.pop()
        except IndexError:
            try:
                ring = _Ring(self._lib)
            except OSError as error:
                for request in requests:
                    request.end(error)
                return
        try:
            ring.run(requests)
        finally:
            if ring.broken is None:
                self._rings.append(ring)
            else:
                ring.close()

    def close(self) -> None:
        while self._rings:
            self._rings.pop().close()


def open_io(io: str, files: Files, threads: int) -> PageIO:
    """Return the way that ``io`` names; ``"auto"`` is io_uring where the package is installed and the kernel allows it.

    ``SpecError`` for another name or without the package, ``TierError`` if the kernel refuses.
    """
    check_choice("io", io, ("auto", "io_uring", "threads"))
    if io != "threads":
        try:
            return UringIO()
        except (SpecError, TierError):
            if io == "io_uring":
                raise
    return ThreadIO(files, threads)


class _Ring:
    """One ring, used by one thread at a time."""

    def __init__(self, lib: Any) -> None:
        self._lib = lib
        self._ring, self._cqe = lib.Ring(), lib.Cqe()
        self._flying: dict[int, tuple[_Move, Any]] = {}  # by id; the kernel uses this memory
        self._ended: deque[tuple[int, int]] = deque()  # what was taken from the ring: id, and bytes or a negative error
        self._last_id = 0
        self.broken: OSError | None = None  # an entry that the kernel did not take may still lie in the queue
        lib.io_uring_queue_init(DEPTH, self._ring, 0)
        self._event = os.eventfd(0, os.EFD_CLOEXEC)
        lib.io_uring_register_eventfd(self._ring, self._event)

    def run(self, requests: Sequence[Request]) -> None:
        waiting = deque(requests)
        try:
            while waiting or self._flying:
                while waiting and len(self._flying) < DEPTH:
                    self._start(waiting.popleft())
                self._finish_some()
        finally:
            while self._flying:  # after an exception, say of ctrl-C: no buffer stays in use
                self._finish_some()

    def _start(self, request: Request) -> None:
        try:
            move = _Move(request)
            self._submit(move)
        except OSError as error:
            request.end(error)

    def _submit(self, move: _Move) -> None:
        if self.broken is not None:
            raise self.broken
        lib, request = self._lib, move.request
        entry, vector = lib.io_uring_get_sqe(self._ring), lib.Iovec(move.rest())
        prepare = lib.io_uring_prep_writev if request.write else lib.io_uring_prep_readv
        prepare(entry, request.fd, vector, move.offset)
        entry.flags |= lib.IOSQE_ASYNC  # or the kernel does part of the work here, where the GIL is held
        self._last_id += 1
        entry.user_data = self._last_id
        try:
            lib.io_uring_submit(self._ring)
        except OSError as error:
            self.broken = error
            raise
        self._flying[self._last_id] = (move, vector)

    def _finish_some(self) -> None:
        if not self._flying:
            return
        if not self._ended:
            os.eventfd_read(self._event)
            self._ended.extend(self._completions())
        while self._ended:
            number, count = self._ended.popleft()
            move, _ = self._flying.pop(number)
            try:
                if -count in (errno.EINTR, errno.EAGAIN):
                    move.stalled()
                elif count < 0:
                    raise OSError(-count, os.strerror(-count))
                elif move.moved(count):
                    move.request.end(None)
                    continue
                self._submit(move)
            except OSError as error:
                move.request.end(error)

    def _completions(self) -> Iterator[tuple[int, int]]:
        """The id of each request that has ended, and how many bytes it moved, or the error's number as a negative."""
        lib = self._lib
        while lib.io_uring_cq_ready(self._ring):
            lib.io_uring_peek_cqe(self._ring, self._cqe)
            entry = self._cqe[0]  # the package does not wrap around, so [1] might lie behind the ring's end
            try:
                count = entry.res
            except OSError as error:  # what the package makes of a negative
                count = -(error.errno or errno.EIO)
            number = entry.user_data
            lib.io_uring_cq_advance(self._ring, 1)
            yield number, count

    def close(self) -> None:
        self._lib.io_uring_queue_exit(self._ring)
        os.close(self._event)
