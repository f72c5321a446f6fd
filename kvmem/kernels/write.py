"""New K/V into the cache, in plain torch: any device, both backends, any layout."""

from __future__ import annotations

import torch

from kvmem.batch import GroupBatch
from kvmem.errors import SpecError
from kvmem.kernels.rules import flat_tokens

__all__ = ["write_component", "write_kv"]


def write_kv(cache: tuple[torch.Tensor, torch.Tensor], batch: GroupBatch, k: torch.Tensor, v: torch.Tensor) -> None:
    """Writes the new tokens' K and V of one layer.

    cache: ``Allocator.kv(layer)``. k, v: ``[T, H, D]``, packed as ``batch.slot_mapping`` is; any strides. They are
    converted to the cache's dtype. Two device operations and no synchronisation, so it can be captured; padding rows
    write to the write-trash block.
    """
    write_component(cache[0], batch, k)
    write_component(cache[1], batch, v)


def write_component(blocks: torch.Tensor, batch: GroupBatch, values: torch.Tensor) -> None:
    """As ``write_kv``, for one tensor ``Allocator.tensor(layer, name)``; values: ``[T, heads, width]``."""
    expected = (batch.num_new_tokens, *blocks.shape[2:])
    if tuple(values.shape) != expected:
        raise SpecError(f"values: got shape {tuple(values.shape)}; the batch and the cache make it {expected}")
    flat_tokens(blocks)[batch.slot_mapping] = values.to(blocks.dtype)
