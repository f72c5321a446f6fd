"""What attention kernels ask of a cache, and checks that say which rule is broken."""

from __future__ import annotations

import torch

from kvmem.allocator.batch import GroupBatch
from kvmem.allocator.cascade import Cascade
from kvmem.arguments import brief, check_size
from kvmem.errors import SpecError
from kvmem.geometry.views import plain
from kvmem.kernels.base import Form

__all__ = [
    "all_tokens", "as_bytes", "as_int32", "check_all_blocks", "check_batch", "check_block_multiple",
    "check_by_head", "check_cache", "check_heads", "check_new", "check_no_window", "check_queries", "check_strides",
    "flat_tokens", "form_of", "heads_first", "host", "plain", "row_spans", "rows_of", "window_left",
]  # fmt: skip

#: Kernels keep strides in uint32 (FlashInfer's ``paged_kv_t``).
STRIDE_LIMIT = 2**32
#: FlashAttention 2 refuses pages of any other size.
FA2_BLOCK_TOKENS = 256


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """8-bit floats as uint8, the same memory; others as they are. For indexing, which not every torch can do in 8-bit
    floats on every device.
    """
    tensor = plain(tensor)
    eight_bits = tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1
    return tensor.view(torch.uint8) if eight_bits else tensor


def heads_first(blocks: torch.Tensor) -> bool:
    """Whether ``[num_blocks, block_size, H, W]`` is a transposed view of head-major blocks."""
    return blocks.ndim == 4 and blocks.shape[2] > 1 and blocks.stride(1) < blocks.stride(2)


def flat_tokens(blocks: torch.Tensor) -> torch.Tensor:
    """``[num_blocks, block_size, H, W]`` as ``[num_blocks * block_size, H, W]``, a view: index t is what
    ``slot_mapping`` holds. ``SpecError`` for head-major blocks, of which there is no such view.
    """
    blocks = plain(blocks)
    if heads_first(blocks):
        raise SpecError("cache: its blocks are head-major, and this reads tokens that lie one after the other")
    num_blocks, block_size, heads, width = blocks.shape
    return blocks.view(num_blocks * block_size, heads, width)


def all_tokens(blocks: torch.Tensor) -> torch.Tensor:
    """As ``flat_tokens``, but with every token that addresses are reserved for, mapped now or not. For what a captured
    graph keeps: torch checks indices against the length that a tensor had at capture, and rows grow past it.
    """
    flat = flat_tokens(blocks)
    held = flat.untyped_storage().nbytes() // flat.dtype.itemsize - flat.storage_offset()
    tokens = (held - flat.shape[1] * flat.shape[2]) // flat.stride(0) + 1
    return flat.as_strided((max(tokens, len(flat)), *flat.shape[1:]), flat.stride())


