"""What kernels read: a filled cache of either backend, and a static twin of it with the same content and metadata.

The twin of the virtual backend is a plain contiguous tensor ``[rows, tokens, heads, width]`` for K and one for V of
each layer; the twin of the paged one is a pool of blocks for each. Rows and blocks have the same numbers as in the
cache, so the same metadata serves both, and what differs is the memory alone: mapped or allocated, interleaved or not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from kvmem import Allocator
from kvmem.allocator.batch import Batch
from kvmem.bench.gpu.device import BenchDevice
from kvmem.bench.gpu.sizes import ModelShape
from kvmem.bench.memory import Backend
from kvmem.kernels.checks import plain
from kvmem.kernels.write import write_kv

__all__ = [
    "Cache",
    "Managed",
    "Memory",
    "budget_bytes",
    "fitting",
    "open_cache",
    "static_layers",
    "static_twin",
    "whole_blocks",
]

Cache = tuple[torch.Tensor, torch.Tensor]
_GUARD = 256
_SEED = 20240611


@dataclass
class Memory:
    """``caches``: K and V ``[blocks, block_size, heads, width]`` of each layer, or of the first few; they are walked
    round and round. ``rows``: the same as ``[rows, tokens, heads, width]``, where sequences are contiguous.
    """

    name: str
    batch: Batch
    caches: list[Cache]
    rows: list[Cache] | None

    def cache(self, layer: int) -> Cache:
        return self.caches[layer % len(self.caches)]


class Managed(Memory):
    """A cache of ours, filled with random numbers. ``filling`` names every token."""

    def __init__(
        self, model: ModelShape, device: BenchDevice, backend: Backend, sequences: int, tokens: int, *,
        interleave: int | Literal["all"] = "all", page_bytes: int | None = None,
    ) -> None:  # fmt: skip
        self.allocator = open_cache(
            model, device, backend, sequences, tokens, interleave=interleave, page_bytes=page_bytes
        )
        self.ids = self.allocator.open_batch(sequences)
        counts = np.full(sequences, tokens, dtype=np.int32)
        self.allocator.extend_batch(self.ids, counts)
        self.filling = self.allocator.batch(self.ids)
        layers = range(model.layers)
        caches = [(plain(k), plain(v)) for k, v in (self.allocator.kv(layer) for layer in layers)]
        rows = None
        if backend == "virtual":
            rows = [(plain(self.allocator.rows(n, "k")), plain(self.allocator.rows(n, "v"))) for n in layers]
        _fill(caches, self.filling, model)
        super().__init__(backend, self.filling, caches, rows)
        self._left = tokens

    def ask(self, new_tokens: int) -> Batch:
        """Makes ``batch`` the one in which the last ``new_tokens`` of each sequence ask; fewer from call to call."""
        self.allocator.commit_batch(self.ids, np.full(len(self.ids), self._left - new_tokens, dtype=np.int32))
        self._left = new_tokens
        self.batch = self.allocator.batch(self.ids)
        return self.batch


def static_layers(model: ModelShape, tokens: int, cold_bytes: int) -> int:
    """How many layers of a static twin keep its reads out of the cache."""
    return min(model.layers, -(-cold_bytes // (tokens * model.layer_bytes)))


def fitting(model: ModelShape, room_bytes: int, need: Callable[[ModelShape], int]) -> ModelShape:
    """The model with as many layers as ``need`` of it leaves within ``room_bytes``; at least one."""
    layers = model.layers
    while layers > 1 and need(model.with_layers(layers)) > room_bytes:
        layers -= 1
    return model.with_layers(layers)


def static_twin(managed: Managed, model: ModelShape, layers: int) -> Memory:
    """The same content in plain tensors, ``layers`` of them; zeroes where the cache has nothing."""
    first = (managed.rows or managed.caches)[0][0]
    tensors: list[Cache] = []
    for _ in range(layers):
        k, v = torch.zeros(2, *first.shape, dtype=model.dtype, device=first.device)
        tensors.append((k, v))
    blocks = (-1, model.block_size, model.kv_heads, model.head_dim)
    caches = [(k.view(blocks), v.view(blocks)) for k, v in tensors]
    _fill(caches, managed.filling, model)
    if managed.rows is None:
        return Memory("static pool", managed.batch, caches, None)
    return Memory("static", managed.batch, caches, tensors)


def open_cache(
    model: ModelShape, device: BenchDevice, backend: Backend, sequences: int, tokens: int, *,
    interleave: int | Literal["all"] = "all", page_bytes: int | None = None, map_ahead_tokens: int = 0,
) -> Allocator:  # fmt: skip
    """An allocator with room for ``sequences`` of ``tokens``, the guard behind each included, and no more."""
    page = page_bytes or (2 << 20)
    layers = model.layers if interleave == "all" else min(interleave, model.layers)
    memory = budget_bytes(model, backend, layers, sequences, tokens + map_ahead_tokens, page)
    return Allocator(
        model.spec, backend=backend, device=device.torch_device, memory=memory, max_sequences=sequences,
        max_tokens=tokens, page_bytes=page, interleave=interleave, map_ahead_tokens=map_ahead_tokens,
        tail_guard_tokens=_GUARD, prefix_cache=False,
    )  # fmt: skip


def budget_bytes(model: ModelShape, backend: Backend, interleave: int, sequences: int, tokens: int, page: int) -> int:
    """Bytes of pages that ``sequences`` of ``tokens`` need, trash blocks and rounding included."""
    total = 0
    for first in range(0, model.layers, interleave):
        width = min(interleave, model.layers - first) * model.layer_bytes
        if backend == "virtual":
            total += sequences * -(-(tokens + _GUARD) * width // page) + 3
        else:
            blocks = sequences * -(-tokens // model.block_size) + 2
            total += -(-blocks * model.block_size * width // page) + 3
    return total * page


def whole_blocks(blocks: torch.Tensor) -> torch.Tensor:
    """The view of `Allocator.kv`, which ends at the last mapped block, over all blocks that can ever be: for a captured
    graph that writes, since torch checks indices against the shape it was captured with.
    """
    blocks = plain(blocks)
    elements = blocks.untyped_storage().nbytes() // blocks.element_size()
    return blocks.as_strided(
        (elements // blocks.stride(0), *blocks.shape[1:]), blocks.stride(), blocks.storage_offset()
    )


def _fill(caches: list[Cache], batch: Batch, model: ModelShape) -> None:
    """The same random numbers in every layer, of order one."""
    device = caches[0][0].device
    generator = torch.Generator(device).manual_seed(_SEED)
    shape = (batch.num_new_tokens, model.kv_heads, model.head_dim)
    k = torch.randn(shape, generator=generator, device=device, dtype=model.dtype)
    v = torch.randn(shape, generator=generator, device=device, dtype=model.dtype)
    for cache in caches:
        write_kv(cache, batch, k, v)
