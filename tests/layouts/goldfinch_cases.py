"""GoldFinch for the suite over all layouts: without states, which a prefix is found by in this layout alone."""

from __future__ import annotations

import torch
from layout_case import Case, hidden_states
from toy_goldfinch import HEADS, Toy

from kvmem.layouts.goldfinch import goldfinch_spec

__all__ = ["cases"]

LAYERS, D_MODEL, VOCABULARY = 3, 64, 50


def cases() -> list[Case]:
    return [
        _case("goldfinch float64", torch.float64, 16, interleaved=True, tolerance=1e-10),
        _case("goldfinch bfloat16", torch.bfloat16, 8, interleaved=False, tolerance=1e-5),
    ]


def _case(name: str, dtype: torch.dtype, block_size: int, *, interleaved: bool, tolerance: float) -> Case:
    toy = Toy(7, recurrent=0, gold=LAYERS, interleaved=interleaved)
    sizes = {"num_layers": LAYERS, "recurrent_layers": 0, "d_model": D_MODEL, "block_size": block_size}
    spec = goldfinch_spec(**sizes, dtype=dtype, states=False)

    def values(layer: int, ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden_states(ids, positions, D_MODEL // 16), ids % VOCABULARY  # one copy: the same for all layers

    def plain(layer: int, ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        c, tokens = values(layer, ids, positions)
        return toy.keys_values(layer, c.to(dtype).double(), tokens)

    plain_bytes, bytes_each = 2 * LAYERS * D_MODEL * dtype.itemsize, D_MODEL // 16 * dtype.itemsize + 4
    ratio, layout = plain_bytes / bytes_each, toy.layout(spec, tile_tokens=24)
    return Case(name, layout, HEADS, D_MODEL // HEADS, values, plain, tolerance, plain_bytes, ratio)
