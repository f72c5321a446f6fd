"""Instruction counts of the core under callgrind, and the comparison of two of them; they have no noise.

``benchmarks/native/core.cpp`` runs the workload without Python; the instructions of one phase of a warm round count.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks.programs import PROGRAMS
from benchmarks.workload import Workload
from kvmem.bench.__main__ import main
from kvmem.bench.cli import PATH, QUIET
from kvmem.bench.document import check_writable, document, write_json
from kvmem.bench.render import Table, console
from kvmem.bench.text import BenchError, Progress, progress

MAY_GROW_PERCENT = 10  # of the older count: from here on the comparison fails
_PROGRAM = PROGRAMS / "core"
_TOTAL = re.compile(r"^(?:totals|summary):\s*(\d+)", re.MULTILINE)


def instruction_cases() -> dict[str, tuple[str, str, Workload]]:
    """By name: phase, backend, workload. 64 sequences, so that all of it takes under a minute."""
    plain = Workload(sequences=64, prompt=512, steps=32, pool=4096)
    cached, tables = replace(plain, cache=True), replace(plain, metadata=True)
    full = replace(cached, pool=64 * 34, evict=True)
    cases = {}
    for backend in ("paged", "virtual"):
        for name, phases, workload in (
            ("no prefix cache", ("admit", "step", "edge", "free"), plain),
            ("all metadata", ("step",), tables),
            ("prefix cache", ("admit", "step", "edge", "free"), cached),
            ("full pool", ("admit", "edge"), full),
        ):
            for phase in phases:
                cases[f"{backend}, {name}, {phase}"] = (phase, backend, workload)
    return cases


def count(done: Progress = lambda done: None) -> dict[str, Any]:
    """``schema_version``, ``environment``, and ``instructions``: those of a warm round, by case."""
    if not _PROGRAM.exists():
        raise BenchError("benchmarks/native/core.cpp is not compiled: run `make callgrind` in the source checkout")
    if shutil.which("valgrind") is None:
        raise BenchError("counting instructions needs valgrind: apt-get install valgrind")
    found: dict[str, int] = {}
    for name, case in instruction_cases().items():
        found[name] = _count(*case)
        done(len(found))
    return document(["instructions"], instructions=found)


def _count(phase: str, backend: str, workload: Workload) -> int:
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts"
        done = subprocess.run(
            ["valgrind", "--tool=callgrind", f"--toggle-collect=*measured_{phase}*", f"--callgrind-out-file={counts}",
             str(_PROGRAM), *workload.arguments(), "--backend", backend, "--rounds", "2", "--count"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        found = _TOTAL.search(counts.read_text(encoding="ascii", errors="replace")) if counts.exists() else None
    if done.returncode or found is None:
        raise BenchError(f"callgrind of {phase}, {backend}: {done.stderr.strip()[-300:]}")
    return int(found[1])


@dataclass(frozen=True)
class Growth:
    """``before`` and ``after`` are instructions; ``after`` is 0 where the case is absent."""

    case: str
    before: int
    after: int

    @property
    def share(self) -> float:
        return self.after / self.before - 1

    @property
    def failed(self) -> bool:
        return self.after == 0 or 100 * (self.after - self.before) >= MAY_GROW_PERCENT * self.before


def compare(older: Path, newer: Path) -> list[Growth]:
    """Every case of ``older``; cases that only ``newer`` has are left out."""
    before, after = _load(older), _load(newer)
    return [Growth(case, value, after.get(case, 0)) for case, value in before.items()]


def _load(path: Path) -> dict[str, int]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        counts = {str(case): int(value) for case, value in document["instructions"].items()}
    except OSError as error:
        raise BenchError(f"{path}: cannot read the counts: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BenchError(f"{path}: not counts of `benchmarks.instructions`: {type(error).__name__} {error}") from None
    if not counts or min(counts.values()) <= 0:
        raise BenchError(f"{path}: not counts of `benchmarks.instructions`: there is no case, or one of 0 instructions")
    return counts


def show(older: Path, newer: Path) -> bool:
    """Prints every case. False when one grew by `MAY_GROW_PERCENT` or more, or is absent."""
    rows = compare(older, newer)
    spec = f"""case={{case}}; before={{before:,}}; after={{after:,}}; growth={{share:+.1%}};
    {MAY_GROW_PERCENT} % or more={{mark}}"""
    shown = [{**vars(r), "share": r.share, "mark": "TOO MUCH" if r.failed else ""} for r in rows]
    Table.of("Instructions of the core", spec, shown).show(console())
    return not any(row.failed for row in rows)


@click.command()
@click.argument("older", type=PATH, required=False)
@click.argument("newer", type=PATH, required=False)
@click.option("--json", "path", type=PATH, default=Path("docs/results/instructions.json"))
@QUIET
@click.pass_context
def instructions(context: click.Context, older: Path | None, newer: Path | None, path: Path, quiet: bool) -> None:
    """Counts the core's instructions with callgrind (`make callgrind`) and rewrites the --json file; or compares the
    files OLDER and NEWER. Exit code 1 if a case grew by a tenth or more, or is gone.
    """
    if older is not None and newer is not None:
        context.exit(0 if show(older, newer) else 1)
    if older is not None:
        raise BenchError(f"{older}: there is nothing to compare it with; name a second file")
    check_writable(path)
    with progress(Console(stderr=True), "callgrind, cases", len(instruction_cases()), quiet) as done:
        counts = count(done)
    fresh = path.with_name(path.name + ".new")
    write_json(counts, fresh)
    fine = show(path, fresh) if path.exists() else True
    fresh.replace(path)
    context.exit(0 if fine else 1)


if __name__ == "__main__":
    sys.exit(main(None, instructions, "python -m benchmarks.instructions"))
