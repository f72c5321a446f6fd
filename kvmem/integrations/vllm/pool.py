"""The engine's pool of blocks as a kvmem allocator, and the parts of it that vLLM looks at beside the block manager."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvmem import Allocator, CacheSpec, Component, Group, SchedulerCache, SpecError
from kvmem.integrations.vllm.held import Held

__all__ = ["RESERVED_BLOCKS", "BlockPool", "Coordinator", "round_up"]

#: Block 0 is the null block, which tables name where a window has dropped one; block 1 is kvmem's padding block.
#: Neither is ever handed out.
RESERVED_BLOCKS = 2
#: What pages of a device without memory are a multiple of.
_PAGE_BYTES = 2 << 20


def round_up(tokens: int, size: int) -> int:
    """Return the least multiple of ``size`` that is not below ``tokens``."""
    return -(-tokens // size) * size


class BlockPool:
    """Blocks 2 to ``num_blocks - 1``, under the names of vLLM's ``BlockPool`` that its scheduler uses.

    An allocator without a device decides, and a block is one of its pages: what a token stores does not matter here.
    window_tokens: a sliding window, or None. max_tokens: of a request. max_requests: that can hold blocks at one time.
    ``SpecError`` if there is no block to hand out.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        max_tokens: int,
        max_requests: int,
        window_tokens: int | None,
        prefix_cache: bool,
        policy: str,
    ) -> None:
        if num_blocks <= RESERVED_BLOCKS:
            raise SpecError(
                f"the engine's pool has {num_blocks} blocks, of which kvmem reserves {RESERVED_BLOCKS}: give it more "
                "memory for the KV cache"
            )
        self.num_blocks = num_blocks - RESERVED_BLOCKS
        # Only tables with a window name the reserved blocks, which then take pages.
        self._reserved = 0 if window_tokens is None else RESERVED_BLOCKS
        self._page_bytes = math.lcm(_PAGE_BYTES, block_size)
        self._tells_freed = False
        token = Component("block", width=self._page_bytes // block_size, dtype=torch.uint8)
        group = Group("layers", (token,), (0,), window_tokens=window_tokens)
        self.allocator = Allocator(
            CacheSpec((group,), block_size=block_size),
            backend="paged",
            device="meta",
            memory=(self.num_blocks + self._reserved) * self._page_bytes,
            page_bytes=self._page_bytes,
            max_sequences=max_requests,
            max_tokens=round_up(max_tokens, block_size),
            prefix_cache=prefix_cache,
            append_only=True,
            policy=policy,
        )
        self.cache = SchedulerCache(self.allocator)
        self._back(block_size)

    def _back(self, block_size: int) -> None:
        """Take every block once, so that no later step pays for the first use of a page."""
        most, left, handles = self.allocator.max_tokens // block_size, self.num_blocks, list[int]()
        while left > 0 and len(handles) < self.allocator.max_sequences:
            sequence = self.allocator.sequence()
            sequence.extend(min(most, left) * block_size)
            handles.append(sequence.id)
            left -= most
        self.allocator.free_batch(np.array(handles, np.int32))

    def free_blocks(self, ordered_blocks: Iterable[Held]) -> None:
        """Free what ``BlockManager.pop_blocks_for_free`` returned."""
        self.cache.free_all(ordered_blocks)

    def get_num_free_blocks(self) -> int:
        """Return how many blocks no request uses, cached ones included. Cost: linear in the requests."""
        held = self.allocator.core.stats().held_bytes // self._page_bytes
        return int(self.num_blocks + self._reserved - held)

    def get_usage(self) -> float:
        """Return the part of the pool that requests use, 0 to 1."""
        return (self.num_blocks - self.get_num_free_blocks()) / self.num_blocks

    def take_freed_blocks(self) -> list[int]:
        """Return the blocks, ascending, that no request and no cached content uses any more since the last call: their
        memory can be given back to the system.

        The first call returns none and begins to count, which makes later steps slower: a block is taken from the pool
        of pages again each time. Cost: linear in the pool.
        """
        core, freed = self.allocator.core, set[int]()
        stats = core.stats()
        self.allocator.trim(stats.parked_bytes - stats.cached_bytes)  # the pages of blocks without content
        if not self._tells_freed:
            self._tells_freed = True
            core.record()
            return []
        for kind, _, slot, _, count, _ in core.take_ops():
            if kind == "unmap":
                freed.update(range(slot, slot + count))
            elif kind == "map":
                freed.difference_update(range(slot, slot + count))
        return sorted(freed)


@dataclass(frozen=True)
class _Group:
    """Stands for vLLM's single-type manager, of which other parts of the engine read the block size."""

    block_size: int
    kv_cache_spec: Any
    kv_cache_group_id: int = 0


class Coordinator:
    """The names of vLLM's coordinator that its scheduler and its engine use. held: requests with blocks, by id."""

    enable_partial_hash_hits = False
    single_type_managers: tuple[_Group, ...]

    def __init__(self, held: Mapping[str, Held], block_size: int, kv_cache_spec: Any) -> None:
        self._held, self._size = held, block_size
        self.single_type_managers = (_Group(block_size, kv_cache_spec),)

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *_: Any, **__: Any) -> int:
        """Return how many blocks the request lacks for ``num_tokens`` tokens."""
        held = self._held.get(request_id)
        return max(0, math.ceil(num_tokens / self._size) - (0 if held is None else len(held.blocks)))
