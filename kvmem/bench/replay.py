"""Replays a trace against one pool and measures it: what fitted, what was preempted, what was mapped and used, and the
cost of the allocator's and the driver's calls.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, replace
from time import perf_counter, perf_counter_ns
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmem.bench.engine import Outcome, Scheduler, StepModel
from kvmem.bench.pools import Int32s, Pool, Totals, Usage
from kvmem.bench.text import Progress
from kvmem.bench.timing import Spread
from kvmem.bench.traces import Trace

_SAMPLES = 500  # enough for a plot; a sample is one account, no driver call
_MOST_SAMPLES = 1000


@dataclass(frozen=True)
class CallCosts:
    """Microseconds of one driver call: ``map`` of a page, ``set_access`` and ``unmap`` of a run of pages."""

    page_bytes: int
    map_us: float
    set_access_us: float
    unmap_us: float


@dataclass(frozen=True)
class DriverCosts:
    """Call costs at two page sizes of one device; between and beyond them a line through both."""

    device: str
    source: str
    small: CallCosts
    large: CallCosts

    def at(self, page_bytes: int) -> CallCosts:
        share = (page_bytes - self.small.page_bytes) / (self.large.page_bytes - self.small.page_bytes)
        pairs = zip(astuple(self.small)[1:], astuple(self.large)[1:], strict=True)
        return CallCosts(page_bytes, *(max(0.0, small + share * (large - small)) for small, large in pairs))

    def seconds(self, calls: Totals, page_bytes: int) -> float:
        """Of all maps, accesses and unmaps, without those that create and reserve once at the start."""
        one = self.at(page_bytes)
        us = calls.map * one.map_us + calls.set_access * one.set_access_us + calls.unmap * one.unmap_us
        return us / 1e6


#: kvcached's pull request #331 (nsys, H100): total time over calls, 100 calls for the large size. Not measured here.
PUBLISHED = DriverCosts(
    "H100", "kvcached PR #331", CallCosts(2 << 20, 3.3, 60.0, 42.0), CallCosts(112 << 20, 5.0, 80.0, 60.0)
)


@dataclass(frozen=True)
class Sample:
    """One moment of a replay. ``step`` counts scheduler steps from the first arrival."""

    step: int
    running: int
    waiting: int
    usage: Usage


@dataclass(frozen=True)
class ReplayResult:
    """One pool's replay.

    ``step_us``: all calls of the allocator in a scheduler step; ``grow_us``: only those steps in which every running
    sequence just grew; ``admit_us``, ``free_us``: one sequence. ``cdf_us``: the 101 percentiles of ``step_us``.
    ``driver_seconds``: of the maps, accesses and unmaps, at the costs of `PUBLISHED`. ``lookup_tokens``,
    ``hit_tokens``: of prompts with content, else 0. ``end_used_bytes`` and ``end_wasted_bytes`` are sums over the
    completed requests, measured at each one's end. ``mean_`` bytes: over all samples. ``wall_seconds`` is the whole
    simulation's, scheduler included.
    """

    pool: str
    outcome: Outcome
    simulated_seconds: float
    wall_seconds: float
    mean_running: float
    step_us: Spread
    grow_us: Spread
    admit_us: Spread
    free_us: Spread
    cdf_us: tuple[float, ...]
    driver_calls: int
    map_calls: int
    set_access_calls: int
    unmap_calls: int
    driver_seconds: float
    lookup_tokens: int
    hit_tokens: int
    end_used_bytes: int
    end_wasted_bytes: int
    mean_mapped_bytes: float
    mean_used_bytes: float
    mean_wasted_bytes: float
    mean_parked_bytes: float
    samples: tuple[Sample, ...]
    step_seconds: float

    def as_row(self) -> dict[str, Any]:
        """Its JSON form. ``samples`` is one list for each field of `Sample` and `Usage`."""
        moments = [{**vars(sample), **vars(sample.usage)} for sample in self.samples]
        names = [name for name in (moments[0] if moments else ()) if name != "usage"]
        columns = {name: [moment[name] for moment in moments] for name in names}
        return asdict(replace(self, samples=())) | {"samples": columns}


class Meter:
    """Times every call into ``pool`` and nothing around it; takes a `Sample` every ``sample_steps`` steps, more rarely
    in a long run.

    Rounding is measured where it is largest, at a request's end: the drop of wasted bytes that its `finish` causes.
    ``admit_ns``: of each admission that succeeded, with the commit of its prompt; ``free_ns``: for each sequence ended.
    """

    def __init__(self, pool: Pool, sample_steps: int = 33) -> None:
        self.pool, self.sample_steps = pool, sample_steps
        self.on_sample: Callable[[], None] = lambda: None
        self.samples: list[Sample] = []
        self.finished_used_bytes = self.finished_wasted_bytes = 0
        self.admit_ns, self.free_ns, self._steps = array("q"), array("q"), array("q")
        self._now = 0  # nanoseconds of the allocator since the step began
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
            self.admit_ns.append(spent)
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
        self.free_ns.append(spent // len(ids))

    def finish(self, ids: Int32s) -> None:
        """`free` for requests that ended; counts what they had used and wasted."""
        before = self.pool.usage()
        self.free(ids)
        after = self.pool.usage()
        self.finished_used_bytes += before.used_bytes - after.used_bytes
        self.finished_wasted_bytes += before.wasted_bytes - after.wasted_bytes

    def end_step(self, running: int) -> None:
        self._steps.extend((self._now, running, self._grew_only))
        self._now, self._grew_only = 0, True

    def sample_due(self, step: int) -> bool:
        return step >= self._next_sample

    def sample(self, step: int, running: int, waiting: int) -> None:
        if len(self.samples) >= _MOST_SAMPLES:
            del self.samples[1::2]
            self.sample_steps *= 2
        self._next_sample = step + self.sample_steps
        self.samples.append(Sample(step, running, waiting, self.pool.usage()))
        self.on_sample()

    @property
    def steps(self) -> npt.NDArray[np.int64]:
        """Of each step the nanoseconds of the allocator's calls, the sequences running, and whether there was no
        admission, no end and no preemption: int64 [steps, 3].
        """
        return np.array(self._steps, dtype=np.int64).reshape(-1, 3)


def replay(
    trace: Trace, pool: Pool, model: StepModel, *, max_sequences: int, bytes_per_token: int, page_bytes: int,
    progress: Progress = lambda done: None,
) -> ReplayResult:  # fmt: skip
    """Runs ``trace`` to the end. ``progress`` gets the number of requests that have ended, about every simulated ten
    seconds.
    """
    span = trace.arrival_seconds[-1] / model.step_seconds
    meter = Meter(pool, sample_steps=max(1, int(span) // _SAMPLES))
    scheduler = Scheduler(trace, meter, model, max_sequences=max_sequences, bytes_per_token=bytes_per_token)
    meter.on_sample = lambda: progress(scheduler.ended)
    calls, before = pool.usage().driver_calls, pool.totals()
    begin = perf_counter()
    outcome = scheduler.run()
    wall = perf_counter() - begin
    progress(scheduler.ended)
    step_ns, running, grew_only = meter.steps.T
    since = Totals(*(now - then for now, then in zip(astuple(pool.totals()), astuple(before), strict=True)))
    means = {
        f"mean_{kind}_bytes": float(np.mean([getattr(sample.usage, f"{kind}_bytes") for sample in meter.samples]))
        for kind in ("mapped", "used", "wasted", "parked")
    }
    return ReplayResult(
        pool.name, outcome, outcome.steps * model.step_seconds, wall,
        mean_running=float(running.mean()) if step_ns.size else 0.0,
        step_us=Spread.of_ns(step_ns), grow_us=Spread.of_ns(step_ns[grew_only > 0]),
        admit_us=Spread.of_ns(meter.admit_ns), free_us=Spread.of_ns(meter.free_ns),
        cdf_us=tuple((np.percentile(step_ns, np.arange(101)) / 1000).tolist()) if step_ns.size else (),
        driver_calls=pool.usage().driver_calls - calls, map_calls=since.map, set_access_calls=since.set_access,
        unmap_calls=since.unmap, driver_seconds=PUBLISHED.seconds(since, page_bytes),
        lookup_tokens=since.lookup_tokens, hit_tokens=since.hit_tokens, end_used_bytes=meter.finished_used_bytes,
        end_wasted_bytes=meter.finished_wasted_bytes, samples=tuple(meter.samples), step_seconds=model.step_seconds,
        **means,
    )  # fmt: skip
