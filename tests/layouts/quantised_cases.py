"""Quantised K and V for the suite over all layouts, and what their bytes stand for, computed without kvmem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from layout_case import Case, hidden_states

import kvmem
from kvmem.layouts.quantised import QuantisedKV

__all__ = ["BLOCK", "HEADS", "LAYERS", "WIDTH", "cases", "plain_spec"]

LAYERS, HEADS, WIDTH, BLOCK = 2, 2, 16, 8


def plain_spec(**changed: Any) -> kvmem.CacheSpec:
    sizes = {
        "num_layers": LAYERS,
        "num_kv_heads": HEADS,
        "head_dim": WIDTH,
        "dtype": torch.float32,
        "block_size": BLOCK,
    }
    return kvmem.CacheSpec.kv(**(sizes | changed))


def values(layer: int, ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V as the model makes them, float32."""
    both = hidden_states(ids, positions, 2 * HEADS * WIDTH, layer=layer).float()
    k, v = both.view(-1, 2, HEADS, WIDTH).unbind(1)
    return k, v


def _integers(x: np.ndarray, bits: int, axis: int, scale_dtype: type[np.floating]) -> np.ndarray:
    """Float64 of float32 x after rounding to integers that span least to largest along an axis."""
    zero = -_upward(-x.min(axis, keepdims=True), scale_dtype)
    scale = _upward((x.max(axis, keepdims=True) - zero) / np.float32(2**bits - 1), scale_dtype)
    codes = np.rint((x - zero) * (np.float32(1) / np.where(scale > 0, scale, np.float32(1))))
    return codes.astype(np.float64) * scale + zero


def _upward(y: np.ndarray, scale_dtype: type[np.floating]) -> np.ndarray:
    near = y.astype(scale_dtype)
    return np.where(near < y, np.nextafter(near, scale_dtype(np.inf)), near).astype(np.float32)


def by_token(
    x: torch.Tensor, bits: int, group: int = WIDTH, scale_dtype: type[np.floating] = np.float16
) -> torch.Tensor:
    groups = x.float().numpy().reshape(*x.shape[:-1], x.shape[-1] // group, group)
    return torch.from_numpy(_integers(groups, bits, -1, scale_dtype).reshape(x.shape))


def by_channel(x: torch.Tensor, bits: int, block: int = BLOCK) -> torch.Tensor:
    """Whole blocks; the rest as it is."""
    return by_blocks(lambda blocks: torch.from_numpy(_integers(blocks.numpy(), bits, 1, np.float16)), x, block)


def by_blocks(rounded: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, block: int = BLOCK) -> torch.Tensor:
    whole = len(x) // block * block
    blocks = x[:whole].float().reshape(-1, block, *x.shape[1:])
    return torch.cat([rounded(blocks).reshape(x[:whole].shape), x[whole:].double()])


def own_scale(x: torch.Tensor, dtype: torch.dtype, axis: int) -> torch.Tensor:
    """Float64 of x after rounding to 8-bit floats, the largest along an axis to the largest of the dtype."""
    scale = _upward((x.float().abs().amax(axis, keepdim=True) / torch.finfo(dtype).max).numpy(), np.float16)
    scale = torch.from_numpy(scale)
    codes = (x.float() * (1 / scale.where(scale > 0, 1))).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return codes.to(dtype).double() * scale


def eight_bits(x: torch.Tensor, dtype: torch.dtype, scale: float) -> torch.Tensor:
    return (x / scale).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype).double() * scale


FP8 = torch.float8_e4m3fn
V_SCALES = (0.01, 0.005)
Meaning = Callable[[int, torch.Tensor], torch.Tensor]
#: name -> (options, what K and V of a layer mean, bytes of a token and head without the tail)
ALL: dict[str, tuple[dict[str, Any], Meaning, Meaning, int]] = {
    "kivi int4": ({}, lambda _, k: by_channel(k, 4), lambda _, v: by_token(v, 4), (8 + 2 * 4) + (8 + 2 * 2)),
    "int4 by channel": (
        {"v_scales": "channel"}, lambda _, k: by_channel(k, 4), lambda _, v: by_channel(v, 4), 2 * (8 + 2 * 4),
    ),
    "int3 and int2 by group": (
        {"k": "int3", "v": "int2", "k_scales": "token", "group_size": 8, "scale_dtype": "float32"},
        lambda _, k: by_token(k, 3, 8, np.float32), lambda _, v: by_token(v, 2, 8, np.float32),
        (6 + 4 * 4) + (4 + 4 * 4),
    ),
    "int8 by token": (
        {"k": "int8", "v": "int8", "k_scales": "token"}, lambda _, k: by_token(k, 8), lambda _, v: by_token(v, 8),
        2 * (16 + 2 * 2),
    ),
    "fp8": (
        {"k": "fp8_e4m3", "v": "fp8_e4m3", "k_scales": 0.02, "v_scales": V_SCALES},
        lambda _, k: eight_bits(k, FP8, 0.02), lambda layer, v: eight_bits(v, FP8, V_SCALES[layer]), 2 * 16,
    ),
    "fp8 by channel and token": (
        {"k": "fp8_e4m3", "v": "fp8_e5m2", "k_scales": "channel", "v_scales": "token", "group_size": 8},
        lambda _, k: by_blocks(lambda x: own_scale(x, FP8, 1), k),
        lambda _, v: own_scale(v.unflatten(-1, (2, 8)), torch.float8_e5m2, -1).flatten(-2), (16 + 4) + (16 + 4),
    ),
    "fp8_e5m2 and bf16": (
        {"k": "fp8_e5m2", "v": "bfloat16"}, lambda _, k: eight_bits(k, torch.float8_e5m2, 1.0),
        lambda _, v: v.bfloat16().double(), 16 + 2 * 16,
    ),
}  # fmt: skip


def _case(name: str) -> Case:
    options, mean_k, mean_v, bytes = ALL[name]

    def plain(layer: int, ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = values(layer, ids, positions)
        return mean_k(layer, k), mean_v(layer, v)

    layout = QuantisedKV(plain_spec(), **options)
    plain_bytes = plain_spec().bytes_per_token
    return Case(
        name, layout, query_heads=2 * HEADS, head_dim=WIDTH, values=values, plain=plain, tolerance=1e-5,
        plain_bytes=plain_bytes, ratio=plain_bytes / (LAYERS * HEADS * bytes), blockwise=bool(layout.tail(0)),
        extra={"sizes": {"page_bytes": 12288}} if "by channel and token" in name else {},  # whole blocks of 1,536 bytes
    )  # fmt: skip


def cases() -> list[Case]:
    """Ratios leave out the tail, which holds the incomplete block only."""
    return [_case(name) for name in ALL]
