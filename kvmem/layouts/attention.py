"""Attention of the newest tokens of a sequence over a tile of its tokens, in torch. ``merge`` joins tiles."""

from __future__ import annotations

import torch

from kvmem.errors import SpecError

__all__ = ["Partial", "attend_tile", "compute_dtype", "described", "masked_scores", "normalise"]

#: ``(out [n, query heads, width], lse [n, query heads])``; the lse is a natural logarithm, -inf where no key is seen.
Partial = tuple[torch.Tensor, torch.Tensor]


def described(value: object) -> str:
    """Return what a refusal says of a value: shape, dtype and device of a tensor, or the type; and that of members."""
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(described, value[:4]))}{', ...' * (len(value) > 4)}]"
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {value.dtype} on {value.device}"
    return type(value).__name__


def compute_dtype(q: torch.Tensor) -> torch.dtype:
    """Return the dtype that attention is computed in: float64 for queries in float64, else float32."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def masked_scores(
    q: torch.Tensor, k: torch.Tensor, *, first: int, length: int, scale: float | None = None, causal: bool = True,
    window: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return the scores ``[query heads, n, m]`` of n queries over m keys, -inf where a query sees no key.

    q: ``[n, query heads, width]``, of tokens ``[length - n, length)``. k: ``[m, KV heads, width]``, of tokens
    ``[first, first + m)``. Query heads h * g to (h + 1) * g - 1 share KV head h. window: how many tokens a query sees,
    itself included; None for all. ``SpecError`` for queries whose heads or width do not fit.
    """
    dtype = compute_dtype(q)
    new, heads, width = q.shape
    if width != k.shape[2] or not heads or heads % k.shape[1]:
        fit = f"a multiple of {k.shape[1]} heads, {k.shape[2]}"
        raise SpecError(f"q: got shape {tuple(q.shape)}; must be [{new}, {fit}]")
    grouped = q.to(dtype).view(new, k.shape[1], heads // k.shape[1], width)
    scores = torch.einsum("qhgd,khd->hgqk", grouped, k.to(dtype)).flatten(0, 1)
    scores *= width**-0.5 if scale is None else scale
    positions = torch.arange(length - new, length, device=q.device).unsqueeze(1)
    keys = torch.arange(first, first + len(k), device=q.device)
    if causal and first + len(k) > length - new + 1:
        scores.masked_fill_(keys > positions, -torch.inf)
    if window is not None:
        scores.masked_fill_(keys <= positions - window, -torch.inf)
    return scores


def normalise(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the softmax of ``masked_scores`` ``[query heads, n, m]``, zero where nothing is seen, and the lse ``[n,
    query heads]``.
    """
    lse = scores.logsumexp(-1)
    return (scores - lse.unsqueeze(-1)).exp().masked_fill((lse == -torch.inf).unsqueeze(-1), 0), lse.T


def attend_tile(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, first: int, length: int, scale: float | None = None,
    causal: bool = True, window: int | None = None,
) -> Partial:  # fmt: skip
    """Return ``(out, lse)`` of the queries over the tokens ``[first, first + m)``; arguments as for ``masked_scores``.

    v: ``[m, KV heads, any width]``.
    """
    scores = masked_scores(q, k, first=first, length=length, scale=scale, causal=causal, window=window)
    weights, lse = normalise(scores)
    heads, new, held = weights.shape
    grouped = weights.view(v.shape[1], heads // v.shape[1], new, held)
    return torch.einsum("hgqk,khd->qhgd", grouped, v.to(weights.dtype)).flatten(1, 2), lse
