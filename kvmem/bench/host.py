"""The cost of calls on the CPU device, where memory is real: the kernel creates, maps and unmaps pages.

`micro` times single calls, on every backend in turn in each repetition, so that a slow moment of the machine affects
all; `mapping` times a run of pages beside a bare ``mmap`` of the same pages.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from time import perf_counter_ns

import numpy as np

from kvmem import Allocator, CacheSpec, PagePool, _core
from kvmem.bench.model import Backend, Budget, Model, check_fits, open_allocator
from kvmem.bench.pools import Int32s
from kvmem.bench.text import BenchError, Progress
from kvmem.bench.timing import WARM_UP, Spread

BARE, EXTEND = "bare mmap", "Sequence.extend"
_STEPS = 48  # decode steps of a repetition of `micro`: crosses three block edges
_AREAS, _RUNS = 8, 12  # of `mapping`: sequences that grow in turn, next to each other, and runs of each
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000  # Linux, all architectures but Alpha, MIPS and PA-RISC


@dataclass(frozen=True)
class MicroResult:
    """``us``: microseconds a ``unit`` of ``case`` on ``backend``, for a batch of ``sequences``. ``driver_calls``: of
    all repetitions together.
    """

    case: str
    unit: str
    backend: str
    sequences: int
    us: Spread
    driver_calls: int


@dataclass(frozen=True)
class MappingResult:
    """``us``: microseconds a run of ``run_pages`` pages. ``times_bare``: of the medians. ``driver_calls``: a run."""

    way: str
    page_bytes: int
    run_pages: int
    us: Spread
    times_bare: float
    driver_calls: float


# Single calls

_CASES = {
    "map": "page",  # extend with nothing parked: creates and maps
    "admit": "batch",  # the same extend over parked rows
    "extend": "step",  # one token each, no block edge
    "extend at an edge": "step",  # one token each, all cross a block edge, rows parked
    "batch": "step",  # kernel metadata refilled in place
    "free": "sequence",
    "unmap": "page",  # trim of everything parked
}


class _Micro:
    """One backend's allocator and its timings."""

    def __init__(self, model: Model, backend: Backend, budget: Budget, sequences: int, tokens: int) -> None:
        self.backend, self.sequences, self.tokens = backend, sequences, tokens
        self.block_size = model.spec.block_size
        self.allocator = open_allocator(model, backend, "cpu", budget)
        self.batch = self.allocator.make_batch(max_new_tokens=sequences, max_tokens=tokens)
        self.one = np.ones(sequences, dtype=np.int32)
        self.restart()

    def restart(self) -> None:
        self.ns: dict[str, list[float]] = {case: [] for case in _CASES}
        self.calls = dict.fromkeys(_CASES, 0)

    def time(self, case: str, call: Callable[[], object], units: int = 0) -> None:
        """0 units: the pages that ``call`` maps or unmaps."""
        core = self.allocator.pool.core
        calls, mapped = core.driver_calls, core.mapped_pages
        begin = perf_counter_ns()
        call()
        spent = perf_counter_ns() - begin
        self.ns[case].append(spent / (units or max(1, abs(core.mapped_pages - mapped))))
        self.calls[case] += core.driver_calls - calls

    def extend(self, ids: Int32s, counts: Int32s) -> None:
        self.allocator.extend_batch(ids, counts)
        self.allocator.commit_batch(ids, counts)

    def repeat(self) -> None:
        """Every case once; leaves the allocator empty, with nothing mapped."""
        allocator, n = self.allocator, self.sequences
        full = np.full(n, self.tokens, dtype=np.int32)
        ids = allocator.open_batch(n)
        self.time("map", lambda: self.extend(ids, full))
        self.time("free", lambda: allocator.free_batch(ids), n)
        self._decode(full - _STEPS)
        self.time("unmap", allocator.trim)

    def _decode(self, prompt: Int32s) -> None:
        allocator = self.allocator
        ids = allocator.open_batch(self.sequences)
        self.time("admit", lambda: self.extend(ids, prompt), 1)
        for step in range(_STEPS):
            edge = (self.tokens - _STEPS + step) % self.block_size == 0
            self.time("extend at an edge" if edge else "extend", lambda: allocator.extend_batch(ids, self.one), 1)
            self.time("batch", lambda: allocator.fill(ids, self.batch), 1)
            allocator.commit_batch(ids, self.one)
        allocator.free_batch(ids)

    def results(self) -> list[MicroResult]:
        return [
            MicroResult(case, unit, self.backend, self.sequences, Spread.of_ns(self.ns[case]), self.calls[case])
            for case, unit in _CASES.items()
        ]


