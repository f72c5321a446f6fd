"""What FlashInfer's MLA wrapper, ``flashinfer.mla.BatchMLAPagedAttentionWrapper``, is to be called with.

Its kernels read the latent and the rotary key of a token as they are stored. The matrices that would make K and V of
them are absorbed into the queries and the output: one KV head, whose K is ``[ckv, kpe]`` and whose V is ``ckv``::

    shape = {"num_heads": 128, "head_dim_ckv": 512, "head_dim_kpe": 64, "scale": 192**-0.5, "dtype": torch.bfloat16}
    wrapper.plan(**mla_plan(batch, **shape, wrapper=wrapper, return_lse=True))
    cache = mla_cache_of(alloc.tensor(layer, "ckv"), alloc.tensor(layer, "kpe"))
    out, lse = wrapper.run(**mla_run(q_nope, q_pe, cache, wrapper=wrapper, return_lse=True))

Read against 0.2.5 to 0.7.4. From 0.7.0 on ``plan()`` takes its tensors as ``MLAPlanMetadata`` and whether ``run()``
will return the lse, and ``run()`` takes its tensors in pairs. The older form, the only one of older versions, still
works there with a deprecation warning; ``wrapper=`` selects the form of its version. This is for the backends fa2 and
fa3, which read CSR. The lse is a base-2 logarithm: ``flashinfer.natural_lse``.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from kvmem.allocator.batch import GroupBatch
from kvmem.allocator.cascade import Cascade, CascadeLevel
from kvmem.errors import SpecError
from kvmem.kernels.base import Cache, Result, Run, Step
from kvmem.kernels.checks import STRIDE_LIMIT, check_no_window, check_strides, host, plain
from kvmem.kernels.flashinfer import natural_lse
from kvmem.kernels.versions import installed, takes

__all__ = ["mla_cache_of", "mla_cascade_plans", "mla_plan", "mla_run", "prepare_mla"]


def mla_plan(
    batch: GroupBatch, *, num_heads: int, head_dim_ckv: int, head_dim_kpe: int, scale: float, dtype: torch.dtype,
    kv_dtype: torch.dtype | None = None, causal: bool = True, wrapper: Any = None, return_lse: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """For ``BatchMLAPagedAttentionWrapper.plan``: any number of new tokens per row.

    num_heads: of the queries. head_dim_ckv, head_dim_kpe: widths of latent and rotary key. scale: of the heads before
    absorption, so it has no default (DeepSeek: ``(128 + 64) ** -0.5``, times what its rotary scaling adds). dtype,
    kv_dtype: of queries and cache, the same by default. wrapper: the wrapper, or its class, for the form of its
    version; without it the oldest form, which all take. return_lse: what ``run()`` will be given. ``SpecError`` for a
    batch with a sliding window, which the kernels do not have.
    """
    check_no_window(batch, "the MLA kernels have")
    tensors = {
        "qo_indptr": host(batch, "cu_seqlens_q"),
        "kv_indptr": host(batch, "kv_indptr"),
        "kv_indices": batch.kv_indices,
        "kv_len_arr": host(batch, "seq_lens"),
    }
    return {
        **_metadata(tensors, wrapper, return_lse),
        "page_size": batch.block_size,
        "causal": causal,
        **_common(num_heads, head_dim_ckv, head_dim_kpe, scale, dtype, kv_dtype),
    }


def mla_cascade_plans(
    cascade: Cascade, *, num_heads: int, head_dim_ckv: int, head_dim_kpe: int, scale: float, dtype: torch.dtype,
    kv_dtype: torch.dtype | None = None, causal: bool = True, wrapper: Any = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One plan for each level, since FlashInfer has no cascade for MLA: run a wrapper for each with the same queries
    and ``return_lse=True``, and join their ``(out, natural_lse(lse))`` by ``merge.merge_levels``. Arguments as for
    ``mla_plan``; wrapper: one of them, or their class.
    """
    check_no_window(cascade, "the MLA kernels have")
    return [
        {
            **_metadata(_tensors_of(level), wrapper, return_lse=True),
            "page_size": cascade.block_size,
            "causal": causal and level is cascade.levels[-1],
            **_common(num_heads, head_dim_ckv, head_dim_kpe, scale, dtype, kv_dtype),
        }
        for level in cascade.levels
    ]


def mla_run(
    q_nope: torch.Tensor, q_pe: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor], *, wrapper: Any = None,
    return_lse: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """For ``BatchMLAPagedAttentionWrapper.run``: everything by name, in pairs where the version takes pairs.

    q_nope, q_pe: ``[T, Hq, head_dim_ckv]`` and ``[T, Hq, head_dim_kpe]``. cache: ``mla_cache_of(...)``. wrapper,
    return_lse: as for ``mla_plan``.
    """
    if _wants(wrapper, "run", "query"):
        return {"query": (q_nope, q_pe), "kv_cache": cache, "return_lse": return_lse}
    ckv, kpe = cache
    return {"q_nope": q_nope, "q_pe": q_pe, "ckv_cache": ckv, "kpe_cache": kpe, "return_lse": return_lse}


