"""Memory moves between two allocators on one pool, while one of them decodes.

First the neighbour holds what the load leaves, and parks it; then the decoding allocator admits prompts, one after each
step, from the neighbour's pages; then it frees them and the neighbour takes them back. The step of the load is timed
before and meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np

from kvmem import Allocator, PagePool
from kvmem.bench.gpu.decoders import ManagedDecoder
from kvmem.bench.gpu.device import BenchDevice
from kvmem.bench.gpu.measure import Part
from kvmem.bench.gpu.sizes import Sizes
from kvmem.bench.model import BACKENDS, Backend
from kvmem.bench.pools import AllocatorPool, Int32s
from kvmem.bench.text import BenchError
from kvmem.bench.timing import WARM_UP, Spread

_BACKEND_SECONDS = 15.0
_MOST_PROMPTS = 64


@dataclass(frozen=True)
class ElasticRow:
    """``moved_bytes`` went ``direction`` in ``seconds``, decode steps between the admissions included. admission_us:
    of one prompt of ``prompt_tokens``, which takes its pages from the other allocator. step_us: of the load, meanwhile;
    quiet_step_us: before anything moved. ratio: of their medians.
    """

    backend: str
    direction: str
    moved_bytes: int
    prompt_tokens: int
    seconds: float
    admission_us: Spread
    gib_per_second: float
    step_us: Spread
    quiet_step_us: Spread
    ratio: float
    driver_calls: int


def elastic(part: Part) -> None:
    """Both backends."""
    for backend in BACKENDS:
        if part.allows(backend, _BACKEND_SECONDS):
            for row in _Neighbours(part.device, part.sizes, backend).rows():
                part.report.add("elastic", row)
            part.device.give_back()


class _Neighbours:
    def __init__(self, device: BenchDevice, sizes: Sizes, backend: Backend) -> None:
        self._sizes, self._backend = sizes, backend
        model, prompts = sizes.model, sizes.elastic_sequences
        # Every admission follows a step, so the load grows by as many tokens.
        tokens = sizes.elastic_prompt + WARM_UP + sizes.elastic_steps + 2 * _MOST_PROMPTS
        memory = min(sizes.elastic_bytes, int(sizes.memory_share * device.free_bytes()))
        self._pool = PagePool(device=device.torch_device, memory=memory, page_bytes=sizes.page_bytes)
        self._busy, self._quiet = (
            Allocator(
                model.spec, backend=backend, pool=self._pool, max_sequences=prompts + _MOST_PROMPTS,
                max_tokens=max(tokens, sizes.elastic_chunk), prefix_cache=False, map_ahead_tokens=0,
            )
            for _ in range(2)
        )  # fmt: skip
        self._load = ManagedDecoder(device, model, self._busy, prompts, tokens)

    def rows(self) -> list[ElasticRow]:
        sizes = self._sizes
        self._load.begin(np.full(sizes.elastic_sequences, sizes.elastic_prompt, dtype=np.int32))
        for _ in range(WARM_UP):
            self._load.step()
        before = [self._load.step().whole for _ in range(sizes.elastic_steps)]
        held = self._fill(self._quiet)
        rows = []
        for name, giver, taker in (
            ("to the busy one", self._quiet, self._busy),
            ("back to the quiet one", self._busy, self._quiet),
        ):
            giver.free_batch(np.concatenate(held))  # parked: it still holds the pages
            held, row = self._move(name, giver, taker, len(held), before)
            rows.append(row)
        return rows

    def _fill(self, allocator: Allocator) -> list[Int32s]:
        """Admits prompts until no memory is left, then frees the last one, because the load goes on growing."""
        held: list[Int32s] = []
        while len(held) < _MOST_PROMPTS and (ids := self._admit(allocator)) is not None:
            held.append(ids)
        if len(held) < 2:
            raise BenchError(f"elastic: a pool of {self._pool.budget_bytes} bytes leaves no room beside the load")
        allocator.free_batch(held.pop())
        return held

    def _move(
        self, direction: str, giver: Allocator, taker: Allocator, count: int, before: list[int]
    ) -> tuple[list[Int32s], ElasticRow]:
        held: list[Int32s] = []
        steps, admissions = [], []
        calls, mapped = self._pool.core.driver_calls, giver.stats().mapped_bytes
        begin = perf_counter_ns()
        for _ in range(count):
            steps.append(self._load.step().whole)
            asked = perf_counter_ns()
            if (ids := self._admit(taker)) is None:
                break  # the load has grown meanwhile
            admissions.append(perf_counter_ns() - asked)
            held.append(ids)
        seconds = (perf_counter_ns() - begin) / 1e9
        moved = mapped - giver.stats().mapped_bytes
        return held, ElasticRow(
            self._backend, direction, moved, self._sizes.elastic_chunk, seconds, Spread.of_ns(admissions),
            moved / 2**30 / (sum(admissions) / 1e9), Spread.of_ns(steps), Spread.of_ns(before),
            float(np.median(steps) / np.median(before)), self._pool.core.driver_calls - calls,
        )  # fmt: skip

    def _admit(self, allocator: Allocator) -> Int32s | None:
        return AllocatorPool(allocator, self._backend, self._sizes.elastic_chunk).admit(0, self._sizes.elastic_chunk)
