"""Reads and writes of pages, many at a time: by a pool of threads with preadv and pwritev, or by io_uring."""

from __future__ import annotations

import errno
import importlib.util
import mmap
import os
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any, Final

from kvmem.arguments import check_choice
from kvmem.errors import SpecError, TierError
from kvmem.tiers.base import Buffer
from kvmem.tiers.disk.files import Files

__all__ = ["DEPTH", "PAGE", "Move", "PageIO", "UringIO", "open_io", "padded", "pages"]

PAGE: Final = 4096  # what offsets, lengths and addresses are multiples of: enough for O_DIRECT on every file system
DEPTH: Final = 32  # moves of one call that are under way at a time
_STALLS: Final = 16  # signals and short transfers without progress, after which a move has failed


def padded(size: int) -> int:
    """Return ``size``, rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


def pages(size: int) -> memoryview:
    """Return new memory that begins with a page; ``OSError`` if there is none."""
    return memoryview(mmap.mmap(-1, size))


class Move(ABC):
    """One contiguous transfer between memory and a file. Its functions may run in another thread.

    error: why it failed, or None.
    """

    write = False
    error: OSError | None = None

    def __init__(self, fd: int, offset: int) -> None:
        self.fd, self.offset = fd, offset

    @abstractmethod
    def begin(self) -> list[Buffer]:
        """Return the memory, when the transfer starts. Raises nothing but ``OSError``."""

    def end(self, error: OSError | None) -> None:
        """Called once: with None when every byte was moved."""
        self.error = error


class PageIO(ABC):
    """A way to read and write. Thread-safe."""

    @abstractmethod
    def run(self, moves: Sequence[Move]) -> None:
        """Return when every move has ended. They run in any order."""

    @abstractmethod
    def close(self) -> None:
        """Release threads or rings. REQUIRES: no ``run`` is under way."""


def open_io(io: str, files: Files, threads: int) -> PageIO:
    """Return the way that ``io`` names; ``"auto"`` is io_uring where the package works and the kernel allows it.

    ``SpecError`` for another name or without the package, ``TierError`` if the package's code does not run on this
    processor or the kernel refuses.
    """
    check_choice("io", io, ("auto", "io_uring", "threads"))
    if io != "threads":
        try:
            return UringIO()
        except (SpecError, TierError):
            if io == "io_uring":
                raise
    return ThreadIO(files, threads)


class _Progress:
    """A move under way: what is left of it after short transfers."""

    def __init__(self, move: Move) -> None:
        self.move, self.views, self.offset, self._stalls = move, move.begin(), move.offset, 0

    def moved(self, count: int) -> bool:
        """Note that so many bytes were moved; return whether all are. ``OSError`` if there is no progress."""
        if count == sum(map(len, self.views)):
            return True
        if count == 0 and not self.move.write:
            raise OSError(errno.EIO, "the file ends within the slot")
        pages = count - count % PAGE  # O_DIRECT goes on at a page
        if not pages:
            self.stalled()
        self.offset += pages
        while pages:
            pages -= (step := min(pages, len(self.views[0])))
            self.views[0] = self.views[0][step:]
            if not self.views[0]:
                del self.views[0]
        return False

    def stalled(self) -> None:
        self._stalls += 1
        if self._stalls > _STALLS:
            raise OSError(errno.EIO, "transfers stop short, again and again")


class ThreadIO(PageIO):
    """A pool of threads. A move alone runs in the thread of its caller, and so do all without other threads."""

    def __init__(self, files: Files, threads: int) -> None:
        self._files, self._threads = files, threads
        self._pool = ThreadPoolExecutor(threads, "kvmem-disk")

    def run(self, moves: Sequence[Move]) -> None:
        waiting = iter(moves)  # the threads take from it in turn

        def work() -> None:
            for move in waiting:
                self._run_one(move)

        if len(moves) <= 1 or self._threads == 1:
            return work()
        futures = [self._pool.submit(work) for _ in range(min(self._threads, len(moves)))]
        try:
            for future in futures:
                future.result()
        finally:
            wait(futures)  # an exception, say of ctrl-C, must not leave buffers in use

    def _run_one(self, move: Move) -> None:
        call = self._files.pwritev if move.write else self._files.preadv
        try:
            progress = _Progress(move)
            while True:
                try:
                    if progress.moved(call(move.fd, progress.views, progress.offset)):
                        break
                except InterruptedError:
                    progress.stalled()
        except OSError as error:
            move.end(error)
        else:
            move.end(None)

    def close(self) -> None:
        # Without waiting: no call is under way, and the collector may run this while its thread holds a lock that a
        # thread which ends takes.
        self._pool.shutdown(wait=False)


_PROBE = """
import sys
sys.path.insert(0, sys.argv[1])
import liburing
ring = liburing.Ring()
liburing.io_uring_queue_init(1, ring, 0)
liburing.io_uring_queue_exit(ring)
"""


@cache
def _fault_of(folder: str) -> str:
    """Return why the package liburing in ``folder`` does not work, or "".

    Asked in a process of its own: wheels of 2026 have instructions (AVX-512) that end the process on other processors.
    Cost: the start of an interpreter, once.
    """
    command = (sys.executable, "-I", "-c", _PROBE, folder)
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    if done.returncode < 0:
        return f"it ends a process by {signal.Signals(-done.returncode).name}, as code for another processor does"
    return (done.stderr.strip() or "no reason").splitlines()[-1] if done.returncode else ""


class UringIO(PageIO):
    """io_uring through the package liburing: a ring for each call under way, kept for the next one.

    The package's own waits hold the GIL; here an eventfd announces completions, and Python waits for it without.
    """

    def __init__(self) -> None:
        spec = importlib.util.find_spec("liburing")
        if spec is None or spec.origin is None:
            raise SpecError("io: 'io_uring' needs the package liburing: pip install 'kvmem[io-uring]'")
        if reason := _fault_of(str(Path(spec.origin).parents[bool(spec.submodule_search_locations)])):
            raise TierError(f"io: the package liburing does not work here ({reason}); use io='threads'")
        self._lib, self._rings = importlib.import_module("liburing"), deque[_Ring]()
        try:
            self._rings.append(_Ring(self._lib))
        except OSError as e:
            raise TierError(f"io: the kernel refuses io_uring ({e.strerror}); use io='threads'") from e

    def run(self, moves: Sequence[Move]) -> None:
        try:
            ring = self._rings.pop()
        except IndexError:
            try:
                ring = _Ring(self._lib)
            except OSError as error:
                for move in moves:
                    move.end(error)
                return
        try:
            ring.run(moves)
        finally:
            if ring.broken is None:
                self._rings.append(ring)
            else:
                ring.close()

    def close(self) -> None:
        while self._rings:
            self._rings.pop().close()


class _Ring:
    """One ring, used by one thread at a time."""

    def __init__(self, lib: Any) -> None:
        self._lib = lib
        self._ring, self._cqe = lib.Ring(), lib.Cqe()
        self._flying: dict[int, tuple[_Progress, Any]] = {}  # by id; the kernel uses this memory
        self._ended: deque[tuple[int, int]] = deque()  # what was taken from the ring: id, and bytes or a negative error
        self._last_id = 0
        self.broken: OSError | None = None  # an entry that the kernel did not take may still lie in the queue
        lib.io_uring_queue_init(DEPTH, self._ring, 0)
        self._event = os.eventfd(0, os.EFD_CLOEXEC)
        lib.io_uring_register_eventfd(self._ring, self._event)

    def run(self, moves: Sequence[Move]) -> None:
        waiting = deque(moves)
        try:
            while waiting or self._flying:
                while waiting and len(self._flying) < DEPTH:
                    self._start(waiting.popleft())
                self._finish_some()
        finally:
            while self._flying:  # after an exception, say of ctrl-C: no buffer stays in use
                self._finish_some()

    def _start(self, move: Move) -> None:
        try:
            self._submit(_Progress(move))
        except OSError as error:
            move.end(error)

    def _submit(self, progress: _Progress) -> None:
        if self.broken is not None:
            raise self.broken
        lib, move = self._lib, progress.move
        entry, vector = lib.io_uring_get_sqe(self._ring), lib.Iovec(progress.views)
        prepare = lib.io_uring_prep_writev if move.write else lib.io_uring_prep_readv
        prepare(entry, move.fd, vector, progress.offset)
        entry.flags |= lib.IOSQE_ASYNC  # or the kernel does part of the work here, where the GIL is held
        self._last_id += 1
        entry.user_data = self._last_id
        try:
            lib.io_uring_submit(self._ring)
        except OSError as error:
            self.broken = error
            raise
        self._flying[self._last_id] = (progress, vector)

    def _finish_some(self) -> None:
        if not self._flying:
            return
        if not self._ended:
            os.eventfd_read(self._event)
            self._ended.extend(self._completions())
        while self._ended:
            number, count = self._ended.popleft()
            progress, _ = self._flying.pop(number)
            try:
                if -count in (errno.EINTR, errno.EAGAIN):
                    progress.stalled()
                elif count < 0:
                    raise OSError(-count, os.strerror(-count))
                elif progress.moved(count):
                    progress.move.end(None)
                    continue
                self._submit(progress)
            except OSError as error:
                progress.move.end(error)

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
