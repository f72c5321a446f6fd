"""Attention over two disjoint parts of a context, joined: a shared prefix once, each sequence's own tokens apart."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce

import torch

__all__ = ["merge", "merge_levels"]


def merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out, lse)`` over both parts.

    out_a, out_b: ``[T, Hq, D]``. lse_a, lse_b: ``[T, Hq]``, natural logarithms, -inf for an empty part. Each part is
    weighted by its share of the softmax's denominator (Milakov and Gimelshein, arXiv:1805.02867). Computed
    in the dtype of the lse, returned in that of ``out_a``.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    # Where both parts are empty, -inf - -inf is NaN; weights of 0 give the zeroes that no keys give.
    nothing = lse == -torch.inf
    share_a = torch.exp(lse_a - lse).masked_fill(nothing, 0).unsqueeze(-1)
    share_b = torch.exp(lse_b - lse).masked_fill(nothing, 0).unsqueeze(-1)
    return (out_a.to(lse.dtype) * share_a + out_b.to(lse.dtype) * share_b).to(out_a.dtype), lse


def merge_levels(parts: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """``merge`` of one ``(out, lse)`` or more: of the levels of a ``Cascade``, in any order."""
    return reduce(lambda joined, part: merge(*joined, *part), parts)
