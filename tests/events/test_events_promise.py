"""A replica that knows nothing but the events: for each prefix of everything that was ever committed it foretells what
`match()` finds, under windows of every size, states, pins and memory that is short."""

from __future__ import annotations

import random

import pytest
from event_world import Router
from lockstep_prefix import MARK, NO_ROOT, PrefixLockstep
from prefix_walk import author, step
from support import make_allocator

import kvmem
from kvmem import Component, Group
from kvmem.events.digests import block_digests

pytestmark = pytest.mark.core
BLOCK, GUARD = 4, (0, 3)
PAIR = tuple(Component(name, width=64, dtype="float32") for name in "kv")  # 2 KiB a block
STATE = (Component("state", width=40, dtype="float32", growth="fixed"),)


def spec_of(*windows: int | None, state: bool = False) -> kvmem.CacheSpec:
    """A layer for each window, None for full attention; then one with a state."""
    groups = [Group(f"g{i}", PAIR, (i,), window_tokens=window) for i, window in enumerate(windows)]
    if state:
        groups.append(Group("state", STATE, (len(groups),)))
    return kvmem.CacheSpec(tuple(groups), block_size=BLOCK)


SPECS = {
    "full": spec_of(None),
    "window of 1": spec_of(None, 1),
    "window of half a block": spec_of(None, 2),
    "window of 5 blocks": spec_of(None, 20),
    "two windows": spec_of(None, 3, 17),
    "all sliding": spec_of(9),
    "all sliding, two": spec_of(5, 14),
    "all sliding, 1 token": spec_of(1),
    "state": spec_of(None, state=True),
    "state and window": spec_of(None, 9, state=True),
    "state and windows only": spec_of(7, state=True),
}


class Replica(Router):
    """Foretells matches from what it was told."""

    def __init__(self, spec: kvmem.CacheSpec, guard: int) -> None:
        super().__init__()
        self.spec, self.guard = spec, guard

    def promised(self, tokens: list[int]) -> int:
        """How many of ``tokens``, in whole blocks, a request that begins with them is promised."""
        digests = block_digests(self.spec, tokens)
        return max((n for n in range(1, len(digests) + 1) if self._holds(digests[:n])), default=0) * BLOCK

    def _holds(self, digests: list[bytes]) -> bool:
        def told(group: int, some: list[bytes]) -> bool:
            return all((group, "GPU", d) in self.held for d in some)

        n = len(digests)
        for i, group in enumerate(self.spec.groups):
            first = 0
            if group.growth == "fixed":
                first = n - 1
            elif group.window_tokens:
                first = max(0, n * BLOCK - group.window_tokens + 1 - self.guard) // BLOCK
            if not told(i, digests[first:]):
                return False
        return True


@pytest.mark.parametrize("guard", GUARD)
@pytest.mark.parametrize("name", SPECS)
def test_what_events_promise_is_what_is_found(backend: str, name: str, guard: int, rng: random.Random) -> None:
    alloc = make_allocator(
        SPECS[name], backend, memory=4096 * 60, page_bytes=4096, max_sequences=5, max_tokens=100, events=100_000,
        record_ops=backend == "virtual", partial_reuse=False, tail_guard_tokens=guard, device="meta", policy=rng.choice(["lru", "density"]),
    )  # fmt: skip
    pair, replica = (
        PrefixLockstep(alloc, contents=False, partial_reuse=False),
        Replica(SPECS[name], alloc.tail_guard_tokens),
    )
    writer = author(pair, rng)
    for _ in range(150):
        step(pair, rng, writer)
        pair.agree()
        replica.follow(alloc.events())
        root = pair.model.root(NO_ROOT)
        said = [content.tokens for content in pair.model.contents.values() if content.root is root]
        text = rng.choice([*writer.prompts, *said])
        wrong = []
        for end in range(BLOCK, len(text) + 1, BLOCK):
            promised, found = replica.promised(text[:end]), alloc.match([*text[:end], 9]).num_tokens
            # Of what needs no memory (a window of one token at a block's end) only the allocator knows.
            if found != promised and (name != "all sliding, 1 token" or found > promised):
                wrong.append((end, promised, found))
        assert not wrong, wrong
        for pin, nodes in pair.pins:
            kept = [token for node in nodes for token in node.tokens]
            if nodes[0].parent is root and max(kept) < MARK:
                assert alloc.match([*kept, 9]).num_tokens == pin.num_tokens
