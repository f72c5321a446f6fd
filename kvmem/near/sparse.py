"""SparF: attention that reads some channels of K for all tokens, and whole rows of the tokens that these scores choose.

From InstInfer (arXiv:2409.04992), a form of SparQ attention (arXiv:2312.04985) for pages of storage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kvmem.arguments import check_bool, check_size
from kvmem.errors import SpecError
from kvmem.layouts.attention import compute_dtype

__all__ = ["Reader", "SparF", "attend_sparse"]


@dataclass(frozen=True)
class SparF:
    """Reads ``r * S + 2 * k * width`` elements of a head's ``2 * S * width``: an eighth with r = width/8, k = S/16.

    r: channels of K that are read for all tokens: the largest of ``|q|``, summed over the query heads that share a KV
        head. k: tokens whose rows are read, one set for these query heads. Larger values mean all.
    blend: add ``(1 - alpha)`` times the mean of all V, alpha being the chosen tokens' share by the estimate.
    recent: how many of the newest tokens are among the k in any case; default a quarter.

    The answer's lse is an estimate (``Part.exact`` is False) unless all tokens are read.
    """

    r: int
    k: int
    blend: bool = True
    recent: int | None = None

    def __post_init__(self) -> None:
        check_size("r", self.r)
        check_size("k", self.k)
        check_bool("blend", self.blend)
        if self.recent is not None and check_size("recent", self.recent, 0) > self.k:
            raise SpecError(f"recent: got {self.recent}; these are among the k={self.k} tokens, so at most as many")

    def recent_tokens(self) -> int:
        """Return ``recent``, or its default."""
        return max(1, self.k // 4) if self.recent is None else self.recent


class Reader(NamedTuple):
    """How the KV heads of a sequence and layer are read, all of them in one call.

    columns: of channels ``[heads, r]`` and a count, these channels of K of the first tokens, ``[heads, tokens, r]``.
    rows: of tokens ``[heads, k]``, ascending, their K and V, ``[heads, k, width]`` each. mean_v: of a count, the mean
    of V of the first tokens, float64 ``[heads, width]``.
    """

    columns: Callable[[torch.Tensor, int], torch.Tensor]
    rows: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    mean_v: Callable[[int], torch.Tensor]


def attend_sparse(
    sparse: SparF, q: torch.Tensor, reader: Reader, heads: int, lengths: list[int], v_width: int
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Return ``(out [n, query heads, width of V], lse [n, query heads], exact)``, in the dtype of the computation.

    q: ``[n, query heads, width]``. heads: of K and V. lengths: how many tokens each of the n sees; 0 gives zeros and
    -inf. Computed head by head, so that a result does not depend on how many heads there are.
    """
    dtype = compute_dtype(q)
    out = torch.zeros(*q.shape[:2], v_width, dtype=dtype)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=dtype)
    for i, length in enumerate(lengths):
        if length:
            grouped = q[i].to(dtype).reshape(heads, q.shape[1] // heads, q.shape[2])
            found = _attend_one(sparse, grouped, reader, length)
            out[i], lse[i] = (torch.cat(x) for x in zip(*found, strict=True))
    return out, lse, max(lengths, default=0) <= sparse.k


def _attend_one(sparse: SparF, q: torch.Tensor, reader: Reader, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Out and lse of each KV head. q: ``[heads, g, width]``."""
    whole = length <= sparse.k
    channels = q.abs().sum(1).topk(min(sparse.r, q.shape[2])).indices.sort().values
    if whole:
        choices = [(torch.arange(length), q.new_ones(q.shape[1]))] * len(q)
    else:
        columns = reader.columns(channels, length).to(q.dtype)
        choices = [_choose(sparse, *x) for x in zip(q, channels, columns, strict=True)]
    k, v = (rows.to(q.dtype) for rows in reader.rows(torch.stack([chosen for chosen, _ in choices])))
    mean = reader.mean_v(length).to(q.dtype) if sparse.blend and not whole else None
    found = []
    for h, (_, share) in enumerate(choices):
        scores = q[h] @ k[h].T * q.shape[2] ** -0.5
        out, lse = scores.softmax(-1) @ v[h], scores.logsumexp(-1)
        if mean is not None:
            out = share[:, None] * out + (1 - share[:, None]) * mean[h]
            lse = lse - share.log()  # the chosen tokens are that share of the denominator
        found.append((out, lse))
    return found


def _choose(
    sparse: SparF, q: torch.Tensor, channels: torch.Tensor, columns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a head's tokens that are read, ascending, and the share of each query's weights that they have by
    estimate. q: ``[g, width]``. columns: ``[tokens, r]``.
    """
    part = q[:, channels]
    covered = part.abs().sum(1) / q.abs().sum(1)
    covered = torch.where(covered > 0, covered, torch.ones_like(covered))  # without these channels all scores are 0
    weights = (part @ columns.T / (q.shape[1] * covered[:, None]).sqrt()).softmax(-1)
    wanted = weights.sum(0)
    wanted[len(wanted) - sparse.recent_tokens() :] = torch.inf
    chosen = wanted.topk(sparse.k).indices.sort().values
    return chosen, weights[:, chosen].sum(1).clamp(torch.finfo(q.dtype).tiny, 1)
