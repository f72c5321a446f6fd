"""Decoders with no model around them: metadata, plan, writes and attention in every layer, one step at a time."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any, Protocol, cast

import numpy as np
import torch

from kvmem import Allocator
from kvmem.allocator.batch import GroupBatch
from kvmem.bench.gpu.device import BenchDevice, Call
from kvmem.bench.gpu.kernels import flashinfer_package, workspace
from kvmem.bench.gpu.memory import Cache, whole_blocks
from kvmem.bench.gpu.sizes import ModelShape
from kvmem.bench.gpu.static_pool import Int32s, StaticPool
from kvmem.kernels import flashinfer, reference
from kvmem.kernels.checks import flat_tokens
from kvmem.kernels.write import write_kv

__all__ = ["Decoder", "Managed", "Static", "StepTimes", "StepWork"]

_SEED = 20240611


@dataclass(frozen=True)
class StepTimes:
    """Nanoseconds by the host's clock; for the counts see `kvmem.bench.gpu.decode.DecodeRow`."""

    whole: int
    allocator: int
    plan: int
    driver_calls: int = 0
    calls_meanwhile: int = 0
    lag_pages: int = 0
    lag_steps: int = 0


class Decoder(Protocol):
    name: str

    @property
    def out(self) -> torch.Tensor:
        """``[sequences, query heads, width]``: the last layer's attention in the last step."""

    def begin(self, lengths: Int32s) -> None:
        """A new batch with these prompts, filled and committed."""

    def step(self) -> StepTimes: ...

    def end(self) -> None: ...


class StepWork:
    """One token of each sequence in every layer: the write, and attention through FlashInfer (CUDA) or SDPA (CPU).

    On CUDA the layers are one captured graph; ``plan`` runs on the host before each replay.
    """

    def __init__(self, device: BenchDevice, model: ModelShape, sequences: int, max_blocks: int) -> None:
        self.device, self.model = device, model
        generator = torch.Generator(device.torch_device).manual_seed(_SEED)
        shape = (model.query_heads + 2 * model.kv_heads, sequences, model.head_dim)
        qkv = torch.randn(shape, generator=generator, device=device.torch_device, dtype=model.dtype).transpose(0, 1)
        sizes = [model.query_heads, model.kv_heads, model.kv_heads]
        self.q, self.k, self.v = (part.contiguous() for part in torch.split(qkv, sizes, 1))
        self.out = torch.empty_like(self.q)
        self._replay: Call | None = None
        self._wrapper: Any = None
        if device.kind == "cuda":
            self._wrapper = _graph_wrapper(device.torch_device, sequences, max_blocks)

    def plan(self, batch: GroupBatch) -> None:
        if self._wrapper is None:
            return
        model = self.model
        self._wrapper.plan(
            **flashinfer.decode_plan(
                batch, num_query_heads=model.query_heads, num_kv_heads=model.kv_heads, head_dim=model.head_dim,
                dtype=model.dtype,
            )
        )  # fmt: skip

    def run(self, caches: list[Cache], batch: GroupBatch) -> None:
        """Every call gets the same caches and the same batch, refilled: the first one is captured."""
        if self._replay is None:
            self._replay = self.device.capture(lambda: self._layers(caches, batch))
        self._replay()

    def _layers(self, caches: list[Cache], batch: GroupBatch) -> None:
        for cache in caches:
            write_kv(cache, batch, self.k, self.v)
            if self._wrapper is None:
                self.out.copy_(reference.sdpa(self.q, cache, batch))
            else:
                self._wrapper.run(self.q, flashinfer.cache_of(*cache), out=self.out)


def _graph_wrapper(device: torch.device, sequences: int, max_blocks: int) -> Any:
    def buffer(size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int32, device=device)

    return flashinfer_package().BatchDecodeWithPagedKVCacheWrapper(
        workspace(device), "NHD", use_cuda_graph=True, use_tensor_cores=True,
        paged_kv_indptr_buffer=buffer(sequences + 1), paged_kv_indices_buffer=buffer(max_blocks),
        paged_kv_last_page_len_buffer=buffer(sequences),
    )  # fmt: skip


