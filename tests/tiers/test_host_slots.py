"""The order in which blocks leave host memory: ends of chains first, one slot for each content, and as long as they are retained."""

from __future__ import annotations

import random

import pytest
from tier_world import World, make

import kvmem

pytestmark = pytest.mark.core


def take(alloc: kvmem.Allocator, key: int, parent: int = 0) -> tuple[int, int]:
    name = alloc.core.take_slot(0, key, parent)
    assert alloc.check() == []
    return name


def test_the_end_of_a_chain_leaves_before_its_beginning(backend: str, rng: random.Random) -> None:
    """In whatever order its blocks came, and also where a block comes after one that follows it."""
    with make("full", backend, host_blocks=8) as alloc:
        order = rng.sample(range(8), 8)
        chain = {k: take(alloc, 100 + k, 99 + k if k else 0) for k in order}
        alloc.core.release_slots(list(chain.values()))
        for n in range(1, 8):
            alloc.core.release_slots([take(alloc, n)])
            assert alloc.core.has_slots([chain[k] for k in range(8)]) == [k < 8 - n for k in range(8)]


def test_a_content_has_one_slot_unless_that_is_held(backend: str) -> None:
    with make("full", backend, host_blocks=4) as alloc:
        first = take(alloc, 7)
        second = take(alloc, 7)  # the first is held by a transfer
        assert first[0] != second[0] and alloc.core.has_slots([first, second]) == [True, True]
        alloc.core.release_slots([first, second])
        third = take(alloc, 7)
        assert third[0] in (first[0], second[0]) and alloc.core.free_slots(0) == 2
        alloc.core.drop_slots([first, second, third])
        alloc.core.release_slots([third])
        assert alloc.core.free_slots(0) == 4 and alloc.check() == []


def test_a_prompt_that_is_computed_again_takes_no_second_slots(backend: str) -> None:
    with make("full", backend, host_blocks=30) as alloc:
        world, text = World(alloc), list(range(40))
        for _ in range(3):
            world.run(text, load="device")
            alloc.core.clear_cache()  # the device has nothing now
            assert alloc.tiering.host_blocks() == [10]
            assert alloc.core.free_slots(0) == 20
        assert world.hits == 0 and world.run(text) == 36


def retained(alloc: kvmem.Allocator, text: list[int], priority: int, ttl: float | None = None) -> None:
    world = World(alloc)
    with alloc.sequence(text) as seq:
        seq.retain(0, len(text), priority=priority, ttl=ttl)
        world.go_on(seq, text)
    alloc.core.clear_cache()


@pytest.mark.parametrize("policy", ["lru", "density"])
@pytest.mark.parametrize("name", ["full", "window"])
def test_retention_goes_down_and_comes_back(name: str, backend: str, policy: str, seed: int) -> None:
    """A retained prompt outlives others in host memory, also once it has been on the device again in between."""
    rng = random.Random(seed)
    with make(name, backend, host_blocks=16, policy=policy) as alloc:
        world, text = World(alloc), list(range(24))
        others = [[100 * n + rng.randrange(100) for _ in range(24)] for n in range(1, 6)]
        retained(alloc, text, 90)
        for _ in range(2):
            for other in others:
                world.run(other)
                alloc.core.clear_cache()
            assert world.run(text) == 20
            alloc.core.clear_cache()


@pytest.mark.parametrize(("priority", "ttl", "cached"), [(10, None, 0), (90, 1e-3, 0), (90, 1e6, 20), (50, None, 0)])
def test_low_and_expired_priorities_leave_first(priority: int, ttl: float | None, cached: int, backend: str) -> None:
    with make("full", backend, host_blocks=12, policy="lru") as alloc:
        world, other = World(alloc), list(range(100, 124))
        world.run(other)
        alloc.core.clear_cache()
        retained(alloc, list(range(24)), priority, ttl)
        assert alloc.core.free_slots(0) == 0
        world.run(list(range(200, 224)))
        alloc.core.clear_cache()
        if priority < 50:
            assert world.run(other) == 20  # although it is older
        else:
            world.run(other)
            alloc.core.clear_cache()
        assert world.run(list(range(24))) == cached
