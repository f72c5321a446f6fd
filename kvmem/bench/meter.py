"""A pool with a stopwatch and a notebook: what the allocator cost in each step, and what it held over time."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np
import numpy.typing as npt

from kvmem.bench.pools import Int32s, Pool, Usage

__all__ = ["Meter", "Sample"]


_MOST_SAMPLES = 1000


@dataclass(frozen=True)
class Sample:
    """One moment of a replay. ``step`` counts scheduler steps from the first arrival."""

    step: int
    running: int
    waiting: int
    usage: Usage


class Meter:
    """Times every call into ``pool`` and nothing around it; takes a `Sample` every ``sample_steps`` steps, more rarely
    in a long run.

    Rounding is measured where it is largest, at a request's end: the drop of wasted bytes that its `finish` causes.
    """

    def __init__(self, pool: Pool, sample_steps: int = 33) -> None:
        self.pool, self.sample_steps = pool, sample_steps
        self.on_sample: Callable[[Sample], None] | None = None
        self.samples: list[Sample] = []
        self.finished_used_bytes = 0
        self.finished_wasted_bytes = 0
        self._now = 0  # nanoseconds of the allocator since the step began
        self._step_ns, self._step_running, self._step_grew_only = array("q"), array("q"), array("b")
        self._admit_ns, self._free_ns = array("q"), array("q")
        self._grew_only = True
        self._next_sample = 0

    def admit(self, request: int, tokens: int) -> Int32s | None:
        """A new sequence with the first ``tokens`` of the request; None when it does not fit."""
        begin = perf_counter_ns()
        ids = self.pool.admit(request, tokens)
        spent = perf_counter_ns() - begin
        self._now += spent
        self._grew_only = False
        if ids is not None:
            self._admit_ns.append(spent)
        return ids

    def grow(self, ids: Int32s, counts: Int32s) -> bool:
        """One step's growth of all running sequences, in one call, and their commit."""
        begin = perf_counter_ns()
        done = self.pool.try_extend(ids, counts)
        if done:
            self.pool.commit(ids, counts)
        self._now += perf_counter_ns() - begin
        return done

    def free(self, ids: Int32s) -> None:
        begin = perf_counter_ns()
        self.pool.free(ids)
        spent = perf_counter_ns() - begin
        self._now += spent
        self._grew_only = False
        self._free_ns.append(spent // len(ids))

    def finish(self, ids: Int32s) -> None:
        """`free` for requests that ended; books what they had used and wasted."""
        before = self.pool.usage()
        self.free(ids)
        after = self.pool.usage()
        self.finished_used_bytes += before.used_bytes - after.used_bytes
        self.finished_wasted_bytes += before.wasted_bytes - after.wasted_bytes

    def end_step(self, step: int, running: int) -> None:
        self._step_ns.append(self._now)
        self._step_running.append(running)
        self._step_grew_only.append(self._grew_only)
        self._now, self._grew_only = 0, True

    def sample_due(self, step: int) -> bool:
        return step >= self._next_sample

    def sample(self, step: int, running: int, waiting: int) -> None:
        if len(self.samples) >= _MOST_SAMPLES:
            del self.samples[1::2]
            self.sample_steps *= 2
        self._next_sample = step + self.sample_steps
        self.samples.append(Sample(step, running, waiting, self.pool.usage()))
        if self.on_sample is not None:
            self.on_sample(self.samples[-1])

    @property
    def step_ns(self) -> npt.NDArray[np.int64]:
        """Nanoseconds of the allocator's calls in each step: int64 [steps]."""
        return np.array(self._step_ns, dtype=np.int64)

    @property
    def step_running(self) -> npt.NDArray[np.int64]:
        """Sequences running in each step: int64 [steps]."""
        return np.array(self._step_running, dtype=np.int64)

    @property
    def grow_only(self) -> npt.NDArray[np.bool_]:
        """Steps without an admission, an end or a preemption: bool [steps]."""
        return np.array(self._step_grew_only, dtype=np.bool_)

    @property
    def admit_ns(self) -> npt.NDArray[np.int64]:
        """Nanoseconds of each admission that succeeded, with the commit of its prompt."""
        return np.array(self._admit_ns, dtype=np.int64)

    @property
    def free_ns(self) -> npt.NDArray[np.int64]:
        """Nanoseconds for each sequence ended."""
        return np.array(self._free_ns, dtype=np.int64)
