"""Sizes and counts of an allocator: addresses, physical memory, cached content."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from kvmem import _core
from kvmem.arguments import format_bytes

__all__ = ["Stats"]


@dataclass(frozen=True)
class Stats:
    """A snapshot from ``Allocator.stats()``. Sizes are bytes, and ``mapped = used + wasted + parked + cached_beside``.

    reserved_bytes: reserved addresses, which cost no memory.
    budget_bytes: the most that the pool may create. created_bytes: what it has created. free_bytes: the part of that
        which no allocator maps.
    physical_bytes: what the system holds for the pool (CPU: pages of the memfd that were touched).
    mapped_bytes: pages mapped by this allocator; a page that is mapped several times counts once.
    used_bytes: tokens of live sequences, each physical byte once.
    shared_bytes: pages (paged: blocks) that more than one sequence reads.
    parked_bytes: mapped pages that no live sequence needs: ready for the next sequence, reclaimed when memory is short
        and by ``trim()``. They may hold cached blocks.
    cached_beside_bytes: the part of ``cached_bytes`` on pages that live sequences need too (paged). These blocks can be
        evicted for new tokens, but their pages cannot be reclaimed; ``compact()`` may help.
    held_bytes: memory that live sequences keep from others: the whole blocks that hold their tokens, the null block and
        the padding block (paged), or the pages that hold their tokens (virtual). The rest of the budget is available,
        including all cached content; if block sizes of groups differ, or other allocators share the pool, some of it
        only as whole pages.
    wasted_bytes: the rest of the mapped bytes, which holds nothing: rounding to pages and blocks, the guard behind the
        last token, null and padding blocks.
    driver_calls: calls of the pool to its driver since it was made (``"meta"``: the calls that a GPU's driver would
        get).
    num_sequences, max_sequences: live sequences, and the most there can be.
    cached_bytes, cached_blocks: tokens of cached, unreferenced blocks, and how many blocks. Each physical byte counts
        once, since blocks with a common start may share pages (virtual). The bytes also count those parts of used
        blocks that are out of window; the blocks do not.
    pinned_blocks: pins of blocks; a block that is pinned twice counts twice.
    evicted_blocks: blocks evicted since the allocator was made.
    lookup_tokens, hit_tokens: tokens of prompts that began (``sequence()``, ``admit_batch()``,
        ``SchedulerCache.allocate``), all but the last token of each; and how many of them were found cached. A refused
        prompt does not count.
    device_free_bytes: memory of the CUDA device that is free for any process; None on other devices.
    torch_allocated_bytes, torch_reserved_bytes: what torch's caching allocator has given to tensors on this CUDA
        device, and what it holds in all, apart from kvmem's memory; None on other devices.
    """

    reserved_bytes: int
    budget_bytes: int
    created_bytes: int
    free_bytes: int
    physical_bytes: int
    mapped_bytes: int
    used_bytes: int
    shared_bytes: int
    parked_bytes: int
    held_bytes: int
    cached_beside_bytes: int
    wasted_bytes: int
    driver_calls: int
    num_sequences: int
    max_sequences: int
    cached_bytes: int
    cached_blocks: int
    pinned_blocks: int
    evicted_blocks: int
    lookup_tokens: int
    hit_tokens: int
    device_free_bytes: int | None
    torch_allocated_bytes: int | None
    torch_reserved_bytes: int | None

    def summary(self) -> str:
        """Return a text of some lines: sequences, memory and what it holds, hits, driver calls."""
        shown = format_bytes
        parts = [
            f"{self.num_sequences} of {self.max_sequences} sequences",
            f"memory: {shown(self.held_bytes)} held by them, {shown(self.mapped_bytes)} mapped, of a budget of "
            f"{shown(self.budget_bytes)}",
            f"mapped: {shown(self.used_bytes)} used by tokens ({shown(self.shared_bytes)} of it shared), "
            f"{shown(self.parked_bytes)} parked, {shown(self.wasted_bytes)} wasted, "
            f"{shown(self.cached_beside_bytes)} cached beside",
            f"cached: {self.cached_blocks} unreferenced blocks, {shown(self.cached_bytes)}; {self.pinned_blocks} "
            f"pinned, {self.evicted_blocks} evicted so far",
            f"prompts: {self.hit_tokens} of {self.lookup_tokens} tokens found cached"
            + (f" ({self.hit_tokens / self.lookup_tokens:.0%})" if self.lookup_tokens else ""),
            f"addresses: {shown(self.reserved_bytes)} reserved; driver calls: {self.driver_calls}",
        ]
        if self.device_free_bytes is not None:
            parts.append(
                f"device: {shown(self.device_free_bytes)} free; torch holds {shown(self.torch_reserved_bytes or 0)}"
            )
        return "\n".join(parts)

    @classmethod
    def of(cls, counted: _core.AllocatorStats, **others: Any) -> Stats:
        """Return the core's counts, which have the same names, and ``others``."""
        names = [field.name for field in fields(cls) if field.name not in others]
        return cls(**{name: getattr(counted, name) for name in names}, **others)
