"""What FlashAttention 2 and 3 are to be called with. Lengths and tables stay on the device; no host copy is needed.

Read against flash-attn 2.6.1 to 2.8.3, the hopper folder (version 3) of 2.8.0 to 2.8.3, and fa3-fwd 0.0.1 to 0.0.3.

There are two forms. ``"rows"`` (virtual backend): the cache is the rows, ``alloc.rows(layer, "k")`` and ``"v"``, and a
row is chosen by its number; functions that take no such number read the same rows as ``checks.flat_tokens(...)`` of
``alloc.kv``. ``"blocks"`` (both backends): the cache is ``alloc.kv(layer)`` with a block table. The default is rows
where there are any.

Arguments that all makers take: batch, of the group that is read. scale: of the scores, default ``D ** -0.5``. causal:
the mask is aligned to the end of a row. window_tokens: tokens that a query sees, itself included; needed where a window
has dropped tokens. return_lse: whether the lse is returned too. They return keyword arguments, int32 tensors of the
batch among them, and raise ``SpecError`` for what the kernel does not take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kvmem.allocator.batch import GroupBatch
from kvmem.errors import SpecError
from kvmem.kernels.base import Cache, Form, Result, Run, Step
from kvmem.kernels.checks import (
    as_int32,
    check_block_multiple,
    flat_tokens,
    form_of,
    plain,
    row_spans,
    rows_of,
    window_left,
)
from kvmem.kernels.versions import takes

__all__ = [
    "fa2_args", "fa2_query", "fa2_varlen_args", "fa3_args", "fa3_fwd_args", "fa3_varlen_args", "natural_lse", "plain",
    "prepare_fa2", "prepare_fa2_varlen", "prepare_fa3", "prepare_fa3_varlen",
]  # fmt: skip


def fa2_query(q: torch.Tensor, batch: GroupBatch) -> torch.Tensor:
    """Packed ``[T, Hq, D]`` as the ``[B, T / B, Hq, D]`` that FlashAttention 2 takes, a view; its output becomes packed
    by ``flatten(0, 1)``. ``SpecError`` unless every row has equally many new tokens.
    """
    if batch.num_new_tokens != batch.num_rows * batch.max_seqlen_q:
        raise SpecError(
            "FlashAttention 2 with a cache takes equally many new tokens per row; the batch has "
            f"{batch.num_new_tokens} in {batch.num_rows} rows, {batch.max_seqlen_q} in the longest: use "
            "fa2_varlen_args, torch_ops or FlashInfer"
        )
    return q.view(batch.num_rows, batch.max_seqlen_q, *q.shape[1:])


def fa2_args(
    batch: GroupBatch, *, form: Form | None = None, scale: float | None = None, causal: bool = True,
    window_tokens: int | None = None, return_lse: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """For ``flash_attn.flash_attn_with_kvcache(fa2_query(q, batch), k_cache, v_cache, **args)``, version 2.

    The new tokens are in the cache already, so ``k=`` and ``v=`` stay out. Blocks need ``block_size % 256 == 0``.
    """
    form = form_of(batch, form)
    if form == "blocks":
        check_block_multiple(batch, "FlashAttention 2")
    table = {"block_table": batch.block_table} if form == "blocks" else {}
    return {**_with_kvcache(batch, form, scale, causal, window_tokens, return_lse), **table}


def fa2_varlen_args(
    batch: GroupBatch, *, scale: float | None = None, causal: bool = True, window_tokens: int | None = None,
    return_lse: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """For ``flash_attn.flash_attn_varlen_func(q, k, v, **args)``, version 2, over blocks: any numbers of new tokens.

    Needs ``block_size % 256 == 0``. Rows go through ``torch_ops``, the same kernel: this function takes no
    ``seqused_k``. With ``return_lse`` it returns ``(out, lse, None)``.
    """
    check_block_multiple(batch, "FlashAttention 2")
    lengths = as_int32(batch.cu_seqlens_k, "cu_seqlens_k", "FlashAttention 2")
    args = _varlen(batch, batch, lengths, scale, causal, window_tokens)
    return {**args, "return_attn_probs": return_lse, "block_table": batch.block_table}


def fa3_args(
    batch: GroupBatch, *, form: Form | None = None, scale: float | None = None, causal: bool = True,
    window_tokens: int | None = None, return_lse: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """For version 3's ``flash_attn_with_kvcache(q, k_cache, v_cache, **args)``: packed queries, blocks of any size.

    With ``return_lse`` it returns ``(out, lse, ...)``.
    """
    form = form_of(batch, form)
    packed = {"cu_seqlens_q": batch.cu_seqlens_q, "max_seqlen_q": batch.max_seqlen_q}
    table = {"page_table": batch.block_table} if form == "blocks" else {}
    return {**_with_kvcache(batch, form, scale, causal, window_tokens, return_lse), **packed, **table}


def fa3_fwd_args(
    batch: GroupBatch, *, dtype: torch.dtype, scale: float | None = None, causal: bool = True, return_lse: bool = False
) -> dict[str, Any]:
    """As ``fa3_args`` over rows, for the wheel ``fa3-fwd`` 0.0.3 (``fa3_fwd_interface``), which was built without fp16,
    sliding windows and the paging that decode needs. dtype: of queries and cache. ``SpecError`` names what is missing.
    """
    if dtype not in (torch.bfloat16, torch.float8_e4m3fn):
        raise SpecError(f"dtype: got {dtype}; fa3-fwd was built for bfloat16 and float8_e4m3fn only")
    if bool(batch.first_tokens_cpu.any()):
        raise SpecError("fa3-fwd was built without sliding windows, and this batch's tokens have been dropped by one")
    return fa3_args(batch, form="rows", scale=scale, causal=causal, return_lse=return_lse)


def fa3_varlen_args(
    batch: GroupBatch, *, scale: float | None = None, causal: bool = True, window_tokens: int | None = None,
    return_lse: bool = False, queries: GroupBatch | None = None, function: Callable[..., Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """For version 3's ``flash_attn_varlen_func(q, k, v, **args)`` over rows, with k and v ``checks.flat_tokens(...)``
    of ``alloc.kv``.

    ``cu_seqlens_k`` says where rows start and ``seqused_k`` how long they are, so rows may have gaps and any order.
    In a captured graph, which keeps how long k and v were, they are ``checks.all_tokens(...)``, and ``max_seqlen_k`` is
    the longest that the graph will see.

    queries: the batch that q is packed by where that is another group's (cross attention, ``causal=False``). function:
    what will be called, for ``SpecError`` with ``return_lse`` where it cannot return the lse, as in the hopper folder
    of flash-attn 2.8.
    """
    starts, lengths = row_spans(batch, window_tokens, "FlashAttention with seqused_k")
    if return_lse and function is not None and not takes(function, "return_attn_probs"):
        raise SpecError(
            "return_lse: got True, but the function given takes no return_attn_probs; use flash_attn_with_kvcache with "
            "fa3_args, which returns the lse, or a newer FlashAttention 3"
        )
    asked = {"return_attn_probs": True} if return_lse else {}
    args = _varlen(batch, queries or batch, starts, scale, causal, window_tokens)
    return {**args, "seqused_k": lengths, **asked}


def natural_lse(lse: torch.Tensor) -> torch.Tensor:
    """``[T, Hq]`` of what FlashAttention returns, ``[B, Hq, T / B]`` or, packed, ``[Hq, T]``: natural already.

    Version 2 returns +inf for rows with nothing to attend to; here that is -inf.
    """
    packed = lse.transpose(1, 2).flatten(0, 1) if lse.ndim == 3 else lse.T
    return packed.masked_fill(packed == torch.inf, -torch.inf)


def _with_kvcache(
    batch: GroupBatch, form: Form, scale: float | None, causal: bool, window_tokens: int | None, return_lse: bool
) -> dict[str, Any]:
    args = {
        "cache_seqlens": batch.seq_lens,
        "softmax_scale": scale,
        "causal": causal,
        "window_size": _window(batch, window_tokens, causal),
        "return_softmax_lse": return_lse,
    }
    if form == "rows":
        args["cache_batch_idx"], _ = rows_of(batch, "cache_batch_idx")
        if window_tokens is not None:  # tiles before the window may be unmapped; a block table has the zero block there
            args["cache_leftpad"] = batch.first_tokens
    return args


def _varlen(
    batch: GroupBatch, packed: GroupBatch, starts: torch.Tensor, scale: float | None, causal: bool,
    window_tokens: int | None,
) -> dict[str, Any]:  # fmt: skip
    return {
        "cu_seqlens_q": packed.cu_seqlens_q,
        "cu_seqlens_k": starts,
        "max_seqlen_q": packed.max_seqlen_q,
        "max_seqlen_k": batch.max_seqlen_k,
        "softmax_scale": scale,
        "causal": causal,
        "window_size": _window(batch, window_tokens, causal),
    }


def _window(batch: GroupBatch, window_tokens: int | None, causal: bool) -> tuple[int, int]:
    left = window_left(batch, window_tokens, causal)
    return (left, 0) if left >= 0 else (-1, -1)


# ---- How they are run ------------------------------------------------------------------------------------------------


def prepare_fa2(library: Any, step: Step, *, form: Form = "blocks") -> Run:
    args = fa2_args(step.batch, form=form, **_how(step))

    def call(q: torch.Tensor, *cache: torch.Tensor) -> Any:
        return library.flash_attn_with_kvcache(fa2_query(q, step.batch), *cache, **args)

    return runner(call, plain, {}, step)


def prepare_fa2_varlen(library: Any, step: Step) -> Run:
    return runner(library.flash_attn_varlen_func, plain, fa2_varlen_args(step.batch, **_how(step)), step)


def prepare_fa3(library: Any, step: Step, *, form: Form = "blocks", built_without: bool = False) -> Run:
    """built_without: the library is fa3-fwd."""
    if built_without:
        args = fa3_fwd_args(step.batch, dtype=step.dtype, scale=step.scale, return_lse=step.return_lse)
    else:
        args = fa3_args(step.batch, form=form, **_how(step))
    return runner(library.flash_attn_with_kvcache, plain, {**args, **_descale(step)}, step)


def prepare_fa3_varlen(library: Any, step: Step) -> Run:
    function = library.flash_attn_varlen_func
    args = fa3_varlen_args(step.batch, function=function, **_how(step))
    return runner(function, flat_tokens, {**args, **_descale(step)}, step)


def runner(
    function: Callable[..., Any], view: Callable[[torch.Tensor], torch.Tensor], args: dict[str, Any], step: Step
) -> Run:
    """``run`` of a function of FlashAttention's, which returns ``out`` or ``(out, lse, ...)``, over ``view`` of K and
    V.
    """

    def run(q: torch.Tensor, cache: Cache) -> Result:
        found = function(q, *map(view, cache), **args)
        out, lse = found[:2] if isinstance(found, (tuple, list)) else (found, None)
        return out.view(*q.shape[:2], -1), natural_lse(lse) if step.return_lse else None

    return run


def _how(step: Step) -> dict[str, Any]:
    return {"scale": step.scale, "window_tokens": step.window_tokens, "return_lse": step.return_lse}


def _descale(step: Step) -> dict[str, torch.Tensor]:
    """FlashAttention 3's factors of an 8-bit cache, float32 ``[B, H]``; queries are not scaled."""
    if not step.scales:
        return {}
    scales = {"q_descale": 1.0, "k_descale": step.scales["k_scale"], "v_descale": step.scales["v_scale"]}
    shape = step.batch.num_rows, step.num_kv_heads
    return {name: torch.full(shape, value, device=step.device) for name, value in scales.items()}
