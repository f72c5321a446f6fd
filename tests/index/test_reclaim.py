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
from kvmem.tiers import Tiers

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


class Kept:
    """The blocks that have got a host slot, spelt out as the queue of moves stored them."""

    def __init__(self, core: Any) -> None:
        self.core, self.taken, self.nodes = core, 0, dict[int, tuple[int, tuple[int, ...]]]()

    def take(self) -> list[Block]:
        number, records, _ = self.core.drain_moves(self.taken)
        if number == self.taken:
            return []
        self.taken, row, found = number, 0, []
        columns = (records.kinds, records.nodes, records.groups, records.ordinals)
        for kind, node, group, ordinal in zip(*(c.tolist() for c in columns), strict=True):
            if kind == 0:
                self.nodes[node] = ordinal, tuple(records.tokens[row].tolist())
                row += 1
            elif kind == 3:
                found.append((group, *self.nodes[node]))
        return found


@pytest.mark.parametrize("policy", ["lru", "density"])
@pytest.mark.parametrize("name", sorted(SPECS))
def test_host_slots_get_every_block_that_is_lost_once(name: str, backend: str, policy: str, seed: int) -> None:
    """With memory and rows running out, trimming, forks and truncation, and calls that fail and are taken back. What is
    cut off counts as wrong, so host memory gets none of it."""
    options = {"device": "meta", "policy": policy, "events": 4096, "tiers": Tiers(host="1MiB")}
    leader = Calls(make(name, backend, **options), random.Random(seed))
    leader.alloc._tiering = None  # it would take the moves first
    told, kept, seen = Told(), Kept(leader.alloc.core), 0
    loop = Steps(STEPS)
    while step := loop.next(seen > STEPS / 40):
        leader.step()
        lost, removed = kept.take(), told.removed(leader.alloc.events())
        assert Counter(lost) == (Counter() if leader.verb == "truncate" else Counter(removed)), step
        seen += len(lost)
    for handle in leader.alloc.core.handles():
        leader.sequences[handle].free()
    assert leader.alloc.core.clear_cache() > 0
    lost, removed = kept.take(), told.removed(leader.alloc.events())
    assert Counter(lost) == Counter([*removed, *told.stored.values()])  # one event says of the rest that all are gone
