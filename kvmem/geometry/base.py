"""The interfaces between the parts of kvmem that never import each other. They meet in ``kvmem.allocator``.

The native side has its own two: ``csrc/driver/driver.h`` (what a device must offer) and
``csrc/table/page_table.h`` (what a backend is to the core).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kvmem import _core
from kvmem.errors import SpecError
from kvmem.spec import Group

__all__ = ["Backend", "Sizes", "TokenLayout", "require_supported"]


class TokenLayout(Protocol):
    """Where the components of one group lie within a token."""

    @property
    def group(self) -> Group: ...

    @property
    def token_bytes(self) -> list[int]:
        """Per arena, bytes from one token to the next."""

    @property
    def total_token_bytes(self) -> int:
        """Bytes one token takes in all arenas, padding included."""


@dataclass(frozen=True)
class Sizes:
    """What a backend needs to know to lay out its arenas.

    cached_rows: rows that may keep what finished sequences held (virtual). memory_bytes: the budget at the start;
    capacity_bytes bounds what can ever be mapped.
    """

    page_bytes: int
    max_sequences: int
    cached_rows: int
    max_tokens: int
    tail_guard_tokens: int
    memory_bytes: int
    capacity_bytes: int


class Backend(Protocol):
    """One of the two page tables, as far as Python sees it."""

    name: str
    paged: bool

    @staticmethod
    def geometry(layout: TokenLayout, sizes: Sizes) -> _core.GroupGeometry:
        """The addresses a group reserves. ``SpecError`` when there are not as many."""


def require_supported(group: Group) -> None:
    """Raises ``SpecError`` for what a spec can describe and no layout stores yet; ``Allocator`` calls it first.

    ``planes`` pass: the bytes of such a component are stored whole (``Component.planes``).
    """
    for component in group.components:
        if component.ragged:
            raise SpecError(
                f"group {group.name!r}: component {component.name!r}: ragged: got True; an allocator "
                "has one length for all heads of a sequence: use kvmem.layouts.lanes.LaneCache, or ragged=False"
            )
