"""How much memory an allocator has, what holds it, and giving it back."""

from __future__ import annotations

from typing import Any

from kvmem.allocator.batch_buffers import INT32_MAX
from kvmem.allocator.opening import OpenedCore
from kvmem.allocator.stats import Stats
from kvmem.arguments import check_size, is_fraction, parse_bytes

__all__ = ["MemoryCalls"]


class MemoryCalls(OpenedCore):
    """The calls that are about bytes."""

    def set_memory(self, memory: int | float | str) -> None:
        """Grows or shrinks what this allocator may map, and the budget of a pool of its own; parked pages go first.
        ``memory``: as when it was made.

        ``OutOfMemory``, and nothing changed, when live sequences hold more than that; ``compact()`` may help. What is
        parked goes in pieces, as by ``trim()``, unless pins keep some of it: then all at once, or not at all. Growing
        what creates its pages ahead (CUDA) is one piece too. Threads that take memory meanwhile may get it refused;
        then parked pages are gone.
        """
        if self._shares_pool and (memory == "auto" or is_fraction("memory", memory)):
            memory = self._limit_bytes(memory)
        self.core.set_memory(self.pool.parse_pages(memory))

    def trim(self, bytes: int | str | None = None) -> int:
        """Gives parked and free pages back to the system: at least ``bytes`` of them if there are as many, or all, also
        those of cached blocks. Returns bytes. In pieces of a millisecond, each all or nothing, between which other
        threads' calls are let in.
        """
        return self.core.trim(-1 if bytes is None else parse_bytes("bytes", bytes))

    def compact(self, bytes: int | str | None = None) -> int:
        """Moves blocks of live sequences and of the cache out of the emptiest pages, until ``bytes`` more (None: all
        that can be) hold nothing, as whole pages. Returns how many bytes do: ``trim()``, this allocator or a neighbour
        in the pool may take them. All or nothing.

        Paged backend; a page of the virtual one belongs to a row, so there it does nothing and returns 0. A block goes
        only into room in a page that stays in use. Addresses stay, contents too; block ids change, so **batches filled
        before are stale**: call it between steps and ``fill()`` again. A captured graph reads the tables by address
        and needs only that. On the device: one copy of each moved block and arena, on the allocator's stream, waiting
        for nothing. On the host: a look at each page, free block and table entry (0.04 s for 60 GiB in 64 KiB each).
        Nothing calls it by itself.
        """
        return self.core.compact(-1 if bytes is None else parse_bytes("bytes", bytes))

    def set_stream(self, stream: Any) -> None:
        """The stream that kernels use this memory on, for all allocators of the pool: ``PagePool.set_stream``."""
        self.pool.set_stream(stream)

    def stats(self) -> Stats:
        """What is held now. Cost grows with live sequences, not with memory."""
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

    def free_tokens(self) -> int:
        """How many tokens there is memory for beside what live sequences hold; what is cached or parked counts as free,
        as all of it can be given up. At most: what whole pages and blocks round up to comes on top, so ``can_fit``
        decides. In a shared pool, beside what others' live sequences hold. Cost: as ``stats()``.
        """
        s, each = self.core.stats(), self.spec.bytes_per_token
        left = s.limit_bytes - s.held_bytes - self.spec.fixed_bytes
        return max(0, left) // each if each > 0 else INT32_MAX

    def can_fit(self, n: int) -> bool:
        """Whether ``sequence().try_extend(n)`` would succeed now: there is a place for one more sequence, it may be so
        long, and there is memory, with all given up for it that is only cached. Exact, on both backends.

        Changes nothing: it is decided and taken back. Costs as much as that extension, without the driver's calls:
        some 100 ns for each block that would have to be given up.
        """
        return self.core.can_fit(check_size("n", n, 0, INT32_MAX))

    def check(self) -> list[str]:
        """Every violated invariant as a sentence; empty when healthy. Cost grows with everything: for tests and idle
        times.
        """
        return self.core.check()
