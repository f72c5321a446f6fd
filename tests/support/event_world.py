"""Both ends of the event stream, made simply: an index that tells what it does, and a router that believes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property

import numpy as np
from support import windows

import kvmem
from kvmem import _core
from kvmem.events import AllBlocksCleared, BlockRemoved, BlockStored, Event, EventBatch, EventStream
from kvmem.events.digests import block_digests

BLOCK = 4
MEDIA = ("GPU", "CPU")
Held = set[tuple[int, str, bytes]]


@cache
def spec_of() -> kvmem.CacheSpec:
    """Two groups, full attention and a window of 40 tokens."""
    return windows(BLOCK)


def root_of(root: int) -> tuple[str, str]:
    return f"s{root}", f"e{root}"


class Roots(dict[int, tuple[str, str]]):
    """The salts and extra keys of all roots there could be."""

    def __missing__(self, root: int) -> tuple[str, str]:
        return root_of(root)


class Drain:
    """A ring's batches as an allocator gives them: each again, until it is said to be taken."""

    def __init__(self, ring: _core.EventRing, resident: Callable[[], Iterable[object]]) -> None:
        self.ring, self.resident = ring, resident
        self.given = self.nothing = EventBatch(0, ring.drain(0, list), Roots())

    def __call__(self, taken: int, most: int, restart: bool) -> EventBatch:
        if restart or (most and self.given.number <= taken):
            records = self.ring.drain(most, self.resident, restart)
            self.given = EventBatch(self.given.number + (len(records) > 0), records, Roots())
        return self.given if self.given.number > taken else self.nothing


def stream_of(ring: _core.EventRing) -> EventStream:
    """A stream over a ring that never loses anything."""
    return EventStream(spec_of(), Drain(ring, list))


@dataclass
class Node:
    parent: int
    root: int
    chain: list[int]  # all tokens up to its end
    holders: set[tuple[int, int]] = field(default_factory=set)  # (group, tier)

    @property
    def tokens(self) -> np.ndarray:
        return np.array(self.chain[-BLOCK:], np.int32)

    @property
    def ordinal(self) -> int:
        return len(self.chain) // BLOCK - 1

    @cached_property
    def digest(self) -> bytes:
        salt, adapter = root_of(self.root)
        return block_digests(spec_of(), self.chain, salt=salt, adapter=adapter)[-1]


class World:
    """An index of blocks that changes at random. Its ids are used again as soon as they are free."""

    def __init__(self, rng: np.random.Generator, capacity: int) -> None:
        self.rng = rng
        self.ring = _core.EventRing(capacity, BLOCK)
        self.nodes: dict[int, Node] = {}

    def stream(self) -> EventStream:
        return EventStream(spec_of(), Drain(self.ring, self.resident), media=MEDIA)

    def held(self) -> Held:
        return {(group, MEDIA[tier], n.digest) for n in self.nodes.values() for group, tier in n.holders}

    def resident(self) -> Iterator[tuple[object, ...]]:
        for node, n in sorted(self.nodes.items(), key=lambda item: item[1].ordinal):
            for group, tier in sorted(n.holders) or [(-1, 0)]:
                yield node, n.parent, n.root, group, n.ordinal, n.tokens, tier

    def step(self) -> None:
        chance = self.rng.random()
        if chance < 0.005:
            self.nodes.clear()
            self.ring.cleared()
        elif chance < 0.55 or not self.nodes:
            self.insert()
        else:
            self.change()

    def insert(self) -> None:
        """A block after any other, or at a root; now and then one that nobody holds, but a block after it."""
        parent = int(self.rng.choice([-1, *self.nodes]))
        for _ in range(int(self.rng.integers(1, 6))):
            before = self.nodes.get(parent)
            root = before.root if before else int(self.rng.integers(0, 3))
            content = self.rng.integers(0, 4, BLOCK).tolist()
            node = Node(parent, root, (before.chain if before else []) + content)
            if any((n.root, n.chain) == (node.root, node.chain) for n in self.nodes.values()):
                return
            at = next(i for i in range(len(self.nodes) + 1) if i not in self.nodes)
            self.nodes[at] = node
            holders = [(0, 0), (1, 0), (0, 1), (1, 1)]
            chosen = [h for h in holders if self.rng.random() < 0.4]
            self.hold(at, chosen)
            parent = at
        if not self.nodes[parent].holders:
            self.hold(parent, [(0, 0)])

    def hold(self, at: int, holders: list[tuple[int, int]]) -> None:
        n = self.nodes[at]
        n.holders |= set(holders)
        for group, tier in holders or [(-1, 0)]:
            self.ring.stored(at, n.parent, n.root, group, n.ordinal, n.tokens, tier)

    def change(self) -> None:
        """Another holder for a block, or one fewer; a leaf that nobody holds is forgotten, and so on upwards."""
        at = int(self.rng.choice(list(self.nodes)))
        n = self.nodes[at]
        holder = (int(self.rng.integers(0, 2)), int(self.rng.integers(0, 2)))
        if holder not in n.holders:
            if self.rng.random() < 0.3:
                self.hold(at, [holder])
            return
        n.holders.remove(holder)
        self.ring.removed(at, *holder)
        while at >= 0 and not self.nodes[at].holders and all(m.parent != at for m in self.nodes.values()):
            at = self.nodes.pop(at).parent


class Router:
    """Follows a stream to the letter, and refuses what contradicts what it was told before."""

    def __init__(self) -> None:
        self.held: Held = set()
        self.chains: dict[bytes, tuple[str, tuple[int, ...]]] = {}  # what each digest stands for

    def follow(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, AllBlocksCleared):
                self.held.clear()
            elif isinstance(event, BlockRemoved):
                gone = {(event.group, event.medium, h) for h in event.block_hashes}
                assert len(gone) == len(event.block_hashes) and gone <= self.held, "removed, but not held"
                self.held -= gone
            else:
                self.store(event)

    def store(self, event: BlockStored) -> None:
        new = {(event.group, event.medium, h) for h in event.block_hashes}
        assert len(new) == len(event.block_hashes) and not new & self.held, "stored, but held already"
        size = event.block_size
        assert len(event.token_ids) == len(event.block_hashes) * size
        self.held |= new
        for i, digest in enumerate(event.block_hashes):
            content = (
                str((event.adapter, event.extra_keys and event.extra_keys[i])),
                event.token_ids[i * size : (i + 1) * size],
            )
            assert self.chains.setdefault(digest, content) == content, "one digest for two contents"
