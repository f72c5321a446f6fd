"""The kernels' packages by hand: float64 on a CPU, under the names that the packages have, so that what calls them cannot
tell which it has. A package that needs no GPU is itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import kernel_oracle_flash_attention as flash
import kernel_oracle_flashinfer as flashinfer
import kernel_oracle_flashinfer_mla as mla
import torch

__all__ = ["library_by_hand"]


def _bare(kind: type) -> Callable[..., Any]:
    """Made as the real wrapper is; which of its kernels is asked for makes no difference by hand."""
    return lambda *given, **options: kind()


def _descaled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """FlashAttention 3's 8-bit form: one factor each for Q, K and V, float32 ``[B, H]``, here all the same number."""

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **args: Any) -> Any:
        k_scale, v_scale = (float(args.pop(name, torch.ones(1, 1))[0, 0]) for name in ("k_descale", "v_descale"))
        args.pop("q_descale", None)
        scale = (args.pop("softmax_scale") or q.shape[-1] ** -0.5) * k_scale
        result = kernel(q, k, v, softmax_scale=scale, **args)
        if isinstance(result, torch.Tensor):  # no lse was asked for
            return result * v_scale
        return result[0] * v_scale, *result[1:]

    call.__signature__ = inspect.signature(kernel)  # type: ignore[attr-defined]
    return call


_FLASHINFER = SimpleNamespace(
    BatchDecodeWithPagedKVCacheWrapper=_bare(flashinfer.BatchDecodeWithPagedKVCacheWrapper),
    BatchPrefillWithPagedKVCacheWrapper=_bare(flashinfer.BatchPrefillWithPagedKVCacheWrapper),
    BatchPrefillWithRaggedKVCacheWrapper=_bare(flashinfer.BatchPrefillWithRaggedKVCacheWrapper),
    BatchAttention=_bare(flashinfer.BatchAttention),
    MultiLevelCascadeAttentionWrapper=flashinfer.MultiLevelCascadeAttentionWrapper,
    append_paged_kv_cache=flashinfer.append_paged_kv_cache,
)
_FLASH_3 = SimpleNamespace(
    flash_attn_with_kvcache=_descaled(flash.fa3_with_kvcache), flash_attn_varlen_func=_descaled(flash.fa3_varlen)
)
_LIBRARIES = {
    "flashinfer": _FLASHINFER,
    "flashinfer.mla": SimpleNamespace(BatchMLAPagedAttentionWrapper=mla.NewBatchMLAPagedAttentionWrapper),
    "flash_attn": SimpleNamespace(
        flash_attn_with_kvcache=flash.fa2_with_kvcache, flash_attn_varlen_func=flash.fa2_varlen
    ),
    "fa3_fwd_interface": _FLASH_3,
    "flash_attn_interface": _FLASH_3,
    "flash_attn.cute": SimpleNamespace(flash_attn_varlen_func=flash.fa4_varlen),
    "torch": SimpleNamespace(
        ops=SimpleNamespace(aten=SimpleNamespace(_flash_attention_forward=flash.flash_op)),
        nn=SimpleNamespace(
            attention=SimpleNamespace(varlen=SimpleNamespace(varlen_attn=flash.varlen_attn, AuxRequest=SimpleNamespace))
        ),
    ),
}


def library_by_hand(package: str) -> Any:
    """The stand-in for ``package``, or ``package`` itself where there is none."""
    return _LIBRARIES.get(package) or import_module(package)
