"""Blocks by the clusters of their keys (Squeezed Attention, arXiv:2411.09688; RetroInfer, arXiv:2505.02922)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from kvmem.arguments import check_size
from kvmem.errors import SpecError
from kvmem.selectors.base import LayerView, Selector, spread
from kvmem.spec import Component, Group

__all__ = ["Clustered"]

_ID_NUMBERS = 4  # int16 numbers of an int64
_MOST_SCORES = 1 << 25  # of tokens against centroids that k-means holds at once


class Clustered(Selector):
    """Clusters the keys of all blocks that a write completes: a prompt, or a chunk of it. A token's score is that of
    its cluster's centroid; a block's mass is the sum over its tokens.

    Kept of a block: its share of the centroids of its segment (the blocks that were clustered together), the label of
    each of its tokens (int16, by head), the mean of its keys, and a number by which its segment is known. A sequence
    may hold only a part of a segment, after a fork or a hit of a prefix; tokens whose centroid lies in the other part
    are scored by the mean of their block. Nothing that was written is written again, since others may share it.

    In a step that completes one block the cluster is the block. Cost of a write: ``iterations`` times tokens times
    centroids of a segment. A choice reads everything that is kept.
    """

    def __init__(self, *, tokens_per_cluster: int = 16, segment_blocks: int = 128, iterations: int = 10) -> None:
        """tokens_per_cluster: on average, as in RetroInfer; a block has at least one centroid. segment_blocks: the most
        that are clustered together. iterations: of k-means.
        """
        self.tokens_per_cluster = check_size("tokens_per_cluster", tokens_per_cluster)
        self.segment_blocks = check_size("segment_blocks", segment_blocks)
        self.iterations = check_size("iterations", iterations)

    def components(self, group: Group) -> tuple[Component, ...]:
        """``k_centroids``: ``[centroids, heads, width]``, then the mean ``[heads, width]``, in K's dtype (bf16 for 8
        bits). ``k_labels``, int16: ``[block_size, heads]``, the number of the centroid less that of the block's first,
        then 4 numbers of the segment's. ``SpecError`` if centroids do not divide a block or do not fit the labels.
        """
        k, size, share = group.component("k"), group.block_size, self._share(group.block_size)
        if size % share or share * self.segment_blocks > 2**15:
            raise SpecError(
                f"tokens_per_cluster, segment_blocks: got {self.tokens_per_cluster}, {self.segment_blocks}; a block of "
                f"{size} tokens would have {share} centroids, which must divide it, and a segment at most {2**15}"
            )
        elements = [k.elements_at(index) for index in range(len(group.layers))]
        labels = [size * k.heads_at(index) + _ID_NUMBERS for index in range(len(group.layers))]
        dtype = torch.bfloat16 if k.dtype.itemsize == 1 else k.dtype
        return (
            spread("k_centroids", [(share + 1) * n for n in elements], size, dtype),
            spread("k_labels", labels, size, torch.int16),
        )

    def _share(self, block_size: int) -> int:
        return max(1, block_size // self.tokens_per_cluster)

    def summarise(self, keys: torch.Tensor, runs: list[int]) -> Mapping[str, torch.Tensor]:
        """k-means in each segment, those of equal length together."""
        lengths = np.array([min(self.segment_blocks, n - at) for n in runs for at in range(0, n, self.segment_blocks)])
        firsts = lengths.cumsum() - lengths
        places = [firsts[lengths == n][:, None] + np.arange(n) for n in np.unique(lengths)]
        parts = [self._cluster(keys[torch.from_numpy(at).to(keys.device)]) for at in places]
        order = torch.from_numpy(np.concatenate([at.ravel() for at in places]).argsort()).to(keys.device)
        centroids, labels = (torch.cat(part)[order] for part in zip(*parts, strict=True))
        return {"k_centroids": centroids, "k_labels": labels}

    def _cluster(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both summaries of segments of equal length. keys: ``[segments, blocks, block_size, heads, width]``."""
        segments, blocks, size, heads, width = keys.shape
        share = self._share(size)
        wide = keys if keys.dtype == torch.float64 else keys.float()
        x = wide.permute(0, 3, 1, 2, 4).reshape(segments * heads, blocks * size, width)
        pieces = torch.split(x, max(1, _MOST_SCORES // (blocks * size * blocks * share)))
        found = [k_means(piece, blocks * share, self.iterations) for piece in pieces]
        vectors, labels = (torch.cat(p) for p in zip(*found, strict=True))
        centroids = vectors.view(segments, heads, blocks, share, width).permute(0, 2, 3, 1, 4)
        kept = torch.cat((centroids, wide.mean(2).unsqueeze(2)), 2)
        stored = torch.bfloat16 if keys.dtype.itemsize == 1 else keys.dtype
        own = torch.arange(blocks, device=keys.device).view(-1, 1, 1) * share
        near = labels.view(segments, heads, blocks, size).permute(0, 2, 3, 1) - own
        ids = _id_of(centroids.flatten(1)).view(-1, 1, 1).expand(-1, blocks, 1).contiguous()
        numbers = torch.cat((near.to(torch.int16).flatten(2), ids.view(torch.int16)), 2)
        return kept.to(stored).flatten(2).flatten(0, 1), numbers.flatten(0, 1)

    def logits(self, q: torch.Tensor, view: LayerView, scale: float) -> torch.Tensor:
        """The mass of a block's tokens, each with the score of its centroid. Cost: scores of all tokens at once."""
        size, share, (rows, blocks) = view.block_size, self._share(view.block_size), view.table.shape
        vectors = view.summary("k_centroids", (share + 1) * view.heads * view.width).to(q.dtype)
        vectors = vectors.view(rows, blocks, share + 1, view.heads, view.width)
        scores = scale * torch.einsum("bnhgw,bmchw->bnhgmc", q, vectors)
        centroids, means = scores[..., :share].flatten(-2), scores[..., share:]
        numbers = view.summary("k_labels", size * view.heads + _ID_NUMBERS)
        ids = numbers[..., -_ID_NUMBERS:].contiguous().view(torch.int64)  # [B, M, 1]
        labels = numbers[..., :-_ID_NUMBERS].view(rows, blocks, size, view.heads).long()
        labels = labels + torch.arange(blocks, device=q.device).view(-1, 1, 1) * share
        target = labels.div(share, rounding_mode="floor")
        here = target.clamp(0, blocks - 1)
        held = (view.lengths // size).view(-1, 1, 1, 1)
        known = (target == here) & (target < held)
        known &= ids.squeeze(-1).gather(1, here.flatten(1)).view_as(here) == ids.unsqueeze(-1)
        at = labels.clamp(0, blocks * share - 1).permute(0, 3, 1, 2).flatten(2)[:, None, :, None]
        near = torch.unflatten(centroids.gather(-1, at.expand(*centroids.shape[:-1], -1)), -1, (blocks, size))
        return torch.where(known.permute(0, 3, 1, 2)[:, None, :, None], near, means).logsumexp(-1)


def k_means(x: torch.Tensor, clusters: int, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return centroids ``[S, clusters, width]`` and the label of each key, int64 ``[S, n]``: Lloyd's algorithm.

    x: keys ``[S, n, width]``; ``clusters`` divides n. It starts with the means of equal runs of keys. A centroid is the
    mean of the keys that have its label; without any it stays where it was.
    """
    centroids = torch.unflatten(x, 1, (clusters, -1)).mean(2)
    labels = x.new_zeros(x.shape[:2], dtype=torch.int64)
    for _ in range(iterations if clusters > 1 else 1):
        half_norms = centroids.square().sum(-1).unsqueeze(1) / 2
        labels = (x @ centroids.transpose(1, 2) - half_norms).argmax(-1)
        counts = x.new_zeros(centroids.shape[:2]).scatter_add_(1, labels, torch.ones_like(x[..., 0]))
        sums = torch.zeros_like(centroids).scatter_add_(1, labels.unsqueeze(-1).expand_as(x), x)
        centroids = torch.where(counts.unsqueeze(-1) > 0, sums / counts.clamp(min=1).unsqueeze(-1), centroids)
    return centroids, labels


def _id_of(numbers: torch.Tensor) -> torch.Tensor:
    """Return an int64 ``[S]`` that depends on every bit of ``numbers``, floats ``[S, n]``. Equal only by accident for
    segments that differ, and then a score is that of another centroid.
    """
    bits = numbers.contiguous().view(torch.int32).long()
    odd = torch.arange(1, 2 * bits.shape[1], 2, device=bits.device) * -7046029254386353131  # 2**64 / the golden ratio
    return (bits * odd).sum(1)
