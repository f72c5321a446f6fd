"""The byte ledger: bytes held, read and moved, by component and tier. A claim of a saving is read from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from kvmem.arguments import check_size

__all__ = ["Ledger"]

#: (component, tier): ``("k", "device")``. What is no component of the spec, such as a scratch, has a name of its own.
Key = tuple[str, str]


class Ledger:
    """Counts of bytes. ``Allocator.ledger`` is the only one that knows what an allocator holds.

    read, moved: since the ledger was made or ``reset()``. A layout counts what it reads of a component, in whole bursts
        where it skips parts; attention kernels of other packages count nothing. ``moved`` counts bytes that changed
        their tier, under the tier that they went to.

    Not thread-safe: two threads that count at the same time may lose a count.
    """

    def __init__(self, in_use: Callable[[], Mapping[str, int]]) -> None:
        """in_use: returns the bytes that live sequences hold on the device, by component."""
        self._in_use = in_use
        self._beside: Counter[Key] = Counter()
        self.read: Counter[Key] = Counter()
        self.moved: Counter[Key] = Counter()

    def count_read(self, component: str, bytes: int, tier: str = "device") -> None:
        """Add ``bytes`` to ``read``."""
        self.read[component, tier] += bytes

    def count_moved(self, component: str, bytes: int, tier: str) -> None:
        """Add ``bytes`` to ``moved``. tier: where they are now."""
        self.moved[component, tier] += bytes

    def hold(self, name: str, bytes: int, tier: str = "device") -> None:
        """Set what something beside the cache holds now, such as a scratch; 0 removes it."""
        check_size("bytes", bytes, 0)
        self._beside[name, tier] = bytes

    @property
    def held(self) -> dict[Key, int]:
        """The bytes held now: tokens and states of live sequences, each physical byte once and without padding, and
        what ``hold()`` was told. Cost: as ``Allocator.stats()``.

        On the virtual backend, sequences share whole pages, whose ends fall within tokens. What a group holds is then
        divided between its components in proportion to their sizes: each may be off by less than a page for every range
        of memory (``Allocator(interleave=)``) and every sequence that shares.
        """
        used = {(name, "device"): bytes for name, bytes in self._in_use().items()}
        return used | {key: bytes for key, bytes in self._beside.items() if bytes > 0}

    def reset(self) -> None:
        """Set ``read`` and ``moved`` to zero."""
        self.read.clear()
        self.moved.clear()

    def __repr__(self) -> str:
        return f"Ledger(held={self.held}, read={dict(self.read)}, moved={dict(self.moved)})"