def mla_cache_of(ckv: torch.Tensor, kpe: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``[num_blocks, block_size, width]`` each, views, for ``run()``: the blocks that both have.

    ckv, kpe: ``Allocator.tensor(layer, "ckv")`` and ``"kpe"``, ``[num_blocks, block_size, 1, width]`` of one dtype.
    Their strides may differ, and so may their ends, where each has a range of its own (``interleave="none"``).
    ``SpecError`` for any other shape; and with FlashInfer before 0.6.11 if the last block begins 2**32 elements or more
    from the first.
    """
    ckv, kpe = plain(ckv), plain(kpe)
    same = ckv.ndim == kpe.ndim == 4 and ckv.shape[1:3] == kpe.shape[1:3] and ckv.dtype == kpe.dtype
    if not same or ckv.shape[2] != 1:
        raise SpecError(
            f"cache: ckv is {tuple(ckv.shape)} {ckv.dtype} and kpe {tuple(kpe.shape)} {kpe.dtype}; MLA kernels take "
            "[num_blocks, block_size, 1, width] with equal blocks, and one dtype"
        )
    count = min(len(ckv), len(kpe))
    ckv, kpe = ckv[:count], kpe[:count]
    for blocks in (ckv, kpe):
        check_strides(blocks)
        _check_reach(blocks, installed("flashinfer-python"))
    return ckv.squeeze(2), kpe.squeeze(2)


def prepare_mla(library: Any, step: Step) -> Run:
    wrapper = library.BatchMLAPagedAttentionWrapper(step.open_workspace(), backend="fa2")
    form = {"wrapper": wrapper, "return_lse": step.return_lse}
    assert step.scale is not None
    plan = mla_plan(
        step.batch, num_heads=step.num_query_heads, head_dim_ckv=step.head_dim, head_dim_kpe=step.head_dim_kpe,
        scale=step.scale, dtype=step.dtype, kv_dtype=step.kv_dtype, **form,
    )  # fmt: skip
    wrapper.plan(**plan)

    def run(q: torch.Tensor, cache: Cache) -> Result:
        nope, pe = q[..., : step.head_dim].contiguous(), q[..., step.head_dim :].contiguous()
        found = wrapper.run(**mla_run(nope, pe, mla_cache_of(*cache), **form))
        return (found[0], natural_lse(found[1])) if step.return_lse else (found, None)

    return run


#: The first release whose kernels multiply a block id and the stride of a block in 64 bits.
_WIDE_SINCE = (0, 6, 11)


def _check_reach(blocks: torch.Tensor, version: tuple[int, ...] | None) -> None:
    reach = (len(blocks) - 1) * blocks.stride(0)
    if version is not None and version < _WIDE_SINCE and reach >= STRIDE_LIMIT:
        raise SpecError(
            f"cache: block {len(blocks) - 1} begins {reach} elements from block 0; the MLA kernels of the FlashInfer "
            f"that is installed reach {STRIDE_LIMIT - 1}: install 0.6.11 or newer, lower interleave, or give less "
            "memory"
        )


def _tensors_of(level: CascadeLevel) -> dict[str, torch.Tensor]:
    return {
        "qo_indptr": level.qo_indptr_cpu,
        "kv_indptr": level.kv_indptr_cpu,
        "kv_indices": level.kv_indices,
        "kv_len_arr": level.kv_lens_cpu,
    }


def _metadata(tensors: dict[str, torch.Tensor], wrapper: Any, return_lse: bool) -> dict[str, Any]:
    """The tensors that say which tokens belong to which row, in the form of the version of ``wrapper``."""
    if not _wants(wrapper, "plan", "metadata"):
        return {**tensors}
    layouts = {"query_layout": "split", "kv_cache_layout": "split"}
    metadata = _metadata_class(_class_of(wrapper)).csr(**tensors)
    return {"metadata": metadata, **layouts, "lse_mode": "base2" if return_lse else "none"}


def _wants(wrapper: Any, method: str, keyword: str) -> bool:
    """Whether the version of ``wrapper`` has the newer form of ``method``; not where it is None."""
    function = getattr(_class_of(wrapper), method, None)
    if wrapper is not None and function is None:
        raise SpecError(f"wrapper: got {wrapper!r}, which has no {method}(); give a BatchMLAPagedAttentionWrapper")
    return wrapper is not None and takes(function, keyword)


def _class_of(wrapper: Any) -> Any:
    return wrapper if isinstance(wrapper, type) else type(wrapper)


def _metadata_class(wrapper: type) -> Any:
    """``MLAPlanMetadata`` from the module of the wrapper's class, which is loaded, or of one that it inherits from."""
    for one in wrapper.__mro__:
        found = getattr(sys.modules.get(one.__module__), "MLAPlanMetadata", None)
        if found is not None:
            return found
    raise SpecError(
        f"wrapper: got {wrapper.__module__}.{wrapper.__qualname__}, whose plan() takes metadata=, but its module has "
        "no MLAPlanMetadata: give flashinfer.mla.BatchMLAPagedAttentionWrapper, or no wrapper"
    )


def _common(
    num_heads: int, head_dim_ckv: int, head_dim_kpe: int, scale: float, dtype: torch.dtype, kv_dtype: torch.dtype | None
) -> dict[str, Any]:  # fmt: skip
    return {
        "num_heads": num_heads,
        "head_dim_ckv": head_dim_ckv,
        "head_dim_kpe": head_dim_kpe,
        "sm_scale": scale,
        "q_data_type": dtype,
        "kv_data_type": dtype if kv_dtype is None else kv_dtype,
    }
