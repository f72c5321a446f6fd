"""What a scheduler's calls cost, beside a C++ program that does the same bookkeeping with plain arrays.

All managers of a case run in turn, round after round, so that a slow moment of the machine falls on each.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from kvmem.bench.environment import environment
from kvmem.bench.errors import BenchError
from kvmem.bench.floor import build_floor, run_program
from kvmem.bench.managers import heap_bytes, open_manager
from kvmem.bench.results import SCHEMA_VERSION, without_folders
from kvmem.bench.spread import Spread
from kvmem.bench.workload import Manager, Timings, Workload, run_round

__all__ = ["FLOOR", "GOALS", "Case", "StepReport", "StepResult", "cases", "measure", "step"]

FLOOR = "floor"
Phase = Literal["admit", "step", "edge", "free"]


@dataclass(frozen=True)
class Case:
    """``phase`` of ``workload``, for which a ``unit`` is to cost ``goal_us`` at most. ``managers``: which of ours."""

    name: str
    unit: str
    phase: Phase
    workload: Workload
    goal_us: float | None = None
    managers: tuple[str, ...] = ("paged", "virtual")


@dataclass(frozen=True)
class StepResult:
    """``us``: microseconds a ``unit``; ``quiet_us``: the median of the quietest round. ``typical_p99`` and
    ``typical_largest``, over the median: of the medians, over all rounds, of each position in the round.
    ``heap_bytes``: of the manager's books at the end of a round.
    """

    case: str
    unit: str
    manager: str
    goal_us: float | None
    sequences: int
    pool_blocks: int
    us: Spread
    quiet_us: float
    typical_p99: float
    typical_largest: float
    heap_bytes: int | None


@dataclass
class StepReport:
    """The rows, and their JSON form: ``schema_version``, ``environment``, ``command``, ``setup``, ``results``."""

    rounds: int
    results: list[StepResult]
    notes: list[str]

    def to_dict(self, command: list[str]) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "environment": environment(),
            "command": without_folders(command),
            "setup": {"rounds": self.rounds, "notes": self.notes},
            "results": {"step": [asdict(row) for row in self.results]},
        }


#: Microseconds, at 256 sequences of 2,048 tokens.
GOALS = {"step": 5.0, "metadata": 15.0, "edge": 40.0, "calls": 60.0, "admit": 2.0, "cached": 12.0, "free": 2.0}


def cases(scale: float = 1.0) -> list[Case]:
    """All of them. ``scale`` below 1 shrinks prompts and steps, for tests."""
    plain = Workload(prompt=_whole(2048 * scale), steps=_whole(512 * scale))
    cached, tables = replace(plain, cache=True), replace(plain, metadata=True)
    shared = replace(cached, shared=plain.prompt // 2)
    full = replace(cached, evict=True, pool=cached.blocks)
    batched, calls = (
        ("paged", "virtual", "paged, cpu"),
        ("paged, one by one", "virtual, one by one", "paged, SchedulerCache"),
    )
    edge, admit = "step: all cross a block edge", f"admit {plain.prompt:,} tokens"
    rows = [
        Case("step: slots and what is new in the table", "step", "step", plain, GOALS["step"], batched),
        Case("step: all kernel metadata", "step", "step", tables, GOALS["metadata"], batched),
        Case(f"{edge}, prefix cache", "step", "edge", cached, GOALS["edge"]),
        Case(f"{edge}, every allocation evicts", "step", "edge", full),
        Case("step: a call a sequence", "step", "step", plain, GOALS["calls"], calls),
        Case(admit, "sequence", "admit", plain, GOALS["admit"]),
        Case(f"{admit}, prefix cache", "sequence", "admit", cached, GOALS["cached"]),
        Case(f"{admit}, {shared.shared:,} of them cached", "sequence", "admit", shared, GOALS["cached"]),
        Case(f"{admit}, every allocation evicts", "sequence", "admit", full),
        Case("free", "sequence", "free", plain, GOALS["free"]),
        Case("free, prefix cache", "sequence", "free", cached, GOALS["free"]),
    ]
    for sequences in (16, 1024, 4096):
        small = Workload(sequences, _whole(512 * scale), _whole(64 * scale), pool=sequences * 64)
        rows.append(Case(f"step: {sequences:,} sequences", "step", "step", small))
    for pool in (1_000, 10_000, 100_000, 1_000_000):
        blocks = max(68, int(pool * scale))
        many = Workload(blocks // 68, 1024, _whole(32 * scale), pool=blocks, cache=True)
        rows.append(Case(f"admit 1,024 tokens, pool of {pool:,} blocks", "sequence", "admit", many))
        rows.append(Case(f"free, pool of {pool:,} blocks", "sequence", "free", many))
    return rows


def _whole(tokens: float) -> int:
    return max(32, int(tokens) // 16 * 16)


def step(chosen: Sequence[Case], rounds: int = 5, progress: Callable[[int], None] | None = None) -> StepReport:
    """Every case on the floor and on kvmem. Cases of one workload are phases of the same rounds."""
    notes: list[str] = []
    try:
        build_floor()
        has_floor = True
    except BenchError as error:
        has_floor, notes = False, [f"no floor: {error}"]
    results: dict[tuple[str, str], StepResult] = {}
    for done, workload in enumerate(dict.fromkeys(case.workload for case in chosen), 1):
        here = [case for case in chosen if case.workload == workload]
        names = list(dict.fromkeys(name for case in here for name in case.managers))
        timings, heaps = measure(workload, [FLOOR, *names] if has_floor else names, rounds)
        for case in here:
            for name in (FLOOR, *case.managers):
                if name in timings:
                    results[case.name, name] = _result(case, name, timings[name], heaps[name])
        if progress is not None:
            progress(done)
    rows = [row for case in chosen for (name, _), row in results.items() if name == case.name]
    return StepReport(rounds, rows, notes)


def measure(workload: Workload, names: Sequence[str], rounds: int) -> tuple[dict[str, Timings], dict[str, int | None]]:
    """``rounds`` interleaved rounds of each manager, after one that warms up: mapped pages, grown tables."""
    timings = {name: Timings() for name in names}
    heaps: dict[str, int | None] = dict.fromkeys(names)
    managers: dict[str, Manager] = {}
    for name in names:
        if name != FLOOR:
            before = heap_bytes()
            managers[name] = open_manager(name, workload)
            run_round(managers[name], workload, 0)
            after = heap_bytes()
            heaps[name] = None if before is None or after is None else after - before
    for number in range(1, rounds + 1):
        for name in names:
            if name == FLOOR:
                printed = run_program(build_floor(), workload)
                timings[name].add(printed)
                heaps[name] = printed["metadata_bytes"]
            else:
                gc.collect()
                timings[name].add(run_round(managers[name], workload, number))
    return timings, heaps


def _result(case: Case, name: str, timings: Timings, heap: int | None) -> StepResult:
    typical = timings.typical(case.phase)
    spread = Spread.of_ns(timings.all(case.phase))
    middle = float(np.median(typical)) if typical.size else 0.0
    p99, largest = (np.percentile(typical, (99, 100)) / middle).tolist() if middle else (0.0, 0.0)
    workload = case.workload
    return StepResult(
        case.name,
        case.unit,
        name,
        case.goal_us,
        workload.sequences,
        workload.pool,
        spread,
        timings.quietest(case.phase) / 1e3,
        p99,
        largest,
        heap,
    )
