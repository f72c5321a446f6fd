"""New K/V into the cache, in plain torch: any device, both backends, any layout, 8-bit floats among them."""

from __future__ import annotations

import torch

from kvmem.allocator.batch import GroupBatch
from kvmem.errors import SpecError
from kvmem.kernels.checks import all_tokens, as_bytes, check_all_blocks, check_batch
from kvmem.layouts.views import plain

__all__ = ["to_cache_dtype", "write_component", "write_kv"]

Scale = float | torch.Tensor


def write_kv(
    cache: tuple[torch.Tensor, torch.Tensor], batch: GroupBatch, k: torch.Tensor, v: torch.Tensor, *,
    k_scale: Scale = 1.0, v_scale: Scale = 1.0,
) -> None:  # fmt: skip
    """Writes the new tokens' K and V of one layer.

    cache: ``Allocator.kv(layer)``. k, v: ``[T, H, D]``, packed as ``batch.slot_mapping`` is; any strides. They are
    converted by ``to_cache_dtype``. A few device operations and no synchronisation, so it can be captured, and the
    graph stays valid while sequences grow; padding rows write to the write-trash block. ``StaleHandle``, and nothing is
    written, where the batch's sequences are not what they were: ``GroupBatch.check_current``.
    """
    check_all_blocks(cache)
    write_component(cache[0], batch, k, scale=k_scale)
    write_component(cache[1], batch, v, scale=v_scale)


def write_component(blocks: torch.Tensor, batch: GroupBatch, values: torch.Tensor, *, scale: Scale = 1.0) -> None:
    """As ``write_kv``, for one tensor ``Allocator.tensor(layer, name)``; values: ``[T, heads, width]``."""
    check_batch(batch)
    blocks = plain(blocks)
    expected = (batch.num_new_tokens, *blocks.shape[2:])
    if tuple(values.shape) != expected:
        raise SpecError(f"values: got shape {tuple(values.shape)}; the batch and the cache make it {expected}")
    as_bytes(all_tokens(blocks))[batch.slot_mapping] = as_bytes(to_cache_dtype(values, blocks.dtype, scale=scale))


def to_cache_dtype(values: torch.Tensor, dtype: torch.dtype, *, scale: Scale = 1.0) -> torch.Tensor:
    """``values / scale`` as the cache keeps them, for kernels that write it themselves too (FlashInfer's append).

    8-bit floats saturate at their largest number, on every torch alike: a plain conversion may make NaN or infinity of
    what is larger, and one such K or V spoils the sequence for good. NaN stays NaN. scale: a number, or a tensor on the
    device that broadcasts against ``[T, heads, width]``; the kernel that reads must be told the same.
    """
    if isinstance(scale, torch.Tensor) or scale != 1.0:
        values = values.float() / scale
    if dtype.is_floating_point and dtype.itemsize == 1:
        limit = torch.finfo(dtype).max
        values = values.clamp(-limit, limit)
    return values.to(dtype)
