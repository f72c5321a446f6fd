"""The commands ``step``, ``peers``, ``instructions`` and ``compare``: arguments in, tables and JSON out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from kvmem.bench.errors import BenchError
from kvmem.bench.progress import progress
from kvmem.bench.report import Report
from kvmem.bench.results import check_writable, write_json
from kvmem.bench.step import Case, cases, step
from kvmem.bench.step_report import COLUMNS, memory_rows, step_rows

__all__ = ["run_step"]

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
