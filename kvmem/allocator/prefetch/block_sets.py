"""Blocks of a prompt below the device: what a prefetch plan can bring one place up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from kvmem.allocator.tiers.places import Prompt

__all__ = ["BlockSet"]


class _Missing(NamedTuple):
    block: int
    digest: bytes
    group: int
    num_bytes: int


class BlockSet:
    """Whole blocks, all layers of a group each, that are one place below ``to``, in the order of the prompt.

    A prefetch of them brings what a sequence needs that begins behind the last of them, as far as it is missing then:
    with sliding windows and states, that may be other blocks of these groups. What was brought stays, so a plan names
    each block once in all its windows.
    """

    def __init__(self, prompt: Prompt, to: Literal["device", "host"], missing: list[_Missing]) -> None:
        self.prompt, self.to, self.missing = prompt, to, missing

    @staticmethod
    def of(prompt: Prompt, to: Literal["device", "host"], places: list[tuple[int, int, int]]) -> BlockSet:
        """places: block, group and bytes of each."""
        return BlockSet(prompt, to, [_Missing(k, prompt.digests[k], g, size) for k, g, size in sorted(places)])

    @property
    def num_bytes(self) -> int:
        """How many bytes the blocks have."""
        return sum(place.num_bytes for place in self.missing)

    @property
    def num_blocks(self) -> int:
        """Behind which block of the prompt the set ends."""
        return self.missing[-1].block + 1 if self.missing else 0

    def cut(self, most_bytes: int) -> BlockSet:
        """Return the first blocks, of all groups each, that have at most ``most_bytes`` in all."""
        total, end = 0, 0
        for at, place in enumerate(self.missing):
            total += place.num_bytes
            if total > most_bytes:
                break
            if at + 1 == len(self.missing) or self.missing[at + 1].block != place.block:
                end = at + 1
        return BlockSet(self.prompt, self.to, self.missing[:end])

    def without(self, earlier: Sequence[object]) -> BlockSet:
        """Return what is in none of ``earlier``."""
        others = [e for e in earlier if isinstance(e, BlockSet) and e.to == self.to]
        seen = {(place.digest, place.group) for e in others for place in e.missing}
        return BlockSet(self.prompt, self.to, [p for p in self.missing if (p.digest, p.group) not in seen])

    def __repr__(self) -> str:
        return f"BlockSet(to={self.to!r}, {self.num_bytes} bytes in {len(self.missing)} blocks)"
