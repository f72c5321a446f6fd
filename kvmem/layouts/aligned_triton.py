"""The two sums of ``aligned`` in Triton (3.6 syntax): a plane is loaded only where the level asks for it."""

# No `from __future__ import annotations`: Triton reads those of its kernels, and real ones need no parsing.

import torch
import triton
import triton.language as tl

__all__ = ["scores", "weighted"]

_KINDS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit  # type: ignore[untyped-decorator]
def _load(high, mid, low, shift, level, here, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Numbers from their three planes. A masked load moves no bytes; levels are those of whole bursts or rows."""
    bits = tl.load(high, mask=here, other=0).to(tl.int32) << 8
    bits |= ((tl.load(mid, mask=here & (level >= 1), other=0).to(tl.int32) >> shift) & 15) << 4
    bits |= (tl.load(low, mask=here & (level >= 2), other=0).to(tl.int32) >> shift) & 15
    bits |= tl.where(level == 0, 0x80, tl.where(level == 1, 0x08, 0))
    return bits.to(tl.uint16).to(KIND, bitcast=True).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _score_block(  # type: ignore[no-untyped-def]
    out, q, blocks, ids, levels, scale, block_bytes, row_bytes, heads, width, tokens, length,
    NEW: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One block of K of one KV head: channels by tokens. Addresses are int64: a cache is larger than 2^31 bytes."""
    block, head = tl.program_id(0), tl.program_id(1)
    element = tl.arange(0, WIDTH)
    here = (element < width)[:, None]
    channel = head * width + element
    token = tl.arange(0, 64)[None, :]
    bursts = heads * width // 64  # of a row
    row = blocks + tl.load(ids + block) * block_bytes + (channel // bursts * row_bytes)[:, None]
    burst = (channel % bursts)[:, None]
    nibbles = row + heads * width + burst * 32 + token % 32
    level = tl.load(levels + channel, mask=element < width, other=0)[:, None]
    shift = token // 32 * 4
    k = _load(row + burst * 64 + token, nibbles, nibbles + heads * width // 2, shift, level, here, KIND)
    position = block * 64 + tl.arange(0, 64)
    for i in range(NEW * GROUP):
        query, query_head = i // GROUP, head * GROUP + i % GROUP
        at = q + (query * heads * GROUP + query_head) * width + element
        score = tl.sum(tl.load(at, mask=element < width, other=0).to(tl.float32)[:, None] * k, axis=0) * scale
        if CAUSAL:
            score = tl.where(position > length - NEW + query, float("-inf"), score)
        tl.store(out + (query_head * NEW + query).to(tl.int64) * tokens + position, score)


@triton.jit  # type: ignore[untyped-decorator]
def _weigh_block(  # type: ignore[no-untyped-def]
    out, weights, blocks, ids, levels, block_bytes, row_bytes, heads, width, tokens,
    NEW: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One block of V of one KV head: tokens by elements, into a partial sum of its own."""
    block, head = tl.program_id(0), tl.program_id(1)
    element = tl.arange(0, WIDTH)[None, :]
    row = tl.arange(0, 64)
    position = block * 64 + row
    here = (position < tokens)[:, None] & (element < width)
    unit = blocks + tl.load(ids + block) * block_bytes + (row * row_bytes)[:, None]
    half = width // 2
    nibbles = unit + heads * width + head * half + element % half
    level = tl.load(levels + position * heads + head, mask=position < tokens, other=0)[:, None]
    shift = element // half * 4
    v = _load(unit + head * width + element, nibbles, nibbles + heads * half, shift, level, here, KIND)
    for i in range(NEW * GROUP):
        line = (head * GROUP + i % GROUP) * NEW + i // GROUP
        weight = tl.load(weights + line.to(tl.int64) * tokens + position, mask=position < tokens, other=0)
        sums = tl.sum(weight[:, None] * v, axis=0)
        at = out + (block.to(tl.int64) * heads * GROUP * NEW + line) * width + tl.arange(0, WIDTH)
        tl.store(at, sums, mask=tl.arange(0, WIDTH) < width)


def scores(
    q: torch.Tensor, blocks: torch.Tensor, ids: torch.Tensor, levels: torch.Tensor, dtype: torch.dtype, length: int,
    *, scale: float, causal: bool,
) -> torch.Tensor:  # fmt: skip
    """Return the scores of complete blocks of K, float32 ``[query heads, n, 64 * blocks]``, in one launch.

    q: ``[n, query heads, width]``. blocks: K of all blocks, bytes ``[num_blocks, 64, 1, row bytes]``; ids: int64, those
    of the sequence. levels: ``[KV heads, width]``. dtype: of K. length: tokens of the sequence, for the causal mask.
    """
    (new, queries, width), heads = q.shape, len(levels)
    out = torch.empty(queries, new, 64 * len(ids), dtype=torch.float32, device=q.device)
    with torch.cuda.device(q.get_device()):  # Triton launches on the current device, which may be another
        _score_block[len(ids), heads](
            out, q.contiguous(), blocks, ids, levels.contiguous(), scale, blocks.stride(0), blocks.stride(1), heads,
            width, 64 * len(ids), length, NEW=new, GROUP=queries // heads, CAUSAL=causal,
            WIDTH=triton.next_power_of_2(width), KIND=_KINDS[dtype],
        )  # fmt: skip
    return out


def weighted(
    weights: torch.Tensor, blocks: torch.Tensor, ids: torch.Tensor, levels: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return the weighted sum of V, float32 ``[n, query heads, width]``: one launch, then the sum over its blocks.

    weights: float32 ``[query heads, n, tokens]``. blocks, ids, dtype: as for ``scores``, of V; the last block may be
    incomplete. levels: ``[tokens, KV heads]``.
    """
    (queries, new, tokens), heads = weights.shape, levels.shape[1]
    width = blocks.shape[-1] // (2 * heads)
    out = torch.empty(len(ids), queries, new, width, dtype=torch.float32, device=weights.device)
    with torch.cuda.device(weights.get_device()):
        _weigh_block[len(ids), heads](
            out, weights.contiguous(), blocks, ids, levels.contiguous(), blocks.stride(0), blocks.stride(1), heads,
            width, tokens, NEW=new, GROUP=queries // heads, WIDTH=triton.next_power_of_2(width), KIND=_KINDS[dtype],
        )  # fmt: skip
    return out.sum(0).transpose(0, 1)
