"""Attention in plain torch, on any device: a slice of the row on the virtual backend, gathered blocks on the paged
one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from kvmem.allocator.batch import GroupBatch
from kvmem.allocator.cascade import Cascade, CascadeLevel
from kvmem.arguments import check_size
from kvmem.errors import SpecError
from kvmem.kernels.base import Cache, Result, Run, Step
from kvmem.kernels.checks import as_bytes, check_all_blocks, check_batch, check_queries, flat_tokens, heads_first, plain
from kvmem.kernels.merge import merge_levels

__all__ = ["cascade_attention", "level_attention", "oracle", "prepare_sdpa", "sdpa", "sdpa_lse"]


@dataclass(frozen=True)
class _Part:
    """One row of the batch: queries ``[q_begin, q_end)`` of the packed ones, over tokens ``[first, length)`` of
    sequence ``row``.
    """

    row: int
    q_begin: int
    q_end: int
    first: int
    length: int


def oracle(
    q: torch.Tensor, cache: Cache, batch: GroupBatch, *, scale: float | None = None, causal: bool = True,
    window_tokens: int | None = None, queries: GroupBatch | None = None, dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """``(out [T, Hq, width of V], lse [T, Hq])`` by the definition of attention, computed and returned in ``dtype``:
    the reference that other kernels are compared with.

    Arguments as for ``sdpa``. Scores of all queries and keys of a sequence exist at once.
    """
    check_all_blocks(cache)
    check_queries(q)
    out = torch.zeros(*q.shape[:2], cache[1].shape[-1], dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=dtype, device=q.device)
    for part in _parts(q, cache[0], batch, queries or batch, causal, window_tokens):
        k, v = (_tokens(c, batch, part).to(dtype) for c in cache)
        scores = _scores(q[part.q_begin : part.q_end].to(dtype), k, scale)
        if causal:
            scores.masked_fill_(~_mask(part, window_tokens, q.device), -torch.inf)
        lse[part.q_begin : part.q_end] = scores.logsumexp(-1).T
        out[part.q_begin : part.q_end] = _weighted(scores.softmax(-1), v)
    return out, lse


def sdpa(
    q: torch.Tensor, cache: Cache, batch: GroupBatch, *, scale: float | None = None, causal: bool = True,
    window_tokens: int | None = None, queries: GroupBatch | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attention by torch's ``scaled_dot_product_attention``, one call per sequence: ``[T, Hq, width of V]`` in q's
    dtype.

    q: ``[T, Hq, D]``, packed by ``cu_seqlens_q``; Hq is a multiple of the cache's heads. cache:
    ``Allocator.kv(layer)``, the new tokens already written; K and V may differ in width. scale: default ``D ** -0.5``.
    window_tokens: tokens a query sees, itself included; give it for a sliding-window group. Tokens that the window has
    dropped are not touched.
    queries: the batch that q is packed by where that is another group's (cross attention, with ``causal=False``).
    Rows with no keys give zeroes.

    Virtual backend: K and V are views. Paged: they are gathered first, a copy of each sequence's tokens.
    """
    check_all_blocks(cache)
    check_queries(q)
    out = torch.zeros(*q.shape[:2], cache[1].shape[-1], dtype=q.dtype, device=q.device)
    for part in _parts(q, cache[0], batch, queries or batch, causal, window_tokens):
        k, v = (_tokens(c, batch, part).to(q.dtype).transpose(0, 1).unsqueeze(0) for c in cache)
        new, held = part.q_end - part.q_begin, part.length - part.first
        # One new token sees all that was taken; a fresh prompt is a plain triangle, which SDPA does without a mask.
        triangle = causal and new == held > 1 and window_tokens is None
        masked = causal and new > 1 and not triangle
        mine = q[part.q_begin : part.q_end].transpose(0, 1).unsqueeze(0)
        if new == 1:  # the query heads of a group as rows of one head: torch's own GQA is many times slower on a CPU
            mine = mine.reshape(1, k.shape[1], -1, mine.shape[-1])
        result = F.scaled_dot_product_attention(
            mine, k, v, attn_mask=_mask(part, window_tokens, q.device) if masked else None, is_causal=triangle,
            scale=scale, enable_gqa=mine.shape[1] != k.shape[1],
        ).reshape(1, q.shape[1], new, -1)  # fmt: skip
        out[part.q_begin : part.q_end] = result[0].transpose(0, 1)
    return out


