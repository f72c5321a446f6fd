"""Dense attention over blocks on the CPU: the one place that chooses how it is computed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from kvmem import _core
from kvmem.kernels import cpu
from kvmem.kernels.checks import as_bytes
from kvmem.layouts.attention import Partial, attend_tile, compute_dtype

__all__ = ["attend_blocks", "tokens_of"]


def attend_blocks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, lengths: Sequence[int],
    counts: Sequence[int], *, causal: bool,
) -> Partial:  # fmt: skip
    """Return ``(out, lse)``: out ``[T, query heads, width of V]`` in q's dtype, lse ``[T, query heads]`` in float32, or
    float64 for queries in float64. By ``csrc/attend`` where it has a kernel for the dtypes, else in torch.

    q: ``[T, query heads, width]``, ``counts[i]`` of row i. k, v: ``[blocks, block_size, KV heads, width]``, any
    strides. table: the blocks of each row, int ``[rows, blocks of a row]``. lengths: tokens of each row.
    causal: the queries are the newest tokens of their row; else each sees all of it.
    """
    out = torch.zeros(*q.shape[:2], v.shape[3], dtype=q.dtype)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=compute_dtype(q))
    if q.dtype in cpu.DTYPES[:3] and k.dtype in cpu.DTYPES and k.dtype == v.dtype:
        numbers = (torch.tensor(x, dtype=torch.int32) for x in (lengths, [0] * len(lengths), [0, *accumulate(counts)]))
        work = _core.Attention(
            table.to(torch.int32).contiguous(), *numbers, block_size=k.shape[1], query_heads=q.shape[1],
            heads=k.shape[2], width=k.shape[3], value_width=v.shape[3], query=cpu.dtype_name(q.dtype),
            stored=cpu.dtype_name(k.dtype), scale=k.shape[3] ** -0.5, causal=causal,
        )  # fmt: skip
        dense = q if q.stride(2) == 1 else q.contiguous()
        q_at, k_at, v_at, out_at = map(cpu.described, (dense, k, v, out))
        work.run(q_at, k_at, v_at, out_at, lse.data_ptr(), torch.get_num_threads())
        return out, lse
    begin = 0
    for blocks, length, count in zip(table, lengths, counts, strict=True):
        if length and count:
            mine, place = slice(begin, begin + count), tokens_of(blocks, length, k.shape[1])
            keys, values = (as_bytes(x)[place].view(x.dtype) for x in (k, v))
            out[mine], lse[mine] = attend_tile(q[mine], keys, values, first=0, length=length, causal=causal)
        begin += count
    return out, lse


def tokens_of(blocks: torch.Tensor, length: int, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the block and the place in it of each of a row's tokens, int64 ``[length]`` each."""
    tokens = torch.arange(length)
    return blocks.long()[tokens // block_size], tokens % block_size
