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
from kvmem.kernels.checks import flat_tokens, plain, window_left
from kvmem.kernels.flash_attention import FA2_BLOCK_TOKENS, natural_lse, row_spans
from kvmem.kernels.versions import takes

__all__ = ["TAIL_GUARD_TOKENS", "attention", "flash_op_args", "natural_lse", "supports", "varlen_args"]

#: Tokens past a sequence's end that the kernel may touch: none, each is fetched under a predicate of the real length.
TAIL_GUARD_TOKENS = {"flash": 0}


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
    q: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor], batch: GroupBatch, *, scale: float | None = None,
    causal: bool = True, window_tokens: int | None = None, queries: GroupBatch | None = None,
    max_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """``(out [T, Hq, D], lse [T, Hq])`` by whichever of the two is there. CUDA, fp16 and bf16 only.

    cache: ``Allocator.kv(layer)``. max_tokens: in a captured graph, the longest that a sequence will be; default the
    longest of the batch, a number that the graph would keep. ``SpecError`` where the paged backend cannot be read:
    block tables need torch 2.12 and ``block_size % 256 == 0``; and for a cache of another dtype than the queries.
    """
    cache = plain(cache[0]), plain(cache[1])
    if cache[0].dtype != q.dtype:
        raise SpecError(
            f"cache: K and V are {cache[0].dtype} and the queries {q.dtype}; torch's flash operator takes one dtype, "
            "fp16 or bf16: use FlashInfer or FlashAttention 3 for a cache of 8 bits"
        )
    if supports("seqused_k") and supports("enable_gqa"):
        from torch.nn.attention.varlen import AuxRequest, varlen_attn

        args = varlen_args(
            batch, scale=scale, causal=causal, window_tokens=window_tokens, queries=queries, max_tokens=max_tokens
        )
        k, v = cache if "block_table" in args else map(flat_tokens, cache)
        out, lse = varlen_attn(q, k, v, return_aux=AuxRequest(lse=True), **args)
    else:
        args = flash_op_args(
            batch, scale=scale, causal=causal, window_tokens=window_tokens, queries=queries, max_tokens=max_tokens
        )
        k, v = map(flat_tokens, cache)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, **args)
    return out, natural_lse(lse)


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
    ``rules.flat_tokens(...)``.

    ``cum_seq_k`` says where rows start and ``seqused_k`` how long they are. Returns ``(out, lse [Hq, T], ...)``.
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
    """For ``varlen_attn(q, k, v, **args)`` of torch 2.12 on: over rows, with k and v ``rules.flat_tokens(...)`` of
    ``alloc.kv``, or where there are none over blocks, with ``alloc.kv`` as it is. Never a copy.
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
    if batch.block_size % FA2_BLOCK_TOKENS:
        raise SpecError(
            f"block_size: got {batch.block_size}; torch's flash operator takes block tables of blocks of a multiple of "
            f'{FA2_BLOCK_TOKENS} tokens only: use that, backend="virtual", or FlashInfer'
        )
    max_k = batch.block_table.shape[1] * batch.block_size
    return {**args, "cu_seq_k": None, "max_k": max_k, "seqused_k": batch.seq_lens, "block_table": batch.block_table}
