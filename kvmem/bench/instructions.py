"""Instruction counts of the core under callgrind, and the comparison of two of them: no clock, so no noise.

``benchmarks/native/core.cpp`` runs the workload without Python; what one phase of a warm round costs is counted.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmem.bench.environment import environment
from kvmem.bench.errors import BenchError
from kvmem.bench.results import SCHEMA_VERSION
from kvmem.bench.workload import Workload

__all__ = ["MAY_GROW_PERCENT", "Growth", "compare", "core_program", "count", "instruction_cases"]

MAY_GROW_PERCENT = 10  # of the older count: from here on the comparison fails
_PROGRAM = Path(__file__).parents[2] / "build" / "bench" / "core"
_TOTAL = re.compile(r"^(?:totals|summary):\s*(\d+)", re.MULTILINE)


def instruction_cases() -> dict[str, tuple[str, str, Workload]]:
    """By name: phase, backend, workload. 64 sequences, so that all of it takes under a minute."""
    plain = Workload(sequences=64, prompt=512, steps=32, pool=4096)
    cached = Workload(sequences=64, prompt=512, steps=32, pool=4096, cache=True)
    tables = Workload(sequences=64, prompt=512, steps=32, pool=4096, metadata=True)
    full = Workload(sequences=64, prompt=512, steps=32, pool=64 * 34, cache=True, evict=True)
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


def core_program() -> Path:
    """`BenchError` where it is not compiled, or valgrind is absent."""
    if not _PROGRAM.exists():
        raise BenchError("benchmarks/native/core.cpp is not compiled: run `make callgrind` in the source checkout")
    if shutil.which("valgrind") is None:
        raise BenchError("counting instructions needs valgrind: apt-get install valgrind")
    return _PROGRAM


def count(
    program: Path, progress: Callable[[int], None] | None = None,
    cases: dict[str, tuple[str, str, Workload]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """``schema_version``, ``environment``, and ``instructions``: those of a warm round, by case."""
    found = {}
    for done, (name, (phase, backend, workload)) in enumerate((cases or instruction_cases()).items(), 1):
        found[name] = _count(program, phase, backend, workload)
        if progress is not None:
            progress(done)
    return {"schema_version": SCHEMA_VERSION, "environment": environment(), "instructions": found}


def _count(program: Path, phase: str, backend: str, workload: Workload) -> int:
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts"
        done = subprocess.run(
            ["valgrind", "--tool=callgrind", f"--toggle-collect=*measured_{phase}*", f"--callgrind-out-file={counts}",
             str(program), *workload.arguments(), "--backend", backend, "--rounds", "2", "--count"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        found = _TOTAL.search(counts.read_text(encoding="ascii", errors="replace")) if counts.exists() else None
    if done.returncode or found is None:
        raise BenchError(f"callgrind of {phase}, {backend}: {done.stderr.strip()[-300:]}")
    return int(found[1])


@dataclass(frozen=True)
class Growth:
    """``before`` and ``after`` are instructions; 0 after: the case is gone."""

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
    """Every case of ``older``. Cases that only ``newer`` has are no comparison."""
    before, after = _load(older), _load(newer)
    return [Growth(case, value, after.get(case, 0)) for case, value in before.items()]


def _load(path: Path) -> dict[str, int]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        counts = {str(case): int(value) for case, value in document["instructions"].items()}
    except OSError as error:
        raise BenchError(f"{path}: cannot read the counts: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BenchError(f"{path}: not counts of `bench instructions`: {type(error).__name__} {error}") from None
    if not counts or min(counts.values()) <= 0:
        raise BenchError(f"{path}: not counts of `bench instructions`: a case without instructions, or none at all")
    return counts
