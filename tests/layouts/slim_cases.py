"""Slim attention for the suite over all layouts, and the models that its own tests use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from layout_case import Case, hidden_states

from kvmem.layouts.rope import Rope
from kvmem.layouts.slim import Projection, SlimK, SlimX

__all__ = ["cases", "layer_norm", "plain_kv", "projection", "square"]

HEADS, WIDTH, HIDDEN = 4, 8, 32


def square(size: int, cond: float, seed: int) -> torch.Tensor:
    """float64 ``[size, size]``, of entries near 1 / sqrt(size), with the condition number ``cond``."""
    draw = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64))[0] for _ in "lr")
    values = torch.logspace(0, -torch.tensor(cond).log10().item(), size, dtype=torch.float64)
    return left @ (values * (size / values.square().sum()).sqrt()).diag() @ right


def projection(
    inputs: int, columns: int, seed: int, *, v_columns: int | None = None, cond: float | None = None, bias: float = 0.3
) -> Projection:
    draw = torch.Generator().manual_seed(seed)

    def weights(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    w_k = weights(inputs, columns) * inputs**-0.5 if cond is None else square(inputs, cond, seed)
    w_v = weights(inputs, v_columns or columns) * inputs**-0.5
    return Projection(w_k, w_v, bias * weights(columns), bias * weights(v_columns or columns))


def layer_norm(layer: int, k: torch.Tensor) -> torch.Tensor:
    """A QK norm over each head, with a weight that differs by layer."""
    scale = torch.linspace(0.5, 1.5 + layer, k.shape[-1], dtype=k.dtype)
    return torch.nn.functional.rms_norm(k, k.shape[-1:]) * scale


def plain_kv(
    x: torch.Tensor, layer: Projection, width: int, positions: torch.Tensor, *, rope: Rope | None = None,
    norm: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """K before norm and rotation, K after them, and V, ``[T, heads, width]`` each, as a model computes them."""
    heads = layer.w_k.shape[1] // width
    raw = (x @ layer.w_k + layer.b_k).unflatten(1, (heads, width))
    v = (x @ layer.w_v + layer.b_v).unflatten(1, (heads, -1))
    k = raw if norm is None else norm(raw)
    return raw, k if rope is None else rope.apply(k, positions), v


def _slim_case(name: str, layers: list[Projection], tolerance: float, ratio: float, **how: Any) -> Case:
    rope = Rope.default(WIDTH)
    layout = SlimK(layers, num_heads=HEADS, head_dim=WIDTH, rope=rope, **how)
    norm = how.get("k_norm")

    def made(layer: int, ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = hidden_states(ids, positions, HIDDEN, layer=layer)
        return plain_kv(
            x, layers[layer], WIDTH, positions, rope=rope, norm=norm and (lambda k: norm(layer, k))
        )  # fmt: skip

    def values(layer: int, ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raw, _, v = made(layer, ids, positions)
        return raw, v

    item = layout.spec.groups[0].components[0].dtype.itemsize
    plain = len(layers) * 2 * HEADS * WIDTH * item
    return Case(name, layout, HEADS, WIDTH, values, lambda *a: made(*a)[1:], tolerance, plain, ratio)


def _x_case(name: str, heads: int, query_heads: int, dtype: torch.dtype, tolerance: float) -> Case:
    layers = [projection(16, heads * 16, seed) for seed in (31, 32)]
    layout = SlimX(layers, head_dim=16, dtype=dtype)

    def values(layer: int, ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (hidden_states(ids, positions, 16, layer=layer),)

    def plain(layer: int, ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return plain_kv(*values(layer, ids, positions), layers[layer], 16, positions)[1:]

    bytes = len(layers) * 2 * heads * 16 * dtype.itemsize
    return Case(name, layout, query_heads, 16, values, plain, tolerance, bytes, 2.0 * heads)


def cases() -> list[Case]:
    """K only in three types, with a QK norm, and with one layer of two that stores K and V; the input of wide layers."""
    good = [projection(HIDDEN, HEADS * WIDTH, seed, cond=20) for seed in (21, 22)]
    mixed = [good[0], projection(HIDDEN, HEADS * WIDTH, 23, cond=1e6)]
    return [
        _slim_case("slim float64", good, 1e-9, 2.0, dtype=torch.float64, order="fold"),
        _slim_case("slim fp16", good, 2e-2, 2.0),
        _slim_case("slim norm", good, 1e-4, 2.0, dtype=torch.float32, k_norm=layer_norm, block_size=8),
        _slim_case("slim, one layer of K and V", mixed, 2e-2, 4 / 3),
        _x_case("slim x", 4, 4, torch.float64, 1e-9),
        _x_case("slim x, GQA, bf16", 2, 4, torch.bfloat16, 3e-2),
    ]