def check_cache(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V as plain tensors; ``SpecError`` if they break what paged kernels rely on. What ``Allocator.kv()`` gives
    passes whenever K and V have the same heads, width and dtype.
    """
    k, v = plain(k), plain(v)
    if k.ndim != 4 or k.shape != v.shape or k.dtype != v.dtype:
        raise SpecError(
            f"cache: K is {tuple(k.shape)} {k.dtype} and V {tuple(v.shape)} {v.dtype}; kernels take one shape and "
            "dtype for both, [num_blocks, block_size, heads, width]"
        )
    if k.stride() != v.stride():
        raise SpecError(
            f"cache: K has strides {k.stride()} and V {v.stride()}; append and CUDA-core decode take equal strides only"
        )
    check_strides(k)
    return k, v


def check_by_head(
    cache: object, heads: int, block_size: int, width: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of head-major blocks as plain tensors; ``SpecError`` unless each is ``[num_blocks, heads, block_size,
    width]`` of that dtype in memory of the CPU, with equal strides and the last two dimensions dense.
    """
    check_all_blocks(cache, "alloc.kv_by_head(layer)")
    k, v = (plain(part) for part in cache)  # type: ignore[attr-defined]
    expected = (heads, block_size, width)
    if tuple(k.shape[1:]) != expected or tuple(v.shape[1:]) != expected or {k.dtype, v.dtype} != {dtype}:
        raise SpecError(
            f"cache: K is {tuple(k.shape)} {k.dtype} and V {tuple(v.shape)} {v.dtype}; must be [num_blocks, heads, "
            f"block_size, width] = [num_blocks, {heads}, {block_size}, {width}] of {dtype}: alloc.kv_by_head(layer)"
        )
    if k.stride() != v.stride() or k.stride()[2:] != (width, 1) or not k.is_cpu:
        raise SpecError(
            f"cache: K has strides {k.stride()} and V {v.stride()}, on {k.device}; the kernel takes equal ones with "
            "dense blocks of a head, in memory of the CPU: alloc.kv_by_head(layer)"
        )
    return k, v


def check_strides(blocks: torch.Tensor) -> None:
    """``SpecError`` unless the last dimension is dense and each stride fits 32 bits."""
    strides = blocks.stride()
    if strides[-1] != 1:
        raise SpecError(f"cache: the last dimension has stride {strides[-1]}; it must be dense (stride 1)")
    if min(strides) < 1 or max(strides) >= STRIDE_LIMIT:
        raise SpecError(
            f"cache: strides {strides} in elements; kernels keep them in 32 bits, so each must be 1 to 2**32 - 1: "
            "lower block_size or interleave"
        )


def host(batch: GroupBatch, field: str) -> torch.Tensor:
    """A field of the batch on the CPU, as a copy of its own.

    A kernel's ``plan()`` uploads what it is given without waiting. From the batch's own pinned buffer, that upload
    could run after the next step has refilled it; from ordinary memory, torch stages it before it returns.
    """
    tensor: torch.Tensor = getattr(batch, f"{field}_cpu")
    return tensor.clone()


def as_int32(tensor: torch.Tensor, field: str, kernel: str) -> torch.Tensor:
    """``tensor`` as it is; ``SpecError`` for one that is int64 since int32 might not do."""
    if tensor.dtype != torch.int32:
        raise SpecError(
            f"{field}: {kernel} takes int32, and this batch may pass {2**31 - 1} tokens there, so that it is int64: "
            "use block tables or FlashInfer's paged kernels, or lower max_sequences, max_tokens or cached_rows"
        )
    return tensor


def rows_of(batch: GroupBatch, why: str) -> tuple[torch.Tensor, torch.Tensor]:
    """``rows`` [B] and ``row_starts`` [B + 1], int32 or int64; ``SpecError`` where sequences are not contiguous (paged
    backend).
    """
    if batch.rows is None or batch.row_starts is None:
        raise SpecError(
            f'{why} reads contiguous sequences; the paged backend has none: use a paged kernel, or backend="virtual"'
        )
    return batch.rows, batch.row_starts


def row_spans(batch: GroupBatch, window_tokens: int | None, kernel: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each row's tokens start, int32 ``[B + 1]`` (the last entry closes the list), and how many there are, int32
    ``[B]``.

    With a sliding window they start at the first token still held: causal masks count from the end, so leaving out what
    no query sees changes nothing, and a kernel that loads whole tiles cannot touch what was dropped. ``SpecError``
    where the rows have 2**31 tokens or more. Below that no start plus what was dropped can pass it, since a sequence
    ends within its row.
    """
    starts = as_int32(rows_of(batch, kernel)[1], "row_starts", kernel)
    if window_tokens is None:
        return starts, batch.seq_lens
    dropped = torch.cat([batch.first_tokens, batch.first_tokens.new_zeros(1)])
    return starts + dropped, batch.seq_lens - batch.first_tokens


def form_of(batch: GroupBatch, form: Form | None) -> Form:
    """``form``, or by default rows where there are any; ``SpecError`` for what is neither form."""
    if form not in (None, "rows", "blocks"):
        raise SpecError(f'form: got {form!r}; must be "rows", "blocks" or None')
    return form or ("blocks" if batch.rows is None else "rows")


def check_block_multiple(batch: GroupBatch, kernel: str) -> None:
    """``SpecError`` unless blocks are as FlashAttention 2, in whichever package, takes them."""
    if batch.block_size % FA2_BLOCK_TOKENS:
        raise SpecError(
            f"block_size: got {batch.block_size}; {kernel} takes block tables of blocks of a multiple of "
            f'{FA2_BLOCK_TOKENS} tokens only: use that, rows (backend="virtual"), or FlashInfer'
        )


def check_no_window(batch: GroupBatch | Cascade, kernel: str, instead: str = "") -> None:
    """``SpecError`` if a sliding window has dropped tokens of the batch, which ``kernel`` could not leave out."""
    if batch.drops_tokens:
        raise SpecError(f"{kernel} no sliding window, and one has dropped tokens of this batch{instead}")


def check_batch(batch: object) -> None:
    """``SpecError`` for what is no batch, ``StaleHandle`` for one whose sequences are not what they were."""
    if isinstance(batch, GroupBatch):
        batch.check_current()
    elif not hasattr(batch, "drops_tokens"):  # a cascade has it, and so has another manager's batch
        raise SpecError(f"batch: got {batch!r:.200}; kernels take the batch of a step: alloc.batch([seq])")


def check_all_blocks(cache: object, call: str = "alloc.kv(layer)") -> None:
    """``SpecError`` for what is not K and V of all blocks, four dimensions each. call: what gives them."""
    parts = cache if isinstance(cache, (tuple, list)) else [cache]
    if len(parts) == 2 and all(isinstance(part, torch.Tensor) and part.ndim == 4 for part in parts):
        return
    got = [tuple(part.shape) if isinstance(part, torch.Tensor) else type(part).__name__ for part in parts]
    raise SpecError(
        f"cache: got {got}; must be {call}, K and V of all blocks; seq.kv(layer) is for attention without a batch"
    )


def check_heads(num_query_heads: object, num_kv_heads: object, head_dim: object) -> None:
    """``SpecError`` unless all are integers of 1 or more, and the query heads a multiple of the cache's."""
    queries, heads = check_size("num_query_heads", num_query_heads), check_size("num_kv_heads", num_kv_heads)
    check_size("head_dim", head_dim)
    if queries % heads:
        raise SpecError(f"num_query_heads: got {queries}; must be a multiple of num_kv_heads, {heads}")


def check_new(name: str, values: object, shape: tuple[int, ...]) -> None:
    """``SpecError`` unless ``values`` is a tensor of that shape in memory of the CPU."""
    if not isinstance(values, torch.Tensor) or not values.is_cpu:
        got = f"a tensor on {values.device}" if isinstance(values, torch.Tensor) else type(values).__name__
        raise SpecError(f"{name}: got {got}; must be a tensor in memory of the CPU")
    if tuple(values.shape) != shape:
        raise SpecError(f"{name}: got shape {tuple(values.shape)}; the batch and the cache make it {shape}")


def check_queries(q: object) -> None:
    """``SpecError`` for what is not a tensor of floats, ``[T, query heads, width]``."""
    if not isinstance(q, torch.Tensor) or q.ndim != 3 or not q.is_floating_point():
        got = f"{tuple(q.shape)} of {q.dtype}" if isinstance(q, torch.Tensor) else brief(q)
        raise SpecError(f"q: got {got}; must be floats, [new tokens, query heads, width]")


def window_left(batch: GroupBatch | Cascade, window_tokens: int | None, causal: bool) -> int:
    """How many tokens before its own a query sees: ``window_tokens - 1``, or -1 for all of them.

    ``SpecError`` if the batch has dropped tokens and no window is given: the kernel would read what is not there;
    ``StaleHandle`` if the batch is no longer current.
    """
    check_batch(batch)
    if window_tokens is None:
        if batch.drops_tokens:
            raise SpecError("window_tokens: got None, but a window has dropped tokens of this batch; give the group's")
        return -1
    if window_tokens < 1 or not causal:
        raise SpecError(f"window_tokens: got {window_tokens}, causal={causal}; a window is 1 token or more, and causal")
    return window_tokens - 1
