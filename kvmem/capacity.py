"""How much more fits into an allocator, from its books: nothing is tried, opened or given up for the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvmem import _core
from kvmem.errors import StaleHandle

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["GroupNeeds", "Room"]

#: Lengths are int32.
MOST_TOKENS = 2**31 - 1
#: Blocks 0 and 1 of a group are no sequence's (csrc/geometry.h).
TRASH_BLOCKS = 2


@dataclass(frozen=True)
class GroupNeeds:
    """What a group asks of memory. guard_tokens: how far behind its tokens a row is mapped. max_blocks: how many block
    ids there are (paged). token_bytes: by arena.
    """

    growth: str
    block_tokens: int
    window_tokens: int
    guard_tokens: int
    max_blocks: int
    token_bytes: tuple[int, ...]

    def length(self, n: int) -> int:
        """How many tokens a new sequence of ``n`` has in this group, before it has an encoder's."""
        return {"token": n, "fixed": min(n, 1)}.get(self.growth, 0)

    def blocks(self, n: int) -> int:
        return -(-self.length(n) // self.block_tokens)

    @property
    def block_bytes(self) -> int:
        return self.block_tokens * sum(self.token_bytes)

    def row(self, tokens: int, page_bytes: int) -> int:
        """Pages under so many tokens of a row."""
        if tokens == 0:
            return 0
        return sum(-(-(tokens + self.guard_tokens) * each // page_bytes) for each in self.token_bytes)

    def slots(self, blocks: int, page_bytes: int) -> int:
        """Pages under blocks from 0 on."""
        return sum(-(-blocks * self.block_tokens * each // page_bytes) for each in self.token_bytes)

    def most_slots(self, page_bytes: int) -> int:
        """The most pages that one block lies on."""
        sizes = (self.block_tokens * each for each in self.token_bytes)
        return sum(-(-size // page_bytes) if _divides(size, page_bytes) else 2 + size // page_bytes for size in sizes)

    def fresh(self, blocks: int, page_bytes: int) -> int:
        """Pages under so many blocks from the first on that is a sequence's, if nothing lies there yet."""
        if blocks == 0 or not self.divides(page_bytes):
            return self.scattered(blocks, page_bytes)
        trash = (TRASH_BLOCKS * self.block_tokens * each // page_bytes for each in self.token_bytes)
        return self.slots(TRASH_BLOCKS + blocks, page_bytes) - sum(trash)

    def scattered(self, blocks: int, page_bytes: int) -> int:
        """Pages under so many blocks, where no two of the pages are neighbours but within a block."""
        if self.divides(page_bytes):
            return self.slots(blocks, page_bytes)
        whole = min((page_bytes + 1) // (self.block_tokens * each) - 1 for each in self.token_bytes)  # in any page
        return len(self.token_bytes) * -(-blocks // whole) if whole > 0 else blocks * self.most_slots(page_bytes)

    def divides(self, page_bytes: int) -> bool:
        """Whether no block crosses an edge of a page that it does not begin or end at."""
        return all(_divides(self.block_tokens * each, page_bytes) for each in self.token_bytes)

    def needs_trash(self, n: int) -> bool:
        """Whether a sequence of ``n`` tokens grows only where blocks 0 and 1 exist: its window may pass a block."""
        return 0 < self.window_tokens <= n


@dataclass(frozen=True)
class Room:
    """What a new sequence can have: whole pages, and blocks on pages that live sequences need anyway (paged).

    has_trash: by group, whether blocks 0 and 1 are known to be there. live: by group, the blocks in use; None on the
    virtual backend. pinned: by group, how many blocks pins may keep.
    """

    groups: Sequence[GroupNeeds]
    page_bytes: int
    pages: int
    cached_bytes: int
    has_trash: tuple[bool, ...]
    live: list[npt.NDArray[np.int64]] | None
    pinned: list[int]
    _found: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, core: _core.Cache, groups: Sequence[GroupNeeds], page_bytes: int, *, paged: bool) -> Room:
        """As it is now. Cost: as ``Allocator.stats()``; paged, also a look at each block of a live sequence."""
        stats = core.stats()
        live = _live_blocks(core, len(groups)) if paged else None
        lengths = [num_tokens for _, num_tokens in core.pins()]
        pinned = [sum(group.blocks(n) for n in lengths) for group in groups]
        pages = (stats.limit_bytes - stats.mapped_bytes + stats.parked_bytes) // page_bytes
        kept = sum(
            group.most_slots(page_bytes) * blocks
            if paged
            else sum(group.row(group.length(n), page_bytes) + len(group.token_bytes) for n in lengths)
            for group, blocks in zip(groups, pinned, strict=True)
        )
        pages -= min(kept, stats.parked_bytes // page_bytes)
        trash = _trash(groups, stats.held_bytes, live)
        return cls(groups, page_bytes, max(0, pages), stats.cached_bytes, trash, live, pinned)

    def fits(self, n: int) -> bool:
        """Whether a new sequence of ``n`` tokens would find memory, whatever else limits it."""
        needed = 0
        for index, group in enumerate(self.groups):
            if self.live is None:
                needed += group.row(group.length(n), self.page_bytes)
                if group.needs_trash(n):
                    needed += group.row(TRASH_BLOCKS * group.block_tokens, self.page_bytes)
            else:
                needed += self._pages_for(index, group.blocks(n), group.needs_trash(n))
            if needed > self.pages:
                return False
        return True

    def free_tokens(self) -> int:
        """The most tokens for which ``fits()``, up to ``MOST_TOKENS``."""
        high = 1
        while self.fits(high):
            if high > MOST_TOKENS:  # a state alone needs no more for more tokens
                return MOST_TOKENS
            high *= 2
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(middle) else (low, middle)
        return low

    def _pages_for(self, index: int, blocks: int, trash: bool) -> int:
        """The most pages that so many blocks of a group need besides those of live sequences."""
        if blocks == 0:
            return 0
        group, page = self.groups[index], self.page_bytes
        own = group.slots(TRASH_BLOCKS, page) if trash and not self.has_trash[index] else 0
        if index < len(self.groups) - 1:
            # Its blocks take pages from the groups behind it. It takes its lowest free blocks first, so each may come
            # to a page of its own, beside what is cached there.
            most = blocks * group.most_slots(page)
            if group.divides(page):
                cached = self.cached_bytes // (group.block_tokens * min(group.token_bytes))
                most = min(most, group.fresh(blocks, page) + cached * len(group.token_bytes))
            return own + most
        blocks = max(0, blocks - self._beside(index))
        return own + (group.scattered if self._has_start(index) else group.fresh)(blocks, page)

    def _has_start(self, index: int) -> bool:
        """Whether something of a group lies on the first page, which the trash blocks' part of counts for nobody."""
        assert self.live is not None
        first = int(self.live[index].min(initial=MOST_TOKENS))
        sizes = [each * self.groups[index].block_tokens for each in self.groups[index].token_bytes]
        return self.has_trash[index] or any(first * size < self.page_bytes for size in sizes)

    def _beside(self, index: int) -> int:
        """How many blocks of a group lie on pages of live ones, and are free or cached."""
        assert self.live is not None
        group, taken = self.groups[index], self.live[index]
        if index not in self._found:
            end = min(group.max_blocks, self._last_beside(group, taken))
            free = np.setdiff1d(np.arange(TRASH_BLOCKS, end), taken, assume_unique=True)
            lies = np.ones(len(free), np.bool_)
            for each in group.token_bytes:
                size = each * group.block_tokens
                used = np.zeros(end * size // self.page_bytes + 2, np.int64)
                for blocks in (taken, np.arange(TRASH_BLOCKS if self.has_trash[index] else 0)):
                    _mark(used, blocks, size, self.page_bytes)
                unused = np.concatenate([[0], np.cumsum(used == 0)])
                lies &= unused[((free + 1) * size - 1) // self.page_bytes + 1] == unused[free * size // self.page_bytes]
            self._found[index] = max(0, int(lies.sum()) - self.pinned[index])
        return self._found[index]

    def _last_beside(self, group: GroupNeeds, taken: npt.NDArray[np.int64]) -> int:
        """A block id behind all that can lie on a page of these, or of the trash blocks."""
        last = max(int(taken.max(initial=0)), TRASH_BLOCKS)
        return last + 2 + self.page_bytes // (min(group.token_bytes) * group.block_tokens)


def _mark(used: npt.NDArray[np.int64], blocks: npt.NDArray[np.int64], size: int, page_bytes: int) -> None:
    """The pages that these blocks lie on are used."""
    first, last = blocks * size // page_bytes, ((blocks + 1) * size - 1) // page_bytes
    for step in range(int((last - first).max(initial=-1)) + 1):
        used[np.minimum(first + step, last)] = 1


def _divides(size: int, page_bytes: int) -> bool:
    return size % page_bytes == 0 or page_bytes % size == 0


def _live_blocks(core: _core.Cache, num_groups: int) -> list[npt.NDArray[np.int64]]:
    """By group, the blocks of live sequences, each once."""
    while True:
        handles = np.array(core.handles(), np.int32)
        try:
            tables = core.tables(handles)
        except StaleHandle:
            continue  # another thread has freed one of them
        none = np.empty(0, np.int64)
        found = [none if tables is None else tables.group(g).blocks.astype(np.int64) for g in range(num_groups)]
        return [np.unique(blocks[blocks >= TRASH_BLOCKS]) for blocks in found]


def _trash(groups: Sequence[GroupNeeds], held_bytes: int, live: list[npt.NDArray[np.int64]] | None) -> tuple[bool, ...]:
    """What is held beyond the live blocks is the trash blocks: of all groups, or it is not known of which."""
    if live is None:
        return (False,) * len(groups)
    rest = held_bytes - sum(len(blocks) * group.block_bytes for blocks, group in zip(live, groups, strict=True))
    return (rest == TRASH_BLOCKS * sum(group.block_bytes for group in groups),) * len(groups)
