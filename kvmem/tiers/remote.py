"""What tiers over remote stores share: bounded waits, a circuit breaker (Nygard, *Release It!*), verified records, and
one log line for each kind of trouble. A store implements the calls on records, each a header and a payload.
"""

from __future__ import annotations

import math
import os
import re
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar, Final, TypeAlias

from kvmem.arguments import check_size
from kvmem.errors import SpecError, TierError
from kvmem.tiers.base import Buffer, Capacity, Result, Status, Tier, check_batch
from kvmem.tiers.fault_log import FaultLog, logger
from kvmem.tiers.record import HEADER_BYTES, VERSION, header_of, payload_bytes, verify

__all__ = ["ABSENT", "Call", "Limits", "Record", "RemoteTier", "failed"]

Record: TypeAlias = "bytes | Buffer | Result | None"
"""What a store answers for one key: the bytes of the record, None if it has none, or a Result that says what failed."""
Work: TypeAlias = "Callable[[Call], Sequence[Any] | Result]"

ABSENT: Final = Result(Status.MISS, 0, "the store has no such block")


@dataclass(frozen=True)
class Limits:
    """How long and how much a remote tier may take, and when it is given up.

    batch_seconds: the longest that one function of the tier waits, whatever the number of keys.
    batch_bytes: bytes that are under way at once for one caller; larger batches are split, blocks are not.
    faults: calls without an answer, in a row, after which the store is left alone.
    pause_seconds: how long; then one call tries it again.
    calls: calls under way at once, and so connections; more callers wait for one of them.
    """

    batch_seconds: float = 10.0
    batch_bytes: int = 8 << 20
    faults: int = 3
    pause_seconds: float = 5.0
    calls: int = 16

    def __post_init__(self) -> None:
        for field in fields(self):
            check = _check_seconds if field.type == "float" else check_size
            check(f"limits.{field.name}", getattr(self, field.name))


