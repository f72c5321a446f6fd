"""FlashInfer's MLA wrapper by hand, in the form before 0.7.0 and in the one that came then."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from kernel_oracle import attend, check_int32, gather, pack


class BatchMLAPagedAttentionWrapper:
    """As it was before 0.7.0. One KV head: K is the latent and the rotary key side by side, V the latent."""

    def __init__(self, workspace: torch.Tensor | None = None, backend: str = "auto") -> None:
        pass

    def plan(
        self,
        qo_indptr,
        kv_indptr,
        kv_indices,
        kv_len_arr,
        num_heads,
        head_dim_ckv,
        head_dim_kpe,
        page_size,
        causal,
        sm_scale,
        q_data_type,
        kv_data_type,
    ) -> None:
        check_int32("cpu", qo_indptr=qo_indptr, kv_indptr=kv_indptr, kv_len_arr=kv_len_arr)
        check_int32(kv_indices.device, kv_indices=kv_indices)
        assert len(qo_indptr) == len(kv_indptr) == len(kv_len_arr) + 1 and kv_indices.shape == (kv_indptr[-1],)
        assert torch.equal(kv_indptr.diff(), -(-kv_len_arr // page_size)), "as many pages as the length needs"
        self.qo, self.indptr, self.indices = qo_indptr.tolist(), kv_indptr.tolist(), kv_indices
        self.lengths, self.page_size, self.causal, self.scale = kv_len_arr.tolist(), page_size, causal, sm_scale
        self.heads, self.widths, self.dtypes = num_heads, (head_dim_ckv, head_dim_kpe), (q_data_type, kv_data_type)

    def run(self, q_nope, q_pe, ckv_cache, kpe_cache, *, return_lse=False):
        for q, cache, width in zip((q_nope, q_pe), (ckv_cache, kpe_cache), self.widths, strict=True):
            assert q.shape == (self.qo[-1], self.heads, width) and cache.shape[1:] == (self.page_size, width)
            assert (q.dtype, cache.dtype) == self.dtypes and type(cache) is torch.Tensor
            assert cache.stride(-1) == 1 and all(0 < s < 2**32 for s in cache.stride())
        q, parts = torch.cat([q_nope, q_pe], -1), []
        for b, length in enumerate(self.lengths):
            ids = self.indices[self.indptr[b] : self.indptr[b + 1]].tolist()
            ckv, kpe = (gather(cache, ids, length).unsqueeze(1) for cache in (ckv_cache, kpe_cache))
            k = torch.cat([ckv, kpe], -1)
            parts.append(attend(q[self.qo[b] : self.qo[b + 1]], k, ckv, scale=self.scale, causal=self.causal))
        out, lse = pack(parts)
        return (out, lse / math.log(2)) if return_lse else out


@dataclass(frozen=True)
class MLAPlanMetadata:
    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    kv_len_arr: torch.Tensor

    @classmethod
    def csr(cls, qo_indptr, kv_indptr, kv_indices, kv_len_arr) -> MLAPlanMetadata:
        return cls(qo_indptr, kv_indptr, kv_indices, kv_len_arr)


class NewBatchMLAPagedAttentionWrapper(BatchMLAPagedAttentionWrapper):
    """From 0.7.0 on, without what is deprecated there. The plan knows whether the lse will be wanted."""

    def plan(
        self,
        *,
        metadata,
        num_heads,
        head_dim_ckv,
        head_dim_kpe,
        page_size,
        causal,
        sm_scale,
        q_data_type,
        kv_data_type,
        query_layout="packed",
        kv_cache_layout="packed",
        lse_mode="none",
    ) -> None:
        assert isinstance(metadata, MLAPlanMetadata) and query_layout == kv_cache_layout == "split"
        assert lse_mode in ("none", "base2")
        self.lse_mode = lse_mode
        super().plan(
            metadata.qo_indptr, metadata.kv_indptr, metadata.kv_indices, metadata.kv_len_arr, num_heads, head_dim_ckv,
            head_dim_kpe, page_size, causal, sm_scale, q_data_type, kv_data_type,
        )  # fmt: skip

    def run(self, *, query, kv_cache, return_lse=False):
        assert isinstance(query, tuple) and isinstance(kv_cache, tuple)
        assert (self.lse_mode == "base2") == return_lse, "MLA planned run argument LSE mode mismatch"
        return super().run(*query, *kv_cache, return_lse=return_lse)
