"""What all managers, kvmem's and the peers', run under: the timed loop, the exchange with the parent process, and
stand-ins for modules that a peer imports although its KV manager does not need them. It imports only numpy and the
standard library, because it runs in the peers' environments too.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import sys
import types
from collections.abc import Callable, Sequence
from importlib import import_module, metadata
from pathlib import Path
from time import perf_counter_ns, thread_time_ns
from typing import Any

import numpy as np

PHASES = ("admit", "step", "edge", "free")


def run_round(
    manager: Any, prompts: Any, answers: Any, block: int, clear: bool, clock: Callable[[], int] = perf_counter_ns
) -> dict[str, list[int]]:
    """Nanoseconds of every admission, plain step, step at a block edge and end: ``<phase>_ns``.

    prompts: of each sequence, in the form that the manager takes. answers: of each step, the token of each sequence.
    clear: what is cached is evicted at the end, which is not timed.
    """
    ns: dict[str, list[int]] = {f"{phase}_ns": [] for phase in PHASES}
    for i, prompt in enumerate(prompts):
        begin = clock()
        manager.admit(i, prompt)
        ns["admit_ns"].append(clock() - begin)
    for step, tokens in enumerate(answers):
        last = None if step == 0 else tokens
        begin = clock()
        manager.step(last)
        spent = clock() - begin
        ns["edge_ns" if (len(prompts[0]) + step) % block == 0 else "step_ns"].append(spent)
    for i in range(len(prompts)):
        begin = clock()
        manager.release(i)
        ns["free_ns"].append(clock() - begin)
    if clear:
        manager.clear()
    return ns


def serve(
    make: Callable[[dict[str, Any]], Any], version: str, as_taken: Callable[[Any], Any] = np.ndarray.tolist
) -> None:
    """Exchanges JSON lines. First in: the workload; out: ``{"version": ...}``. Then in: a folder with ``prompts.npy``
    and ``answers.npy``; out: the result of `run_round`, and ``peak_bytes``: the memory of the process at the end above
    that before the manager was made, less the prompts. as_taken: turns int32 arrays of token ids into what the manager
    takes.
    """
    workload = json.loads(sys.stdin.readline())
    _warm_up(make, workload, as_taken)
    base = _resident()
    manager = make(workload)
    _say({"version": version})
    for line in sys.stdin:
        before, folder = _resident(), Path(json.loads(line))
        prompts = as_taken(np.load(folder / "prompts.npy"))
        answers = as_taken(np.load(folder / "answers.npy"))
        grown = _resident() - before
        result: dict[str, Any] = dict(
            run_round(manager, prompts, answers, workload["block"], not workload["evict"], thread_time_ns)
        )
        _say(result | {"peak_bytes": max(0, _resident() - grown - base)})


def drive(
    make: Callable[[dict[str, Any]], Any], package: str, modules: Sequence[str], absent: Sequence[str],
    replaced: Sequence[str],
) -> None:  # fmt: skip
    """`serve` for a peer, with its stand-ins. ``modules``: imported before memory is measured."""
    sys.stdout = sys.stderr  # the peer's own output must not mix with the answers
    stand_in(absent, replaced)
    for name in modules:
        import_module(name)
    serve(make, metadata.version(package))


def _warm_up(make: Callable[[dict[str, Any]], Any], workload: dict[str, Any], as_taken: Callable[[Any], Any]) -> None:
    """One short round, so that what is loaded at the first use is not counted as the manager's memory."""
    block = workload["block"]
    small = workload | {"sequences": 2, "prompt": 2 * block, "shared": 0, "steps": block, "pool": 6}
    prompts = as_taken(np.arange(4 * block, dtype=np.int32).reshape(2, -1))
    run_round(make(small), prompts, as_taken(np.zeros((block, 2), np.int32)), block, True)


def _say(message: dict[str, Any]) -> None:
    sys.__stdout__.write(json.dumps(message) + "\n")  # type: ignore[union-attr]
    sys.__stdout__.flush()  # type: ignore[union-attr]


def _resident() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


class _Empty(type):
    """A metaclass: every attribute of its classes is the class itself."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class _Module(types.ModuleType):
    """A module in which every attribute is an empty class."""

    __path__: list[str] = []  # noqa: RUF012 (what makes it a package)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        members = {
            "__init__": lambda *_, **__: None,
            "__call__": lambda self, *_, **__: self,  # what a decorator with arguments makes is called
            "__class_getitem__": classmethod(lambda cls, _: cls),
        }
        empty = _Empty(name, (), members)
        setattr(self, name, empty)
        return empty


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if any(fullname == name or fullname.startswith(name + ".") for name in self.names):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def stand_in(absent: Sequence[str], replaced: Sequence[str] = ()) -> None:
    """Empty modules for those of ``absent`` that are not installed, and for all of ``replaced``."""
    sys.meta_path.append(_Finder(absent))
    sys.meta_path.insert(0, _Finder(replaced))
