"""The kernels of ``blocks`` in Triton (3.6 syntax). ``blocks`` imports this file when it is first needed."""

# No `from __future__ import annotations`: Triton reads those of its kernels, and real ones need no parsing.

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["copy", "zero"]

#: Words of a token that one program moves: 8 KiB of int64, so that a program has enough loads in flight.
_MOST_WORDS = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _copy_token(  # type: ignore[no-untyped-def]
    read, written, from_ids, to_ids, tokens,
    read_size, read_block, read_token, write_size, write_block, write_token,
    words, STEP: tl.constexpr, FROM_IDS: tl.constexpr, TO_IDS: tl.constexpr,
):  # fmt: skip
    # Offsets are int64 throughout: a cache is larger than 2^31 words.
    i = tl.program_id(0).to(tl.int64)
    source = i
    if FROM_IDS:
        source = tl.load(from_ids + i // tokens).to(tl.int64) * tokens + i % tokens
    target = i
    if TO_IDS:
        target = tl.load(to_ids + i // tokens).to(tl.int64) * tokens + i % tokens
    word = tl.program_id(1) * STEP + tl.arange(0, STEP)
    here = word < words
    at = read + (source // read_size) * read_block + (source % read_size) * read_token
    to = written + (target // write_size) * write_block + (target % write_size) * write_token
    tl.store(to + word, tl.load(at + word, mask=here), mask=here)


@triton.jit  # type: ignore[untyped-decorator]
def _zero_token(written, ids, tokens, block, token, words, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0).to(tl.int64)
    at = written + tl.load(ids + i // tokens).to(tl.int64) * block + (i % tokens) * token
    word = tl.program_id(1) * STEP + tl.arange(0, STEP)
    nothing = tl.zeros([STEP], dtype=written.dtype.element_ty)
    tl.store(at + word, nothing, mask=word < words)


def copy(
    read: torch.Tensor, from_ids: torch.Tensor | None, written: torch.Tensor, to_ids: torch.Tensor | None, n: int,
    tokens: int,
) -> None:  # fmt: skip
    """Copies what ``n`` ids stand for, ``tokens`` tokens each, in one launch: a program for each token.

    read, written: integers, ``[num_blocks, block_size, words]`` or ``[num_tokens, words]``, words dense. Ids count
    tokens (``tokens == 1``) or blocks; None: all, in order.
    """
    words = read.shape[-1]
    with _on_device_of(read):
        step = _step(words)
        _copy_token[n * tokens, triton.cdiv(words, step)](
            # Never read where there are no ids, but a pointer must be given.
            read, written, read if from_ids is None else from_ids, read if to_ids is None else to_ids, tokens,
            *_layout(read), *_layout(written), words,
            STEP=step, FROM_IDS=from_ids is not None, TO_IDS=to_ids is not None,
        )  # fmt: skip


def zero(written: torch.Tensor, ids: torch.Tensor) -> None:
    """Writes zero to the blocks ``ids`` of ``[num_blocks, block_size, words]``."""
    _, size, words = written.shape
    with _on_device_of(written):
        step = _step(words)
        grid = (len(ids) * size, triton.cdiv(words, step))
        _zero_token[grid](written, ids, size, written.stride(0), written.stride(1), words, STEP=step)


def _layout(cells: torch.Tensor) -> tuple[int, int, int]:
    """Tokens in a block, and the strides of blocks and tokens, in words."""
    if cells.ndim == 2:
        return 1, cells.stride(0), 0
    return cells.shape[1], cells.stride(0), cells.stride(1)


def _step(words: int) -> int:
    step: int = min(_MOST_WORDS, triton.next_power_of_2(words))
    return step


def _on_device_of(tensor: torch.Tensor) -> Any:
    # Triton launches on the current device, which need not be the tensor's.
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
