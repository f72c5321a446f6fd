"""What FlashAttention 2 and 3 are to be called with. Lengths and tables stay on the device; no host copy is needed.

Read against flash-attn 2.6.1 to 2.8.3, the hopper folder (version 3) of 2.8.0 to 2.8.3, and fa3-fwd 0.0.1 to 0.0.3.

Two forms. ``"rows"`` (virtual backend): the cache is the rows, ``alloc.rows(layer, "k")`` and ``"v"``, and a row is
chosen by its number; functions that take no such number read the same rows as ``rules.flat_tokens(...)`` of
``alloc.kv``. ``"blocks"`` (both backends): the cache is ``alloc.kv(layer)`` and a block table. The default is
rows where there are any.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from kvmem.allocator.batch import GroupBatch
from kvmem.errors import SpecError
from kvmem.kernels.checks import as_int32, plain, rows_of, window_left
from kvmem.kernels.versions import takes

__all__ = [
    "TAIL_GUARD_TOKENS", "fa2_args", "fa2_query", "fa2_varlen_args", "fa3_args", "fa3_fwd_args", "fa3_varlen_args",
    "natural_lse", "plain",
]  # fmt: skip

Form = Literal["rows", "blocks"]

#: Tokens past a sequence's end that a kernel may touch, so that must be mapped and finite. FlashAttention 2 fetches
#: each token under a predicate of the real length. FlashAttention 3 loads tiles of 64 to 224 tokens through the TMA
#: unit, whose descriptor knows the tensor but not the length, and computes 0 * V there: NaN if V is not finite
#: (Dao-AILab/flash-attention #1745, #2374).
TAIL_GUARD_TOKENS = {"fa2": 0, "fa3": 256}

#: FlashAttention 2 refuses pages of any other size.
FA2_BLOCK_TOKENS = 256


def fa2_query(q: torch.Tensor, batch: GroupBatch) -> torch.Tensor:
    """Packed ``[T, Hq, D]`` as the ``[B, T / B, Hq, D]`` that FlashAttention 2 takes; its output becomes packed by
    ``flatten(0, 1)``.

    ``SpecError`` unless every row has equally many new tokens.
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
        _check_fa2_blocks(batch)
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
    _check_fa2_blocks(batch)
    return {
        "cu_seqlens_q": batch.cu_seqlens_q,
        "cu_seqlens_k": as_int32(batch.cu_seqlens_k, "cu_seqlens_k", "FlashAttention 2"),
        "max_seqlen_q": batch.max_seqlen_q,
        "max_seqlen_k": batch.max_seqlen_k,
        "softmax_scale": scale,
        "causal": causal,
        "window_size": _window(batch, window_tokens, causal),
        "return_attn_probs": return_lse,
        "block_table": batch.block_table,
    }


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
    sliding windows and the paging that decode needs. ``SpecError`` names what is missing.
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
    """For version 3's ``flash_attn_varlen_func(q, k, v, **args)`` over rows, with k and v ``rules.flat_tokens(...)`` of
    ``alloc.kv``.

    ``cu_seqlens_k`` says where rows start and ``seqused_k`` how long they are, so rows may have gaps and any order.
    In a captured graph, which keeps how long k and v were, they are ``rules.all_tokens(...)``, and ``max_seqlen_k`` is
    the longest that the graph will see.
    queries: the batch that q is packed by where that is another group's (cross attention, ``causal=False``).
    function: what will be called, for ``SpecError`` with ``return_lse`` where it cannot be asked for the lse, as in the
    hopper folder of flash-attn 2.8.
    """
    starts, lengths = row_spans(batch, window_tokens, "FlashAttention with seqused_k")
    packed = queries or batch
    if return_lse and function is not None and not takes(function, "return_attn_probs"):
        raise SpecError(
            "return_lse: got True, but the function given takes no return_attn_probs; use flash_attn_with_kvcache with "
            "fa3_args, which returns the lse, or a newer FlashAttention 3"
        )
    asked = {"return_attn_probs": True} if return_lse else {}
    return {
        "cu_seqlens_q": packed.cu_seqlens_q,
        "cu_seqlens_k": starts,
        "max_seqlen_q": packed.max_seqlen_q,
        "max_seqlen_k": batch.max_seqlen_k,
        "seqused_k": lengths,
        "softmax_scale": scale,
        "causal": causal,
        "window_size": _window(batch, window_tokens, causal),
        **asked,
    }


def natural_lse(lse: torch.Tensor) -> torch.Tensor:
    """``[T, Hq]`` of what FlashAttention returns, ``[B, Hq, T / B]`` or, packed, ``[Hq, T]``: natural already.

    Version 2 says +inf for rows with nothing to attend to; here that is -inf.
    """
    packed = lse.transpose(1, 2).flatten(0, 1) if lse.ndim == 3 else lse.T
    return packed.masked_fill(packed == torch.inf, -torch.inf)


def row_spans(batch: GroupBatch, window_tokens: int | None, kernel: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each row's tokens start, int32 ``[B + 1]`` (the last entry closes the list), and how many there are, int32
    ``[B]``.

    With a sliding window they start at the first token still held: causal masks count from the end, so leaving out what
    no query sees changes nothing, and a kernel that loads whole tiles cannot touch what was dropped.

    ``SpecError`` where the rows have 2**31 tokens or more: these kernels take int32. Below that no start plus what was
    dropped can pass it, since a sequence ends within its row.
    """
    starts = as_int32(rows_of(batch, kernel)[1], "row_starts", kernel)
    if window_tokens is None:
        return starts, batch.seq_lens
    dropped = torch.cat([batch.first_tokens, batch.first_tokens.new_zeros(1)])
    return starts + dropped, batch.seq_lens - batch.first_tokens


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


def form_of(batch: GroupBatch, form: Form | None) -> Form:
    if form not in (None, "rows", "blocks"):
        raise SpecError(f'form: got {form!r}; must be "rows", "blocks" or None')
    return form or ("blocks" if batch.rows is None else "rows")


def _check_fa2_blocks(batch: GroupBatch) -> None:
    if batch.block_size % FA2_BLOCK_TOKENS:
        raise SpecError(
            f"block_size: got {batch.block_size}; FlashAttention 2 takes block tables of blocks of a multiple of "
            f"{FA2_BLOCK_TOKENS} tokens only: use that, rows (virtual backend), or FlashInfer"
        )


def _window(batch: GroupBatch, window_tokens: int | None, causal: bool) -> tuple[int, int]:
    left = window_left(batch, window_tokens, causal)
    return (left, 0) if left >= 0 else (-1, -1)