class Static:
    """Over a static pool."""

    name = "static pool"

    def __init__(self, device: BenchDevice, model: ModelShape, sequences: int, tokens: int) -> None:
        self.pool = StaticPool.of(model, device.torch_device, sequences, tokens)
        self.work = StepWork(device, model, sequences, self.pool.tables.max_blocks)
        self._tokens, self._model = tokens, model
        self._lengths: Int32s = np.zeros(sequences, dtype=np.int32)

    @property
    def out(self) -> torch.Tensor:
        return self.work.out

    def begin(self, lengths: Int32s) -> None:
        self._lengths = lengths.copy()
        starts = np.arange(len(lengths)) * -(-self._tokens // self._model.block_size) * self._model.block_size
        for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            slots = torch.arange(start, start + length, device=self.work.q.device)
            _write_prompt(self.pool.caches, slots, row, self._model)

    def step(self) -> StepTimes:
        begin = perf_counter_ns()
        self._lengths += 1
        tables = self.pool.tables
        tables.fill(self._lengths)
        filled = perf_counter_ns()
        batch = cast(GroupBatch, tables)
        self.work.plan(batch)
        planned = perf_counter_ns()
        self.work.run(self.pool.caches, batch)
        self.work.device.synchronize()
        return StepTimes(perf_counter_ns() - begin, filled - begin, planned - filled)

    def end(self) -> None:
        pass


class Managed:
    """Over an allocator. What only watches (counters, the mapper's lag) is outside of all times."""

    def __init__(
        self, device: BenchDevice, model: ModelShape, allocator: Allocator, sequences: int, tokens: int
    ) -> None:  # fmt: skip
        self.name: str = allocator.backend
        self.allocator = allocator
        self._model = model
        self.batch = allocator.make_batch(max_sequences=sequences, max_new_tokens=sequences, max_tokens=tokens)
        max_blocks = self.batch.full("kv_indices").numel()
        self.work = StepWork(device, model, sequences, max_blocks)
        self._ids: Int32s = np.empty(0, dtype=np.int32)
        self._caches: list[Cache] = []
        self._lag = _Lag(self.allocator)

    @property
    def out(self) -> torch.Tensor:
        return self.work.out

    def begin(self, lengths: Int32s) -> None:
        allocator = self.allocator
        self._ids = allocator.open_batch(len(lengths))
        allocator.extend_batch(self._ids, lengths)
        layers = range(self._model.layers)
        if not self._caches:
            self._caches = [(whole_blocks(k), whole_blocks(v)) for k, v in (allocator.kv(layer) for layer in layers)]
        for row, handle in enumerate(self._ids.tolist()):
            _write_prompt(self._caches, allocator.batch([handle]).slot_mapping, row, self._model)
        allocator.commit_batch(self._ids, lengths)
        self._lag.forget()

    def step(self) -> StepTimes:
        lag_pages, lag_steps = self._lag.now()
        calls = [self._lag.calls()]
        begin = perf_counter_ns()
        self.allocator.step(self._ids, self.batch)
        stepped = perf_counter_ns()
        calls.append(self._lag.calls())
        watched = perf_counter_ns()
        self.work.plan(self.batch)
        planned = perf_counter_ns()
        self.work.run(self._caches, self.batch)
        self.work.device.synchronize()
        end = perf_counter_ns()
        calls.append(self._lag.calls())
        self._lag.decided()
        return StepTimes(
            end - begin - (watched - stepped), stepped - begin, planned - watched, calls[2] - calls[0],
            calls[1] - calls[0], lag_pages, lag_steps,
        )  # fmt: skip

    def end(self) -> None:
        self.allocator.free_batch(self._ids)


class _Lag:
    """How far the mapper is behind: pages that the books say are mapped, less those that the driver has mapped.

    Not known on a CPU, whose driver counts runs of pages: 0 there.
    """

    def __init__(self, allocator: Allocator) -> None:
        assert allocator.pool.device.driver is not None
        self._allocator, self._driver = allocator, allocator.pool.device.driver
        self._counts_pages = self._driver.info.name == "cuda"
        self._decided: list[int] = []

    def calls(self) -> int:
        return int(self._driver.counters().total)

    def forget(self) -> None:
        self._decided = [self._books()]

    def decided(self) -> None:
        """After a step: what all steps so far have decided."""
        self._decided.append(self._books())

    def now(self) -> tuple[int, int]:
        """Pages not mapped yet, and how many steps ago the oldest of them was decided."""
        if not self._counts_pages:
            return 0, 0
        counters = self._driver.counters()
        mapped = counters.map - counters.unmap
        pages = max(0, self._decided[-1] - mapped)
        steps = 0
        while steps < len(self._decided) and self._decided[-1 - steps] > mapped:
            steps += 1
        return pages, steps

    def _books(self) -> int:
        return int(self._allocator.pool.core.mapped_pages)


def _write_prompt(caches: list[Cache], slots: torch.Tensor, row: int, model: ModelShape) -> None:
    """Random numbers of order one, the same for the same row in every cache and layer."""
    generator = torch.Generator(slots.device).manual_seed(_SEED + row)
    shape = (2, len(slots), model.kv_heads, model.head_dim)
    k, v = torch.randn(shape, generator=generator, device=slots.device, dtype=model.dtype)
    for cache in caches:
        for blocks, values in zip(cache, (k, v), strict=True):
            flat_tokens(blocks)[slots] = values
