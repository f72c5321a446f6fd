"""Blocks by the scores of their tokens over a few channels: the first step of SparF (InstInfer, arXiv:2409.04992), from
SparQ attention (arXiv:2312.04985).
"""

from __future__ import annotations

import torch

from kvmem.arguments import check_size
from kvmem.errors import SpecError
from kvmem.selectors.base import LayerView, Selector

__all__ = ["SparF"]


class SparF(Selector):
    """Keeps nothing. A choice reads ``channels`` of the channels of K, of every token: those in which the query is
    largest, summed over the query heads of a KV head, which share the read.

    With all channels, blocks are ordered by the attention mass that they have.
    """

    def __init__(self, channels: int) -> None:
        """channels: r of the papers, up to the width of a head; an eighth of it in InstInfer."""
        self.num_channels = check_size("channels", channels)

    def logits(self, q: torch.Tensor, view: LayerView, scale: float) -> torch.Tensor:
        """The mass of a block's tokens in ``softmax(q_i K_i / sqrt(width * |q_i| / |q|))``, i the chosen channels.

        Cost: besides what is read, the scores of all tokens at once.
        """
        if self.num_channels > view.width:
            raise SpecError(f"channels: got {self.num_channels}; a head of this layer has {view.width}")
        wanted = q.abs().sum((1, 3)).topk(self.num_channels).indices
        keys = view.channels(wanted).to(q.dtype)
        part = q.gather(-1, wanted[:, None, :, None].expand(*q.shape[:-1], -1))
        share = part.abs().sum(-1) / q.abs().sum(-1)
        part = part * (scale / share.sqrt().nan_to_num(nan=1.0)).unsqueeze(-1)  # 0 / 0 of rows without a query
        scores = torch.einsum("bnhgr,bmshr->bnhgms", part, keys)
        return scores.masked_fill(~view.tokens_held()[:, None, None, None], -torch.inf).logsumexp(-1)
