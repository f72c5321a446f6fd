"""Several tiers as one store with a deadline: what is not answered, verified and in time is a miss with a reason."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from operator import methodcaller
from typing import Any, Final, TypeVar

from kvmem.integrations.background import Background
from kvmem.tiers.base import Buffer, Result, Status, Tier
from kvmem.tiers.fault_log import FaultLog

__all__ = ["TierStore", "ends_of_runs"]

_T = TypeVar("_T")
_CALLS: Final = ("contains", "get", "put")  # one thread of each tier for each
_ABSENT: Final = Result(Status.MISS, 0, "no tier has it")


class TierStore:
    """Asks ``tiers``, the fastest first, and waits ``deadline_seconds`` at most for each call, whatever they do.

    A tier that is late is left alone until it has answered. Thread-safe. A buffer of a ``get`` or ``put`` whose result
    says that there was no answer in time still belongs to the tier: it must not be used again.
    """

    def __init__(self, tiers: Sequence[Tier], deadline_seconds: float) -> None:
        self._tiers, self._seconds = list(tiers), deadline_seconds
        self._threads = [Background(len(_CALLS), f"kvmem {tier.name}") for tier in tiers]
        self._late: dict[tuple[int, str], Future[Any]] = {}
        self._log = FaultLog("kvmem's tiers under SGLang")
        self._closed = False

    def present(self, keys: Sequence[bytes]) -> list[bool]:
        """Return whether some tier has each key. A later ``get`` may miss all the same."""
        found, until = [False] * len(keys), self._until()
        for i in range(len(self._tiers)):
            left = [at for at, there in enumerate(found) if not there]
            answer = self._ask(i, "contains", partial(_present, [keys[at] for at in left]), until)
            for at, there in zip(left, [] if isinstance(answer, Result) else answer, strict=False):
                found[at] = there
        return found

    def leading(self, keys: Sequence[bytes]) -> int:
        """Return how many of the first keys some tier has, without a gap."""
        found, until, before = 0, self._until(), -1
        while before < found < len(keys):
            before = found
            for i in range(len(self._tiers)):
                answer = self._ask(i, "contains", partial(_leading, keys[found:]), until)
                found += 0 if isinstance(answer, Result) else answer
            if len(self._tiers) == 1:
                break
        return found

    def get(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        """Fill each buffer, of the payload's exact size, and return a result for each. The tiers verify checksums."""
        results, until = [_ABSENT] * len(keys), self._until()
        for i in range(len(self._tiers)):
            left = [at for at, result in enumerate(results) if not result.ok]
            if not left or time.monotonic() >= until:
                break  # a tier that is late may still write to the buffers: no other may
            work = methodcaller("get", [keys[at] for at in left], [buffers[at] for at in left])
            for at, result in zip(left, _each(self._ask(i, "get", work, until), len(left)), strict=True):
                if result.ok and result.num_bytes != len(buffers[at]):
                    reason = f"the payload has {result.num_bytes} of {len(buffers[at])} bytes"
                    result = Result(Status.CORRUPT, 0, reason)
                if result.status is not Status.MISS or results[at] is _ABSENT:
                    results[at] = result
        self._warn("get", results)
        return results

    def put(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        """Store each buffer in every tier, and return a result for each: ``OK`` if one has it."""
        results, until = [Result(Status.FAILED, 0, "there is no tier")] * len(keys), self._until()
        for i in range(len(self._tiers)):
            each = _each(self._ask(i, "put", partial(_put, keys, buffers), until), len(keys))
            results = [old if old.ok else new for old, new in zip(results, each, strict=True)]
        self._warn("put", results)
        return results

    def close(self) -> None:
        """Close the tiers, within the deadline. Later calls are misses; closing twice is no error."""
        if self._closed:
            return
        until = self._until()
        for i in range(len(self._tiers)):
            self._ask(i, "close", methodcaller("close"), until)
        self._closed = True
        for threads in self._threads:
            threads.close(max(0.0, until - time.monotonic()))

    def _until(self) -> float:
        return time.monotonic() + self._seconds

    def _ask(self, index: int, call: str, work: Callable[[Tier], _T], until: float) -> _T | Result:
        """Return what ``work`` returns for a tier, or a Result that says why there is no answer."""
        if self._closed:
            return Result(Status.FAILED, 0, "the tiers are closed")
        tier, late = self._tiers[index], self._late.get((index, call))
        if late is not None and not late.done():
            return Result(Status.FAILED, 0, f"{tier.name}: an earlier {call} has not been answered yet")
        future = self._threads[index].submit(lambda: work(tier))
        wait([future], max(0.0, until - time.monotonic()))
        if not future.done() and not future.cancel():
            self._late[index, call] = future
        if not future.done() or future.cancelled():
            return self._failed(call, f"{tier.name}: no answer to {call} within {self._seconds:g} s")
        error = future.exception()
        return future.result() if error is None else self._failed(call, f"{tier.name}: {type(error).__name__}: {error}")

    def _failed(self, call: str, reason: str) -> Result:
        self._log.warn(call, f"{reason}; its pages are misses")
        return Result(Status.FAILED, 0, reason)

    def _warn(self, call: str, results: Sequence[Result]) -> None:
        for result in results:
            if result.status in (Status.CORRUPT, Status.FULL):
                self._log.warn(f"{call} {result.status.value}", f"a page is a miss: {result.reason}")
                break


def _each(answer: list[Result] | Result, count: int) -> list[Result]:
    """Return a result for each of ``count`` keys, whatever a tier of somebody else's answered."""
    if isinstance(answer, list) and len(answer) == count and all(isinstance(one, Result) for one in answer):
        return answer
    if not isinstance(answer, Result):
        answer = Result(Status.FAILED, 0, f"{answer!s:.80} is no answer for {count} keys")
    return [answer] * count


def ends_of_runs(there: Sequence[bool], window: int) -> set[int]:
    """Return the lengths, from 1 on, of which the last ``window`` pages are there; all pages of a shorter one."""
    found, run = set[int](), 0
    for end, one in enumerate(there, 1):
        run = run + 1 if one else 0
        if run >= min(window, end):
            found.add(end)
    return found


def _leading(keys: Sequence[bytes], tier: Tier) -> int:
    """Return how many of the first keys the tier has, whatever a tier of somebody else's answers."""
    return max(0, min(len(keys), tier.contains(keys)))


def _present(keys: Sequence[bytes], tier: Tier) -> list[bool]:
    """Return whether the tier has each key, by calls that each end at one that it lacks."""
    found: list[bool] = []
    while len(found) < len(keys):
        run = _leading(keys[len(found) :], tier)
        found += [True] * run + [False] * (len(found) + run < len(keys))
    return found


def _put(keys: Sequence[bytes], buffers: Sequence[Buffer], tier: Tier) -> list[Result]:
    """Store what follows the run that the tier has already: equal keys are equal bytes."""
    have = _leading(keys, tier)
    there = [Result(Status.OK, len(buffer)) for buffer in buffers[:have]]
    return [*there, *(tier.put(keys[have:], buffers[have:]) if have < len(keys) else [])]
