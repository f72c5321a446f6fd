"""Events about blocks in host slots, for the router that reads the device's: ``medium="CPU"`` (docs/events.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmem.events.digests import ChainDigest, Key, keys_in, tag_of_block
from kvmem.events.stream import BlockRemoved, BlockStored, Event, group_kind
from kvmem.spec import CacheSpec

if TYPE_CHECKING:
    from kvmem.allocator.tiers.places import Prompt

__all__ = ["Facts", "TierEvents"]

_MEDIUM = "CPU"


class Facts(NamedTuple):
    """What events say of a block, whichever group has it."""

    before: bytes | None
    digest: bytes
    tokens: tuple[int, ...]
    ordinal: int
    keys: tuple[Key, ...]
    adapter: str | None


class TierEvents:
    """Collects events until they are taken.

    digest: of the allocator's event stream, so that hashes agree. Not thread-safe: its owner holds a lock.
    """

    def __init__(self, spec: CacheSpec, digest: ChainDigest) -> None:
        self._spec, self._digest = spec, digest
        self._here: dict[tuple[int, bytes], Facts] = {}  # by group and key of the tiers
        self._waiting: list[Event] = []

    def facts(self, before: Facts | None, root: tuple[Key, Key], ordinal: int, tokens: bytes, tag: bytes) -> Facts:
        """Return what events say of a block. before: of the block before it. root: salt and adapter."""
        digest = self._digest.block(self._digest.root(*root) if before is None else before.digest, tokens, tag)
        ids = tuple(memoryview(tokens).cast("i"))
        adapter = root[1] if isinstance(root[1], str) else None
        return Facts(None if before is None else before.digest, digest, ids, ordinal, keys_in(tag), adapter)

    def chain(self, prompt: Prompt, block_size: int) -> list[Facts]:
        """Return the facts of a prompt's blocks."""
        found: list[Facts] = []
        for k in range(prompt.num_blocks):
            tokens = prompt.ids[k * block_size : (k + 1) * block_size].astype("<i4").tobytes()
            tag = tag_of_block(prompt.marks, k * block_size, block_size)
            found.append(self.facts(found[-1] if found else None, prompt.root, k, tokens, tag))
        return found

    def kept(self, group: int, key: bytes, facts: Facts) -> None:
        """A host slot has the group's bytes of the block that the tiers call ``key``."""
        if self._here.setdefault((group, key), facts) is facts:  # it did not have them before
            self._waiting.append(self._stored(group, facts))

    def _stored(self, group: int, facts: Facts) -> BlockStored:
        rules = self._spec.groups[group]
        return BlockStored(
            block_hashes=(facts.digest,),
            parent_block_hash=facts.before,
            token_ids=facts.tokens,
            block_size=len(facts.tokens),
            medium=_MEDIUM,
            group=group,
            group_kind=group_kind(rules),
            window_tokens=rules.window_tokens,
            extra_keys=(facts.keys,) if facts.keys else None,
            ordinal=facts.ordinal,
            adapter=facts.adapter,
        )

    def gone(self, group: int, key: bytes) -> None:
        """No host slot has them any more."""
        facts = self._here.pop((group, key), None)
        if facts is not None:
            self._waiting.append(BlockRemoved((facts.digest,), _MEDIUM, group))

    def take(self, *, restart: bool) -> list[Event]:
        """Return the events since the last call; with ``restart``, one for each block that host slots have."""
        found, self._waiting = self._waiting, []
        if restart:
            found = [self._stored(group, facts) for (group, _), facts in self._here.items()]
        return found
