"""Tensors over an allocator's memory.

Addresses are reserved, not mapped: touching an unmapped one is a segmentation fault on a CPU and a lost context on a
GPU. So what a user gets by default ends at the last mapped block, and prints and pickles without touching what may be
missing in between.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from kvmem.layouts import Slice

__all__ = ["CacheTensor", "block_view", "row_view"]


class CacheTensor(torch.Tensor):
    """A view of cache memory with unmapped gaps: an ordinary tensor to every kernel, but one that is safe to print.

    Operations return plain tensors (of what was asked for, so slice to tokens that exist). ``repr`` shows the shape;
    pickling and deep copies, which would read all of it, raise ``TypeError``.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"CacheTensor(shape={tuple(self.shape)}, stride={self.stride()}, dtype={self.dtype}, device={self.device})"
        )

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "a cache tensor has unmapped gaps and cannot be pickled: clone the tokens of a sequence instead"
        )

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise TypeError("a cache tensor has unmapped gaps and cannot be copied: clone the tokens of a sequence instead")


def _strided(
    arena: torch.Tensor, where: Slice, lead: tuple[int, ...], lead_bytes: tuple[int, ...], offset: int
) -> torch.Tensor:
    size = where.dtype.itemsize
    with torch.inference_mode(False):  # a view made in that mode could never be written outside of it
        return arena.view(where.dtype).as_strided(
            (*lead, where.heads, where.width),
            (*(b // size for b in lead_bytes), where.width, 1),
            (offset + where.offset_bytes) // size,
        )


def block_view(arena: torch.Tensor, where: Slice, token_bytes: int, block_size: int, num_blocks: int) -> torch.Tensor:
    """``[num_blocks, block_size, heads, width]`` over an arena's bytes; block b starts at ``b * block_size *
    token_bytes``.
    """
    return _strided(arena, where, (num_blocks, block_size), (block_size * token_bytes, token_bytes), 0)


def row_view(arena: torch.Tensor, where: Slice, token_bytes: int, row_tokens: int, num_rows: int) -> torch.Tensor:
    """``[num_rows, row_tokens, heads, width]`` over an arena's bytes."""
    return _strided(arena, where, (num_rows, row_tokens), (row_tokens * token_bytes, token_bytes), 0)
