"""Events about blocks in host slots, for the router that reads the device's: ``medium="CPU"`` (docs/events.md)."""

from __future__ import annotations

from typing import NamedTuple

from kvmem.events.digests import ChainDigest, Key, keys_in
from kvmem.events.stream import BlockRemoved, BlockStored, Event, group_kind
from kvmem.spec import CacheSpec

__all__ = ["TierEvents"]

_MEDIUM = "CPU"


class _Facts(NamedTuple):
    """What events say of a block, whichever group has it."""

    before: bytes | None
    digest: bytes
    tokens: tuple[int, ...]
    ordinal: int
    keys: tuple[Key, ...]
    adapter: str | None


class TierEvents:
    """Follows the blocks of the index by node, as ``Tiering`` does, and collects events until they are taken.

    digest: of the allocator's event stream, so that hashes agree. Not thread-safe: its owner holds a lock.
    """

    def __init__(self, spec: CacheSpec, digest: ChainDigest) -> None:
        self._spec, self._digest = spec, digest
        self._facts: dict[int, _Facts] = {}  # by node
        self._here: dict[tuple[int, bytes], _Facts] = {}  # by group and key of the tiers
        self._waiting: list[Event] = []

    def node(self, node: int, parent: int, root: tuple[Key, Key], ordinal: int, tokens: bytes, tag: bytes) -> None:
        """The index has the block under this number from now on."""
        before = None if parent < 0 else self._facts[parent].digest
        digest = self._digest.block(before or self._digest.root(*root), tokens, tag)
        ids = tuple(memoryview(tokens).cast("i"))
        adapter = root[1] if isinstance(root[1], str) else None
        self._facts[node] = _Facts(before, digest, ids, ordinal, keys_in(tag), adapter)

    def kept(self, node: int, group: int, key: bytes) -> None:
        """A host slot has the group's bytes of the node."""
        facts = self._facts[node]
        if self._here.setdefault((group, key), facts) is not facts:
            return  # it had them before
        self._waiting.append(self._stored(group, facts))

    def _stored(self, group: int, facts: _Facts) -> BlockStored:
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
