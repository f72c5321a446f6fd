"""The commands ``step``, ``peers``, ``instructions`` and ``compare``: arguments in, tables and JSON out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from kvmem.bench.errors import BenchError
from kvmem.bench.instructions import MAY_GROW_PERCENT, compare, core_program, count, instruction_cases
from kvmem.bench.peers import peers, workloads
from kvmem.bench.progress import progress
from kvmem.bench.report import Report
from kvmem.bench.results import check_writable, write_json
from kvmem.bench.step import Case, cases, step
from kvmem.bench.step_report import COLUMNS, PEER_COLUMNS, memory_rows, peer_rows, step_rows
from kvmem.bench.workload import Workload

__all__ = ["run_compare", "run_instructions", "run_peers", "run_step"]

_WIDTH = 200


def _console() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)


def run_step(words: str, rounds: int, json_path: Path | None, quiet: bool, among: Sequence[Case] | None = None) -> None:
    """``among``: the cases to choose from, by default all."""
    every = cases() if among is None else among
    chosen = [case for case in every if words in case.name]
    if not chosen:
        raise BenchError(
            f"--case {words!r}: no case has that in its name; there are: " + "; ".join(c.name for c in every)
        )
    check_writable(json_path, None)
    out = Report(_console())
    workloads = len({case.workload for case in chosen})
    with progress(Console(stderr=True, highlight=False), "step, workloads", workloads, quiet) as done:
        report = step(chosen, rounds, done)
    rows = [asdict(row) for row in report.results]
    out.table("A scheduler's calls, microseconds", COLUMNS, list(step_rows(rows)))
    out.table(
        "Books of a manager at the end of a round",
        ["pool", "manager", "heap", "bytes a block"],
        list(memory_rows(rows)),
    )
    for note in report.notes:
        out.line(note)
    if json_path is not None:
        write_json(report.to_dict(sys.argv[1:]), json_path)


def run_peers(folder: Path, rounds: int, json_path: Path | None, quiet: bool, base: Workload | None = None) -> None:
    """``base``: the workload that all are made from; default 256 sequences of 2,048 tokens, 512 steps."""
    workload = base or Workload()
    check_writable(json_path, None)
    out = Report(_console())
    names = len(workloads(workload))
    with progress(Console(stderr=True, highlight=False), "peers, workloads", names, quiet) as done:
        report = peers(workload, folder, rounds, done)
    out.table(
        f"Managers on {workload.sequences:,} sequences of {workload.prompt:,} tokens, {workload.steps:,} steps: "
        "microseconds, CPU time of the calling thread",
        PEER_COLUMNS,
        list(peer_rows([asdict(row) for row in report.results])),
    )
    for note in report.notes:
        out.line(note)
    if json_path is not None:
        write_json(report.to_dict(sys.argv[1:]), json_path)


def run_instructions(json_path: Path, quiet: bool) -> bool:
    """Counts, compares with what ``json_path`` held before if it is there, and writes it anew. False: a case grew."""
    program = core_program()
    check_writable(json_path, None)
    with progress(Console(stderr=True, highlight=False), "callgrind, cases", len(instruction_cases()), quiet) as done:
        counts = count(program, done)
    fresh = json_path.with_name(json_path.name + ".new")
    write_json(counts, fresh)
    fine = run_compare(json_path, fresh) if json_path.exists() else True
    fresh.replace(json_path)
    return fine


def run_compare(older: Path, newer: Path) -> bool:
    """Prints every case; False when one grew by `MAY_GROW_PERCENT` or more, or is gone."""
    out = Report(_console())
    rows = compare(older, newer)
    cells = [
        [row.case, f"{row.before:,}", f"{row.after:,}", f"{row.share:+.1%}", "TOO MUCH" if row.failed else ""]
        for row in rows
    ]
    out.table("Instructions of the core", ["case", "before", "after", "growth", f"{MAY_GROW_PERCENT} % or more"], cells)
    return not any(row.failed for row in rows)
