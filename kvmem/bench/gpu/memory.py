"""What kernels read: a filled cache of either backend, and a static twin of it with the same content and metadata.

The twin of the virtual backend is a plain contiguous tensor ``[rows, tokens, heads, width]`` for K and one for V of
each layer; the twin of the paged one is a pool of blocks for each. Rows and blocks have the same numbers as in the
cache, so the same metadata serves both, and what differs is the memory alone: mapped or allocated, interleaved or not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch

from kvmem import Allocator
from kvmem.allocator.batch import Batch
from kvmem.bench.gpu.device import BenchDevice
from kvmem.bench.gpu.sizes import ModelShape
from kvmem.bench.model import Backend
from kvmem.kernels.checks import plain
from kvmem.kernels.write import write_kv

Cache = tuple[torch.Tensor, torch.Tensor]
Interleave = int | Literal["all"]
PAGE_BYTES = 2 << 20  # where no size is given
_GUARD = 256
_SEED = 20240611


class Memory:
    """``caches``: K and V ``[blocks, block_size, heads, width]`` of each layer, or of the first few, which are
    read in cycles. ``rows``: the same as ``[rows, tokens, heads, width]``, where sequences are contiguous. A twin has
    the batch of its ``owner``.
    """

    owner: Managed

    def __init__(self, name: str, caches: list[Cache], rows: list[Cache] | None) -> None:
        self.name, self.caches, self.rows = name, caches, rows

    @property
    def batch(self) -> Batch:
        return self.owner.asked


class Managed(Memory):
    """A cache of ours, filled with random numbers. ``filling``: a batch of all tokens."""

    def __init__(
        self, model: ModelShape, device: BenchDevice, backend: Backend, sequences: int, tokens: int, **options: Any
    ) -> None:  # fmt: skip
        """``options``: as for `open_cache`."""
        self.allocator = open_cache(model, device, backend, sequences, tokens, **options)
        self.ids = self.allocator.open_batch(sequences)
        self.allocator.extend_batch(self.ids, np.full(sequences, tokens, dtype=np.int32))
        self.owner, self.asked, self._left = self, self.allocator.batch(self.ids), tokens
        self.filling = self.asked
        layers = range(model.layers)
        caches = [(plain(k), plain(v)) for k, v in (self.allocator.kv(layer) for layer in layers)]
        rows = None
        if backend == "virtual":
            rows = [(plain(self.allocator.rows(n, "k")), plain(self.allocator.rows(n, "v"))) for n in layers]
        _fill(caches, self.filling, model)
        super().__init__(backend, caches, rows)

    def ask(self, new_tokens: int) -> None:
        """Makes the last ``new_tokens`` of each sequence the queries of ``batch``; fewer from call to call."""
        self.allocator.commit_batch(self.ids, np.full(len(self.ids), self._left - new_tokens, dtype=np.int32))
        self._left = new_tokens
        self.asked = self.allocator.batch(self.ids)


def static_layers(model: ModelShape, tokens: int, cold_bytes: int) -> int:
    """The layers of a static twin that suffice for its reads to miss the L2 cache."""
    return min(model.layers, -(-cold_bytes // (tokens * model.layer_bytes)))


def fitting(model: ModelShape, room_bytes: int, need: Callable[[ModelShape], int]) -> ModelShape:
    """The model with as many layers as fit: ``need`` of it is at most ``room_bytes``. It has at least one."""
    smaller = (model.with_layers(layers) for layers in range(model.layers, 1, -1))
    return next((found for found in smaller if need(found) <= room_bytes), model.with_layers(1))


def static_twin(managed: Managed, model: ModelShape, layers: int) -> Memory:
    """The same content in plain tensors, ``layers`` of them; zeroes where the cache has nothing."""
    first = (managed.rows or managed.caches)[0][0]
    pairs = (torch.zeros(2, *first.shape, dtype=model.dtype, device=first.device) for _ in range(layers))
    tensors: list[Cache] = [(k, v) for k, v in pairs]
    blocks = (-1, model.block_size, model.kv_heads, model.head_dim)
    caches = [(k.view(blocks), v.view(blocks)) for k, v in tensors]
    _fill(caches, managed.filling, model)
    twin = Memory("static pool", caches, None) if managed.rows is None else Memory("static", caches, tensors)
    twin.owner = managed
    return twin


def open_cache(
    model: ModelShape, device: BenchDevice, backend: Backend, sequences: int, tokens: int, *,
    interleave: Interleave = "all", page_bytes: int | None = None, map_ahead_tokens: int = 0,
) -> Allocator:  # fmt: skip
    """An allocator with room for ``sequences`` of ``tokens``, the guard behind each included, and no more."""
    memory = budget_bytes(model, backend, interleave, sequences, tokens + map_ahead_tokens, page_bytes)
    return Allocator(
        model.spec, backend=backend, device=device.torch_device, memory=memory, max_sequences=sequences,
        max_tokens=tokens, page_bytes=page_bytes or PAGE_BYTES, interleave=interleave,
        map_ahead_tokens=map_ahead_tokens, tail_guard_tokens=_GUARD, prefix_cache=False,
    )  # fmt: skip


def budget_bytes(
    model: ModelShape, backend: Backend, interleave: Interleave, sequences: int, tokens: int, page_bytes: int | None
) -> int:  # fmt: skip
    """Bytes of pages that ``sequences`` of ``tokens`` need, null and padding block and rounding included."""
    page = page_bytes or PAGE_BYTES
    total, together = 0, model.layers if interleave == "all" else min(interleave, model.layers)
    for first in range(0, model.layers, together):
        width = min(together, model.layers - first) * model.layer_bytes
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
    count = blocks.untyped_storage().nbytes() // blocks.element_size() // blocks.stride(0)
    return blocks.as_strided((count, *blocks.shape[1:]), blocks.stride(), blocks.storage_offset())


def _fill(caches: list[Cache], batch: Batch, model: ModelShape) -> None:
    """The same random numbers in every layer, of order one."""
    device = caches[0][0].device
    generator = torch.Generator(device).manual_seed(_SEED)
    shape = (batch.num_new_tokens, model.kv_heads, model.head_dim)
    k = torch.randn(shape, generator=generator, device=device, dtype=model.dtype)
    v = torch.randn(shape, generator=generator, device=device, dtype=model.dtype)
    for cache in caches:
        write_kv(cache, batch, k, v)
