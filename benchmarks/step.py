"""The cost of a scheduler's calls, beside a C++ baseline that does the same bookkeeping with plain arrays.

All managers of a case run in turn, round after round, so that a slow moment of the machine affects each.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
from rich.console import Console

from benchmarks.workload import FLOOR, Timings, Workload, floors, heap_bytes, open_manager, run_floor, run_round
from kvmem.bench.__main__ import main
from kvmem.bench.cli import JSON, QUIET
from kvmem.bench.document import check_writable, document, write_json
from kvmem.bench.render import Row, Table, console, show
from kvmem.bench.text import BenchError, Progress, progress
from kvmem.bench.timing import Spread

Phase = Literal["admit", "step", "edge", "free"]


@dataclass(frozen=True)
class Case:
    """A ``phase`` of ``workload``, in which a ``unit`` should cost ``goal_us`` at most. ``managers``: of ours."""

    name: str
    unit: str
    phase: Phase
    workload: Workload
    goal_us: float | None = None
    managers: tuple[str, ...] = ("paged", "virtual")


@dataclass(frozen=True)
class StepResult:
    """``us``: microseconds a ``unit``; ``quiet_us``: the median of the quietest round. ``typical_p99`` and
    ``typical_largest``: of the medians over all rounds of each position in the round, over their median.
    ``heap_bytes``: the manager's metadata at the end of a round.
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


#: Microseconds, at 256 sequences of 2,048 tokens.
GOALS = {"step": 5.0, "metadata": 15.0, "edge": 40.0, "calls": 60.0, "admit": 2.0, "cached": 12.0, "free": 2.0}


def cases(scale: float = 1.0) -> list[Case]:
    """All of them. ``scale`` below 1 shrinks prompts and steps, for tests."""
    plain = Workload(prompt=_whole(2048 * scale), steps=_whole(512 * scale))
    cached, tables = replace(plain, cache=True), replace(plain, metadata=True)
    shared = replace(cached, shared=plain.prompt // 2)
    full = replace(cached, evict=True, pool=cached.blocks)
    batched = ("paged", "virtual", "paged, cpu")
    calls = ("paged, one by one", "virtual, one by one", "paged, SchedulerCache")
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


def step(
    chosen: Sequence[Case], rounds: int = 5, done: Progress = lambda done: None
) -> tuple[list[StepResult], list[str]]:  # fmt: skip
    """Every case on the baseline and on kvmem, and notes. Cases of one workload are phases of the same rounds."""
    floor, notes = floors()
    rows: list[StepResult] = []
    for number, workload in enumerate(dict.fromkeys(case.workload for case in chosen), 1):
        here = [case for case in chosen if case.workload == workload]
        names = list(dict.fromkeys(name for case in here for name in case.managers))
        timings, heaps = measure(workload, [*floor, *names], rounds)
        rows += [_result(case, name, timings[name], heaps[name]) for case in here for name in (*floor, *case.managers)]
        done(number)
    order = [case.name for case in chosen]
    return sorted(rows, key=lambda row: order.index(row.case)), notes


def measure(workload: Workload, names: Sequence[str], rounds: int) -> tuple[dict[str, Timings], dict[str, int | None]]:
    """``rounds`` interleaved rounds of each manager, after one that warms up: mapped pages, grown tables."""
    timings = {name: Timings() for name in names}
    heaps: dict[str, int | None] = dict.fromkeys(names)
    managers: dict[str, Any] = {}
    for name in names:
        if name != FLOOR:
            before = heap_bytes()
            managers[name] = open_manager(name, workload)
            run_round(managers[name], workload, 0)
            heaps[name] = None if before is None else (heap_bytes() or 0) - before
    for number in range(1, rounds + 1):
        for name in names:
            if name == FLOOR:
                printed = run_floor(workload)
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
    return StepResult(
        case.name, case.unit, name, case.goal_us, case.workload.sequences, case.workload.pool, spread,
        timings.quietest(case.phase) / 1e3, p99, largest, heap,
    )  # fmt: skip


_SPEC = """case={case}, us a {unit}; manager={manager}; goal={goal_us:us}; median={us[median]:us};
quietest round={quiet_us:us}; met={met}; floor={least:us}; times the floor={times:.1f}; p99={us[p99]:us};
largest={us[largest]:us}; typical p99 / median={typical_p99:.2f}"""


def step_tables(rows: Sequence[Row]) -> Iterator[Table]:
    """The baseline's rows become columns of the others. "typical" is the median over all rounds of each position in the
    round, which leaves out pauses of the machine; a goal met in the quietest round alone is marked "quietly".
    """
    least = {row["case"]: row["us"]["median"] for row in rows if row["manager"] == FLOOR}
    shown: list[Mapping[str, Any]] = []
    for row in rows:
        if row["manager"] != FLOOR:
            median, goal, floor = row["us"]["median"], row["goal_us"], least.get(row["case"])
            met = "" if goal is None else "yes" if median <= goal else "quietly" if row["quiet_us"] <= goal else "no"
            shown.append({**row, "met": met, "least": floor, "times": median / floor if floor else None})
    yield Table.of("A scheduler's calls, microseconds", _SPEC, shown, 2)
    found: dict[tuple[int, str], int] = {}  # the largest heap of each manager and pool
    for row in rows:
        if row["heap_bytes"] is not None:
            key = row["pool_blocks"], row["manager"]
            found[key] = max(found.get(key, 0), row["heap_bytes"])
    heaps = [{"p": p, "m": m, "heap": size, "each": size / p} for (p, m), size in sorted(found.items())]
    spec = "pool={p:,} blocks; manager={m}; heap={heap:bytes}; bytes a block={each:.0f}"
    yield Table.of("Metadata of a manager at the end of a round", spec, heaps, 2)


def run(words: str, rounds: int, json_path: Path | None, quiet: bool, among: Sequence[Case] | None = None) -> None:
    """``among``: the cases to choose from, by default all."""
    every = cases() if among is None else among
    chosen = [case for case in every if words in case.name]
    if not chosen:
        names = "; ".join(case.name for case in every)
        raise BenchError(f"--case {words!r}: no case has that in its name; there are: {names}")
    check_writable(json_path)
    with progress(Console(stderr=True), "step, workloads", len({c.workload for c in chosen}), quiet) as done:
        results, notes = step(chosen, rounds, done)
    rows = [asdict(row) for row in results]
    show(console(), [*step_tables(rows), *notes])
    setup = {"rounds": rounds, "notes": notes}
    write_json(document(["step", *sys.argv[1:]], setup=setup, results={"step": rows}), json_path)


@click.command()
@click.option("--case", "words", default="", metavar="WORDS", help="Only cases whose name contains this.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="After one that warms up.")
@JSON
@QUIET
def command(words: str, rounds: int, json_path: Path | None, quiet: bool) -> None:
    """A scheduler's calls, each beside the least that a C++ loop needs for the same bookkeeping."""
    run(words, rounds, json_path, quiet)


if __name__ == "__main__":
    sys.exit(main(None, command, "python -m benchmarks.step"))
