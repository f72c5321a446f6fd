"""The best hit rate a cache of prefix blocks can have when the future is known (Belady, IBM Systems Journal 1966)."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

__all__ = ["Belady"]


class Belady:
    """Belady's rule for a list of requests, each the ids of its blocks from the first on.

    The block whose next use lies farthest ahead goes first, of blocks used next by the same request the deepest, so
    that what stays is always whole prefixes; a block that is never used again is not kept.
    """

    def __init__(self, requests: Sequence[Sequence[int]]) -> None:
        self.requests = requests
        self.never = len(requests)
        self._next_use = self._find_next_uses()

    def _find_next_uses(self) -> list[list[int]]:
        seen: dict[int, int] = {}
        found: list[list[int]] = []
        for index in range(len(self.requests) - 1, -1, -1):
            found.append([seen.get(block, self.never) for block in self.requests[index]])
            seen.update(dict.fromkeys(self.requests[index], index))
        return found[::-1]

    def hits(self, capacity: int) -> int:
        """Blocks found, summed over all requests: each one's leading run of cached blocks. About 2 us a block."""
        cached: dict[int, int] = {}  # block -> its next use
        farthest: list[tuple[int, int, int]] = []  # a heap; entries whose next use is no longer true are passed over
        hits = 0
        for blocks, next_uses in zip(self.requests, self._next_use, strict=True):
            for block in blocks:
                if block not in cached:
                    break
                hits += 1
            for depth, (block, use) in enumerate(zip(blocks, next_uses, strict=True)):
                if use == self.never:
                    cached.pop(block, None)
                else:
                    cached[block] = use
                    heapq.heappush(farthest, (-use, -depth, block))
            while len(cached) > capacity:
                use, _, block = heapq.heappop(farthest)
                if cached.get(block) == -use:
                    del cached[block]
        return hits
