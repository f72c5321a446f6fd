"""Blocks that leave the device and come back: from host memory, from a lower tier, on both backends and every kind of group."""

from __future__ import annotations

import random

import pytest
from support import LONG, Steps
from tier_world import SPECS, DictTier, World, make, prompts

import kvmem

STEPS = 2_000 if LONG else 120


@pytest.mark.core
@pytest.mark.parametrize("name", sorted(SPECS))
def test_blocks_come_back_from_host_memory(name: str, backend: str, seed: int) -> None:
    rng = random.Random(seed)
    world = World(make(name, backend, host_blocks=rng.choice([2, 8, 40])))
    texts, loop = prompts(rng, 14), Steps(STEPS)
    while loop.next(world.alloc.tiering.counters["host"] > 5):
        world.run(rng.choice(texts), salt=rng.choice([None, "a"]))
        assert world.alloc.check() == []
    assert world.hits > 0
