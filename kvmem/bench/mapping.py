"""What a mapped page costs on the CPU device, beside a bare ``mmap`` of the same pages.

Runs of adjacent pages, mapped in turn by ``mmap(MAP_SHARED | MAP_FIXED)`` of a memfd and by `Sequence.extend`, which
also decides, keeps the books and can be undone. The same without Python by
``benchmarks/native/mapping.cpp`` (`make mapping`), and there by the host driver's own call too. Pages exist before the
clock starts, and none is touched while it runs: page faults are the first writer's, and the same for all.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np

from kvmem import _core
from kvmem.bench.environment import environment
from kvmem.bench.errors import BenchError
from kvmem.bench.results import SCHEMA_VERSION, without_folders
from kvmem.bench.spread import Spread

__all__ = ["DecodeResult", "MappingReport", "MappingResult", "mapping"]

BARE, EXTEND = "bare mmap", "Sequence.extend"
GOAL = 1.3  # times the bare mmap

_PROGRAM = Path(__file__).parents[2] / "build" / "bench" / "mapping"
_AREAS = 8  # sequences that grow in turn: whoever grows meets a neighbour in its row, but none in the memory
_RUNS = 12  # of each area
_PROTECT = mmap.PROT_READ | mmap.PROT_WRITE
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000  # Linux, all architectures but Alpha, MIPS and PA-RISC


@dataclass(frozen=True)
class MappingResult:
    """``us``: microseconds a run of ``run_pages`` pages. ``times_bare``: of the medians. ``driver_calls``: a run."""

    way: str
    page_bytes: int
    run_pages: int
    us: Spread
    times_bare: float
    driver_calls: float


@dataclass(frozen=True)
class DecodeResult:
    """Driver calls of a batch that decodes over the rows of one that was freed, the mapper on."""

    sequences: int
    steps: int
    driver_calls: int


@dataclass
class MappingReport:
    """Its JSON form has ``schema_version``, ``environment``, ``command``, ``setup``, ``results``."""

    repetitions: int
    rows: list[MappingResult]
    decode: DecodeResult

    def to_dict(self, command: list[str]) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "environment": environment(),
            "command": without_folders(command),
            "setup": {"repetitions": self.repetitions, "goal_times_bare": GOAL},
            "results": {
                "mapping": [asdict(row) for row in self.rows],
                "mapping_decode": [asdict(self.decode)],
            },
        }


def mapping(
    repetitions: int = 10,
    pages: tuple[int, ...] = (64 << 10, 2 << 20),
    runs: tuple[int, ...] = (1, 4, 32),
    progress: Callable[[int], None] | None = None,
) -> MappingReport:
    """Every page size with every run length. Takes address space and no memory to speak of."""
    rows: list[MappingResult] = []
    for done, (page_bytes, run_pages) in enumerate(product(pages, runs), 1):
        times: dict[str, list[int]] = {BARE: [], EXTEND: []}
        calls = 0
        for repetition in range(-1, repetitions):
            made = _repeat(page_bytes, run_pages, times)
            calls += made
            if repetition < 0:  # warmed up
                times, calls = {BARE: [], EXTEND: []}, 0
        rows += _results(page_bytes, run_pages, times, {BARE: len(times[BARE]), EXTEND: calls})
        if _PROGRAM.exists():
            rows += _without_python(page_bytes, run_pages, repetitions)
        if progress is not None:
            progress(done)
    return MappingReport(repetitions, rows, _decode())


def _results(
    page_bytes: int, run_pages: int, times: dict[str, list[int]], calls: dict[str, int]
) -> Iterator[MappingResult]:
    """``times``: the bare mmap's first."""
    bare = Spread.of_ns(next(iter(times.values()))).median
    for way, values in times.items():
        us = Spread.of_ns(values)
        yield MappingResult(way, page_bytes, run_pages, us, us.median / bare, calls[way] / len(values))


def _repeat(page_bytes: int, run_pages: int, times: dict[str, list[int]]) -> int:
    made = 0
    with _bare(page_bytes, run_pages) as bare, _extend(page_bytes, run_pages) as extend:
        for run, area in product(range(_RUNS), range(_AREAS)):
            times[BARE].append(bare(area, run)[0])
            spent, calls = extend(area, run)
            times[EXTEND].append(spent)
            made += calls
    return made


def _without_python(page_bytes: int, run_pages: int, repetitions: int) -> Iterator[MappingResult]:
    words = [str(_PROGRAM), str(page_bytes), str(run_pages), str(repetitions)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"{_PROGRAM.name}: {done.stderr.strip()[-300:] or f'ended with {done.returncode}'}")
    found = json.loads(done.stdout)
    names = {"bare": f"{BARE}, C++", "driver": "host driver, C++", "extend": "Allocator::extend, C++"}
    times = {name: found[f"{key}_ns"] for key, name in names.items()}
    calls = {name: found.get(f"{key}_calls", len(times[name])) for key, name in names.items()}
    return _results(page_bytes, run_pages, times, calls)


