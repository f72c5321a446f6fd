"""The calls of an allocator about memory: its limit, what holds it, and returning it to the system."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from kvmem.allocator.opening import OpenedCore
from kvmem.allocator.stats import Stats
from kvmem.arguments import INT32_MAX, check_size, is_auto, is_fraction, parse_bytes
from kvmem.memory.ledger import Ledger

__all__ = ["MemoryCalls"]


class MemoryCalls(OpenedCore):
    """The calls of an allocator about memory."""

    def set_memory(self, memory: int | float | str) -> None:
        """Grow or shrink what this allocator may map, and the budget if the pool is its own. Parked pages go first.

        memory: as for the constructor. ``OutOfMemory``, and nothing has changed, if live sequences hold more;
        ``compact()`` may help.

        Parked pages are reclaimed in pieces, as by ``trim()``, unless pins hold some of them: then all at once, or
        none. Growing a pool that creates its pages ahead (CUDA) is one piece too. If other threads take memory between
        pieces, the call may be refused after parked pages are gone.
        """
        if self._shares_pool and (is_auto(memory) or is_fraction("memory", memory)):
            memory = self._limit_bytes(memory)
        self.core.set_memory(self.pool.parse_pages(memory))

    def trim(self, bytes: int | str | None = None) -> int:
        """Return parked and free pages to the system, those of cached blocks included; return how many bytes.

        bytes: the least to return, if there are as many; None: all. In pieces of a millisecond, each all or nothing,
        between which other threads' calls may run.
        """
        return self.core.trim(-1 if bytes is None else parse_bytes("bytes", bytes))

    def compact(self, bytes: int | str | None = None) -> int:
        """Move blocks of live sequences and of the cache out of the emptiest pages, so that whole pages become free.

        Return how many bytes became free, for ``trim()``, this allocator or others of the pool. bytes: how many to
        free; None: as many as possible. All or nothing.

        Paged backend only: a page of the virtual backend belongs to a row, so there it does nothing and returns 0.
        Blocks move only into pages that stay in use. Addresses and contents stay; block ids change, so **batches filled
        before are stale**: call it between steps, then ``fill()`` again. A captured graph reads the tables by address
        and needs nothing else. It is never called implicitly.

        Cost: on the device, one copy of each moved block and arena, on the allocator's stream, without waiting; on the
        host, linear in pages, free blocks and table entries (0.04 s for 60 GiB in pages of 64 KiB).
        """
        return self.core.compact(-1 if bytes is None else parse_bytes("bytes", bytes))

    def set_stream(self, stream: Any) -> None:
        """Name the stream on which kernels use this memory, for all allocators of the pool: ``PagePool.set_stream``."""
        self.pool.set_stream(stream)

    def stats(self) -> Stats:
        """Return a snapshot of sizes and counts. Cost: linear in the live sequences, not in memory."""
        s = self.core.stats()
        torch_allocated, torch_reserved = self.pool.device.torch_bytes()
        return Stats.of(
            s,
            reserved_bytes=sum(sum(g.arena_slots) for g in self._geometry) * self.pool.page_bytes,
            wasted_bytes=s.mapped_bytes - s.used_bytes - s.parked_bytes - s.cached_beside_bytes,
            max_sequences=self.max_sequences,
            device_free_bytes=self.pool.device.free_bytes(),
            torch_allocated_bytes=torch_allocated,
            torch_reserved_bytes=torch_reserved,
        )

    @cached_property
    def ledger(self) -> Ledger:
        """The byte ledger: what live sequences hold by component, and what layouts have read and moved."""
        return Ledger(self._bytes_in_use)

    def _bytes_in_use(self) -> dict[str, int]:
        """Return the bytes of live sequences by component, without padding."""
        found: dict[str, int] = {}
        for group, layout, used in zip(
            self.spec.groups, self._layouts, self.core.stats().arena_used_bytes, strict=True
        ):
            for component in group.components:
                for layer in group.layers[:1] if component.scope == "shared" else group.layers:
                    arena = layout.slice(layer, component.name).arena
                    row = group.row_bytes(component.name, layer)
                    held = used[arena] * row // layout.token_bytes[arena]
                    found[component.name] = found.get(component.name, 0) + held
        return found

    def free_tokens(self) -> int:
        """Return an upper bound of the tokens that still fit: the memory that live sequences do not hold, cached and
        parked pages included, divided by ``spec.bytes_per_token``.

        Rounding up to whole pages and blocks comes on top, so ``can_fit`` decides. In a shared pool, memory that live
        sequences of other allocators hold does not count. Cost: as ``stats()``.
        """
        s, each = self.core.stats(), self.spec.bytes_per_token
        left = s.limit_bytes - s.held_bytes - self.spec.fixed_bytes
        return max(0, left) // each if each > 0 else INT32_MAX

    def can_fit(self, n: int) -> bool:
        """Return whether ``sequence().try_extend(n)`` would succeed now. Exact, on both backends; changes nothing.

        The extension is decided and taken back. Cost: as that extension without driver calls, some 100 ns for each
        block that would be evicted.
        """
        return self.core.can_fit(check_size("n", n, 0, INT32_MAX))

    def check(self) -> list[str]:
        """Return every violated invariant as a sentence, and an empty list if all hold.

        Cost: linear in all metadata: for tests and idle times.
        """
        return self.core.check()
