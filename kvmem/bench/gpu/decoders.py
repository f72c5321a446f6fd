"""Decoders without a model: metadata, plan, writes and attention in every layer, one step at a time.

One uses an allocator, one a static pool, as an engine without an allocator does: every sequence owns memory for its
longest length from the start, block tables never change, and a step adds one to the lengths and uploads what the
kernel's plan and the write need.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any

import numpy as np
import torch

from kvmem import Allocator
from kvmem.bench.gpu.device import BenchDevice, Call
from kvmem.bench.gpu.kernels import package_of, plan_arguments, workspace
from kvmem.bench.gpu.memory import Cache, whole_blocks
from kvmem.bench.gpu.sizes import ModelShape
from kvmem.bench.pools import Int32s
from kvmem.kernels import flashinfer, reference
from kvmem.kernels.checks import flat_tokens
from kvmem.kernels.write import write_kv

_SEED = 20240611


@dataclass(frozen=True)
class StepTimes:
    """Nanoseconds by the host's clock; for the counts see `kvmem.bench.gpu.decode.DecodeRow`."""

    whole: int
    allocator: int
    plan: int
    driver_calls: int
    calls_meanwhile: int
    lag_pages: int
    lag_steps: int


class Decoder:
    """One token of each sequence in every layer: the write, and attention through FlashInfer (CUDA) or SDPA (CPU).

    On CUDA the layers are one captured graph, so every step has the same caches and the same batch, refilled; the plan
    runs on the host before each replay. Reading counters and the mapper's lag is not timed.
    ``out``: ``[sequences, query heads, width]``, the last layer's attention in the last step.
    """

    name: str
    batch: Any  # a `GroupBatch`
    caches: list[Cache]

    def __init__(self, device: BenchDevice, model: ModelShape, sequences: int, max_blocks: int) -> None:
        self.device, self.model = device, model
        generator = torch.Generator(device.torch_device).manual_seed(_SEED)
        shape = (model.query_heads + 2 * model.kv_heads, sequences, model.head_dim)
        qkv = torch.randn(shape, generator=generator, device=device.torch_device, dtype=model.dtype).transpose(0, 1)
        sizes = [model.query_heads, model.kv_heads, model.kv_heads]
        self._q, self._k, self._v = (part.contiguous() for part in torch.split(qkv, sizes, 1))
        self.out = torch.empty_like(self._q)
        self._replay: Call | None = None
        self._wrapper: Any = None
        if device.kind == "cuda":
            self._wrapper = _graph_wrapper(device.torch_device, sequences, max_blocks)

    def begin(self, lengths: Int32s) -> None:
        """A new batch with these prompts, filled and committed."""
        raise NotImplementedError

    def end(self) -> None:
        """The batch ends."""

    def advance(self) -> None:
        """Room for a token of each sequence, and the metadata in ``batch``."""
        raise NotImplementedError

    def driver_calls(self) -> int:
        return 0

    def lag(self) -> tuple[int, int]:
        """Pages that the mapper has not mapped yet, and how many steps ago the oldest of them was decided."""
        return 0, 0

    def step(self) -> StepTimes:
        lag, before = self.lag(), self.driver_calls()
        begin = perf_counter_ns()
        self.advance()
        advanced = perf_counter_ns()
        meanwhile = self.driver_calls()
        watched = perf_counter_ns()
        if self._wrapper is not None:
            self._wrapper.plan(**flashinfer.decode_plan(self.batch, **plan_arguments(self.model)))
        planned = perf_counter_ns()
        if self._replay is None:
            self._replay = self.device.capture(self._layers)
        self._replay()
        self.device.synchronize()
        end = perf_counter_ns()
        return StepTimes(
            end - begin - (watched - advanced), advanced - begin, planned - watched, self.driver_calls() - before,
            meanwhile - before, *lag,
        )  # fmt: skip

    def _layers(self) -> None:
        for cache in self.caches:
            write_kv(cache, self.batch, self._k, self._v)
            if self._wrapper is None:
                self.out.copy_(reference.sdpa(self._q, cache, self.batch))
            else:
                self._wrapper.run(self._q, flashinfer.cache_of(*cache), out=self.out)

    def _write_prompt(self, slots: torch.Tensor, row: int) -> None:
        """Random numbers of order one, the same for the same row in every cache and layer."""
        generator = torch.Generator(slots.device).manual_seed(_SEED + row)
        shape = (2, len(slots), self.model.kv_heads, self.model.head_dim)
        k, v = torch.randn(shape, generator=generator, device=slots.device, dtype=self.model.dtype)
        for cache in self.caches:
            for blocks, values in zip(cache, (k, v), strict=True):
                flat_tokens(blocks)[slots] = values


def _graph_wrapper(device: torch.device, sequences: int, max_blocks: int) -> Any:
    def buffer(size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int32, device=device)

    return package_of().BatchDecodeWithPagedKVCacheWrapper(
        workspace(device), "NHD", use_cuda_graph=True, use_tensor_cores=True,
        paged_kv_indptr_buffer=buffer(sequences + 1), paged_kv_indices_buffer=buffer(max_blocks),
        paged_kv_last_page_len_buffer=buffer(sequences),
    )  # fmt: skip


