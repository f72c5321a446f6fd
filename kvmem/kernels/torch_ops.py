"""The FlashAttention 2 that is inside every CUDA build of torch.

torch 2.11 has it as a private operator that can read rows with gaps (``seqused_k``); from 2.12 on it is public,
``torch.nn.attention.varlen.varlen_attn``, and can follow block tables too. Which of them is there is read off the
signatures.
"""

from __future__ import annotations

from typing import Any

import torch

from kvmem.allocator.batch import GroupBatch
from kvmem.errors import SpecError
from kvmem.kernels.base import Cache, Result, Run, Step
from kvmem.kernels.checks import check_block_multiple, flat_tokens, plain, row_spans, window_left
from kvmem.kernels.flash_attention import natural_lse
from kvmem.kernels.versions import takes

__all__ = ["attention", "flash_op_args", "natural_lse", "prepare_attention", "supports", "varlen_args"]


def supports(argument: str) -> bool:
    """Whether this torch's public ``varlen_attn`` takes ``argument``: ``"seqused_k"``, ``"block_table"``,
    ``"enable_gqa"``.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch before 2.10
        return False
    return takes(varlen_attn, argument)


def attention(
    q: torch.Tensor, cache: Cache, batch: GroupBatch, *, scale: float | None = None, causal: bool = True,
    window_tokens: int | None = None, queries: GroupBatch | None = None, max_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """``(out [T, Hq, D], lse [T, Hq])`` by whichever of the two is there, on CUDA.

    q: ``[T, Hq, D]``, fp16 or bf16, packed. cache: ``Allocator.kv(layer)``, of the same dtype. Other arguments: as for
    ``varlen_args``. ``SpecError`` where the paged backend cannot be read, since block tables need torch 2.12 and
    ``block_size % 256 == 0``, and for a cache of another dtype than the queries.
    """
    how = {"scale": scale, "causal": causal, "window_tokens": window_tokens, "queries": queries}
    out, lse = planned(torch, batch, {**how, "max_tokens": max_tokens}, return_lse=True)(q, cache)
    assert lse is not None
    return out, lse


def prepare_attention(library: Any, step: Step) -> Run:
    """library: torch."""
    how = {"scale": step.scale, "window_tokens": step.window_tokens}
    return planned(library, step.batch, how, step.return_lse)


def planned(library: Any, batch: GroupBatch, how: dict[str, Any], return_lse: bool) -> Run:
    """``run(q, cache)`` by whichever of the two operators is there; how: as for ``varlen_args``. library: torch."""
    public = supports("seqused_k") and supports("enable_gqa")
    args = (varlen_args if public else flash_op_args)(batch, **how)
    view = plain if "block_table" in args else flat_tokens

    def run(q: torch.Tensor, cache: Cache) -> Result:
        if cache[0].dtype != q.dtype:
            raise SpecError(
                f"cache: K and V are {cache[0].dtype} and the queries {q.dtype}; torch's flash operator takes one "
                "dtype, fp16 or bf16: use FlashInfer or FlashAttention 3 for a cache of 8 bits"
            )
        k, v = map(view, cache)
        if public:
            varlen = library.nn.attention.varlen
            asked = {"return_aux": varlen.AuxRequest(lse=True)} if return_lse else {}
            found = varlen.varlen_attn(q, k, v, **asked, **args)
            out, lse = found if return_lse else (found, None)
        else:
            out, lse, *_ = library.ops.aten._flash_attention_forward(q, k, v, **args)
        return out, None if lse is None or not return_lse else natural_lse(lse)

    return run


def _longest_query(batch: GroupBatch) -> int:
    """1 tells the operator that each row has one query: it then folds those of a KV head together, counting rows. So a
    batch in which some rows have none must not say so; 2 is as true as a bound.
    """
    return batch.max_seqlen_q if batch.num_new_tokens == batch.num_rows else max(2, batch.max_seqlen_q)


def flash_op_args(
    batch: GroupBatch, *, scale: float | None = None, causal: bool = True, window_tokens: int | None = None,
    queries: GroupBatch | None = None, max_tokens: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """For ``torch.ops.aten._flash_attention_forward(q, k, v, **args)`` over rows, with k and v
    ``checks.flat_tokens(...)``.

    ``cum_seq_k`` says where rows start and ``seqused_k`` how long they are. The operator returns ``(out, lse [Hq, T],
    ...)``. Arguments as for ``varlen_args``.
    """
    if batch.rows is None:
        raise SpecError('block tables need torch 2.12 or newer; with this torch use FlashInfer, or backend="virtual"')
    starts, lengths = row_spans(batch, window_tokens, "torch's flash operator")
    packed = queries or batch
    left = window_left(batch, window_tokens, causal)
    window = {"window_size_left": left, "window_size_right": 0} if left >= 0 else {}
    return {
        "cum_seq_q": packed.cu_seqlens_q,
        "cum_seq_k": starts,
        "max_q": _longest_query(packed),
        "max_k": max_tokens or batch.max_seqlen_k,
        "dropout_p": 0.0,
        "is_causal": causal,
        "return_debug_mask": False,
        "scale": scale,
        "seqused_k": lengths,
        **window,
    }


def varlen_args(
    batch: GroupBatch, *, scale: float | None = None, causal: bool = True, window_tokens: int | None = None,
    queries: GroupBatch | None = None, max_tokens: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """For ``varlen_attn(q, k, v, **args)`` of torch 2.12 on: over rows, with k and v ``checks.flat_tokens(...)`` of
    ``alloc.kv``, or where there are none over blocks, with ``alloc.kv`` as it is. Never a copy.

    batch, scale, causal, window_tokens, queries: as for FlashInfer's plans. max_tokens: in a captured graph, the
    longest that a sequence will be; default the longest of the batch, a number that the graph would hold.
    """
    packed = queries or batch
    left = window_left(batch, window_tokens, causal)
    args = {
        "cu_seq_q": packed.cu_seqlens_q,
        "max_q": _longest_query(packed),
        "scale": scale,
        "window_size": (left, 0 if causal else -1),
        "enable_gqa": True,
    }
    if batch.rows is not None:
        starts, lengths = row_spans(batch, window_tokens, "varlen_attn")
        return {**args, "cu_seq_k": starts, "max_k": max_tokens or batch.max_seqlen_k, "seqused_k": lengths}
    check_block_multiple(batch, "torch's flash operator")
    max_k = batch.block_table.shape[1] * batch.block_size
    return {**args, "cu_seq_k": None, "max_k": max_k, "seqused_k": batch.seq_lens, "block_table": batch.block_table}
