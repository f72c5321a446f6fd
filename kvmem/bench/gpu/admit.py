"""The time until a prompt has its memory: from fresh pages, from a finished prompt's, or by a shared prefix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from time import perf_counter_ns
from typing import Any

import numpy as np

from kvmem import Allocator
from kvmem.arguments import format_bytes
from kvmem.bench.gpu.device import Call
from kvmem.bench.gpu.measure import Part
from kvmem.bench.gpu.memory import budget_bytes
from kvmem.bench.model import BACKENDS, Backend
from kvmem.bench.timing import Spread

_CASE_SECONDS = 4.0
_MORE_TOKENS = 64
_MOST_PROMPTS = 22


@dataclass(frozen=True)
class AdmitRow:
    """way: ``fresh`` pages, created and mapped nowhere; ``parked`` memory of a finished prompt of the same length;
    ``shared`` with a live sequence that begins with the same tokens; ``finished``: the same tokens, left by a sequence
    that has ended. The last two have one token of their own.

    host_us: until the call returns, from when on kernels can be launched. ready_us: until the device is done with what
    the call has queued as well (zeroes for fresh pages, copies).
    """

    way: str
    backend: str
    page_bytes: int
    prompt_tokens: int
    prompt_bytes: int
    cached_tokens: int
    host_us: Spread
    ready_us: Spread
    driver_calls: float


def admit(part: Part) -> None:
    """Each way, page size, prompt and backend, one prompt at a time."""
    for page in part.sizes.admit_pages:
        for prompt in part.sizes.admit_prompts:
            for backend in BACKENDS:
                size = "the default size" if page is None else format_bytes(page)
                run = partial(_case, part, backend, prompt, page)
                part.attempt(f"{backend}, {prompt} tokens, pages of {size}", _CASE_SECONDS, run)


def _case(part: Part, backend: Backend, prompt: int, page_bytes: int | None) -> None:
    for row in _Case(part, backend, prompt, page_bytes).rows():
        part.report.add("admit", row)


class _Case:
    def __init__(self, part: Part, backend: Backend, prompt: int, page_bytes: int | None) -> None:
        device, sizes = part.device, part.sizes
        self._device, self._backend, self._prompt = device, backend, prompt
        self._model = sizes.model
        room = min(sizes.admit_bytes, int(sizes.memory_share * device.free_bytes()))
        each = budget_bytes(self._model, backend, "all", 1, prompt + _MORE_TOKENS, page_bytes)
        self._count = min(_MOST_PROMPTS, room // each)
        self._allocator = Allocator(
            self._model.spec, backend=backend, device=device.torch_device, memory=self._count * each,
            page_bytes=page_bytes, max_sequences=self._count, max_tokens=prompt + _MORE_TOKENS, map_ahead_tokens=0,
        )  # fmt: skip
        self._page_bytes = self._allocator.pool.page_bytes

    def rows(self) -> list[AdmitRow]:
        fresh = self._unknown("fresh")
        parked = self._unknown("parked")
        return [fresh, parked, self._known("shared"), self._known("finished")]

    def _unknown(self, way: str) -> AdmitRow:
        """As many prompts as fit, all alive at the end; then freed, which parks what they held."""
        allocator, counts = self._allocator, np.array([self._prompt], dtype=np.int32)
        samples, held = [], []
        for _ in range(self._count):
            ids = allocator.open_batch(1)
            samples.append(self._timed(lambda ids=ids: allocator.extend_batch(ids, counts)))  # type: ignore[misc]
            allocator.commit_batch(ids, counts)
            held.append(ids)
        allocator.free_batch(np.concatenate(held))
        return self._row(way, 0, samples)

    def _known(self, way: str) -> AdmitRow:
        """One sequence computes the prompt; others begin with it, while it lives or after it has ended."""
        allocator = self._allocator
        allocator.clear_cache()
        tokens = np.arange(self._prompt, dtype=np.int32)
        first = allocator.sequence()
        first.extend(self._prompt)
        first.commit(tokens)
        if way == "finished":
            first.free()
        question = np.append(tokens, np.int32(self._prompt))
        samples, cached, alive = [], 0, []
        for _ in range(max(2, self._count - 3)):
            made: list[Any] = []

            def begin(made: list[Any] = made) -> None:
                made.append(allocator.sequence(question))
                made[0].extend(len(question) - made[0].num_cached_tokens)

            samples.append(self._timed(begin))
            cached = made[0].num_cached_tokens
            if way == "finished":
                made[0].free()
            else:  # its row would be the next one's, as it is
                alive.append(made[0])
        for sequence in [*alive, first] if way == "shared" else []:
            sequence.free()
        return self._row(way, cached, samples)

    def _timed(self, call: Call) -> tuple[int, int, int]:
        self._device.synchronize()
        calls = self._allocator.pool.core.driver_calls
        begin = perf_counter_ns()
        call()
        returned = perf_counter_ns()
        self._device.synchronize()
        ready = perf_counter_ns()
        return returned - begin, ready - begin, self._allocator.pool.core.driver_calls - calls

    def _row(self, way: str, cached: int, samples: list[tuple[int, int, int]]) -> AdmitRow:
        host, ready, calls = zip(*samples[1:] or samples, strict=True)  # the first one warms up
        return AdmitRow(
            way, self._backend, self._page_bytes, self._prompt, self._prompt * self._model.token_bytes, cached,
            Spread.of_ns(host), Spread.of_ns(ready), float(np.mean(calls)),
        )  # fmt: skip
