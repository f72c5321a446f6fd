"""kvmem beside vLLM's manager, and the C++ floor: one workload, one run, interleaved.

Each peer is its published wheel, installed without dependencies into a folder of its own, and runs in a process of its
own (``drivers/``): only its KV manager is imported. Times are CPU time of the calling thread, so that a call that lasts
a millisecond does not pay for other programs while one that lasts a microsecond does not; the floor's are wall clock.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import thread_time_ns
from types import TracebackType
from typing import Any

import numpy as np

from kvmem.bench.drivers import harness
from kvmem.bench.environment import environment
from kvmem.bench.errors import BenchError
from kvmem.bench.floor import build_floor, run_program
from kvmem.bench.results import SCHEMA_VERSION, without_folders
from kvmem.bench.spread import Spread
from kvmem.bench.step import FLOOR, open_manager
from kvmem.bench.workload import Timings, Workload

__all__ = ["PEERS", "Peer", "PeersReport", "PeersResult", "peers", "workloads"]

_DRIVERS = Path(__file__).parent / "drivers"
OURS = ("paged", "virtual")


@dataclass(frozen=True)
class Peer:
    """A wheel that is measured. ``beside``: small packages that it imports and that are not stood in for."""

    name: str
    requirement: str
    beside: tuple[str, ...] = ()

    def install(self, folder: Path) -> str:
        """The command that installs it; its own dependencies stay away."""
        words = " ".join((self.requirement, *self.beside))
        return f"python -m pip install --no-deps --target {folder / self.name} {words}"


PEERS = (Peer("vllm", "vllm==0.33.0", ("cachetools", "cbor2", "msgspec", "pybase64", "pyzmq")),)


@dataclass(frozen=True)
class PeersResult:
    """``us``: microseconds a ``unit`` of ``manager``. ``times_floor`` and ``times_kvmem``: its median over theirs (of
    the faster of our backends). ``peak_bytes``: what the process grew by, None for the floor and for us.
    """

    workload: str
    case: str
    unit: str
    manager: str
    us: Spread
    times_floor: float | None
    times_kvmem: float | None
    peak_bytes: int | None


@dataclass
class PeersReport:
    """The rows, and their JSON form: ``schema_version``, ``environment``, ``command``, ``setup``, ``results``."""

    rounds: int
    workload: Workload
    versions: dict[str, str]
    results: list[PeersResult]
    notes: list[str]

    def to_dict(self, command: list[str]) -> dict[str, Any]:
        setup = {"rounds": self.rounds, "versions": self.versions, "notes": self.notes} | asdict(self.workload)
        return {
            "schema_version": SCHEMA_VERSION,
            "environment": environment(),
            "command": without_folders(command),
            "setup": setup,
            "results": {"peers": [asdict(row) for row in self.results]},
        }


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
    base: Workload, folder: Path, rounds: int, progress: Callable[[int], None] | None = None,
    among: Sequence[Peer] = PEERS,
) -> PeersReport:  # fmt: skip
    """Every workload on every manager that is there. ``folder``: where the peers are installed, each under its name."""
    report = PeersReport(rounds, base, {}, [], [])
    installed = [peer for peer in among if (folder / peer.name).is_dir()]
    report.notes += [f"{p.name} is absent; install it with: {p.install(folder)}" for p in among if p not in installed]
    floor = [FLOOR]
    try:
        build_floor()
    except BenchError as error:
        floor = []
        report.notes.append(f"no floor: {error}")
    for done, (name, workload) in enumerate(workloads(base).items(), 1):
        timings, peaks = _measure(workload, installed, floor, folder, rounds, report)
        report.results += _results(name, timings, peaks)
        if progress is not None:
            progress(done)
    return report


def _measure(
    workload: Workload, installed: Sequence[Peer], floor: list[str], folder: Path, rounds: int, report: PeersReport
) -> tuple[dict[str, Timings], dict[str, int]]:
    timings: dict[str, Timings] = {name: Timings() for name in (*floor, *OURS)}
    peaks: dict[str, int] = {}
    ours = {name: open_manager(name, workload) for name in OURS}
    with ExitStack() as stack:
        running: dict[str, _Process] = {}
        for peer in installed:
            try:
                running[peer.name] = stack.enter_context(_Process(peer, folder / peer.name, workload))
            except BenchError as error:
                note = f"{peer.name} left out: {error}"
                report.notes += [note] if note not in report.notes else []
                continue
            report.versions[peer.name] = running[peer.name].version
            timings[peer.name] = Timings()
        for number in range(rounds + 1):
            prompts, answers = workload.prompts(number), workload.answers(number)
            turn: dict[str, dict[str, Any]] = {}
            for name in floor:
                turn[name] = run_program(build_floor(), workload)
            for name, manager in ours.items():
                turn[name] = dict(
                    harness.run_round(manager, prompts, answers, workload.block, not workload.evict, thread_time_ns)
                )
            for name, process in list(running.items()):
                try:
                    turn[name] = process.round(prompts, answers)
                except BenchError as error:
                    report.notes.append(f"{name} left out of {workload}: {error}")
                    del running[name], timings[name]
                    continue
                peaks[name] = max(peaks.get(name, 0), turn[name]["peak_bytes"])
            if number > 0:  # the first warms up
                for name, printed in turn.items():
                    timings[name].add(printed)
    return timings, peaks


def _results(workload: str, timings: dict[str, Timings], peaks: dict[str, int]) -> list[PeersResult]:
    rows = []
    for case, unit, phase in _CASES:
        spreads = {name: Spread.of_ns(values.all(phase)) for name, values in timings.items()}
        least = spreads[FLOOR].median if FLOOR in spreads else 0.0
        best = min(spreads[name].median for name in OURS)
        for name, us in spreads.items():
            times_floor = us.median / least if least and name != FLOOR else None
            times_kvmem = us.median / best if best and name not in (FLOOR, *OURS) else None
            rows.append(PeersResult(workload, case, unit, name, us, times_floor, times_kvmem, peaks.get(name)))
    return rows


class _Process:
    """A peer's manager in a process of its own; ends with the block."""

    def __init__(self, peer: Peer, folder: Path, workload: Workload) -> None:
        quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self.peer = peer
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, str(_DRIVERS / f"{peer.name}_driver.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | quiet | {"PYTHONPATH": str(folder)},
        )
        with ExitStack() as undo:  # the process must not outlive a constructor that fails
            undo.callback(self.__exit__, None, None, None)
            self.version: str = self._ask(asdict(workload))["version"]
            undo.pop_all()

    def round(self, prompts: np.ndarray, answers: np.ndarray) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            np.save(Path(folder) / "prompts.npy", prompts)
            np.save(Path(folder) / "answers.npy", answers)
            return self._ask(folder)

    def _ask(self, what: object) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):  # a driver that has ended has said why
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            said = [text.strip() for text in self.errors.read().splitlines() if text.strip()]
            raise BenchError(f"its driver ended: {said[-1][:300] if said else 'without a word'}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.errors):
            with suppress(BrokenPipeError):
                pipe.close()
