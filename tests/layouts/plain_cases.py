"""Plain K and V as cases of the suite: what every other layout is compared with."""

from __future__ import annotations

import torch
from layout_case import Case, hidden_states

from kvmem import CacheSpec
from kvmem.layouts import PlainKV

_LAYERS, _HEADS, _WIDTH = 2, 2, 16


def cases() -> list[Case]:
    return [_case(torch.float64, 1e-12), _case(torch.float16, 2e-3), _case(torch.float32, 1e-5, window=40)]


def _case(dtype: torch.dtype, tolerance: float, window: int | None = None) -> Case:
    def values(layer: int, ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        both = hidden_states(ids, positions, 2 * _HEADS * _WIDTH, layer=layer).view(-1, 2, _HEADS, _WIDTH)
        return both[:, 0], both[:, 1]

    def plain(layer: int, ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = values(layer, ids, positions)
        return k, v

    spec = CacheSpec.kv(
        num_layers=_LAYERS, num_kv_heads=_HEADS, head_dim=_WIDTH, dtype=dtype, block_size=16, window_tokens=window
    )
    name = f"plain {str(dtype)[6:]}" + f" window {window}" * (window is not None)
    return Case(name, PlainKV(spec), 4, _WIDTH, values, plain, tolerance, spec.bytes_per_token, 1.0)
