"""What the suite over all layouts (test_layouts.py) needs of each: values to store, and the plain K and V they mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from kvmem.layouts import Layout

__all__ = ["Case", "hidden_states"]

Values = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]


def hidden_states(ids: torch.Tensor, positions: torch.Tensor, width: int, *, layer: int = 0) -> torch.Tensor:
    """float64 ``[T, width]``, the same for the same (id, position, layer): so equal prefixes have equal content."""
    mixed = (ids.double() + 1).unsqueeze(1) * 0.731 + (positions.double() + 3).unsqueeze(1) * 0.417 + layer * 1.93
    spread = torch.arange(1, width + 1, dtype=torch.float64) * 1.618
    return torch.sin(mixed * spread) + torch.cos(mixed.square() * 0.013 + spread * 2.71)


@dataclass(frozen=True)
class Case:
    """One layout, as the suite uses it.

    values(layer, ids, positions): what ``layout.encode`` takes for these tokens; ids and positions are int64 ``[T]``.
    plain(layer, ids, positions): K (after rotation) and V, float64 ``[T, KV heads, width]``, of a whole sequence: what
        the stored values mean, computed without the layout.
    tolerance: the largest error of ``attend``, relative to the largest entry of the reference's output.
    finish(layer, out): turns what ``attend`` returns into attention over V; default: it is that already.
    plain_bytes: bytes a token of plain K and V of the same model, for the ratio. ratio: of those to the layout's bytes,
        exactly.
    blockwise: a layout that encodes whole blocks.
    """

    name: str
    layout: Layout
    query_heads: int
    head_dim: int
    values: Values
    plain: Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    tolerance: float
    plain_bytes: int
    ratio: float
    finish: Callable[[int, torch.Tensor], torch.Tensor] = field(default=lambda layer, out: out)
    blockwise: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
