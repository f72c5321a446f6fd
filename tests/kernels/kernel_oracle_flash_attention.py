"""FlashAttention 2, 3 and 4 and torch's own, by hand: arguments, refusals and the shape of the lse as they document them.

Lengths and tables are on the device; the lse is natural.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from kernel_oracle import INT, attend, check_int32, gather, pack


def _walk(q, k, v, tables, starts, lengths, **rest):
    """Per row: tokens of a block table, or ``k[start : start + length]`` of flat tokens."""
    parts = []
    for b, mine in enumerate(q):
        if tables is not None:
            ids = tables[b].tolist()
            keys, values = gather(k, ids, lengths[b]), gather(v, ids, lengths[b])
        else:
            held = slice(starts[b], starts[b] + lengths[b])
            keys, values = k[held], v[held]
        parts.append(attend(mine, keys, values, **rest))
    return parts


def _mask(causal, window_size):
    left, right = window_size
    assert right in (-1, 0)
    return {"causal": causal or right == 0, "left": left}


def _cache_rows(k_cache, v_cache, lengths, cache_batch_idx, cache_leftpad):
    """Rows of a contiguous cache as flat tokens: where each starts, and how many are left."""
    assert k_cache.stride() == v_cache.stride() and k_cache.stride(-1) == 1
    rows, size = cache_batch_idx.tolist(), k_cache.shape[1]
    pad = cache_leftpad.tolist() if cache_leftpad is not None else [0] * len(rows)
    starts = [row * size + p for row, p in zip(rows, pad, strict=True)]
    flat = [c.as_strided((c.shape[0] * size, *c.shape[2:]), c.stride()[1:]) for c in (k_cache, v_cache)]
    return flat, starts, [n - p for n, p in zip(lengths, pad, strict=True)]


def fa2_with_kvcache(
    q,
    k_cache,
    v_cache,
    *,
    cache_seqlens,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    return_softmax_lse=False,
):
    """flash_attn 2.8 ``flash_attn_with_kvcache``: q ``[B, S, Hq, D]``, lse ``[B, Hq, S]``, +inf for rows that see
    nothing.
    """
    check_int32(
        q.device,
        cache_seqlens=cache_seqlens,
        cache_batch_idx=cache_batch_idx,
        leftpad=cache_leftpad,
        block_table=block_table,
    )
    assert (cache_batch_idx is None) != (block_table is None)
    lengths, starts, k, v = cache_seqlens.tolist(), None, k_cache, v_cache
    if block_table is None:
        (k, v), starts, lengths = _cache_rows(k_cache, v_cache, lengths, cache_batch_idx, cache_leftpad)
    else:
        assert k_cache.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
        assert cache_leftpad is None, "no left padding with pages"
    parts = _walk(q, k, v, block_table, starts, lengths, scale=softmax_scale, **_mask(causal, window_size))
    out, lse = torch.stack([o for o, _ in parts]), torch.stack([s.T for _, s in parts])
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    return (out, lse) if return_softmax_lse else out


def fa2_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    *,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    return_attn_probs=False,
    block_table=None,
):
    """flash_attn 2.8 ``flash_attn_varlen_func`` over pages: ``cu_seqlens_k`` holds lengths only. lse ``[Hq, T]``."""
    check_int32(q.device, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, block_table=block_table)
    assert k.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
    out, lse = _packed(
        q,
        k,
        v,
        cu_seqlens_q,
        None,
        cu_seqlens_k.diff(),
        max_seqlen_q,
        max_seqlen_k,
        block_table,
        softmax_scale,
        _mask(causal, window_size),
    )
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    return (out, lse, None) if return_attn_probs else out


def fa3_with_kvcache(
    q,
    k_cache,
    v_cache,
    *,
    cache_seqlens,
    cache_batch_idx=None,
    cache_leftpad=None,
    page_table=None,
    cu_seqlens_q=None,
    max_seqlen_q=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    return_softmax_lse=False,
):
    """FlashAttention 3's ``flash_attn_with_kvcache`` with packed queries; returns more than two with the lse."""
    check_int32(
        q.device,
        cache_seqlens=cache_seqlens,
        cache_batch_idx=cache_batch_idx,
        leftpad=cache_leftpad,
        page_table=page_table,
    )
    assert (cache_batch_idx is None) != (page_table is None)
    k, v, starts, lengths = k_cache, v_cache, None, cache_seqlens
    if page_table is None:
        (k, v), starts, held = _cache_rows(k_cache, v_cache, lengths.tolist(), cache_batch_idx, cache_leftpad)
        starts, lengths = torch.tensor([*starts, 0], dtype=INT), torch.tensor(held, dtype=INT)
    result = _packed(
        q,
        k,
        v,
        cu_seqlens_q,
        starts,
        lengths,
        max_seqlen_q,
        2**31,
        page_table,
        softmax_scale,
        _mask(causal, window_size),
    )
    return (*result, None, None) if return_softmax_lse else result[0]


