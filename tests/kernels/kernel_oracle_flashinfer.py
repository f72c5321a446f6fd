"""FlashInfer's kernels by hand: arguments, refusals and the base-2 lse as its documentation has them.

Each stand-in has the name of the class or function that it stands for. Paged forms walk a CSR of page ids.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from kernel_oracle import INT, attend, check_int32, check_pages, gather, pack


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

    def _run(
        self, q: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor], k_scale: float = 1.0, v_scale: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
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
            scale = rest["sm_scale"] * k_scale
            parts.append(attend(mine, k, v, scale=scale, causal=rest["causal"], left=rest["window_left"]))
        out, lse = pack(parts)
        return out * v_scale, lse / math.log(2)


def csr_lengths(indptr: torch.Tensor, last_page_len: torch.Tensor, page_size: int) -> list[int]:
    check_int32("cpu", last_page_len=last_page_len)
    lengths = []
    for pages, last in zip(indptr.diff().tolist(), last_page_len.tolist(), strict=True):
        assert pages == 0 or 1 <= last <= page_size
        lengths.append(0 if pages == 0 else (pages - 1) * page_size + last)
    return lengths


class BatchDecodeWithPagedKVCacheWrapper(Paged):
    def plan(
        self,
        indptr,
        indices,
        last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        *,
        window_left=-1,
        sm_scale=None,
        q_data_type="float16",
        kv_data_type=None,
    ) -> None:
        qo = torch.arange(len(indptr), dtype=INT)
        self._plan(
            qo,
            indptr,
            indices,
            csr_lengths(indptr, last_page_len, page_size),
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            page_size=page_size,
            window_left=window_left,
            sm_scale=sm_scale,
            q_data_type=q_data_type,
            kv_data_type=kv_data_type,
            causal=True,
        )

    def run(self, q, paged_kv_cache, *, return_lse=False, **scales):
        out, lse = self._run(q, paged_kv_cache, **scales)
        return (out, lse) if return_lse else out


class BatchPrefillWithPagedKVCacheWrapper(Paged):
    def plan(
        self,
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        page_size,
        *,
        causal=False,
        window_left=-1,
        sm_scale=None,
        q_data_type="float16",
        kv_data_type=None,
    ) -> None:
        self._plan(
            qo_indptr,
            paged_kv_indptr,
            paged_kv_indices,
            csr_lengths(paged_kv_indptr, paged_kv_last_page_len, page_size),
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim_qk,
            page_size=page_size,
            window_left=window_left,
            sm_scale=sm_scale,
            q_data_type=q_data_type,
            kv_data_type=kv_data_type,
            causal=causal,
        )

    run = BatchDecodeWithPagedKVCacheWrapper.run


def merge_base_2(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``merge_state`` of releases that turn two empty parts into NaN."""
    top = torch.maximum(lse, other_lse)
    mine, others = torch.exp2(lse - top), torch.exp2(other_lse - top)
    total = mine + others
    return (mine.unsqueeze(-1) * out + others.unsqueeze(-1) * other) / total.unsqueeze(-1), total.log2() + top


class MultiLevelCascadeAttentionWrapper:
    def __init__(self, num_levels: int, workspace: torch.Tensor | None = None, kv_layout: str = "NHD") -> None:
        self.wrappers = [BatchPrefillWithPagedKVCacheWrapper(workspace, kv_layout) for _ in range(num_levels)]

    def plan(
        self,
        qo_indptr_arr,
        paged_kv_indptr_arr,
        paged_kv_indices_arr,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        causal=False,
        *,
        sm_scale=None,
        window_left=-1,
        q_data_type="float16",
        kv_data_type=None,
    ) -> None:
        levels = zip(
            self.wrappers,
            qo_indptr_arr,
            paged_kv_indptr_arr,
            paged_kv_indices_arr,
            paged_kv_last_page_len,
            strict=True,
        )
        for i, (wrapper, qo_indptr, indptr, indices, last) in enumerate(levels):
            assert qo_indptr[-1] == qo_indptr_arr[-1][-1], "each level covers all queries"
            # The planner of fa3 takes max(pages - 1, 0) * page_size + last for a length, of empty groups too.
            assert (last[indptr.diff() == 0] == 0).all()
            wrapper.plan(
                qo_indptr,
                indptr,
                indices,
                last,
                num_qo_heads,
                num_kv_heads,
                head_dim,
                page_size,
                causal=causal if i == len(self.wrappers) - 1 else False,
                window_left=window_left,
                sm_scale=sm_scale,
                q_data_type=q_data_type,
                kv_data_type=kv_data_type or q_data_type,
            )

    def run(self, q, paged_kv_cache):
        out, lse = self.wrappers[-1].run(q, paged_kv_cache, return_lse=True)
        for wrapper in self.wrappers[:-1]:
            out, lse = merge_base_2(out, lse, *wrapper.run(q, paged_kv_cache, return_lse=True))
        return out


class BatchAttention(Paged):
    def plan(
        self,
        qo_indptr,
        kv_indptr,
        kv_indices,
        kv_len_arr,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        head_dim_vo,
        page_size,
        causal=False,
        sm_scale=None,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    ) -> None:
        check_int32("cpu", kv_len_arr=kv_len_arr)
        assert head_dim_qk == head_dim_vo <= 256
        self._plan(
            qo_indptr,
            kv_indptr,
            kv_indices,
            kv_len_arr.tolist(),
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim_qk,
            page_size=page_size,
            window_left=-1,
            sm_scale=sm_scale,
            q_data_type=q_data_type,
            kv_data_type=kv_data_type,
            causal=causal,
        )

    def run(self, q, kv_cache, **scales):
        return self._run(q, kv_cache, **scales)


class BatchPrefillWithRaggedKVCacheWrapper:
    """Request b: queries ``[qo_indptr[b], qo_indptr[b + 1])`` over tokens ``[kv_indptr[b], kv_indptr[b + 1])``."""

    def __init__(self, workspace: torch.Tensor | None = None, kv_layout: str = "NHD") -> None:
        assert kv_layout == "NHD"

    def plan(
        self,
        qo_indptr,
        kv_indptr,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        *,
        causal=False,
        window_left=-1,
        sm_scale=None,
        q_data_type="float16",
        kv_data_type=None,
    ) -> None:
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
        k.device,
        batch_indices=batch_indices,
        positions=positions,
        kv_indices=kv_indices,
        kv_indptr=kv_indptr,
        kv_last_page_len=kv_last_page_len,
    )
    assert kv_layout == "NHD"
    for i, (row, position) in enumerate(zip(batch_indices.tolist(), positions.tolist(), strict=True)):
        page = int(kv_indices[int(kv_indptr[row]) + position // k.shape[1]])
        k[page, position % k.shape[1]] = append_key[i]
        v[page, position % k.shape[1]] = append_value[i]