def sdpa_lse(
    q: torch.Tensor, cache: Cache, batch: GroupBatch, *, scale: float | None = None, causal: bool = True,
    window_tokens: int | None = None, queries: GroupBatch | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """``(out, lse)``: out ``[T, Hq, width of V]`` as from ``sdpa``, lse float32 ``[T, Hq]``. SDPA returns no lse, so
    this holds all scores of a sequence at once, in float32. Arguments as for ``sdpa``.
    """
    out, lse = oracle(
        q, cache, batch, scale=scale, causal=causal, window_tokens=window_tokens, queries=queries, dtype=torch.float32
    )
    return out.to(q.dtype), lse


def prepare_sdpa(library: Any, step: Step) -> Run:
    """library: this module."""
    scales = step.scales or {"k_scale": 1.0, "v_scale": 1.0}
    scale = (step.head_dim**-0.5 if step.scale is None else step.scale) * scales["k_scale"]

    def run(q: torch.Tensor, cache: Cache) -> Result:
        out = library.sdpa(q, cache, step.batch, scale=scale, window_tokens=step.window_tokens)
        return out * scales["v_scale"], None

    return run


def cascade_attention(
    q: torch.Tensor, cache: Cache, cascade: Cascade, *, scale: float | None = None, causal: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """``(out, lse)`` level by level, joined with ``merge``, as with kernels that have no cascade of their own.

    Arguments as for ``sdpa``; out ``[T, Hq, width of V]`` in q's dtype, lse ``[T, Hq]`` in ``dtype``, the dtype of the
    computation. Each shared prefix is gathered once for all its queries. ``SpecError`` if a window has dropped tokens
    of the batch: use ``sdpa``.
    """
    if cascade.drops_tokens:
        raise SpecError("cascade: a sliding window has dropped tokens of this batch; use sdpa with window_tokens")
    own = cascade.levels[-1]
    out, lse = merge_levels(
        level_attention(q, cache, level, scale=scale, causal=causal and level is own, dtype=dtype)
        for level in cascade.levels
    )
    return out.to(q.dtype), lse


def level_attention(
    q: torch.Tensor, cache: Cache, level: CascadeLevel, *, scale: float | None = None, causal: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """``(out, lse)`` of all queries over one level, in ``dtype``. Queries of a group without blocks: zeroes, -inf."""
    out = torch.zeros(*q.shape[:2], cache[1].shape[-1], dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=dtype, device=q.device)
    size = cache[0].shape[1]
    offsets = torch.arange(size, device=q.device)
    spans = zip(
        pairwise(level.qo_indptr_cpu.tolist()), pairwise(level.kv_indptr_cpu.tolist()), level.kv_lens_cpu.tolist(),
        strict=True,
    )  # fmt: skip
    for (begin, end), (first, last), length in spans:
        if begin == end or length == 0:
            continue
        # Token by token: on the virtual backend, what a block has past a sequence's end may be unmapped.
        slots = (level.kv_indices[first:last].long().unsqueeze(1) * size + offsets).flatten()[:length]
        k, v = (_select(flat_tokens(blocks), slots).to(dtype) for blocks in cache)
        scores = _scores(q[begin:end].to(dtype), k, scale)
        if causal:
            part = _Part(0, begin, end, 0, length)
            scores.masked_fill_(~_mask(part, None, q.device), -torch.inf)
        lse[begin:end] = scores.logsumexp(-1).T
        out[begin:end] = _weighted(scores.softmax(-1), v)
    return out, lse


def _parts(
    q: torch.Tensor, k: torch.Tensor, batch: GroupBatch, queries: GroupBatch, causal: bool, window_tokens: int | None
) -> Iterator[_Part]:
    check_batch(batch)
    starts = queries.cu_seqlens_q_cpu.tolist()
    if q.ndim != 3 or q.shape[0] != starts[-1]:
        raise SpecError(
            f"q: got shape {tuple(q.shape)}; the batch has {starts[-1]} new tokens: [{starts[-1]}, heads, width]"
        )
    heads, width = plain(k).shape[2:]
    if q.shape[2] != width or q.shape[1] % heads:
        raise SpecError(
            f"q: got {q.shape[1]} heads of width {q.shape[2]}; the cache has {heads} of width {width}: the widths must "
            "be equal, and the queries' heads a multiple of the cache's"
        )
    if window_tokens is not None and not (causal and check_size("window_tokens", window_tokens)):
        raise SpecError(f"window_tokens: got {window_tokens} with causal=False; a sliding window looks back only")
    rows = zip(pairwise(starts), batch.first_tokens_cpu.tolist(), batch.seq_lens_cpu.tolist(), strict=True)
    for row, ((begin, end), first, length) in enumerate(rows):
        if window_tokens is not None:
            first = max(first, length - (end - begin) - window_tokens + 1)
        if begin < end and first < length:
            yield _Part(row, begin, end, first, length)


def _tokens(blocks: torch.Tensor, batch: GroupBatch, part: _Part) -> torch.Tensor:
    """``[length - first, heads, width]`` of one sequence, in order."""
    if batch.row_starts_cpu is not None and not heads_first(plain(blocks)):
        start = int(batch.row_starts_cpu[part.row])
        return flat_tokens(blocks)[start + part.first : start + part.length]
    size = batch.block_size
    begin = part.first // size
    ids = batch.block_table[part.row, begin : -(-part.length // size)]
    return _select(plain(blocks), ids).flatten(0, 1)[part.first - begin * size : part.length - begin * size]


def _select(tensor: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return as_bytes(tensor).index_select(0, ids).view(tensor.dtype)


def _mask(part: _Part, window_tokens: int | None, device: torch.device) -> torch.Tensor:
    """bool ``[new, held]``, True where a query sees a key."""
    position = torch.arange(part.length - part.q_end + part.q_begin, part.length, device=device).unsqueeze(1)
    token = torch.arange(part.first, part.length, device=device).unsqueeze(0)
    visible = token <= position
    return visible if window_tokens is None else visible & (token > position - window_tokens)


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float | None) -> torch.Tensor:
    """``[Hq, new, held]``. Query heads h * group to (h + 1) * group - 1 share KV head h."""
    new, heads, width = q.shape
    grouped = q.view(new, k.shape[1], heads // k.shape[1], width)
    scores = torch.einsum("qhgd,khd->hgqk", grouped, k).flatten(0, 1)
    return scores * (width**-0.5 if scale is None else scale)


def _weighted(weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """``[new, Hq, width of V]``."""
    heads, new, held = weights.shape
    grouped = weights.view(v.shape[1], heads // v.shape[1], new, held)
    return torch.einsum("hgqk,khd->qhgd", grouped, v).flatten(1, 2)