_Call = Callable[[int, int], tuple[int, int]]  # area, run -> nanoseconds, driver calls


@contextmanager
def _bare(page_bytes: int, run_pages: int) -> Iterator[_Call]:
    """What ctypes adds is taken off: the same call of a function that does nothing."""
    libc = ctypes.CDLL(None, use_errno=True)
    for function in (libc.mmap, libc.labs):
        function.restype = ctypes.c_void_p
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    run_bytes = page_bytes * run_pages
    total = _AREAS * _RUNS * run_bytes
    hole = libc.mmap(None, total, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)
    if hole == ctypes.c_void_p(-1).value:
        raise BenchError(f"no {total} bytes of address space: {os.strerror(ctypes.get_errno())}")
    file = os.memfd_create("bench")
    os.ftruncate(file, total)

    def call(area: int, run: int) -> tuple[int, int]:
        at, offset = hole + (area * _RUNS + run) * run_bytes, (run * _AREAS + area) * run_bytes
        words = (at, run_bytes, _PROTECT, mmap.MAP_SHARED | _MAP_FIXED, file, offset)
        begin = perf_counter_ns()
        libc.labs(*words)
        middle = perf_counter_ns()
        got = libc.mmap(*words)
        end = perf_counter_ns()
        if got != at:
            raise BenchError(f"mmap failed: {os.strerror(ctypes.get_errno())}")
        return max(0, (end - middle) - (middle - begin)), 1

    try:
        yield call
    finally:
        libc.munmap(hole, total)
        os.close(file)


@contextmanager
def _extend(page_bytes: int, run_pages: int) -> Iterator[_Call]:
    """A page is a block. The pages are those of an allocator that has been closed: they exist, and nothing maps them.
    A run that the kernel is asked for once counts as one driver call.
    """
    from kvmem import PagePool

    block, count = 16, _AREAS * _RUNS * run_pages
    driver = _core.host_driver()
    pool = PagePool(device="cpu", memory=count * page_bytes, page_bytes=page_bytes, driver=driver)
    longest = _RUNS * run_pages * block
    first = _open(pool, page_bytes, block, _AREAS, longest)
    first.extend_batch(first.open_batch(_AREAS), np.full(_AREAS, longest, dtype=np.int32))
    del first
    if pool.mapped_bytes:
        raise BenchError(f"{pool.mapped_bytes} bytes are still mapped: something keeps the first allocator")
    allocator = _open(pool, page_bytes, block, _AREAS, longest)
    sequences = [allocator.sequence() for _ in range(_AREAS)]
    tokens = run_pages * block

    def call(area: int, run: int) -> tuple[int, int]:
        sequence, before = sequences[area], driver.counters().map
        begin = perf_counter_ns()
        sequence.extend(tokens)
        spent = perf_counter_ns() - begin
        return spent, driver.counters().map - before

    yield call
    if allocator.stats().mapped_bytes != count * page_bytes:
        raise BenchError(f"{allocator.stats().mapped_bytes} bytes were mapped instead of {count * page_bytes}")


def _open(pool: Any, page_bytes: int, block: int, sequences: int, tokens: int, map_ahead_tokens: int = 0) -> Any:
    """K and V of one layer, a block a page."""
    from kvmem import Allocator, CacheSpec

    width = page_bytes // block // 4 // 8
    config = {"model_type": "llama", "hidden_size": width * 8, "num_hidden_layers": 1, "num_attention_heads": 8,
              "num_key_value_heads": 8, "head_dim": width}  # fmt: skip
    spec = CacheSpec.from_config(config, dtype="bfloat16", block_size=block)
    return Allocator(
        spec,
        backend="virtual",
        pool=pool,
        max_sequences=sequences,
        max_tokens=tokens,
        interleave="all",
        map_ahead_tokens=map_ahead_tokens,
        tail_guard_tokens=0,
        zero="never",
        prefix_cache=False,
    )


def _decode(sequences: int = 16, prompt: int = 256, steps: int = 256, page_bytes: int = 64 << 10) -> DecodeResult:
    """A batch decodes and is freed; the next one decodes over its rows, and those calls are counted."""
    from kvmem import PagePool

    longest = prompt + steps
    pool = PagePool(device="cpu", memory=2 * sequences * (longest + 64) // 16 * page_bytes, page_bytes=page_bytes)
    one = np.ones(sequences, dtype=np.int32)
    allocator = _open(pool, page_bytes, 16, sequences, longest + 64, map_ahead_tokens=32)
    for _ in range(2):
        ids = allocator.open_batch(sequences)
        allocator.extend_batch(ids, one * prompt)
        allocator.commit_batch(ids, one * prompt)
        before = allocator.stats().driver_calls
        for _ in range(steps):
            allocator.extend_batch(ids, one)
            allocator.commit_batch(ids, one)
        calls = allocator.stats().driver_calls - before
        allocator.free_batch(ids)
    return DecodeResult(sequences, steps, calls)
