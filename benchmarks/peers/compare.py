"""kvmem beside the KV managers of vLLM and SGLang, and the C++ baseline: one workload, one run, interleaved.

Each peer is its published wheel, installed without dependencies into a folder of its own: only its KV manager is
imported. Every manager, kvmem included, runs in a process of its own (``*_driver.py``) under one loop. Times are CPU
time of the calling thread, because other programs would lengthen long calls more than short ones; the baseline's are
wall clock.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console

from benchmarks.workload import FLOOR, Timings, Workload, floors, run_floor
from kvmem.bench.cli import JSON, PATH, QUIET
from kvmem.bench.document import check_writable, document, write_json
from kvmem.bench.render import Row, Table, console, show
from kvmem.bench.text import BenchError, Progress, progress
from kvmem.bench.timing import Spread

_DRIVERS = Path(__file__).parent
_PACKAGES = Path(__file__).parents[2]  # where benchmarks and kvmem are
_BATCHED = ("paged", "virtual")
_BY_REQUEST = "paged, SchedulerCache"
OURS = (*_BATCHED, _BY_REQUEST)


@dataclass(frozen=True)
class Peer:
    """A wheel that is measured. ``beside``: small packages that it imports and that have no stand-in."""

    name: str
    requirement: str
    beside: tuple[str, ...] = ()

    def install(self, folder: Path) -> str:
        """The command that installs it without its dependencies."""
        words = " ".join((self.requirement, *self.beside))
        return f"python -m pip install --no-deps --target {folder / self.name} {words}"


PEERS = (
    Peer("vllm", "vllm==0.33.0", ("cachetools", "cbor2", "msgspec", "pybase64", "pyzmq")),
    Peer("sglang", "sglang==0.5.23", ("dill", "msgspec", "packaging")),
)


@dataclass(frozen=True)
class PeersResult:
    """``us``: microseconds a ``unit``. The median is ``times_floor`` that of the baseline, ``times_kvmem`` that of the
    faster of our backends called once a step, and ``times_by_request`` that of our `SchedulerCache` called for each
    request. ``peak_bytes``: the growth of the process, None for the baseline.
    """

    workload: str
    case: str
    unit: str
    manager: str
    us: Spread
    times_floor: float | None
    times_kvmem: float | None
    times_by_request: float | None
    peak_bytes: int | None


@dataclass
class PeersReport:
    rounds: int
    workload: Workload
    ours: Sequence[str]
    versions: dict[str, str] = field(default_factory=dict)
    results: list[PeersResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def leave_out(self, running: dict[str, Any], name: str, error: BenchError, of: str = "") -> None:
        """Removes a peer that fails, with a note. Raises the error of a manager of ours."""
        if name in self.ours:
            raise BenchError(f"{name}: {error}") from error
        note = f"{name} left out{of}: {error}"
        self.notes += [note] if note not in self.notes else []
        del running[name]

    def to_dict(self, command: list[str]) -> dict[str, Any]:
        setup = {"rounds": self.rounds, "versions": self.versions, "notes": self.notes} | asdict(self.workload)
        return document(command, setup=setup, results={"peers": [asdict(row) for row in self.results]})


def workloads(base: Workload) -> dict[str, Workload]:
    """By name. In the last one every allocation evicts."""
    cached = replace(base, cache=True)
    return {
        "no prefix cache": base,
        "no prefix cache, all metadata": replace(base, metadata=True),
        "prefix cache, distinct prompts": cached,
        f"prefix cache, {base.prompt // 2:,} tokens shared": replace(cached, shared=base.prompt // 2),
        "prefix cache, full pool": replace(cached, evict=True, pool=base.blocks),
    }


_CASES = (("step", "step", "step"), ("step at a block edge", "step", "edge"), ("admit", "sequence", "admit"),
          ("free", "sequence", "free"))  # fmt: skip


def peers(
    base: Workload, folder: Path, rounds: int, done: Progress = lambda done: None,
    among: Sequence[Peer] = PEERS, ours: Sequence[str] = OURS,
) -> PeersReport:  # fmt: skip
    """Every workload on every manager that is there. ``folder``: where the peers are installed, each under its name."""
    report = PeersReport(rounds, base, ours)
    installed = [peer for peer in among if (folder / peer.name).is_dir()]
    report.notes += [f"{p.name} is absent; install it with: {p.install(folder)}" for p in among if p not in installed]
    floor, notes = floors()
    report.notes += notes
    for number, (name, workload) in enumerate(workloads(base).items(), 1):
        with ExitStack() as stack:
            running = _start(stack, workload, installed, folder, report)
            timings, peaks = _measure(workload, running, floor, rounds, report)
        report.results += _results(name, timings, peaks)
        done(number)
    return report


def _start(
    stack: ExitStack, workload: Workload, installed: Sequence[Peer], folder: Path, report: PeersReport
) -> dict[str, _Process]:
    """A process for each manager, ready for rounds. They start in parallel, since each takes seconds."""
    drivers: dict[str, tuple[Sequence[str], Path]]
    drivers = {name: (("kvmem_driver.py", name), _PACKAGES) for name in report.ours}
    drivers |= {peer.name: ((f"{peer.name}_driver.py",), folder / peer.name) for peer in installed}
    running = {name: stack.enter_context(closing(_Process(*driver, workload))) for name, driver in drivers.items()}
    for name, process in list(running.items()):
        try:
            version = process.version()
        except BenchError as error:
            report.leave_out(running, name, error)
        else:
            report.versions |= {name: version} if name not in report.ours else {}
    return running


def _measure(
    workload: Workload, running: dict[str, _Process], floor: list[str], rounds: int, report: PeersReport
) -> tuple[dict[str, Timings], dict[str, int]]:
    timings: dict[str, Timings] = {name: Timings() for name in (*floor, *running)}
    peaks: dict[str, int] = {}
    for number in range(rounds + 1):
        turn: dict[str, dict[str, Any]] = {name: run_floor(workload) for name in floor}
        with tempfile.TemporaryDirectory() as tokens:
            np.save(Path(tokens) / "prompts.npy", workload.prompts(number))
            np.save(Path(tokens) / "answers.npy", workload.answers(number))
            for name, process in list(running.items()):
                try:
                    turn[name] = process.ask(tokens)
                    peaks[name] = max(peaks.get(name, 0), turn[name]["peak_bytes"])
                except BenchError as error:
                    report.leave_out(running, name, error, f" of {workload}")
                    del timings[name]
        if number > 0:  # the first warms up
            for name, printed in turn.items():
                timings[name].add(printed)
    return timings, peaks


def _results(workload: str, timings: dict[str, Timings], peaks: dict[str, int]) -> list[PeersResult]:
    rows = []
    for case, unit, phase in _CASES:
        spreads = {name: Spread.of_ns(values.all(phase)) for name, values in timings.items()}
        medians = {name: us.median for name, us in spreads.items()}
        best = min((medians[name] for name in _BATCHED if name in medians), default=None)
        for name, us in spreads.items():
            of_ours = (best, medians.get(_BY_REQUEST)) if name not in (FLOOR, *OURS) else (None, None)
            bases = (medians.get(FLOOR) if name != FLOOR else None, *of_ours)
            floor, best_of_ours, by_request = (us.median / base if base else None for base in bases)
            times = (floor, best_of_ours, by_request, peaks.get(name))
            rows.append(PeersResult(workload, case, unit, name, us, *times))
    return rows


class _Process:
    """A manager in a process of its own. ``driver``: the file in this folder, and its arguments."""

    def __init__(self, driver: Sequence[str], folder: Path, workload: Workload) -> None:
        quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, str(_DRIVERS / driver[0]), *driver[1:]], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.errors, text=True, env=os.environ | quiet | {"PYTHONPATH": str(folder)},
        )  # fmt: skip
        self._say(asdict(workload))

    def version(self) -> str:
        """Waits until it is ready for rounds."""
        return str(self._answer()["version"])

    def ask(self, what: object) -> dict[str, Any]:
        self._say(what)
        return self._answer()

    def _say(self, what: object) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # `_answer` reports why a driver has ended
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            said = [text.strip() for text in self.errors.read().splitlines() if text.strip()]
            raise BenchError(f"its driver ended: {said[-1][:300] if said else 'it printed nothing'}")
        return json.loads(line)  # type: ignore[no-any-return]

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.errors):
            with suppress(BrokenPipeError):
                pipe.close()


def peer_tables(rows: Sequence[Row], of: str = "CPU time of the calling thread") -> Iterator[Table]:
    """For the ratios see `PeersResult`."""
    spec = """workload={workload}; call={case}, us a {unit}; manager={manager}; median={us[median]:us};
    p99={us[p99]:us}; largest={us[largest]:us}; times the floor={times_floor:,.1f}; times kvmem={times_kvmem:,.1f};
    times kvmem by request={times_by_request:,.1f}; process grew by={peak_bytes:bytes}"""
    yield Table.of(f"Managers on one workload: microseconds, {of}", spec, rows, 3)


def run(folder: Path, rounds: int, json_path: Path | None, quiet: bool, base: Workload | None = None) -> None:
    """``base``: the workload that all are made from; default 256 sequences of 2,048 tokens, 512 steps."""
    workload = base or Workload()
    check_writable(json_path)
    with progress(Console(stderr=True), "peers, workloads", len(workloads(workload)), quiet) as done:
        report = peers(workload, folder, rounds, done)
    written = report.to_dict(["peers", *sys.argv[1:]])
    show(console(), [*peer_tables(written["results"]["peers"]), *report.notes])
    write_json(written, json_path)


@click.command()
@click.option("--installed", type=PATH, default=Path("build/peers"), show_default=True, help="Where the peers are.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="After one that warms up.")
@JSON
@QUIET
def command(installed: Path, rounds: int, json_path: Path | None, quiet: bool) -> None:
    """kvmem beside the KV managers of vLLM and SGLang, and a C++ loop. Prints how to install a peer that is absent."""
    run(installed, rounds, json_path, quiet)