class ManagedDecoder(Decoder):
    """Over an allocator. The mapper's lag is the pages that the metadata says are mapped, less those that the driver
    has mapped; it is not known on a CPU, whose driver counts runs of pages: 0 there.
    """

    def __init__(
        self, device: BenchDevice, model: ModelShape, allocator: Allocator, sequences: int, tokens: int
    ) -> None:  # fmt: skip
        assert allocator.pool.device.driver is not None
        self.name, self.allocator, self._driver = allocator.backend, allocator, allocator.pool.device.driver
        self.batch = allocator.make_batch(max_sequences=sequences, max_new_tokens=sequences, max_tokens=tokens)
        super().__init__(device, model, sequences, self.batch.full("kv_indices").numel())
        self._ids: Int32s = np.empty(0, dtype=np.int32)
        self.caches = []
        self._decided: list[int] = []  # mapped pages, at the start of each step

    def begin(self, lengths: Int32s) -> None:
        allocator = self.allocator
        self._ids = allocator.open_batch(len(lengths))
        allocator.extend_batch(self._ids, lengths)
        if not self.caches:
            layers = (allocator.kv(layer) for layer in range(self.model.layers))
            self.caches = [(whole_blocks(k), whole_blocks(v)) for k, v in layers]
        for row, handle in enumerate(self._ids.tolist()):
            self._write_prompt(allocator.batch([handle]).slot_mapping, row)
        allocator.commit_batch(self._ids, lengths)
        self._decided = []

    def end(self) -> None:
        self.allocator.free_batch(self._ids)

    def advance(self) -> None:
        self.allocator.step(self._ids, self.batch)

    def driver_calls(self) -> int:
        return int(self._driver.counters().total)

    def lag(self) -> tuple[int, int]:
        self._decided.append(self.allocator.pool.core.mapped_pages)
        if self._driver.info.name != "cuda":
            return 0, 0
        counters = self._driver.counters()
        mapped, steps = counters.map - counters.unmap, 0
        while steps < len(self._decided) and self._decided[-1 - steps] > mapped:
            steps += 1
        return max(0, self._decided[-1] - mapped), steps


class StaticDecoder(Decoder):
    """Over a static pool."""

    name = "static pool"

    def __init__(self, device: BenchDevice, model: ModelShape, sequences: int, tokens: int) -> None:
        self.tables = StaticTables(model, device.torch_device, sequences, tokens)
        super().__init__(device, model, sequences, self.tables.max_blocks)
        self.batch = self.tables
        shape = (2, self.tables.max_blocks, model.block_size, model.kv_heads, model.head_dim)
        both = (torch.zeros(shape, dtype=model.dtype, device=device.torch_device) for _ in range(model.layers))
        self.caches = [(k, v) for k, v in both]
        self._lengths: Int32s = np.zeros(sequences, dtype=np.int32)

    def begin(self, lengths: Int32s) -> None:
        self._lengths = lengths.copy()
        for row, (start, length) in enumerate(zip(self.tables.first_slots.tolist(), lengths.tolist(), strict=True)):
            self._write_prompt(torch.arange(start, start + length, device=self.out.device), row)

    def advance(self) -> None:
        self._lengths += 1
        self.tables.fill(self._lengths)


class StaticTables:
    """The fields of `GroupBatch` that kernels read in decode, one new token a sequence. Addresses never change."""

    rows = row_starts = row_starts_cpu = None
    drops_tokens = False
    max_seqlen_q = 1

    def __init__(self, model: ModelShape, device: torch.device, sequences: int, tokens: int) -> None:
        self.block_size, self.num_rows, self.num_new_tokens = model.block_size, sequences, sequences
        width = -(-tokens // model.block_size)
        self._on_gpu = device.type == "cuda"
        sizes = {"seq_lens": sequences, "kv_indptr": sequences + 1, "kv_last_page_len": sequences,
                 "kv_indices": sequences * width, "slot_mapping": sequences}  # fmt: skip
        self._host = {
            name: torch.zeros(
                size, dtype=torch.int64 if name == "slot_mapping" else torch.int32, pin_memory=self._on_gpu
            )
            for name, size in sizes.items()
        }
        self._device = {name: host.to(device) for name, host in self._host.items()}
        self._uploaded = torch.cuda.Event() if self._on_gpu else None  # type: ignore[no-untyped-call]
        self._column = np.arange(width)
        self._table = (np.arange(sequences)[:, None] * width + self._column).astype(np.int32)
        self.first_slots = np.arange(sequences, dtype=np.int64) * width * model.block_size
        self.max_blocks = sequences * width
        self.block_table = torch.from_numpy(self._table).to(device)
        self.cu_seqlens_q_cpu = torch.arange(sequences + 1, dtype=torch.int32)
        self.first_tokens_cpu = torch.zeros(sequences, dtype=torch.int32)
        self._indices = 0

    def check_current(self) -> None:
        """Does nothing, because a static pool never reuses a sequence's blocks."""

    def fill(self, lengths: Int32s) -> None:
        """``lengths``: of each sequence, this step's token included."""
        if self._uploaded is not None:
            self._uploaded.synchronize()
        host = {name: tensor.numpy() for name, tensor in self._host.items()}
        blocks = -(-lengths // self.block_size)
        host["seq_lens"][:] = lengths
        np.cumsum(blocks, out=host["kv_indptr"][1:])
        host["kv_last_page_len"][:] = lengths - (blocks - 1) * self.block_size
        host["slot_mapping"][:] = self.first_slots + lengths - 1
        self._indices = int(host["kv_indptr"][-1])
        host["kv_indices"][: self._indices] = self._table[self._column < blocks[:, None]]
        if self._uploaded is not None:
            for name, tensor in self._host.items():
                used = self._indices if name == "kv_indices" else len(tensor)
                self._device[name][:used].copy_(tensor[:used], non_blocking=True)
            self._uploaded.record()

    def __getattr__(self, name: str) -> Any:
        field, cpu = (name[:-4], True) if name.endswith("_cpu") else (name, False)
        if field not in self.__dict__.get("_host", {}):
            raise AttributeError(name)
        tensor = self._host[field] if cpu or not self._on_gpu else self._device[field]
        return tensor[: self._indices] if field == "kv_indices" else tensor
