"""The two backends as Python sees them: how many addresses each reserves, and what tensors over them look like.

``VirtualBackend`` gives each sequence a row of addresses; ``PagedBackend`` gives all sequences one arena of blocks.
The rest of kvmem does not ask which one it has: both offer the same memory as ``[num_blocks, block_size, heads,
width]`` with block ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import gcd, lcm

from kvmem import _core
from kvmem.arguments import INT32_MAX, check_size, format_bytes
from kvmem.errors import SpecError
from kvmem.geometry.base import Backend, Sizes, TokenLayout

__all__ = ["BACKENDS", "PagedBackend", "VirtualBackend", "lay_out"]

#: Kernels accept a row as pages of any legal size if its length is a multiple of this (FlashAttention 2 asks for 256).
ROW_TOKENS = 256
#: 47 bits of addresses, less what the process itself needs.
MAX_RESERVED_BYTES = 100 << 40
#: Block ids are int32, and so are lengths.
MAX_BLOCKS = MAX_TOKENS = INT32_MAX


def _group_tokens(layout: TokenLayout, max_tokens: int) -> int:
    growth = layout.group.growth
    tokens = 1 if growth == "fixed" else (layout.group.max_tokens or max_tokens) if growth == "prefill" else max_tokens
    return check_size(f"max_tokens of group {layout.group.name!r}", tokens, most=MAX_TOKENS)


def _refuse_addresses(layout: TokenLayout, reserved: int, blocks: int) -> None:
    if reserved > MAX_RESERVED_BYTES or blocks > MAX_BLOCKS:
        raise SpecError(
            f"group {layout.group.name!r} would reserve {format_bytes(reserved)} of addresses and {blocks} block ids; "
            f"there are {format_bytes(MAX_RESERVED_BYTES)} and {MAX_BLOCKS}: lower max_sequences, max_tokens "
            "or page_bytes"
        )


class VirtualBackend:
    """Rows of addresses: row 0, whose first two blocks are the null block and the padding block of padded batches, one
    row per sequence, and those with the cached tokens of finished sequences.
    """

    name = "virtual"
    paged = False

    @staticmethod
    def geometry(layout: TokenLayout, sizes: Sizes) -> _core.GroupGeometry:
        """Addresses for all rows. Each starts at a page and at a block in every arena, so that it can be read as blocks
        too.
        """
        group, page = layout.group, sizes.page_bytes
        tokens = _group_tokens(layout, sizes.max_tokens)
        step = group.block_size if group.growth == "fixed" else lcm(ROW_TOKENS, group.block_size)
        for token_bytes in layout.token_bytes:
            step = lcm(step, page // gcd(page, token_bytes))
        # The null and the padding block, and the guard, must fit in a row as well. A state has no guard.
        guard = 0 if group.growth == "fixed" else sizes.tail_guard_tokens
        wanted = max(tokens + guard, 2 * group.block_size)
        row_tokens = -(-wanted // step) * step
        row_slots = [row_tokens * token_bytes // page for token_bytes in layout.token_bytes]
        rows = 1 + sizes.max_sequences + sizes.cached_rows
        arena_slots = [rows * slots + 1 for slots in row_slots]  # one more: the scratch slot of copy-on-write
        _refuse_addresses(layout, sum(arena_slots) * page, rows * row_tokens // group.block_size)
        return _core.GroupGeometry(
            growth=getattr(_core.Growth, group.growth),
            block_tokens=group.block_size,
            window_tokens=group.window_tokens or 0,
            max_tokens=tokens,
            row_tokens=row_tokens,
            max_blocks=rows * row_tokens // group.block_size,
            token_bytes=layout.token_bytes,
            row_slots=row_slots,
            arena_slots=arena_slots,
            whole_blocks=group.block_order != "tokens",
        )


class PagedBackend:
    """One arena of blocks for all sequences. Blocks 0 and 1 are the null and the padding block of padded batches."""

    name = "paged"
    paged = True

    @staticmethod
    def geometry(layout: TokenLayout, sizes: Sizes) -> _core.GroupGeometry:
        """Addresses for every block that the tables can name, or that memory can ever hold, whichever is less; and at
        least for what memory holds at the start, since blocks stay cached when no table names them any more.
        """
        group, page = layout.group, sizes.page_bytes
        tokens = _group_tokens(layout, sizes.max_tokens)
        named = sizes.max_sequences * -(-tokens // group.block_size)
        block_bytes = layout.total_token_bytes * group.block_size
        held = -(-sizes.capacity_bytes // block_bytes) + 1
        max_blocks = 2 + max(min(named, held), -(-sizes.memory_bytes // block_bytes))
        arena_slots = [-(-max_blocks * group.block_size * token_bytes // page) for token_bytes in layout.token_bytes]
        _refuse_addresses(layout, sum(arena_slots) * page, max_blocks)
        return _core.GroupGeometry(
            growth=getattr(_core.Growth, group.growth),
            block_tokens=group.block_size,
            window_tokens=group.window_tokens or 0,
            max_tokens=tokens,
            row_tokens=0,
            max_blocks=max_blocks,
            token_bytes=layout.token_bytes,
            row_slots=[0] * len(layout.token_bytes),
            arena_slots=arena_slots,
            whole_blocks=group.block_order != "tokens",
        )


BACKENDS: dict[str, type[Backend]] = {"virtual": VirtualBackend, "paged": PagedBackend}


def lay_out(
    backend: type[Backend], layouts: Sequence[TokenLayout], sizes: Sizes, *, fewer_rows: bool
) -> tuple[int, list[_core.GroupGeometry]]:
    """How many ``cached_rows`` there are, and the geometry of every group. With ``fewer_rows`` there are fewer rows
    than ``sizes`` has where addresses are short; without, that is a ``SpecError``.
    """
    while True:
        try:
            return sizes.cached_rows, [backend.geometry(layout, sizes) for layout in layouts]
        except SpecError:
            if not fewer_rows or sizes.cached_rows == 0:
                raise
            sizes = replace(sizes, cached_rows=sizes.cached_rows // 2)
