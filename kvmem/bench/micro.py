"""What one call costs on the CPU device, where memory is real: pages are created, mapped and unmapped by the kernel.

Every repetition runs all cases on every backend in turn, so that a slow moment of the machine falls on all of them; the
first are warm-up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np

from kvmem.arguments import format_bytes
from kvmem.bench.errors import BenchError
from kvmem.bench.memory import Backend, Budget, open_allocator
from kvmem.bench.model import Model
from kvmem.bench.pools import Int32s
from kvmem.bench.spread import Spread

__all__ = ["MicroResult", "micro"]

_WARM_UP = 2
_STEPS = 48  # decode steps of a repetition: crosses three block edges


@dataclass(frozen=True)
class MicroResult:
    """``us``: microseconds a ``unit`` of ``case`` on ``backend``, for a batch of ``sequences``."""

    case: str
    unit: str
    backend: str
    sequences: int
    us: Spread


_CASES = {
    "map": "page",  # extend with nothing parked: creates and maps
    "admit": "batch",  # the same extend over parked rows
    "extend": "step",  # one token each, no block edge
    "extend at an edge": "step",  # one token each, all cross a block edge, rows parked
    "batch": "step",  # kernel metadata refilled in place
    "free": "sequence",
    "unmap": "page",  # trim of everything parked
}


class _Bench:
    """One backend's allocator and its timings."""

    def __init__(self, model: Model, backend: Backend, budget: Budget, sequences: int, tokens: int) -> None:
        self.backend, self.sequences, self.tokens = backend, sequences, tokens
        self.block_size, self.page_bytes = model.spec.block_size, budget.page_bytes
        self.allocator = open_allocator(model, backend, "cpu", budget)
        self.ns: dict[str, list[float]] = {case: [] for case in _CASES}
        self.batch = self.allocator.make_batch(max_new_tokens=sequences, max_tokens=tokens)
        self.one = np.ones(sequences, dtype=np.int32)

    def time(self, case: str, call: Callable[[], object], units: int = 1) -> None:
        begin = perf_counter_ns()
        call()
        self.ns[case].append((perf_counter_ns() - begin) / units)

    def extend(self, ids: Int32s, counts: Int32s) -> None:
        self.allocator.extend_batch(ids, counts)
        self.allocator.commit_batch(ids, counts)

    def repeat(self) -> None:
        """Every case once; leaves the allocator empty, with nothing mapped."""
        allocator, n = self.allocator, self.sequences
        full = np.full(n, self.tokens, dtype=np.int32)
        ids = allocator.open_batch(n)
        before = allocator.stats().mapped_bytes
        begin = perf_counter_ns()
        self.extend(ids, full)
        spent = perf_counter_ns() - begin
        pages = (allocator.stats().mapped_bytes - before) // self.page_bytes
        self.ns["map"].append(spent / max(1, pages))
        self.time("free", lambda: allocator.free_batch(ids), n)
        self._decode(full - _STEPS)
        before = allocator.stats().mapped_bytes
        begin = perf_counter_ns()
        allocator.trim()
        spent = perf_counter_ns() - begin
        pages = (before - allocator.stats().mapped_bytes) // self.page_bytes
        self.ns["unmap"].append(spent / max(1, pages))

    def _decode(self, prompt: Int32s) -> None:
        allocator = self.allocator
        ids = allocator.open_batch(self.sequences)
        self.time("admit", lambda: self.extend(ids, prompt))
        for step in range(_STEPS):
            edge = (self.tokens - _STEPS + step) % self.block_size == 0
            self.time("extend at an edge" if edge else "extend", lambda: allocator.extend_batch(ids, self.one))
            self.time("batch", lambda: allocator.fill(ids, self.batch))
            allocator.commit_batch(ids, self.one)
        allocator.free_batch(ids)

    def forget(self) -> None:
        for values in self.ns.values():
            values.clear()

    def results(self) -> list[MicroResult]:
        return [
            MicroResult(case, unit, self.backend, self.sequences, Spread.of_ns(self.ns[case]))
            for case, unit in _CASES.items()
        ]


def micro(
    model: Model,
    backends: Sequence[Backend],
    *,
    memory_bytes: int,
    page_bytes: int,
    sequences: int = 32,
    repetitions: int = 20,
    progress: Callable[[int], None] | None = None,
) -> list[MicroResult]:
    """All cases on all ``backends``, each with ``memory_bytes`` of real memory. Raises `BenchError` when the batch
    would not fit.
    """
    tokens = _tokens_each(model, memory_bytes, page_bytes, sequences)
    budget = Budget(memory_bytes, sequences, -(-tokens // 256) * 256, page_bytes)
    benches = [_Bench(model, backend, budget, sequences, tokens) for backend in backends]
    for repetition in range(_WARM_UP + repetitions):
        for bench in benches:
            bench.repeat()
            if repetition + 1 == _WARM_UP:
                bench.forget()
        if progress is not None:
            progress(repetition + 1)
    return [result for bench in benches for result in bench.results()]


def _tokens_each(model: Model, memory_bytes: int, page_bytes: int, sequences: int) -> int:
    """Tokens for each sequence that leave two pages a sequence to spare for rounding, in whole blocks."""
    room = memory_bytes - 2 * page_bytes * (sequences + 1)
    blocks = room // (sequences * model.bytes_per_token * model.spec.block_size)
    least = -(-_STEPS // model.spec.block_size) + 1
    if blocks < least:
        need = least * sequences * model.bytes_per_token * model.spec.block_size + 2 * page_bytes * (sequences + 1)
        raise BenchError(
            f"{sequences} sequences of {least * model.spec.block_size} tokens need {format_bytes(need)} of real "
            f"memory; there are {format_bytes(memory_bytes)}. Give more --real-memory"
        )
    return int(blocks * model.spec.block_size)
