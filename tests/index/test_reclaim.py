"""What leaves the cache passes the one hook before content is lost (``PageTable::demote``): each block once, of each group."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from follow_world import SPECS, make
from random_calls import Calls
from support import LONG, Steps

from kvmem.events import BlockRemoved, BlockStored

STEPS = 4_000 if LONG else 600
Block = tuple[int, int, tuple[int, ...]]  # group, ordinal, token ids


class Told:
    """The blocks that events say are removed, spelt out as they were stored."""

    def __init__(self) -> None:
        self.stored: dict[tuple[int, bytes], Block] = {}

    def removed(self, events: list[Any]) -> list[Block]:
        found = []
        for event in events:
            if isinstance(event, BlockStored):
                for i, name in enumerate(event.block_hashes):
                    ids = event.token_ids[i * event.block_size : (i + 1) * event.block_size]
                    self.stored[event.group, name] = event.group, event.ordinal + i, ids
            elif isinstance(event, BlockRemoved):
                found += [self.stored.pop((event.group, name)) for name in event.block_hashes]
        return found


@pytest.mark.parametrize("policy", ["lru", "density"])
@pytest.mark.parametrize("name", sorted(SPECS))
def test_a_tier_sees_every_block_that_is_lost_once(name: str, backend: str, policy: str, seed: int) -> None:
    """With memory and rows running out, trimming, forks and truncation, and calls that fail and are taken back."""
    leader = Calls(make(name, backend, device="meta", policy=policy, events=4096), random.Random(seed))
    told, seen = Told(), 0
    leader.alloc.core.watch_lost()
    loop = Steps(STEPS)
    while step := loop.next(seen > STEPS / 40):
        leader.step()
        lost, removed = leader.alloc.core.take_lost(), told.removed(leader.alloc.events())
        assert Counter(lost) == Counter(removed), step
        seen += len(lost)
    for handle in leader.alloc.core.handles():
        leader.sequences[handle].free()
    assert leader.alloc.clear_cache() > 0
    lost, removed = leader.alloc.core.take_lost(), told.removed(leader.alloc.events())
    assert Counter(lost) == Counter([*removed, *told.stored.values()])  # one event says of the rest that all are gone
