"""What an allocator holds, virtual and physical side by side."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from kvmem import _core
from kvmem.arguments import format_bytes

__all__ = ["Stats"]


@dataclass(frozen=True)
class Stats:
    """A snapshot. All sizes in bytes; physical memory obeys ``mapped = used + wasted + parked + cached_beside``.

    reserved_bytes: addresses, which cost nothing.
    budget_bytes: what the pool may create, ``created_bytes`` what it has created, ``free_bytes`` the part of that
        nobody maps.
    physical_bytes: what the device's system says is really held for the pool (CPU: pages of the memfd that were
        touched).
    mapped_bytes: pages mapped by this allocator, each once however often it is mapped.
    used_bytes: tokens of live sequences, each physical byte once.
    shared_bytes: physical bytes (pages; paged backend: blocks) that more than one sequence reads.
    parked_bytes: mapped pages no live sequence needs: ready for the next one, given up under pressure and by
        ``trim()``. Cached blocks that nobody uses lie on such pages, or beside live ones:
    cached_beside_bytes: the part of ``cached_bytes`` that lies on pages which live sequences need as well. It can be
        given up for their next tokens, or another's, but the pages cannot (paged; ``compact()`` may help).
    held_bytes: what live sequences keep from others: the blocks that hold their tokens, whole, and the trash blocks
        (paged), or their pages (virtual). The rest of the budget can be had, all that is cached included; where groups
        differ, or other allocators share the pool, some of it only as whole pages.
    cached_bytes: tokens of cached blocks that nobody uses, ``cached_blocks`` of them; each physical byte once, since
        blocks that begin alike may share pages (virtual). With sliding windows also what they have passed of blocks
        that are used, which counts as no block.
    pinned_blocks: pins of blocks, each pin of a block counted.
    evicted_blocks: blocks that were cached and given up since the allocator exists.
    lookup_tokens, hit_tokens: of prompts that began (``sequence()``, ``admit_batch()``, ``SchedulerCache.allocate``),
        all but the last token of each, and those found. A prompt that was refused counts nothing.
    wasted_bytes: the rest, which holds nothing: rounding up to pages and blocks, the guard behind the last token, trash
        blocks.
    device_free_bytes: what a CUDA device has free, for this process and all others; None elsewhere.
    torch_allocated_bytes, torch_reserved_bytes: what torch's caching allocator has given to tensors on this CUDA
        device, and what it holds in all. Its memory and ours are apart; None elsewhere.
    driver_calls: calls the pool has made to its driver since it exists (``"meta"``: that a GPU's driver would have
        got).
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
        """The same in a few lines for people: sequences, memory and what it holds, hits, driver calls."""
        shown = format_bytes
        parts = [
            f"{self.num_sequences} of {self.max_sequences} sequences",
            f"memory: {shown(self.held_bytes)} held by them, {shown(self.mapped_bytes)} mapped, of a budget of "
            f"{shown(self.budget_bytes)}",
            f"mapped: {shown(self.used_bytes)} used by tokens ({shown(self.shared_bytes)} of it shared), "
            f"{shown(self.parked_bytes)} parked, {shown(self.wasted_bytes)} wasted, "
            f"{shown(self.cached_beside_bytes)} cached beside",
            f"cached: {self.cached_blocks} blocks, {shown(self.cached_bytes)}, that nobody uses; {self.pinned_blocks} "
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
        """What the core has counted, under the same names, and ``others``."""
        names = [field.name for field in fields(cls) if field.name not in others]
        return cls(**{name: getattr(counted, name) for name in names}, **others)