def micro(
    model: Model, backends: Sequence[Backend], *, memory_bytes: int, page_bytes: int, sequences: int = 32,
    repetitions: int = 20, progress: Progress = lambda done: None,
) -> list[MicroResult]:  # fmt: skip
    """All cases on all ``backends``, each with ``memory_bytes`` of real memory. Raises `BenchError` when the batch
    would not fit.
    """
    tokens = _tokens_each(model, memory_bytes, page_bytes, sequences)
    budget = Budget(memory_bytes, sequences, -(-tokens // 256) * 256, page_bytes)
    benches = [_Micro(model, backend, budget, sequences, tokens) for backend in backends]
    for repetition in range(WARM_UP + repetitions):
        for bench in benches:
            bench.repeat()
            if repetition + 1 == WARM_UP:
                bench.restart()
        progress(repetition + 1)
    return [result for bench in benches for result in bench.results()]


def _tokens_each(model: Model, memory_bytes: int, page_bytes: int, sequences: int) -> int:
    """Tokens for each sequence that leave two pages a sequence to spare for rounding, in whole blocks."""
    spare, block_bytes = 2 * page_bytes * (sequences + 1), sequences * model.bytes_per_token * model.spec.block_size
    blocks, least = (memory_bytes - spare) // block_bytes, -(-_STEPS // model.spec.block_size) + 1
    if blocks < least:
        check_fits(sequences, least * model.spec.block_size, least * block_bytes + spare, memory_bytes)
    return int(blocks * model.spec.block_size)


# A run of pages beside a bare mmap

_Call = Callable[[int, int], tuple[int, int]]  # area, run -> nanoseconds, driver calls


def mapping(page_bytes: int = 64 << 10, run_pages: int = 4, repetitions: int = 10) -> list[MappingResult]:
    """A bare ``mmap(MAP_SHARED | MAP_FIXED)`` of a memfd, and `Sequence.extend`, which also decides, updates metadata
    and can be undone. Pages exist before the clock starts, and none is touched while it runs, so no page fault is
    timed. Uses address space and hardly any memory.
    """
    found: dict[str, list[tuple[int, int]]] = {BARE: [], EXTEND: []}
    for repetition in range(-1, repetitions):
        with _bare(page_bytes, run_pages) as bare, _extend(page_bytes, run_pages) as extend:
            for run, area in product(range(_RUNS), range(_AREAS)):
                for way, call in ((BARE, bare), (EXTEND, extend)):
                    found[way].append(call(area, run))
        if repetition < 0:  # warmed up
            found = {BARE: [], EXTEND: []}
    spreads = {way: Spread.of_ns([ns for ns, _ in pairs]) for way, pairs in found.items()}
    return [
        MappingResult(
            way, page_bytes, run_pages, us, us.median / spreads[BARE].median, float(np.mean(found[way], axis=0)[1])
        )
        for way, us in spreads.items()
    ]


@contextmanager
def _bare(page_bytes: int, run_pages: int) -> Iterator[_Call]:
    """The cost of ctypes is subtracted: that of the same call of a function that does nothing."""
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
        words = (at, run_bytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED, file, offset)
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
    """The pages are those of an allocator that has been closed: they exist, and nothing maps them. A run that the
    kernel is asked for once counts as one driver call.
    """
    block, count = 16, _AREAS * _RUNS * run_pages
    driver = _core.host_driver()
    pool = PagePool(device="cpu", memory=count * page_bytes, page_bytes=page_bytes, driver=driver)
    longest = _RUNS * run_pages * block
    first = open_rows(pool, page_bytes, _AREAS, longest)
    first.extend_batch(first.open_batch(_AREAS), np.full(_AREAS, longest, dtype=np.int32))
    del first
    if pool.mapped_bytes:
        raise BenchError(f"{pool.mapped_bytes} bytes are still mapped: something holds the first allocator")
    allocator = open_rows(pool, page_bytes, _AREAS, longest)
    sequences = [allocator.sequence() for _ in range(_AREAS)]

    def call(area: int, run: int) -> tuple[int, int]:
        sequence, before = sequences[area], driver.counters().map
        begin = perf_counter_ns()
        sequence.extend(run_pages * block)
        spent = perf_counter_ns() - begin
        return spent, driver.counters().map - before

    yield call
    if allocator.stats().mapped_bytes != count * page_bytes:
        raise BenchError(f"{allocator.stats().mapped_bytes} bytes were mapped instead of {count * page_bytes}")


def open_rows(pool: PagePool, page_bytes: int, sequences: int, tokens: int, map_ahead_tokens: int = 0) -> Allocator:
    """The virtual backend with K and V of one layer, 16 tokens a page."""
    width = page_bytes // 16 // 4 // 8
    spec = CacheSpec.kv(num_layers=1, num_kv_heads=8, head_dim=width, dtype="bfloat16", block_size=16)
    return Allocator(
        spec, backend="virtual", pool=pool, max_sequences=sequences, max_tokens=tokens, interleave="all",
        map_ahead_tokens=map_ahead_tokens, tail_guard_tokens=0, zero="never", prefix_cache=False,
    )  # fmt: skip
