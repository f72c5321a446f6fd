"""The newest blocks, beside the first one (StreamingLLM, arXiv:2309.17453)."""

from __future__ import annotations

import torch

from kvmem.selectors.base import LayerView, Selector

__all__ = ["Recent"]


class Recent(Selector):
    """Keeps nothing and reads nothing to choose. For local attention, and as the baseline of other selectors."""

    def logits(self, q: torch.Tensor, view: LayerView, scale: float) -> torch.Tensor:
        """The number of each block: later ones first."""
        return torch.arange(view.table.shape[1], device=q.device, dtype=q.dtype).view(1, 1, 1, 1, -1)
