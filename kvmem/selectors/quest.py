"""Blocks by an upper bound of their scores, from the minimum and maximum of each channel of K (Quest,
arXiv:2406.10774).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvmem.selectors.base import LayerView, Selector, spread
from kvmem.spec import Component, Group

__all__ = ["Quest"]


class Quest(Selector):
    """Keeps minimum and maximum of each channel of K: two numbers of K's dtype for each block, head and channel, which
    is ``1 / block_size`` of the bytes of K and V. A choice reads all of them.

    The bound is exact: no token of a block has a larger score, up to the rounding of the computation.
    """

    def components(self, group: Group) -> tuple[Component, ...]:
        """``k_bounds``: minimum, then maximum, each ``[heads, width]``."""
        k = group.component("k")
        elements = [2 * k.elements_at(index) for index in range(len(group.layers))]
        return (spread("k_bounds", elements, group.block_size, k.dtype),)

    def summarise(self, keys: torch.Tensor, runs: list[int]) -> Mapping[str, torch.Tensor]:
        """Exact in K's dtype."""
        wide = keys.float() if keys.dtype.itemsize == 1 else keys  # torch compares no 8-bit floats
        return {"k_bounds": torch.stack(wide.aminmax(dim=1), 1).to(keys.dtype).flatten(1)}

    def logits(self, q: torch.Tensor, view: LayerView, scale: float) -> torch.Tensor:
        """The largest score that any key between the bounds has."""
        bounds = view.summary("k_bounds", 2 * view.heads * view.width).to(q.dtype)
        low, high = bounds.view(*view.table.shape, 2, view.heads, view.width).unbind(2)
        above = torch.einsum("bnhgw,bmhw->bnhgm", q.clamp(min=0), high)
        return scale * (above + torch.einsum("bnhgw,bmhw->bnhgm", q.clamp(max=0), low))