def fa3_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    *,
    seqused_k,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    return_attn_probs=False,
):
    """FlashAttention 3's ``flash_attn_varlen_func``: ``cu_seqlens_k`` says where rows start, ``seqused_k`` how long
    they are.
    """
    out, lse = _packed(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_k,
        max_seqlen_q,
        max_seqlen_k,
        None,
        softmax_scale,
        _mask(causal, window_size),
    )
    return (out, lse) if return_attn_probs else out


def fa4_varlen(
    q,
    k,
    v,
    *,
    cu_seqlens_q,
    max_seqlen_q,
    max_seqlen_k,
    seqused_k,
    cu_seqlens_k=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    return_lse=False,
):
    """FlashAttention 4's ``flash_attn_varlen_func``: over pages, or rows as for version 3; always a pair."""
    assert page_table is None or cu_seqlens_k is None, "page_table is not supported with cu_seqlens_k"
    left, right = (-1 if bound is None else bound for bound in window_size)
    mask = _mask(causal, (left, right))
    out, lse = _packed(
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k, page_table, softmax_scale, mask
    )
    return out, lse if return_lse else None


def flash_op(
    query,
    key,
    value,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    return_debug_mask,
    *,
    scale=None,
    window_size_left=None,
    window_size_right=None,
    seqused_k=None,
):
    """``aten._flash_attention_forward`` of torch 2.11."""
    assert dropout_p == 0.0 and not return_debug_mask and window_size_right in (None, 0)
    left = -1 if window_size_left is None else window_size_left
    out, lse = _packed(
        query,
        key,
        value,
        cum_seq_q,
        cum_seq_k,
        seqused_k,
        max_q,
        max_k,
        None,
        scale,
        {"causal": is_causal, "left": left},
    )
    return out, lse, torch.empty(0), torch.empty(0), torch.empty(0)


def varlen_attn(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
):
    """``torch.nn.attention.varlen.varlen_attn`` of torch 2.12."""
    assert enable_gqa or query.shape[1] == key.shape[-2]
    assert (cu_seq_k is None) == (block_table is not None), "starts or a table"
    if block_table is not None:
        assert key.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
    out, lse = _packed(
        query, key, value, cu_seq_q, cu_seq_k, seqused_k, max_q, max_k, block_table, scale, _mask(False, window_size)
    )
    return (out, lse) if return_aux is not None and return_aux.lse else out


def _packed(q, k, v, cu_q, starts, lengths, max_q, max_k, tables, scale, mask):
    """Packed queries; ``(out [T, Hq, D], lse [Hq, T])``."""
    check_int32(q.device, cu_seqlens_q=cu_q, starts=starts, lengths=lengths, tables=tables)
    assert type(k) is torch.Tensor and type(v) is torch.Tensor
    assert k.shape == v.shape and k.stride() == v.stride() and k.stride(-1) == 1
    assert k.ndim == (3 if tables is None else 4)
    cu = cu_q.tolist()
    assert cu[-1] == len(q) and len(lengths) == len(cu) - 1
    assert starts is None or len(starts) == len(cu)
    assert max(b - a for a, b in pairwise(cu)) <= max_q and max(lengths.tolist()) <= max_k
    rows = [q[a:b] for a, b in pairwise(cu)]
    begin = None if starts is None else starts.tolist()
    out, lse = pack(_walk(rows, k, v, tables, begin, lengths.tolist(), scale=scale, **mask))
    return out, lse.T
