"""A trace against one pool: what fitted, what was preempted, what was mapped beside what was used, and what the
allocator's calls cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from kvmem.bench.meter import Meter, Sample
from kvmem.bench.pools import Pool
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
    ``end_used_bytes`` and ``end_wasted_bytes`` are sums over the completed requests, measured at each one's end.
    ``wall_seconds`` is the whole simulation's, scheduler included.
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
    calls = pool.usage().driver_calls
    begin = perf_counter()
    outcome = scheduler.run()
    wall = perf_counter() - begin
    if progress is not None:
        progress(scheduler.ended)
    step_ns = meter.step_ns
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
        end_used_bytes=meter.finished_used_bytes,
        end_wasted_bytes=meter.finished_wasted_bytes,
        samples=tuple(meter.samples),
        step_seconds=model.step_seconds,
    )
