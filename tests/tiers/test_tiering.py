"""Blocks that leave the device and come back: from host memory, from a lower tier, on both backends and every kind of group."""

from __future__ import annotations

import random

import pytest
from support import LONG, Steps
from tier_world import MORE, PAGE, SPECS, DictTier, Prompts, Ranks, World, make, prompts

import kvmem
from kvmem.events import AllBlocksCleared, BlockRemoved, BlockStored

STEPS = 2_000 if LONG else 120


@pytest.mark.core
@pytest.mark.parametrize("name", sorted(SPECS))
def test_blocks_come_back_from_host_memory(name: str, backend: str, seed: int) -> None:
    rng = random.Random(seed)
    world = World(make(name, backend, host_blocks=rng.choice([2, 8, 40])))
    texts, loop = Prompts(rng, 14), Steps(STEPS)
    while loop.next(world.alloc.tiering.counters["host"] > 5):
        world.run(texts.next(), salt=rng.choice([None, "a"]))
        assert world.alloc.check() == []
    assert world.hits > 0


@pytest.mark.parametrize("write", ["through", "back"])
@pytest.mark.parametrize("name", sorted(SPECS))
def test_blocks_come_back_from_a_lower_tier(name: str, backend: str, write: str, seed: int) -> None:
    """Host memory of a few blocks, so that most loads pass through slots that others want too."""
    rng = random.Random(seed)
    tier = DictTier()
    world = World(make(name, backend, host_blocks=rng.choice([2, 3, 9]), lower=[tier], write=write))
    texts, loop = Prompts(rng, 14), Steps(STEPS)
    while loop.next(world.alloc.tiering.counters["dict: read"] > 5):
        world.run(texts.next(), salt=rng.choice([None, "a"]), load="all" if rng.random() < 0.5 else "host")
        assert world.alloc.check() == []
    world.alloc.close()


@pytest.mark.core
@pytest.mark.parametrize("name", ["full", *MORE])
def test_another_process_finds_what_one_has_written(name: str, backend: str, seed: int) -> None:
    """A second allocator of the other backend and another interleave, over the same tier."""
    rng, tier = random.Random(seed), DictTier()
    text = [rng.randrange(100) for _ in range(60)]
    other = {"paged": "virtual", "virtual": "paged"}[backend]
    with make(name, backend, host_blocks=20, lower=[tier]) as alloc:
        World(alloc).run(text)
        assert alloc.store(text) == 15 and alloc.store(text) == 0
        assert alloc.flush(30)
    assert len(tier.data) == 15
    for model, cached in (("toy", 56), ("another", 0)):
        with make(name, other, interleave="none", host_blocks=3, lower=[tier], model=model) as alloc:
            world = World(alloc)
            assert alloc.match(text).by_tier == {"device": 0, "host": 0}
            assert world.run(text, load="all") == cached
            assert world.run(text, salt="other", load="all") == 0


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.core] * (name in ("window", "state"))) for name in sorted(SPECS)]
)
def test_a_rank_that_follows_the_ops_holds_the_same_bytes(name: str, backend: str, seed: int) -> None:
    rng = random.Random(seed)
    world = Ranks(name, backend, host_blocks=6)
    texts, loop = Prompts(rng, 12), Steps(60)
    while loop.next({"load", "store"} <= world.kinds):
        world.run(texts.next())
        assert world.alloc.check() == [] and world.memories[1].check() == []


def test_events_tell_what_host_memory_has(backend: str, seed: int) -> None:
    """A router that applies them knows which blocks it has, and tells the device's apart by the medium."""
    rng = random.Random(seed)
    world = World(make("window", backend, host_blocks=5, events=4096))
    texts = prompts(rng, 10)
    here: dict[str, set[tuple[int, bytes]]] = {"GPU": set(), "CPU": set()}
    for step in range(120):
        world.run(rng.choice(texts))
        for event in world.alloc.events(restart=step == 60):
            if isinstance(event, AllBlocksCleared):
                here = {"GPU": set(), "CPU": set()}
            elif isinstance(event, BlockStored):
                assert len(event.token_ids) == event.block_size * len(event.block_hashes)
                here[event.medium] |= {(event.group, name) for name in event.block_hashes}
            else:
                here[event.medium] -= {(event.group, name) for name in event.block_hashes}
        counts = [sum(g == group for g, _ in here["CPU"]) for group in range(2)]
        assert counts == world.alloc.tiering.host_blocks(), step
    assert here["CPU"] and here["GPU"]
    world.alloc.clear_cache()
    for event in world.alloc.events():
        if isinstance(event, BlockRemoved):
            here[event.medium] -= {(event.group, name) for name in event.block_hashes}
    assert not here["CPU"]


@pytest.mark.parametrize("name", ["full", "window", "state"])
def test_more_moves_than_the_queue_holds(name: str, backend: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lost its name is a miss, its slots serve other blocks, and what has a name is right."""
    monkeypatch.setattr("kvmem.allocator.opening.MOVE_TOKENS", 1)  # the least: room for 4,096 moves
    rng, tier = random.Random(seed), DictTier()
    with make(name, backend, host_blocks=12, lower=[tier]) as alloc:
        world, texts = World(alloc), Prompts(rng, 14)
        for first in (1000, 100_000):
            for start in range(first, first + 8000, 40):
                world.run(list(range(start, start + 40)), load="device")  # which does not read the queue
                alloc.core.clear_cache()
            alloc.tiering.settle()
            assert alloc.tiering._batch is not None and alloc.tiering._batch.lossy
            loop, before = Steps(60), alloc.tiering.counters["host"]
            while loop.next(alloc.tiering.counters["host"] > before + 5):
                world.run(texts.next(), load=rng.choice(["host", "all"]))
                assert alloc.check() == []
        assert all(alloc.tiering.host_blocks()) and alloc.flush(60)


@pytest.mark.core
@pytest.mark.parametrize(("first", "second"), [("virtual", "paged"), ("paged", "paged"), ("virtual", "virtual")])
def test_two_allocators_of_one_pool_have_tiers_each(first: str, second: str, seed: int) -> None:
    """One's growth evicts what the other caches, whose blocks go to its own host slots."""
    rng, tiers = random.Random(seed), [DictTier(), DictTier()]
    pool = kvmem.PagePool(memory=30 * PAGE, page_bytes=PAGE, device="cpu")
    worlds = [
        World(make("full", backend, host_blocks=20, lower=[tier], model=backend, pool=pool))
        for backend, tier in zip((first, second), tiers, strict=True)
    ]
    texts, loop = Prompts(rng, 8), Steps(STEPS)
    while loop.next(all(w.alloc.tiering.counters["host"] > 5 for w in worlds)):
        world = rng.choice(worlds)
        for _ in range(rng.randrange(1, 6)):
            world.run(texts.next(), load=rng.choice(["host", "all"]), salt=str(worlds.index(world)))
        for each in worlds:
            assert each.alloc.check() == []
    for world in worlds:
        world.alloc.close()
