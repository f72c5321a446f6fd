"""Palu for the suite over all layouts, and the model whose weights are truncated by the textbook."""

from __future__ import annotations

from typing import Any

import torch
from layout_case import Case, hidden_states

from kvmem.layouts.palu import Palu, stored_bytes, unpack_latents
from kvmem.layouts.rope import Rope

__all__ = ["GROUP", "HEAD_DIM", "HIDDEN", "KV_HEADS", "QUERY_HEADS", "ROPE", "cases", "make_weights", "truncated"]

HIDDEN, QUERY_HEADS, KV_HEADS, HEAD_DIM, GROUP = 48, 8, 4, 16, 2
ROPE = Rope.default(HEAD_DIM)
_UNEQUAL = [[[8, 24], [30, 2]], [[16, 16], [28, 4]]]  # half of the channels of two layers


def make_weights(layers: int, seed: int, dtype: torch.dtype = torch.float64) -> list[Any]:
    """``(W_K, W_V, W_O)`` of each layer, W_O the identity: what it makes of attention over V is attention over V."""
    draw = torch.Generator().manual_seed(seed)
    shape = (layers, 2, HIDDEN, KV_HEADS * HEAD_DIM)
    pairs = torch.randn(shape, generator=draw, dtype=torch.float64) * HIDDEN**-0.5
    return [(*pair.to(dtype), torch.eye(QUERY_HEADS * HEAD_DIM, dtype=dtype)) for pair in pairs]


def truncated(weight: torch.Tensor, ranks: list[int], covariance: torch.Tensor | None = None) -> torch.Tensor:
    """The weight in float64, each group of heads cut to its rank: SVD of S W, with S the root of the covariance."""
    root = torch.eye(len(weight), dtype=torch.float64)
    if covariance is not None:
        values, vectors = torch.linalg.eigh(covariance.double())
        root = vectors * values.sqrt() @ vectors.mT
    cut = []
    for group, rank in zip(weight.double().chunk(len(ranks), 1), ranks, strict=True):
        left, sizes, right = torch.linalg.svd(root @ group, full_matrices=False)
        cut.append(torch.linalg.solve(root, left[:, :rank] * sizes[:rank] @ right[:rank]))
    return torch.cat(cut, 1)


def _case(name: str, ranks: Any, *, rope: Rope | None, dtype: torch.dtype, tolerance: float, ratio: float,
          **options: Any) -> Case:  # fmt: skip
    weights = make_weights(2, 11)
    layout = Palu(
        weights, ranks, kv_heads=KV_HEADS, head_dim=HEAD_DIM, group_heads=GROUP, rope=rope, dtype=dtype, **options
    )
    cut = [[truncated(weights[i][part], layout.ranks[i][part]) for part in (0, 1)] for i in (0, 1)]

    def values(layer: int, ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (hidden_states(ids, positions, HIDDEN, layer=layer),)

    def plain(layer: int, ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = values(layer, ids, positions)[0]
        if "bits" in options:  # packed latents mean what they are unpacked to; test_palu.py bounds what that loses
            rows, weights = layout.encode(layer, x, positions=positions), layout._layers[layer]
            parts = ((rows[name].flatten(1), getattr(weights, name)) for name in ("hk", "hv"))
            k, v = (part.rebuilt(_unpacked(row, part.ranks, options["bits"], dtype)) for row, part in parts)
            return k if rope is None else rope.apply(k, positions), v
        k, v = ((x @ w).unflatten(1, (KV_HEADS, HEAD_DIM)) for w in cut[layer])
        return k if rope is None else rope.apply(k, positions), v

    def finish(layer: int, out: torch.Tensor) -> torch.Tensor:
        return layout.project(layer, out).unflatten(1, (QUERY_HEADS, HEAD_DIM))

    plain_bytes = 2 * 2 * KV_HEADS * HEAD_DIM * dtype.itemsize
    return Case(name, layout, QUERY_HEADS, HEAD_DIM, values, plain, tolerance, plain_bytes, ratio, finish)


def _unpacked(row: torch.Tensor, ranks: list[int], bits: int, dtype: torch.dtype) -> list[torch.Tensor]:
    parts = row.split([stored_bytes(rank, dtype, bits) for rank in ranks], dim=1)
    return [unpack_latents(part, bits, dtype, torch.float64) for part in parts]


def cases() -> list[Case]:
    """With RoPE, without, and with packed latents."""
    half = GROUP * HEAD_DIM // 2
    packed: dict[str, Any] = {"bits": 4, "rotate_latents": True, "block_size": 1}
    return [
        _case("palu", half, rope=ROPE, dtype=torch.float64, tolerance=1e-10, ratio=2.0),
        _case("palu, no rope", _UNEQUAL, rope=None, dtype=torch.float32, tolerance=1e-5, ratio=2.0, block_size=4),
        _case("palu, int4", half, rope=ROPE, dtype=torch.float16, tolerance=1e-5, ratio=256 / 48, **packed),
    ]
