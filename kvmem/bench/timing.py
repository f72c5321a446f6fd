"""Timings of calls in turn; percentiles, and ratios of what was timed together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from time import perf_counter_ns
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

WARM_UP = 2
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Spread:
    """Percentiles of ``count`` timings, in microseconds. Zeros when there were none."""

    count: int
    p10: float
    median: float
    p90: float
    p99: float
    largest: float

    @classmethod
    def of_ns(cls, nanoseconds: npt.ArrayLike) -> Spread:
        values = np.asarray(nanoseconds, dtype=np.float64) / 1000.0
        if values.size == 0:
            return cls(0, 0.0, 0.0, 0.0, 0.0, 0.0)
        return cls(values.size, *np.percentile(values, (10, 50, 90, 99, 100)).tolist())


@dataclass(frozen=True)
class Ratio:
    """Percentiles of the ratios of times in the same repetition."""

    p10: float
    median: float
    p90: float

    @classmethod
    def of(cls, times: Sequence[float], base: Sequence[float]) -> Ratio:
        pairs = np.asarray(times, dtype=np.float64) / np.asarray(base, dtype=np.float64)
        return cls(*np.percentile(pairs, (10, 50, 90)).tolist())


def timed(call: Callable[[], object]) -> int:
    """Nanoseconds of ``call``."""
    begin = perf_counter_ns()
    call()
    return perf_counter_ns() - begin


def in_turn(
    calls: Mapping[str, Callable[[], _Result]],
    repetitions: int,
    *,
    clock: Callable[[], int] = perf_counter_ns,
    look: Callable[[str, _Result], None] = lambda name, result: None,
    order: Random | None = None,
    done: Callable[[int], None] | None = None,
) -> dict[str, list[int]]:
    """Nanoseconds of each call in every repetition after `WARM_UP`. The calls take turns, so that a slow moment of the
    machine affects all of them. ``look`` gets every result, outside of the times; ``order`` draws a new order of the
    calls for each repetition.
    """
    times: dict[str, list[int]] = {name: [] for name in calls}
    for repetition in range(WARM_UP + repetitions):
        for name in calls if order is None else order.sample(list(calls), len(calls)):
            begin = clock()
            result = calls[name]()
            spent = clock() - begin
            if repetition >= WARM_UP:
                times[name].append(spent)
            look(name, result)
        if done is not None:
            done(repetition + 1)
    return times


@contextmanager
def one_thread() -> Iterator[None]:
    """On a shared machine the spread of parallel regions would hide what is measured: how the memory is read."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
