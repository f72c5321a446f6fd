"""New K/V into the cache, in plain torch: any device, both backends, any layout, 8-bit floats among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvmem.allocator.batch import GroupBatch
from kvmem.arguments import brief
from kvmem.errors import SpecError
from kvmem.geometry.views import CacheTensor, plain
from kvmem.kernels.base import Cache, Result, Run, Step
from kvmem.kernels.checks import all_tokens, as_bytes, check_all_blocks, check_batch, heads_first

__all__ = ["prepare_write", "to_cache_dtype", "write_all", "write_component", "write_kv"]

Scale = float | torch.Tensor


def write_kv(
    cache: tuple[torch.Tensor, torch.Tensor], batch: GroupBatch, k: torch.Tensor, v: torch.Tensor, *,
    k_scale: Scale = 1.0, v_scale: Scale = 1.0,
) -> None:  # fmt: skip
    """Writes the new tokens' K and V of one layer.

    cache: ``Allocator.kv(layer)``. k, v: ``[T, H, D]``, packed as ``batch.slot_mapping`` is; any strides, and any dtype
    that ``to_cache_dtype`` converts to the cache's. k_scale, v_scale: what they are divided by.

    It takes a few device operations and does not synchronise, so a graph can capture it, and the graph stays valid
    while sequences grow (of head-major blocks: while ``kv(layer)`` is as long). Padding rows write to the padding
    block. ``SpecError`` for a shape or a dtype that does not fit, ``StaleHandle`` where the batch's sequences are not
    what they were (``GroupBatch.check_current``): nothing is written then.
    """
    check_all_blocks(cache)
    write_all([("k", cache[0], batch, k, k_scale), ("v", cache[1], batch, v, v_scale)])


def write_all(parts: Sequence[tuple[str, torch.Tensor, GroupBatch, torch.Tensor, Scale]]) -> None:
    """As ``write_kv``, for any components of a layer: all of them, or an error and none is written.

    parts: of each the name that a refusal uses, ``Allocator.tensor(layer, name)``, the batch of its group, the values
    ``[T, heads, width]``, and what they are divided by.
    """
    for batch in {id(part[2]): part[2] for part in parts}.values():
        check_batch(batch)
    ready = [_converted(*part) for part in parts]
    for (_, blocks, batch, _, _), values in zip(parts, ready, strict=True):
        if heads_first(plain(blocks)):
            slots = batch.slot_mapping
            as_bytes(blocks)[slots // batch.block_size, slots % batch.block_size] = values
        else:
            as_bytes(all_tokens(blocks))[batch.slot_mapping] = values


def write_component(blocks: torch.Tensor, batch: GroupBatch, values: torch.Tensor, *, scale: Scale = 1.0) -> None:
    """As ``write_kv``, for one tensor ``Allocator.tensor(layer, name)``; values: ``[T, heads, width]``."""
    write_all([("values", blocks, batch, values, scale)])


def to_cache_dtype(
    values: torch.Tensor, dtype: torch.dtype, *, scale: Scale = 1.0, name: str = "values"
) -> torch.Tensor:
    """``values / scale`` as a cache of ``dtype`` stores them; the same tensor where nothing is to be done.

    values: ``[T, heads, width]``. scale: a number, or a tensor on their device that broadcasts against them; the kernel
    that reads has to be given the same. name: what a refusal calls the values. 8-bit floats saturate at their largest
    number, on every version of torch: a plain conversion may turn what is larger into NaN or infinity, and one such K
    or V spoils the sequence for good. NaN stays NaN. ``SpecError`` where a cache of integers would have to truncate or
    wrap: it takes values of its own dtype, without a scale.
    """
    if not isinstance(scale, (torch.Tensor, int, float)):
        raise SpecError(f"{name}: scale: got {brief(scale)}; must be a number or a tensor")
    scaled = isinstance(scale, torch.Tensor) or scale != 1.0
    if values.dtype == dtype and not scaled:
        return values
    if dtype.is_floating_point and not values.dtype.is_floating_point:
        raise SpecError(f"{name}: got {values.dtype}; the cache holds {dtype}: give floats, dequantised if need be")
    if not dtype.is_floating_point:
        raise SpecError(
            f"{name}: got {values.dtype}{' with a scale' * scaled}; the cache holds {dtype}, and a conversion would "
            f"truncate or wrap them: quantise first, and give {dtype} without a scale"
        )
    if scaled or values.dtype.itemsize == 1:  # torch does not clamp 8-bit floats
        values = values.float()
    if scaled:
        values = values / scale
    if dtype.itemsize == 1:
        limit = torch.finfo(dtype).max
        values = values.clamp(-limit, limit)
    return values.to(dtype)


def prepare_write(library: Any, step: Step) -> Run:
    """library: this module."""

    def run(kv: torch.Tensor, cache: Cache) -> Result:
        library.write_kv(cache, step.batch, *kv.unbind(), **(step.scales or {}))
        return kv, None

    return run


def _converted(name: str, blocks: torch.Tensor, batch: GroupBatch, values: torch.Tensor, scale: Scale) -> torch.Tensor:
    """``values`` as bytes of the cache, ready to be stored."""
    owner = blocks._owner if isinstance(blocks, CacheTensor) else 0
    if owner != 0 and isinstance(batch, GroupBatch) and batch._core is not None and owner != id(batch._core):
        raise SpecError("cache: belongs to another allocator than the batch; give that allocator's kv(layer)")
    blocks = plain(blocks)
    if not isinstance(values, torch.Tensor) or values.device != blocks.device:
        got = f"a tensor on {values.device}" if isinstance(values, torch.Tensor) else type(values).__name__
        raise SpecError(f"{name}: got {got}; must be a tensor on {blocks.device}, where the cache is")
    expected = (batch.num_new_tokens, *blocks.shape[2:])
    if tuple(values.shape) != expected:
        raise SpecError(f"{name}: got shape {tuple(values.shape)}; the batch and the cache make it {expected}")
    return as_bytes(to_cache_dtype(values, blocks.dtype, scale=scale, name=name))