def _check_seconds(field: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 86_400:
        raise SpecError(f"{field}: got {value!r}; must be a number of seconds above 0, at most a day")
    return float(value)


def failed(reason: object) -> Result:
    """Return the result of a key for which the store gave no answer. reason: a sentence, or the client's error."""
    if isinstance(reason, BaseException):
        # Most clients say it in the first line; a query string may hold a signature.
        text = re.sub(r"\?\S*", "?...", (str(reason).strip().splitlines() or [""])[0])[:240]
        reason = f"{type(reason).__name__}: {text}"
    return Result(Status.FAILED, 0, str(reason))


class Breaker:
    """Lets calls through until ``faults`` in a row failed; then one each ``pause_seconds``, until one is answered."""

    def __init__(self, faults: int, pause_seconds: float) -> None:
        self._faults, self._pause = faults, pause_seconds
        self._lock = threading.Lock()
        self._in_a_row, self._next = 0, -math.inf

    def admits(self) -> bool:
        """Return whether the store may be called now."""
        with self._lock:
            now = time.monotonic()
            if self._in_a_row >= self._faults:
                if now < self._next:
                    return False
                self._next = now + self._pause  # this call tries; the others go on without
            return True

    def note(self, answered: bool) -> int:
        """Record how a call ended, and return how many had failed in a row before it."""
        with self._lock:
            before = self._in_a_row
            self._in_a_row = 0 if answered else before + 1
            self._next = time.monotonic() + self._pause
            return before


class Call:
    """One call of a store, in a thread of its own: no client's timeout bounds it, to which a byte a second is progress.

    deadline: of ``time.monotonic``, shortly before the caller gives up. abort: a store sets it to what makes its client
    return, for a caller that has given up.
    """

    def __init__(self, seconds: float) -> None:
        self.deadline = time.monotonic() + 0.95 * seconds
        self.abort: Callable[[], object] = lambda: None
        self._done = threading.Event()
        self._answer: Sequence[Any] | Result = failed("interrupted")

    def run(self, work: Work, ended: Callable[[], None]) -> None:
        try:
            self._answer = work(self)
        except Exception as error:  # noqa: BLE001  whatever a client raises is a fault of the store
            self._answer = failed(error)
        finally:
            ended()
            self._done.set()

    def wait(self, seconds: float) -> Sequence[Any] | Result:
        """Return the answer; after ``seconds``, a Result that says so."""
        try:
            return self._answer if self._done.wait(seconds) else failed(f"no answer within {seconds:.3g} s")
        finally:
            if not self._done.is_set():
                self.abort()


class RemoteTier(Tier):
    """A tier in another process or machine.

    A store that does not answer gives ``FAILED`` within ``timeout_seconds`` for each part of a batch, and at most
    ``limits.batch_seconds`` for all of it; the rest of the batch is not tried. Opening a tier asks the store for
    nothing, unless ``check`` is set. A record that is not believed is deleted, so that no later put is held back by it.
    A ``put`` that ``FAILED`` for want of an answer may still arrive, whole. A forked process opens a tier anew.
    """

    #: Keys in one part of a batch, at most.
    part_keys: ClassVar[int] = 512

    def __init__(self, where: str, timeout_seconds: float, namespace: str, limits: Limits) -> None:
        if not isinstance(limits, Limits):
            raise SpecError(f"limits: got {limits!r}; must be a kvmem.tiers.remote.Limits")
        if not isinstance(namespace, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", namespace):
            raise SpecError(f"namespace: got {namespace!r}; must be 1 to 64 letters, digits, '_', '.' or '-'")
        self._where, self._limits = where, limits
        self._seconds = min(_check_seconds("timeout_seconds", timeout_seconds), limits.batch_seconds)
        self._prefix = f"{namespace}/{VERSION}/"
        self._breaker = Breaker(limits.faults, limits.pause_seconds)
        self._slots = threading.BoundedSemaphore(limits.calls)
        self._lock = threading.Lock()
        self._log = FaultLog(where)
        self._closed, self._pid = False, os.getpid()
        self._capacity = Capacity(None, 0, 0)

    # What a store implements. All but the last run in a thread of their own, may raise anything, and should end at
    # call.deadline.

    @abstractmethod
    def _ping(self, call: Call) -> Sequence[object] | Result:
        """Return if the store answers and understands us; what, does not matter."""

    @abstractmethod
    def _exists(self, call: Call, names: Sequence[str]) -> list[bool] | Result:
        """Return whether it has each; a Result if it does not say."""

    @abstractmethod
    def _read(self, call: Call, names: Sequence[str], sizes: Sequence[int]) -> Sequence[Record] | Result:
        """Return the first bytes of each record, at least as many as its size if there are so many."""

    @abstractmethod
    def _write(self, call: Call, names: Sequence[str], records: Sequence[tuple[bytes, Buffer]]) -> list[Result]:
        """Store each header and payload as one, in place of what is there. The tier sets ``num_bytes``."""

    @abstractmethod
    def _remove(self, call: Call, names: Sequence[str]) -> list[Result]:
        """Remove each: ``OK``, or ``ABSENT``."""

    @abstractmethod
    def _measure(self, call: Call) -> list[Capacity]:
        """Return the capacity, as the one item."""

    @abstractmethod
    def _release(self, idle: bool) -> None:
        """Close connections. idle: no call is under way any more."""

    # The interface.

    def contains(self, keys: Sequence[bytes]) -> int:
        names, present = self._names(keys), 0
        for part, answer in self._parts([0] * len(keys), lambda part: partial(self._exists, names=names[part])):
            if isinstance(answer, Result):
                break
            if not all(answer):
                return present + list(answer).index(False)
            present = part.stop
        return present

    def get(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        names = self._names(keys, buffers, writable=True)
        sizes = [HEADER_BYTES + len(buffer) for buffer in buffers]
        results = self._results(
            sizes,
            lambda part: partial(self._read, names=names[part], sizes=sizes[part]),
            lambda part, answer: map(_accept, keys[part], answer, buffers[part]),
        )
        wrong = [name for name, result in zip(names, results, strict=True) if result.status is Status.CORRUPT]
        if wrong:
            self._log_first(Status.CORRUPT, results)
            self._bounded(lambda: partial(self._remove, names=wrong), self._seconds)
        return results

    def put(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        names = self._names(keys, buffers)

        def prepare(part: slice) -> Work:
            # By the caller, who may fill the buffer anew after giving up: a header made then would vouch for that.
            headers = map(header_of, keys[part], buffers[part])
            return partial(self._write, names=names[part], records=list(zip(headers, buffers[part], strict=True)))

        results = self._results([HEADER_BYTES + len(buffer) for buffer in buffers], prepare)
        self._log_first(Status.FULL, results)
        return [r._replace(num_bytes=len(b)) if r.ok else r for r, b in zip(results, buffers, strict=True)]

    def delete(self, keys: Sequence[bytes]) -> list[Result]:
        names = self._names(keys)
        return self._results([0] * len(keys), lambda part: partial(self._remove, names=names[part]))

    def capacity(self) -> Capacity:
        """Return what the store says; what it said last, while it does not answer."""
        self._check_open()
        answer: Any = self._bounded(lambda: self._measure, self._limits.batch_seconds)
        if not isinstance(answer, Result):
            self._capacity = answer[0]
        return self._capacity

    def close(self) -> None:
        if self._pid != os.getpid():
            return  # the connections are the parent's
        with self._lock:
            if self._closed:
                return
            self._closed = True
        until = time.monotonic() + self._seconds
        slots = range(self._limits.calls)
        self._release(idle=all(self._slots.acquire(timeout=max(0.0, until - time.monotonic())) for _ in slots))

    # Calls: checked, split, bounded.

    def _open(self, check: bool) -> None:
        """Ask the store whether it answers, if ``check`` is set, or raise ``TierError``. A constructor's last line."""
        if check and isinstance(answer := self._bounded(lambda: self._ping, self._seconds), Result):
            self.close()
            raise TierError(
                f"{self._where}: {answer.reason}; without check=True it opens, and all its blocks are misses"
            )

    def _check_open(self) -> None:
        if self._pid != os.getpid():  # before any lock, which another thread may have held while this process began
            raise TierError(f"{self._where}: opened before a fork, in process {self._pid}; open it anew in this one")
        if self._closed:
            raise TierError(f"{self._where}: the tier is closed")

    def _names(
        self, keys: Sequence[bytes], buffers: Sequence[Buffer] | None = None, writable: bool = False
    ) -> list[str]:
        """Return the store's names for the keys. Everything is checked before anything is sent."""
        self._check_open()
        check_batch(keys, buffers, writable=writable)
        return [self._prefix + key.hex() for key in keys]

    def _results(
        self,
        sizes: Sequence[int],
        prepare: Callable[[slice], Work],
        accept: Callable[[slice, Sequence[Any]], Iterable[Result]] = lambda _, answer: answer,
    ) -> list[Result]:
        results: list[Result] = []
        for part, answer in self._parts(sizes, prepare):
            rest = len(sizes) - part.start
            results += [answer] * rest if isinstance(answer, Result) else accept(part, answer)
        return results

    def _parts(
        self, sizes: Sequence[int], prepare: Callable[[slice], Work]
    ) -> Iterator[tuple[slice, Sequence[Any] | Result]]:
        """Yield each part of the batch and its answers; a Result in their place is for all the rest, and the end."""
        end, stop = time.monotonic() + self._limits.batch_seconds, 0
        while stop < len(sizes):
            start, total = stop, 0
            while stop < min(len(sizes), start + self.part_keys) and (
                stop == start or total + sizes[stop] <= self._limits.batch_bytes
            ):
                total, stop = total + sizes[stop], stop + 1
            part = slice(start, stop)
            answer = self._bounded(partial(prepare, part), end - time.monotonic())
            if not isinstance(answer, Result) and len(answer) != stop - start:
                answer = failed(f"{len(answer)} answers for {stop - start} keys")
            yield part, answer
            if isinstance(answer, Result):
                return

    def _bounded(self, prepare: Callable[[], Work], seconds: float) -> Sequence[Any] | Result:
        """Return the answer of the work that ``prepare`` returns, or a Result that says why there is none in time."""
        if seconds <= 0:
            return failed(f"the batch took longer than {self._limits.batch_seconds:g} s")
        if not self._breaker.admits():
            return failed(f"{self._where} did not answer; it is tried again after {self._limits.pause_seconds:g} s")
        answer = self._start(prepare(), min(self._seconds, seconds))
        problem = answer if isinstance(answer, Result) else _unanswered(answer)
        before = self._breaker.note(problem is None)
        if problem is not None and before == 0:
            self._warn(problem, "; its blocks are misses until it answers")
        elif problem is None and before >= self._limits.faults:
            logger.info("%s: answers again", self._where)
        return answer

    def _start(self, work: Work, seconds: float) -> Sequence[Any] | Result:
        until = time.monotonic() + seconds
        if not self._slots.acquire(timeout=seconds):
            return failed(f"all {self._limits.calls} calls were under way for {seconds:.3g} s")
        call = Call(max(0.0, until - time.monotonic()))
        try:  # daemons: a client that never returns must not keep the process from its end
            threading.Thread(target=call.run, args=(work, self._slots.release), daemon=True).start()
        except RuntimeError as error:  # no more threads
            self._slots.release()
            return failed(error)
        return call.wait(max(0.0, until - time.monotonic()))

    def _log_first(self, status: Status, results: Sequence[Result]) -> None:
        for result in results:
            if result.status is status:
                return self._warn(result)

    def _warn(self, result: Result, so: str = "") -> None:
        self._log.warn(result.status.value, f"{result.status.value}: {result.reason}{so}")


def _unanswered(answers: Sequence[Any]) -> Result | None:
    """Return the first result if all are ``FAILED``: a store that answers for some keys is there."""
    results = [a for a in answers if isinstance(a, Result) and a.status is Status.FAILED]
    return results[0] if results and len(results) == len(answers) else None


def _accept(key: bytes, record: Record, buffer: Buffer) -> Result:
    """Copy the payload of a record that is what was put under the key, or say why not."""
    if record is None or isinstance(record, Result):
        return record or ABSENT
    view = memoryview(record)
    header, payload = view[:HEADER_BYTES], view[HEADER_BYTES:]
    length = payload_bytes(header, key)
    if isinstance(length, int) and length > len(buffer):
        return Result(Status.MISS, 0, f"the payload has {length} bytes, and the buffer {len(buffer)}")
    reason = verify(header, key, payload)
    if reason:
        return Result(Status.CORRUPT, 0, reason)
    buffer[: len(payload)] = payload
    return Result(Status.OK, len(payload))
