"""A virtual clock: engines and links that work in the order of the calls, advanced without waiting.

Times are exact (integers and fractions, no rounding), so that "the copy was hidden behind the kernel" is an equation,
on any machine. A clock decides nothing: it says when work that was given in an order would start and end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from numbers import Rational, Real
from typing import NamedTuple

from kvmem.arguments import brief, check_name, check_size
from kvmem.errors import SpecError

__all__ = ["Clock", "Link", "Work", "exact_rate", "exact_seconds"]

#: What durations and rates are given as. A float is taken as the binary fraction that it is.
Number = int | float | Fraction


class Work(NamedTuple):
    """Something that occupied ``resource`` from ``start`` to ``end``, in seconds since the clock began."""

    name: str
    resource: str
    start: Fraction
    end: Fraction

    @property
    def seconds(self) -> Fraction:
        """From the start to the end."""
        return self.end - self.start


class Clock:
    """Resources are named by whoever uses them; each does one thing at a time, in the order of the calls (FIFO), as a
    CUDA stream, a copy engine or a thread does. A resource that was never used has been idle.

    ``work``: all of it, in the order of the calls; read it only. Cost: constant for a call of ``run()``.
    """

    def __init__(self) -> None:
        self.work: list[Work] = []
        self._last: dict[str, Work] = {}
        self._busy: dict[str, Fraction] = {}
        self._stall: dict[str, Fraction] = {}
        # What each work waited for, by id: equal works are different ones, and `work` keeps them alive.
        self._cause: dict[int, Work | None] = {}

    def run(self, resource: str, seconds: Number, *, after: Iterable[Work] = (), name: str = "") -> Work:
        """Put work on ``resource``. It starts when what was put there before has ended, and all of ``after`` too.

        seconds: 0 or more; 0 is a mark that others can wait for. ``SpecError`` for a negative time, NaN, infinity, or
        work of another clock; nothing has changed then.
        """
        check_name("resource", resource)
        spent, needed = exact_seconds("seconds", seconds), list(after)
        for one in needed:
            if id(one) not in self._cause:
                raise SpecError(f"after: got {brief(one)}; must be work that run() of this clock returned")
        free = self._last.get(resource)
        # The resource first: where both end at once, the path stays on it.
        cause = max([*([free] if free else []), *needed], key=lambda one: one.end, default=None)
        start = cause.end if cause else Fraction(0)
        work = Work(name, resource, start, start + spent)
        self.work.append(work)
        self._cause[id(work)] = cause
        self._last[resource] = work
        self._busy[resource] = self.busy(resource) + spent
        self._stall[resource] = self.stall(resource) + start - (free.end if free else 0)
        return work

    @property
    def now(self) -> Fraction:
        """When the last work ends."""
        return max((last.end for last in self._last.values()), default=Fraction(0))

    def busy(self, resource: str) -> Fraction:
        """Seconds that ``resource`` has worked."""
        return self._busy.get(resource, Fraction(0))

    def idle(self, resource: str) -> Fraction:
        """Seconds until ``now`` that ``resource`` has not worked: its stall, and the time since its last work."""
        return self.now - self.busy(resource)

    def stall(self, resource: str) -> Fraction:
        """Seconds that ``resource`` had nothing to do before its work could start: before the first, and between."""
        return self._stall.get(resource, Fraction(0))

    def critical_path(self) -> list[Work]:
        """The work that decides ``now``, from its beginning: each starts at the moment when the one before ends.

        Shortening anything else changes nothing. Of several such paths, one.
        """
        path: list[Work] = []
        step = max(self._last.values(), key=lambda last: last.end, default=None)
        while step is not None:
            path.append(step)
            step = self._cause[id(step)]
        return path[::-1]


@dataclass(frozen=True)
class Link:
    """What moves bytes, as a resource of a clock: ``clock.run(link.name, link.seconds(n))``.

    bytes_per_second: above 0. latency_seconds: of every transfer, beside its bytes.
    """

    name: str
    bytes_per_second: Number
    latency_seconds: Number = 0

    def __post_init__(self) -> None:
        check_name("Link.name", self.name)
        exact_rate(f"{self.name}: bytes_per_second", self.bytes_per_second)
        exact_seconds(f"{self.name}: latency_seconds", self.latency_seconds)

    def seconds(self, bytes: int, *, transfers: int = 1) -> Fraction:
        """The time of ``bytes`` in so many transfers; none of either takes none."""
        moved = check_size("bytes", bytes, 0) / exact_rate("bytes_per_second", self.bytes_per_second)
        return moved + check_size("transfers", transfers, 0) * exact_seconds("latency_seconds", self.latency_seconds)


def exact_rate(field: str, value: Number) -> Fraction:
    """``value`` a second as a fraction; ``SpecError`` unless it is a finite number above 0."""
    rate = _exact(value)
    if rate is None or rate <= 0:
        raise SpecError(f"{field}: got {brief(value)}; a rate is a finite number above 0")
    return rate


def exact_seconds(field: str, value: Number) -> Fraction:
    """``value`` as a fraction; ``SpecError`` unless it is a finite number of at least 0."""
    seconds = _exact(value)
    if seconds is None or seconds < 0:
        raise SpecError(f"{field}: got {brief(value)}; a time is a finite number of seconds, 0 or more")
    return seconds


def _exact(value: object) -> Fraction | None:
    """None for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    if isinstance(value, Rational):
        return Fraction(int(value.numerator), int(value.denominator))
    number = float(value)
    return Fraction(number) if math.isfinite(number) else None
