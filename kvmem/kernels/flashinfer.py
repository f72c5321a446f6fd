"""What FlashInfer is to be called with, from 0.2.5 to 0.7.4; ``BatchAttention`` exists from 0.2.7 on.

``plan()`` once a step with one of the ``*_plan`` dicts, then ``run()`` once a layer with ``cache_of(k, v)``::

    plan = flashinfer.decode_plan(batch, num_query_heads=32, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16)
    wrapper.plan(**plan)
    out, lse = wrapper.run(q, flashinfer.cache_of(*alloc.kv(layer)), return_lse=True)

Both backends look the same from here: the virtual one's block ids are arithmetic. What ``plan()`` reads on the host is
a copy on the CPU, so it does not wait for the device; block ids stay on the device. All are int32. Layout is NHD
throughout.

Arguments that the plans share: batch, of the group that is read. num_query_heads, num_kv_heads, head_dim: of a layer.
dtype, kv_dtype: ``torch.dtype`` of queries and cache, the same by default. scale: of the scores, default ``head_dim **
-0.5``. window_tokens: tokens that a query sees, itself included; needed where a window has dropped tokens. causal: the
mask is aligned to the end of a row. queries: the batch that the queries are packed by where that is another group's
(cross attention, ``causal=False``). ``SpecError`` for what the kernel does not take.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from kvmem.allocator.batch import GroupBatch
from kvmem.allocator.cascade import Cascade
from kvmem.errors import SpecError
from kvmem.kernels.base import Cache, Result, Run, Step
from kvmem.kernels.checks import STRIDE_LIMIT, check_cache, check_no_window, flat_tokens, host, rows_of, window_left
from kvmem.kernels.versions import installed
from kvmem.kernels.write import to_cache_dtype

__all__ = [
    "Ragged", "append_args", "batch_attention_plan", "cache_of", "cascade_plan", "decode_plan", "natural_lse",
    "prefill_plan", "prepare_append", "prepare_batch_attention", "prepare_cascade", "prepare_decode", "prepare_prefill",
    "prepare_ragged", "ragged_cache_of", "ragged_plan",
]  # fmt: skip

cache_of = check_cache  # the pair that every paged ``run()`` and the append take


def natural_lse(lse: torch.Tensor) -> torch.Tensor:
    """The natural logarithm, ``[T, Hq]``, of FlashInfer's lse, which is in base 2; old versions lack ``lse_base=``."""
    return lse * math.log(2)


