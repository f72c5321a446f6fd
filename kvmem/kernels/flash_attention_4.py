"""What FlashAttention 4 (``flash_attn.cute``, the package flash-attn-4) is to be called with.

Read against 4.0.0b3 to 4.0.0b36; what is refused here is what the last of them refuses, and the first follow block
tables on Blackwell only. Lengths and tables stay on the device. The forms ``"rows"`` and ``"blocks"``, the arguments
that are not described here, and ``natural_lse`` are those of ``flash_attention``.
"""

from __future__ import annotations

from typing import Any

import torch

from kvmem.allocator.batch import GroupBatch
from kvmem.errors import SpecError
from kvmem.kernels.base import HALVES, Form, Run, Step
from kvmem.kernels.checks import flat_tokens, form_of, plain, row_spans, window_left
from kvmem.kernels.flash_attention import natural_lse, runner

__all__ = ["fa4_varlen_args", "natural_lse", "plain", "prepare_fa4"]

_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)

#: By the major number of the device's compute capability: the largest head, and (head_dim, head_dim_v) beyond it.
_LARGEST_HEAD = {8: 256, 9: 256, 10: 128, 11: 128, 12: 256}
_MORE_HEADS = {10: ((192, 128), (256, 256)), 11: ((192, 128), (256, 256))}


def fa4_varlen_args(
    batch: GroupBatch, *, head_dim: int, dtype: torch.dtype, head_dim_v: int | None = None, form: Form | None = None,
    scale: float | None = None, causal: bool = True, window_tokens: int | None = None, return_lse: bool = False,
    queries: GroupBatch | None = None, capability: tuple[int, int] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """For version 4's ``flash_attn_varlen_func(q, k, v, **args)`` (``flash_attn.cute``), which has no
    ``flash_attn_with_kvcache``: over rows, with k and v ``checks.flat_tokens(...)`` of ``alloc.kv``, or over blocks of
    any size, with ``alloc.kv`` as it is.

    The function always returns ``(out, lse)``, lse None without ``return_lse``. head_dim: of queries and K; head_dim_v:
    of V, default the same. dtype: of queries, K and V, one for all. queries, and rows in a captured graph: as for
    ``fa3_varlen_args``; blocks need nothing there. capability: of the device, by default the batch's own where it is a
    GPU. ``SpecError`` for sizes of heads, dtypes and devices that it does not take.
    """
    form = form_of(batch, form)
    if capability is None and batch.seq_lens.is_cuda:
        capability = torch.cuda.get_device_capability(batch.seq_lens.device)
    major = capability[0] if capability else None
    _check(major, form, dtype, (head_dim, head_dim_v or head_dim))
    left = window_left(batch, window_tokens, causal)
    packed = queries or batch
    args = {
        "cu_seqlens_q": packed.cu_seqlens_q,
        "max_seqlen_q": packed.max_seqlen_q,
        "softmax_scale": scale,
        "causal": causal,
        "window_size": (left, 0) if left >= 0 else (None, None),
        "return_lse": return_lse,
    }
    if form == "blocks":
        longest = batch.block_table.shape[1] * batch.block_size
        table = {"page_table": batch.block_table, "max_seqlen_k": longest}
        return {**args, **table, "seqused_k": batch.seq_lens}
    starts, lengths = row_spans(batch, window_tokens, "FlashAttention 4")
    return {**args, "cu_seqlens_k": starts, "max_seqlen_k": batch.max_seqlen_k, "seqused_k": lengths}


def prepare_fa4(library: Any, step: Step, *, form: Form = "blocks") -> Run:
    args = fa4_varlen_args(
        step.batch, head_dim=step.head_dim, dtype=step.dtype, form=form, scale=step.scale,
        window_tokens=step.window_tokens, return_lse=step.return_lse,
    )  # fmt: skip
    return runner(library.flash_attn_varlen_func, flat_tokens if form == "rows" else plain, args, step)


def _check(major: int | None, form: str, dtype: torch.dtype, heads: tuple[int, int]) -> None:
    """Its own assertions; some of them would fail in the middle of compiling, without a way out."""
    if major is not None and major not in _LARGEST_HEAD:
        raise SpecError(
            f"capability: got {major}.x; FlashAttention 4 runs on 8.x to 12.x: use reference.sdpa, or FlashInfer"
        )
    if form == "blocks" and major in (8, 12):
        raise SpecError(
            f'form: got "blocks" on a device of compute capability {major}.x, where FlashAttention 4 follows no block '
            'table; it does on 9.x to 11.x: use form="rows" (virtual backend), or FlashInfer'
        )
    _check_dtype(major, dtype)
    _check_heads(major, dtype, heads)


def _check_dtype(major: int | None, dtype: torch.dtype) -> None:
    if dtype not in HALVES + _EIGHT_BITS or (dtype in _EIGHT_BITS and major not in (None, 10)):
        raise SpecError(
            f"dtype: got {dtype}; FlashAttention 4 takes float16 and bfloat16, and on compute capability 10.x "
            "float8_e4m3fn and float8_e5m2"
        )


def _check_heads(major: int | None, dtype: torch.dtype, heads: tuple[int, int]) -> None:
    step = 16 // dtype.itemsize  # copies are of 16 bytes
    largest = 256 if major is None else _LARGEST_HEAD[major]
    more = _MORE_HEADS.get(major, ()) if major is not None else ()
    fits = all(8 <= width <= largest and width % step == 0 for width in heads)
    if not fits and heads not in more:
        where = "" if major is None else f" on compute capability {major}.x"
        also = "".join(f", or ({k}, {v})" for k, v in more)
        raise SpecError(
            f"head_dim, head_dim_v: got {heads}; FlashAttention 4 takes 8 to {largest} each{where}, in steps of {step} "
            f"for {dtype}{also}: use FlashInfer"
        )
