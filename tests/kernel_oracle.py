"""Attention kernels done by hand, in float64, one query and one head at a time.

Each stand-in has the name and the arguments of the kernel that it stands for, follows them as that kernel's
documentation says, and refuses what it refuses. Nothing here knows kvmem: what the argument makers say is followed, not
trusted.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch

INT = torch.int32


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    left: int = -1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q ``[n, Hq, D]`` over k, v ``[m, H, .]``, masks aligned to the end. ``(out [n, Hq, Dv], lse [n, Hq])``,
    float64.
    """
    new, heads, width = q.shape
    held, group = k.shape[0], heads // k.shape[1]
    out = torch.zeros(new, heads, v.shape[-1], dtype=torch.float64)
    lse = torch.full((new, heads), -math.inf, dtype=torch.float64)
    for i in range(new):
        position = held - new + i
        end = position + 1 if causal else held
        begin = max(0, position - left) if left >= 0 else 0
        if begin >= end:
            continue
        for h in range(heads):
            keys, values = k[begin:end, h // group].double().cpu(), v[begin:end, h // group].double().cpu()
            scores = keys @ q[i, h].double().cpu() * (width**-0.5 if scale is None else scale)
            top = scores.max()
            weights = torch.exp(scores - top)
            out[i, h] = weights @ values / weights.sum()
            lse[i, h] = top + weights.sum().log()
    return out, lse


def check_int32(device: torch.device | str, **tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            assert tensor.dtype == INT, f"{name} is {tensor.dtype}"
            assert tensor.device.type == torch.device(device).type, f"{name} is on {tensor.device}"
            assert tensor.stride(-1) == 1, f"{name} is not contiguous"


def check_pages(k: torch.Tensor, v: torch.Tensor, page_size: int) -> None:
    assert type(k) is torch.Tensor and type(v) is torch.Tensor
    assert k.shape == v.shape and k.stride() == v.stride() and k.stride(-1) == 1
    assert k.shape[1] == page_size
    assert all(0 < s < 2**32 for s in k.stride())


def gather(pages: torch.Tensor, ids: list[int], length: int) -> torch.Tensor:
    """The first ``length`` tokens of pages ``ids``, one token at a time."""
    size = pages.shape[1]
    assert len(ids) * size >= length
    tokens = [pages[ids[t // size], t % size] for t in range(length)]
    return torch.stack(tokens) if tokens else pages.new_zeros(0, *pages.shape[2:])


def pack(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([o for o, _ in parts]), torch.cat([s for _, s in parts])


# --- FlashInfer: paged forms walk a CSR of page ids; lse in base 2 ---


class Paged:
    """What the paged wrappers share: requests of queries ``qo_indptr`` over pages ``indices[indptr[b] : indptr[b +
    1]]``.
    """

    def __init__(self, workspace: torch.Tensor | None = None, kv_layout: str = "NHD") -> None:
        assert kv_layout == "NHD"

    def _plan(
        self, qo: torch.Tensor, indptr: torch.Tensor, indices: torch.Tensor, lengths: list[int], **rest: Any
    ) -> None:
        check_int32("cpu", qo_indptr=qo, indptr=indptr)
        check_int32(indices.device, indices=indices)
        assert len(qo) == len(indptr) == len(lengths) + 1 and indices.shape == (indptr[-1],)
        assert (indptr.diff() >= 0).all() and (qo.diff() >= 0).all() and qo[0] == indptr[0] == 0
        self.qo, self.indptr, self.indices, self.lengths, self.rest = (
            qo.tolist(),
            indptr.tolist(),
            indices,
            lengths,
            rest,
        )

    def _run(self, q: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        rest = self.rest
        check_pages(*cache, rest["page_size"])
        assert q.shape == (self.qo[-1], rest["num_qo_heads"], rest["head_dim"])
        assert cache[0].shape[2:] == (rest["num_kv_heads"], rest["head_dim"])
        assert q.dtype == rest["q_data_type"] and cache[0].dtype == rest["kv_data_type"]
        assert self.indices.device == q.device
        parts = []
        for b, length in enumerate(self.lengths):
            ids = self.indices[self.indptr[b] : self.indptr[b + 1]].tolist()
            k, v = (gather(pages, ids, length) for pages in cache)
            mine = q[self.qo[b] : self.qo[b + 1]]
            parts.append(attend(mine, k, v, scale=rest["sm_scale"], causal=rest["causal"], left=rest["window_left"]))
        out, lse = pack(parts)
        return out, lse / math.log(2)


def csr_lengths(indptr: torch.Tensor, last_page_len: torch.Tensor, page_size: int) -> list[int]:
    check_int32("cpu", last_page_len=last_page_len)
    lengths = []
    for pages, last in zip(indptr.diff().tolist(), last_page_len.tolist(), strict=True):
        assert pages == 0 or 1 <= last <= page_size
        lengths.append(0 if pages == 0 else (pages - 1) * page_size + last)
    return lengths


class BatchDecodeWithPagedKVCacheWrapper(Paged):
    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, *, window_left=-1, sm_scale=None,
        q_data_type="float16", kv_data_type=None,
    ) -> None:  # fmt: skip
        qo = torch.arange(len(indptr), dtype=INT)
        self._plan(
            qo, indptr, indices, csr_lengths(indptr, last_page_len, page_size), num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads, head_dim=head_dim, page_size=page_size, window_left=window_left, sm_scale=sm_scale,
            q_data_type=q_data_type, kv_data_type=kv_data_type, causal=True,
        )  # fmt: skip

    def run(self, q, paged_kv_cache, *, return_lse=False):
        out, lse = self._run(q, paged_kv_cache)
        return (out, lse) if return_lse else out


class BatchPrefillWithPagedKVCacheWrapper(Paged):
    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim_qk,
        page_size, *, causal=False, window_left=-1, sm_scale=None, q_data_type="float16", kv_data_type=None,
    ) -> None:  # fmt: skip
        self._plan(
            qo_indptr, paged_kv_indptr, paged_kv_indices, csr_lengths(paged_kv_indptr, paged_kv_last_page_len, page_size),
            num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads, head_dim=head_dim_qk, page_size=page_size,
            window_left=window_left, sm_scale=sm_scale, q_data_type=q_data_type, kv_data_type=kv_data_type, causal=causal,
        )  # fmt: skip

    run = BatchDecodeWithPagedKVCacheWrapper.run


class BatchAttention(Paged):
    def plan(
        self, qo_indptr, kv_indptr, kv_indices, kv_len_arr, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, page_size,
        causal=False, sm_scale=None, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
    ) -> None:  # fmt: skip
        check_int32("cpu", kv_len_arr=kv_len_arr)
        assert head_dim_qk == head_dim_vo <= 256
        self._plan(
            qo_indptr, kv_indptr, kv_indices, kv_len_arr.tolist(), num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads,
            head_dim=head_dim_qk, page_size=page_size, window_left=-1, sm_scale=sm_scale, q_data_type=q_data_type,
            kv_data_type=kv_data_type, causal=causal,
        )  # fmt: skip

    def run(self, q, kv_cache):
        return self._run(q, kv_cache)


class BatchPrefillWithRaggedKVCacheWrapper:
    """Request b: queries ``[qo_indptr[b], qo_indptr[b + 1])`` over tokens ``[kv_indptr[b], kv_indptr[b + 1])``."""

    def __init__(self, workspace: torch.Tensor | None = None, kv_layout: str = "NHD") -> None:
        assert kv_layout == "NHD"

    def plan(
        self, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, *, causal=False, window_left=-1, sm_scale=None,
        q_data_type="float16", kv_data_type=None,
    ) -> None:  # fmt: skip
        check_int32("cpu", qo_indptr=qo_indptr, kv_indptr=kv_indptr)
        assert len(qo_indptr) == len(kv_indptr)
        assert (qo_indptr.diff() >= 0).all() and (kv_indptr.diff() >= 0).all(), "the planner refuses negative lengths"
        self.qo, self.kv = qo_indptr.tolist(), kv_indptr.tolist()
        self.rest = {"scale": sm_scale, "causal": causal, "left": window_left}
        self.q_shape = (self.qo[-1], num_qo_heads, head_dim_qk)
        self.kv_shape, self.dtypes = (num_kv_heads, head_dim_qk), (q_data_type, kv_data_type)

    def run(self, q, k, v, *, return_lse=False):
        assert q.shape == self.q_shape and k.shape == v.shape and k.shape[1:] == self.kv_shape
        assert k.stride() == v.stride() and k.stride(-1) == 1 and k.stride(0) * k.shape[0] <= 2**32
        assert (q.dtype, k.dtype) == self.dtypes
        parts = []
        for b in range(len(self.qo) - 1):
            new = slice(self.qo[b], self.qo[b + 1])
            if (
                new.start < new.stop
            ):  # a request with no queries makes no tile: its tokens, perhaps unmapped, stay untouched
                held = slice(self.kv[b], self.kv[b + 1])
                parts.append(attend(q[new], k[held], v[held], **self.rest))
        out, lse = pack(parts)
        return (out, lse / math.log(2)) if return_lse else out


def append_paged_kv_cache(
    append_key,
    append_value,
    batch_indices,
    positions,
    paged_kv_cache,
    kv_indices,
    kv_indptr,
    kv_last_page_len,
    kv_layout="NHD",
) -> None:
    k, v = paged_kv_cache
    check_pages(k, v, k.shape[1])
    check_int32(
        k.device, batch_indices=batch_indices, positions=positions, kv_indices=kv_indices, kv_indptr=kv_indptr,
        kv_last_page_len=kv_last_page_len,
    )  # fmt: skip
    assert kv_layout == "NHD"
    for i, (row, position) in enumerate(zip(batch_indices.tolist(), positions.tolist(), strict=True)):
        page = int(kv_indices[int(kv_indptr[row]) + position // k.shape[1]])
        k[page, position % k.shape[1]] = append_key[i]
        v[page, position % k.shape[1]] = append_value[i]


# --- FlashAttention: lengths and tables on the device; natural lse ---


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
    q, k_cache, v_cache, *, cache_seqlens, cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None,
    causal=False, window_size=(-1, -1), return_softmax_lse=False,
):  # fmt: skip
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
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, softmax_scale=None, causal=False, window_size=(-1, -1),
    return_attn_probs=False, block_table=None,
):  # fmt: skip
    """flash_attn 2.8 ``flash_attn_varlen_func`` over pages: ``cu_seqlens_k`` holds lengths only. lse ``[Hq, T]``."""
    check_int32(q.device, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, block_table=block_table)
    assert k.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
    out, lse = _packed(
        q, k, v, cu_seqlens_q, None, cu_seqlens_k.diff(), max_seqlen_q, max_seqlen_k, block_table, softmax_scale,
        _mask(causal, window_size),
    )  # fmt: skip
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    return (out, lse, None) if return_attn_probs else out


def fa3_with_kvcache(
    q, k_cache, v_cache, *, cache_seqlens, cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None,
    max_seqlen_q=None, softmax_scale=None, causal=False, window_size=(-1, -1), return_softmax_lse=False,
):  # fmt: skip
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
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, seqused_k, softmax_scale=None, causal=False,
    window_size=(-1, -1), return_attn_probs=False,
):  # fmt: skip
    """FlashAttention 3's ``flash_attn_varlen_func``: ``cu_seqlens_k`` says where rows start, ``seqused_k`` how long
    they are.
    """
    out, lse = _packed(
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k, None, softmax_scale,
        _mask(causal, window_size),
    )  # fmt: skip
    return (out, lse) if return_attn_probs else out


def flash_op(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
    window_size_left=None, window_size_right=None, seqused_k=None,
):  # fmt: skip
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
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None,
):  # fmt: skip
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