def decode_plan(
    batch: GroupBatch, *, num_query_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype,
    kv_dtype: torch.dtype | None = None, scale: float | None = None, window_tokens: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """For ``BatchDecodeWithPagedKVCacheWrapper.plan``: one new token per row, and ``SpecError`` if there are more."""
    if batch.max_seqlen_q > 1 or batch.num_new_tokens != batch.num_rows:
        raise SpecError(
            f"decode takes one new token per row; the batch has {batch.num_new_tokens} in {batch.num_rows} rows: use "
            "prefill_plan or batch_attention_plan"
        )
    return {
        "indptr": host(batch, "kv_indptr"),
        "indices": batch.kv_indices,
        "last_page_len": host(batch, "kv_last_page_len"),
        "head_dim": head_dim,
        "page_size": batch.block_size,
        "window_left": window_left(batch, window_tokens, causal=True),
        **_common(num_query_heads, num_kv_heads, head_dim, dtype, kv_dtype, scale),
    }


def prefill_plan(
    batch: GroupBatch, *, num_query_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype,
    kv_dtype: torch.dtype | None = None, scale: float | None = None, window_tokens: int | None = None,
    causal: bool = True, queries: GroupBatch | None = None,
) -> dict[str, Any]:  # fmt: skip
    """For ``BatchPrefillWithPagedKVCacheWrapper.plan``: any number of new tokens per row; prefill, chunked or not, and
    decode.
    """
    return {
        "qo_indptr": host(queries or batch, "cu_seqlens_q"),
        "paged_kv_indptr": host(batch, "kv_indptr"),
        "paged_kv_indices": batch.kv_indices,
        "paged_kv_last_page_len": host(batch, "kv_last_page_len"),
        "head_dim_qk": head_dim,
        "page_size": batch.block_size,
        "causal": causal,
        "window_left": window_left(batch, window_tokens, causal),
        **_common(num_query_heads, num_kv_heads, head_dim, dtype, kv_dtype, scale),
    }


def batch_attention_plan(
    batch: GroupBatch, *, num_query_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype,
    kv_dtype: torch.dtype | None = None, scale: float | None = None, causal: bool = True,
    queries: GroupBatch | None = None,
) -> dict[str, Any]:  # fmt: skip
    """For ``BatchAttention.plan``: prefill and decode in one launch. ``SpecError`` for a batch with a sliding window.

    The wrapper holds ``kv_indices`` itself, not a copy: it is the batch's buffer, valid until the next fill. ``run()``
    always returns ``(out, lse)``, and takes ``k_scale=`` and ``v_scale=`` from 0.4.0 on.
    """
    check_no_window(batch, "BatchAttention has", ": use prefill_plan")
    return {
        "qo_indptr": host(queries or batch, "cu_seqlens_q"),
        "kv_indptr": host(batch, "kv_indptr"),
        "kv_indices": batch.kv_indices,
        "kv_len_arr": host(batch, "seq_lens"),
        "head_dim_qk": head_dim,
        "head_dim_vo": head_dim,
        "page_size": batch.block_size,
        "causal": causal,
        **_common(num_query_heads, num_kv_heads, head_dim, dtype, kv_dtype or dtype, scale),
    }


def cascade_plan(
    cascade: Cascade, *, num_query_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype,
    kv_dtype: torch.dtype | None = None, scale: float | None = None, window_tokens: int | None = None,
    causal: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """For ``MultiLevelCascadeAttentionWrapper(len(cascade.levels), workspace).plan``: shared prefixes are read once.

    The number of levels is fixed when the wrapper is made: make one for each number that ``max_levels`` allows.
    ``run()`` returns no lse. ``SpecError`` for window_tokens with more than one level, since the wrapper masks each
    level by its own end; and for a kv_dtype other than dtype where the installed FlashInfer is older than 0.2.9, whose
    wrapper takes one dtype.
    """
    levels = cascade.levels
    if window_tokens is not None and len(levels) > 1:
        raise SpecError(
            f"window_tokens: got {window_tokens} with {len(levels)} levels; the wrapper masks each level by its own "
            "end: use prefill_plan, or make the cascade with max_levels=1"
        )
    common = _common(num_query_heads, num_kv_heads, head_dim, dtype, kv_dtype, scale)
    if common["kv_data_type"] == dtype:
        del common["kv_data_type"]  # the default; before 0.2.9 there is no such keyword
    else:
        _check_cascade_dtype(dtype, common["kv_data_type"], installed("flashinfer-python"))
    return {
        "qo_indptr_arr": [level.qo_indptr_cpu for level in levels],
        "paged_kv_indptr_arr": [level.kv_indptr_cpu for level in levels],
        "paged_kv_indices_arr": [level.kv_indices for level in levels],
        "paged_kv_last_page_len": [level.kv_last_page_len_cpu for level in levels],
        "head_dim": head_dim,
        "page_size": cascade.block_size,
        "causal": causal,
        "window_left": window_left(cascade, window_tokens, causal),
        **common,
    }


def append_args(batch: GroupBatch) -> dict[str, Any]:
    """For ``append_paged_kv_cache(k, v, paged_kv_cache=cache_of(*alloc.kv(layer)), **append_args(batch))``, with k and
    v ``[T, H, D]`` in the cache's dtype: it converts nothing (``write.to_cache_dtype`` does, for 8 bits too).

    Everything stays on the device. A padding row has the null block in ``kv_indices``, where all later batches expect
    zeroes; an append goes to the padding block, the next id, instead.
    """
    return {
        "batch_indices": batch.batch_indices,
        "positions": batch.positions,
        "kv_indices": batch.kv_indices.clamp(min=1),
        "kv_indptr": batch.kv_indptr,
        "kv_last_page_len": batch.kv_last_page_len,
        "kv_layout": "NHD",
    }


@dataclass(frozen=True)
class Ragged:
    """plan: for ``BatchPrefillWithRaggedKVCacheWrapper.plan``. order, inverse: int64 ``[T]`` on the batch's device,
    since the kernel takes rows in ascending order::

        wrapper.plan(**ragged.plan)
        out = wrapper.run(q[ragged.order], *ragged_cache_of(*alloc.kv(layer)))[ragged.inverse]
    """

    plan: dict[str, Any]
    order: torch.Tensor
    inverse: torch.Tensor


def ragged_plan(
    batch: GroupBatch, *, num_query_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype,
    kv_dtype: torch.dtype | None = None, scale: float | None = None, window_tokens: int | None = None,
    causal: bool = True,
) -> Ragged:  # fmt: skip
    """For the ragged wrapper over rows with gaps between them, on the virtual backend.

    Its KV lengths are differences of ``kv_indptr``, so the gap behind each row is a filler request with no queries: row
    i is request 2 i. A sliding window starts at the first token still held. ``SpecError`` on the paged backend, for
    more than one padding row, since all have one address, and for tokens past 2**31.
    """
    device = rows_of(batch, "the ragged wrapper")[0].device
    first = batch.first_tokens_cpu.tolist()
    lengths, row_starts = batch.seq_lens_cpu.tolist(), host(batch, "row_starts").tolist()
    cu_q = batch.cu_seqlens_q_cpu.tolist()
    rows = sorted(range(batch.num_rows), key=lambda i: (row_starts[i], lengths[i]))
    qo_indptr: list[int] = [0]
    kv_indptr: list[int] = []
    order: list[int] = []
    for i in rows:
        # A row that holds nothing has no address of its own: it begins where the row before it ends.
        begin = row_starts[i] + first[i] if lengths[i] else (kv_indptr[-1] if kv_indptr else 0)
        if kv_indptr and begin < kv_indptr[-1]:
            raise SpecError("the ragged wrapper cannot take two padding rows: make the batch without pad_to")
        kv_indptr += [begin, begin + lengths[i] - first[i]]
        tokens = range(cu_q[i], cu_q[i + 1])
        order += tokens
        qo_indptr += [qo_indptr[-1] + len(tokens)] * 2
    if kv_indptr and kv_indptr[-1] >= 2**31:
        raise SpecError(
            f"the ragged wrapper takes int32 and a row of this batch ends at token {kv_indptr[-1]} of all rows: use "
            "prefill_plan, or lower max_sequences, max_tokens or cached_rows"
        )
    # The last row has no gap behind it.
    plan = {
        "qo_indptr": torch.tensor(qo_indptr[:-1] if rows else [0], dtype=torch.int32),
        "kv_indptr": torch.tensor(kv_indptr or [0], dtype=torch.int32),
        "head_dim_qk": head_dim,
        "causal": causal,
        "window_left": window_left(batch, window_tokens, causal),
        **_common(num_query_heads, num_kv_heads, head_dim, dtype, kv_dtype, scale),
    }
    index = torch.tensor(order, dtype=torch.int64)
    return Ragged(plan, index.to(device), index.argsort().to(device))


def ragged_cache_of(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of ``Allocator.kv(layer)`` as ``[tokens, H, D]``, views, for the ragged ``run()``.

    ``SpecError`` if the last token lies 2**32 elements or more from the first: fa2 ragged multiplies token index and
    stride in 32 bits and would read elsewhere. The paged wrappers reach everything.
    """
    k, v = (flat_tokens(t) for t in check_cache(k, v))
    span = k.shape[0] * k.stride(0)
    if span > STRIDE_LIMIT:
        raise SpecError(
            f"the ragged wrapper addresses {STRIDE_LIMIT} elements; this cache spans {span}: use prefill_plan, or "
            "lower interleave or max_sequences"
        )
    return k, v


def _check_cascade_dtype(dtype: torch.dtype, kv_dtype: torch.dtype, version: tuple[int, ...] | None) -> None:
    if version is not None and version < (0, 2, 9):
        raise SpecError(
            f"kv_dtype: got {kv_dtype} with queries of {dtype}; the cascade wrapper of the FlashInfer that is "
            "installed takes one dtype for both: install 0.2.9 or newer, or use prefill_plan"
        )


def _common(
    num_query_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, kv_dtype: torch.dtype | None,
    scale: float | None,
) -> dict[str, Any]:  # fmt: skip
    if num_kv_heads < 1 or num_query_heads % num_kv_heads:
        raise SpecError(f"num_query_heads: got {num_query_heads}; must be a multiple of num_kv_heads, {num_kv_heads}")
    return {
        "num_qo_heads": num_query_heads,
        "num_kv_heads": num_kv_heads,
        "sm_scale": head_dim**-0.5 if scale is None else scale,
        "q_data_type": dtype,
        "kv_data_type": dtype if kv_dtype is None else kv_dtype,
    }


# ---- How they are run ------------------------------------------------------------------------------------------------


def prepare_decode(library: Any, step: Step, *, tensor_cores: bool = False) -> Run:
    options = {"backend": "fa2"} if tensor_cores else {}
    make = library.BatchDecodeWithPagedKVCacheWrapper
    wrapper = make(step.open_workspace(), "NHD", use_tensor_cores=tensor_cores, **options)
    wrapper.plan(**decode_plan(step.batch, **step.heads, window_tokens=step.window_tokens))
    return _runner(wrapper, step, return_lse=step.return_lse)


def prepare_prefill(library: Any, step: Step, *, backend: str = "fa2") -> Run:
    """backend: FlashInfer's "auto" takes fa3 on Hopper, which compiles for minutes."""
    wrapper = library.BatchPrefillWithPagedKVCacheWrapper(step.open_workspace(), "NHD", backend=backend)
    wrapper.plan(**prefill_plan(step.batch, **step.heads, window_tokens=step.window_tokens))
    return _runner(wrapper, step, return_lse=step.return_lse)


def prepare_batch_attention(library: Any, step: Step) -> Run:
    wrapper = library.BatchAttention("NHD", str(step.device))
    wrapper.plan(**batch_attention_plan(step.batch, **step.heads))
    return _runner(wrapper, step)


def prepare_cascade(library: Any, step: Step) -> Run:
    assert step.cascade is not None
    wrapper = library.MultiLevelCascadeAttentionWrapper(len(step.cascade.levels), step.open_workspace(), "NHD")
    wrapper.plan(**cascade_plan(step.cascade, **step.heads))
    return lambda q, cache: (wrapper.run(q, cache_of(*cache)), None)


def prepare_ragged(library: Any, step: Step, *, backend: str = "fa2") -> Run:
    ragged = ragged_plan(step.batch, **step.heads, window_tokens=step.window_tokens)
    wrapper = library.BatchPrefillWithRaggedKVCacheWrapper(step.open_workspace(), "NHD", backend=backend)
    wrapper.plan(**ragged.plan)

    def run(q: torch.Tensor, cache: Cache) -> Result:
        out, lse = wrapper.run(q[ragged.order], *ragged_cache_of(*cache), return_lse=True)
        return out[ragged.inverse], natural_lse(lse)[ragged.inverse]

    return run


def prepare_append(library: Any, step: Step) -> Run:
    args = append_args(step.batch)

    def run(kv: torch.Tensor, cache: Cache) -> Result:
        k, v = (to_cache_dtype(new, step.kv_dtype) for new in kv.unbind())
        library.append_paged_kv_cache(k, v, paged_kv_cache=cache_of(*cache), **args)
        return kv, None

    return run


def _runner(wrapper: Any, step: Step, **options: bool) -> Run:
    def run(q: torch.Tensor, cache: Cache) -> Result:
        found = wrapper.run(q, cache_of(*cache), **options, **(step.scales or {}))
        return (found[0], natural_lse(found[1])) if isinstance(found, tuple) else (found, None)

    return run
