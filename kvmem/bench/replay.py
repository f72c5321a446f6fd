"""A trace against one pool: what fitted, what was preempted, what was mapped beside what was used, and what the
allocator's calls cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from time import perf_counter

import numpy as np

from kvmem.bench.driver_costs import PUBLISHED
from kvmem.bench.meter import Meter, Sample
from kvmem.bench.pools import Pool, Totals
from kvmem.bench.scheduler import Outcome, Scheduler, StepModel
from kvmem.bench.spread import Spread
from kvmem.bench.traces import Trace

__all__ = ["ReplayResult", "replay"]

_SAMPLES = 500  # enough for a plot; a sample is one account, no driver call


@dataclass(frozen=True)
class ReplayResult:
    """One pool's replay.

    ``step_us``: all calls of the allocator in a scheduler step; ``grow_us``: only those steps in which every running
    sequence just grew; ``admit_us``, ``free_us``: one sequence. ``cdf_us``: the 101 percentiles of ``step_us``.
    ``driver_seconds``: of the maps, accesses and unmaps, at the costs of `driver_costs.PUBLISHED`. ``lookup_tokens``,
    ``hit_tokens``: of prompts with content, else 0. ``end_used_bytes`` and ``end_wasted_bytes`` are sums over the
    completed requests, measured at each one's end. ``wall_seconds`` is the whole simulation's, scheduler included.
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
    samples: tuple[Sample, ...]
    step_seconds: float

    @property
    def mean_used_bytes(self) -> float:
        return float(np.mean([sample.usage.used_bytes for sample in self.samples]))

    @property
    def mean_mapped_bytes(self) -> float:
        return float(np.mean([sample.usage.mapped_bytes for sample in self.samples]))

    @property
    def mean_parked_bytes(self) -> float:
        return float(np.mean([sample.usage.parked_bytes for sample in self.samples]))

    @property
    def mean_wasted_bytes(self) -> float:
        return float(np.mean([sample.usage.wasted_bytes for sample in self.samples]))

    @property
    def driver_seconds_an_hour(self) -> float:
        return self.driver_seconds * 3600 / self.simulated_seconds if self.simulated_seconds else 0.0

    @property
    def hit_rate(self) -> float:
        return self.hit_tokens / max(1, self.lookup_tokens)

    @property
    def end_waste(self) -> float:
        """Share of the bytes in use at request end."""
        return self.end_wasted_bytes / max(1, self.end_used_bytes)


def replay(
    trace: Trace,
    pool: Pool,
    model: StepModel,
    *,
    max_sequences: int,
    bytes_per_token: int,
    page_bytes: int,
    progress: Callable[[int], None] | None = None,
) -> ReplayResult:
    """Runs ``trace`` to the end. ``progress`` hears the number of requests that have ended, about every simulated ten
    seconds.
    """
    span = trace.arrival_seconds[-1] / model.step_seconds
    meter = Meter(pool, sample_steps=max(1, int(span) // _SAMPLES))
    scheduler = Scheduler(trace, meter, model, max_sequences=max_sequences, bytes_per_token=bytes_per_token)
    if progress is not None:
        meter.on_sample = lambda sample: progress(scheduler.ended)
    calls, before = pool.usage().driver_calls, pool.totals()
    begin = perf_counter()
    outcome = scheduler.run()
    wall = perf_counter() - begin
    if progress is not None:
        progress(scheduler.ended)
    step_ns, after = meter.step_ns, pool.totals()
    since = Totals(*(now - then for now, then in zip(astuple(after), astuple(before), strict=True)))
    return ReplayResult(
        pool=pool.name,
        outcome=outcome,
        simulated_seconds=outcome.steps * model.step_seconds,
        wall_seconds=wall,
        mean_running=float(meter.step_running.mean()) if step_ns.size else 0.0,
        step_us=Spread.of_ns(step_ns),
        grow_us=Spread.of_ns(step_ns[meter.grow_only]),
        admit_us=Spread.of_ns(meter.admit_ns),
        free_us=Spread.of_ns(meter.free_ns),
        cdf_us=tuple((np.percentile(step_ns, np.arange(101)) / 1000).tolist()) if step_ns.size else (),
        driver_calls=pool.usage().driver_calls - calls,
        map_calls=since.map,
        set_access_calls=since.set_access,
        unmap_calls=since.unmap,
        driver_seconds=PUBLISHED.seconds(since, page_bytes),
        lookup_tokens=since.lookup_tokens,
        hit_tokens=since.hit_tokens,
        end_used_bytes=meter.finished_used_bytes,
        end_wasted_bytes=meter.finished_wasted_bytes,
        samples=tuple(meter.samples),
        step_seconds=model.step_seconds,
    )
