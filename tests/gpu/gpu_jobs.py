"""Runs gpu_worker.py for many kernels at once, and makes tables of what they found. A kernel that crashes or hangs ends
its own process and nothing else; the modules that several of them compile are compiled side by side."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from gpu_kernels import BY_NAME, Trial

ROOT = Path(__file__).resolve().parents[2]
WORKER = ROOT / "tests" / "gpu" / "gpu_worker.py"
PYTHON_PATH = [str(ROOT), *(str(ROOT / "tests" / folder) for folder in ("kernels", "support"))]
LIMIT_SECONDS = int(os.environ.get("KVMEM_GPU_TIMEOUT", "540"))


@dataclass
class Record:
    what: str
    status: str  # "ok", "failed", "skipped", or "crashed": the process ended, or was ended, while at it
    why: str = ""
    error: float = 0.0
    allowed: float = 0.0
    seconds: float = 0.0
    trace: str = ""


@dataclass
class Report:
    """What one process found, and how it ended: "", or why not by itself."""

    kernel: Trial
    records: list[Record] = field(default_factory=list)
    ended: str = ""
    seconds: float = 0.0

    @property
    def skipped(self) -> str:
        """Why the whole kernel was left out; empty if it was not."""
        left_out = [r.why for r in self.records if r.status == "skipped" and r.what == self.kernel.name]
        return left_out[0] if left_out else ""

    def numbers(self) -> list[Record]:
        return [r for r in self.records if not r.what.startswith("tail ") and r.what != self.kernel.name]

    def tail(self, mode: str) -> list[Record]:
        return [r for r in self.records if r.what.startswith(f"tail {mode}")]


def read_report(kernel: Trial, output: str, ended: str) -> Report:
    report, open_one = Report(kernel, ended=ended), ""
    for line in output.splitlines():
        if not line.startswith("{"):
            continue
        said = json.loads(line)
        if said["status"] == "begin":
            open_one = said["what"]
        else:
            report.records.append(Record(**said))
            open_one = ""
    if open_one:
        report.records.append(Record(open_one, "crashed", ended or "the process ended without a word"))
    return report


def run_worker(
    name: str, seed: int, *, device: str = "cuda", command: Iterable[str] = (), limit: float = LIMIT_SECONDS
) -> Report:
    """One process. It is given ``limit`` seconds, compiling included; then it and what it started are killed."""
    begin = time.perf_counter()
    # Several compile at once, and nvcc takes 1 to 2 GB of memory for each file: fewer files at a time for each of them,
    # unless KVMEM_GPU_JOBS says how many.
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [*PYTHON_PATH, os.environ.get("PYTHONPATH")])),
        "MAX_JOBS": os.environ.get("KVMEM_GPU_JOBS") or str(max(2, (os.cpu_count() or 2) // 4)),
    }
    words = list(command) or [sys.executable, str(WORKER), name, "--device", device, "--seed", str(seed)]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=environment,
    )  # fmt: skip
    _running.add(process)
    try:
        output, errors = process.communicate(timeout=limit)
        code = process.returncode
        ended = (
            "" if code == 0 else f"ended with {f'signal {-code}' if code < 0 else f'status {code}'}: {errors[-800:]}"
        )
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # ninja and nvcc too
        output, errors = process.communicate()
        ended = f"killed after {limit:.0f} s (KVMEM_GPU_TIMEOUT): {errors[-400:]}"
    finally:
        _running.discard(process)
    report = read_report(BY_NAME[name], output, ended)
    report.seconds = time.perf_counter() - begin
    return report


_running: set[subprocess.Popen[str]] = set()


def end_all() -> None:
    """Kills the workers that are running, ninja and nvcc too; what they have said so far makes their reports."""
    for process in list(_running):
        with suppress(ProcessLookupError):  # it has just ended
            os.killpg(process.pid, signal.SIGKILL)


class Pool:
    """Starts all kernels at once and hands out their reports as they are asked for."""

    def __init__(self, names: list[str], seed: int, run: Callable[[str, int], Report] = run_worker) -> None:
        self._pool = ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // 2)))
        self._futures: dict[str, Future[Report]] = {name: self._pool.submit(run, name, seed) for name in names}

    def __getitem__(self, name: str) -> Report:
        return self._futures[name].result()

    def done(self) -> list[Report]:
        return [future.result() for future in self._futures.values() if future.done() and not future.cancelled()]

    def close(self) -> None:
        """Ends what still runs, as after an interrupt: whoever has the last minutes wants the tables in them."""
        for future in self._futures.values():
            future.cancel()
        end_all()
        self._pool.shutdown()


# ---- What it comes to ------------------------------------------------------------------------------------------------


def problems(report: Report) -> list[str]:
    """A sentence for each number that is off, and each try that failed."""
    return [f"{r.what}: {r.status}: {r.why}\n{r.trace}" for r in report.numbers() if r.status in ("failed", "crashed")]


@dataclass(frozen=True)
class Tail:
    touches: str  # "no", "yes", "unknown": memory past the end, whatever the mask says
    needs_finite: str
    verdict: str
    wrong: bool  # the registry's number promises less than the kernel needs


def tail_of(report: Report) -> Tail:
    """Compares what happened with the ``guard_tokens`` of the registry."""
    guard, place = report.kernel.kernel.guard_tokens, report.kernel.guard_place
    guarded, bare, poisoned = (report.tail(mode) for mode in ("guarded", "bare", "poisoned"))
    bare = bare if guard else guarded
    touches, needs_finite = _any_bad(bare), _any_bad(poisoned)
    if _any_bad(guarded) == "yes":
        return Tail(touches, needs_finite, f"TOO SMALL: {place} = {guard}, raise it to 256 or more", True)
    if guard == 0 and needs_finite == "yes":
        return Tail(touches, needs_finite, f"TOO SMALL: {place} = 0, but NaN behind the end comes through", True)
    if guard and touches == needs_finite == "no":
        return Tail(touches, needs_finite, f"larger than needed: {place} = {guard} could be 0", False)
    if "unknown" in (touches, needs_finite):
        return Tail(touches, needs_finite, f"not settled: {place} = {guard}", False)
    return Tail(touches, needs_finite, f"right: {place} = {guard}", False)


def _any_bad(records: list[Record]) -> str:
    judged = [r for r in records if r.status != "skipped"]
    if any(r.status in ("failed", "crashed") for r in judged):
        return "yes"
    return "no" if judged else "unknown"


def table(title: str, head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    ]
    return [title, "", lines[0], "-" * len(lines[0]), *lines[1:], ""]


def numbers_table(reports: list[Report]) -> list[str]:
    rows = []
    for report in reports:
        ran = [r for r in report.numbers() if r.status != "skipped"]
        worst = max(ran, key=lambda r: r.error / (r.allowed or 1), default=None)
        bad = sum(r.status in ("failed", "crashed") for r in ran)
        found = report.skipped or (
            f"{bad} of {len(ran)} failed" if bad else f"{len(ran)} right" if ran else "nothing ran"
        )
        error = f"{worst.error:.1e} of {worst.allowed:.0e}" if worst and worst.allowed else ""
        rows.append([report.kernel.name, found, error, f"{report.seconds:.0f}"])
    return table("Kernels against a float64 reference", ["kernel", "cases", "worst error", "seconds"], rows)


def tails_table(reports: list[Report]) -> list[str]:
    rows = []
    for report in reports:
        if not report.skipped:
            tail = tail_of(report)
            rows.append([report.kernel.name, tail.touches, tail.needs_finite, tail.verdict])
    head = ["kernel", "touches it?", "must be finite?", "the registry's number"]
    return table("Memory past a sequence's end", head, rows)
