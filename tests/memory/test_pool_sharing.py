"""Several allocators on one pool: memory moves to where it is needed, nothing else does."""

from __future__ import annotations

import random
from itertools import count

import numpy as np
import pytest
import torch
from support import BACKENDS, LONG, Steps
from support_world import NOTHING, PAGE, World, checked, held, mixed_spec, plain_spec

import kvmem

pytestmark = pytest.mark.core

PAIRS = [(a, b) for a in BACKENDS for b in BACKENDS]
SIZES = {"interleave": 1, "max_sequences": 6, "max_tokens": 3000}


def make_pool(pages: int) -> tuple[kvmem.PagePool, object]:
    driver = checked()
    return kvmem.PagePool(memory=pages * PAGE, page_bytes=PAGE, driver=driver), driver


def join(
    pool: kvmem.PagePool, backend: str, tags: int = 0, spec: kvmem.CacheSpec | None = None, **options: object
) -> World:
    """A new allocator of the pool. ``tags``: another number for each, so that what a neighbour has written is seen."""
    alloc = kvmem.Allocator(spec or plain_spec(), backend=backend, pool=pool, **SIZES | {"debug": True} | options)  # type: ignore[arg-type]
    return World(alloc, count(1 + (tags << 40)))


@pytest.mark.parametrize(("giver", "taker"), PAIRS)
def test_parked_memory_goes_to_a_neighbour(giver: str, taker: str) -> None:
    """The first fills the pool and frees most of it; the second grows beyond what is free. And back again."""
    pool, _ = make_pool(60)
    worlds = [join(pool, giver, 1), join(pool, taker, 2, plain_spec(3))]
    for first, second in [worlds, worlds[::-1], worlds]:
        kept = first.start(100)
        gone = first.start(0)
        while first.run(first.extend(gone, 64)):
            assert first.run(first.commit(gone, 64, [0]))
        assert first.run(first.free([gone]))
        before = first.alloc.stats()
        assert before.parked_bytes > 30 * PAGE and pool.budget_bytes - pool.mapped_bytes < 4 * PAGE
        taken = second.start(500)
        assert first.alloc.stats().parked_bytes <= before.parked_bytes - 10 * PAGE
        for world in (first, second):
            world.healthy()
        assert pool.mapped_bytes <= pool.budget_bytes
        assert first.run(first.free([kept])) and second.run(second.free([taken]))


def test_ones_own_parked_memory_goes_first() -> None:
    for backend in BACKENDS:
        pool, _ = make_pool(46)
        first, second = join(pool, backend, 1), join(pool, backend, 2)
        for world in (first, second):
            assert world.run(world.free([world.start(320), world.start(320)]))
        assert pool.budget_bytes - pool.mapped_bytes <= 6 * PAGE
        before = first.alloc.stats().parked_bytes
        second.start(640)  # 20 pages: more than a parked row of 10 and what is free
        assert first.alloc.stats().parked_bytes == before, f"{backend}: there was enough without it"
        second.start(320)
        assert first.alloc.stats().parked_bytes < before, f"{backend}: there was not"
        second.healthy()


def memory_of(world: World, handle: int) -> torch.Tensor:
    """uint8 [reserved tokens, all bytes] of a sequence, found by its block table as a kernel finds it."""
    size = world.groups[0].block_size
    batch = world.alloc.batch([handle])
    slots = batch.slot_mapping
    assert slots is not None
    tensors = [part for layer in world.alloc.spec.groups[0].layers for part in world.alloc.kv(layer)]
    return torch.cat([t[slots // size, slots % size].flatten(1).view(torch.uint8) for t in tensors], 1)


def fill_with_ones(world: World, handle: int) -> None:
    size = world.groups[0].block_size
    slots = world.alloc.batch([handle]).slot_mapping
    for layer in world.alloc.spec.groups[0].layers:
        for part in world.alloc.kv(layer):
            part.view(torch.uint8)[slots // size, slots % size] = 0xFF


@pytest.mark.parametrize(("giver", "taker"), PAIRS)
@pytest.mark.parametrize("zero", ["fresh", "always", "never"])
def test_what_a_neighbour_left_reads_zero(zero: str, giver: str, taker: str) -> None:
    pool, _ = make_pool(60)
    first, second = join(pool, giver, 1), join(pool, taker, 2, zero=zero)
    for _ in range(3):  # the pages come back to it with 0xFF of the other, whatever they held before
        handle = first.core.open()
        first.core.extend(handle, 1800)
        fill_with_ones(first, handle)
        assert bool((memory_of(first, handle) == 0xFF).all())
        first.core.free(handle)
        handle = second.core.open()
        second.core.extend(handle, 1500)
        found = memory_of(second, handle)
        assert bool((found == (0xFF if zero == "never" else 0)).any())
        if zero != "never":
            assert not bool(found.any())
        if zero == "always":  # its own memory too, when the next sequence gets it
            fill_with_ones(second, handle)
            second.core.free(handle)
            handle = second.core.open()
            second.core.extend(handle, 1500)
            assert not bool(memory_of(second, handle).any())
        second.core.free(handle)


@pytest.mark.parametrize("ahead", [0, 100])
def test_a_random_life_of_four_allocators(ahead: int, rng: random.Random) -> None:
    """Different specs, both backends, one budget that changes: it holds after every call, and no content is lost."""
    pool, driver = make_pool(150)
    specs = [plain_spec(), mixed_spec(), plain_spec(3), mixed_spec()]
    worlds = [
        join(pool, BACKENDS[i % 2], i + 1, spec, max_tokens=400, debug=False, map_ahead_tokens=ahead)
        for i, spec in enumerate(specs)
    ]
    refused, moved = 0, 0
    loop = Steps(8000 if LONG else 700)
    while step := loop.next(refused and moved):
        world = rng.choice(worlds)
        others = [w.alloc.stats().mapped_bytes for w in worlds if w is not world]
        refused += not world.run(world.choose(rng))
        moved += [w.alloc.stats().mapped_bytes for w in worlds if w is not world] != others
        if step % 25 == 0:
            try:
                pool.set_memory(rng.randint(70, 150) * PAGE)
            except kvmem.OutOfMemory:
                refused += 1
        assert pool.mapped_bytes <= pool.budget_bytes
        assert driver.live().pages * PAGE <= pool.budget_bytes or ahead  # the mapper may be about to create or undo
        assert sum(w.alloc.stats().mapped_bytes for w in worlds) == pool.mapped_bytes
        if step % 20 == 0:
            for world in worlds:
                world.healthy()
    for world in worlds:
        world.healthy()
    while worlds:
        worlds.pop(rng.randrange(len(worlds))).__dict__.clear()
        del world
        for world in worlds:
            world.healthy()
        world = None
    assert pool.mapped_bytes == 0
    del pool
    assert held(driver) == NOTHING


def test_memory_caps_an_allocator_within_a_pool(backend: str) -> None:
    pool, _ = make_pool(60)
    capped, free = join(pool, backend, 1, memory=20 * PAGE), join(pool, backend, 2)
    handle = capped.start(600)
    with pytest.raises(kvmem.OutOfMemory, match="set_memory"):
        capped.core.extend(handle, 200)
    assert capped.alloc.stats().mapped_bytes <= 20 * PAGE
    capped.healthy()
    free.start(1000)  # the cap of one is no cap of the other
    capped.alloc.set_memory(30 * PAGE)
    assert capped.run(capped.extend(handle, 200))
    with pytest.raises(kvmem.OutOfMemory):
        capped.alloc.set_memory(10 * PAGE)
    assert capped.run(capped.commit(handle, 200, [0]))
    with pytest.raises(kvmem.OutOfMemory):
        capped.core.extend(handle, 400)
    assert capped.run(capped.truncate(handle, 200))
    capped.alloc.set_memory(10 * PAGE)  # what is parked goes
    assert capped.alloc.stats().mapped_bytes <= 10 * PAGE and pool.budget_bytes == 60 * PAGE
    for world in (capped, free):
        world.healthy()


@pytest.mark.parametrize(("giver", "taker"), PAIRS)
def test_the_budget_grows_and_shrinks_live(giver: str, taker: str) -> None:
    pool, driver = make_pool(40)
    first, second = join(pool, giver, 1), join(pool, taker, 2)
    kept = [first.start(300), second.start(300)]
    gone = second.start(250)
    with pytest.raises(kvmem.OutOfMemory):
        first.core.extend(kept[0], 600)
    pool.set_memory(80 * PAGE)
    with pytest.raises(kvmem.OutOfMemory):  # its own limit is what the pool had when it was made
        first.core.extend(kept[0], 2000)
    assert first.run(first.extend(kept[0], 600))
    assert first.run(first.truncate(kept[0], 300)) and second.run(second.free([gone]))
    in_use = sum(w.alloc.stats().mapped_bytes - w.alloc.stats().parked_bytes for w in (first, second))
    with pytest.raises(kvmem.OutOfMemory, match="smallest that would fit"):
        pool.set_memory(in_use - PAGE)
    assert pool.budget_bytes == 80 * PAGE
    pool.set_memory(in_use)
    assert pool.mapped_bytes == in_use == driver.live().pages * PAGE == first.alloc.stats().physical_bytes
    for world in (first, second):
        world.healthy()
    pool.set_memory(80 * PAGE)
    second.start(600)
    for world in (first, second):
        world.healthy()


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_closed_allocator_returns_its_pages(first: str, second: str) -> None:
    pool, driver = make_pool(60)
    stays, goes = join(pool, first, 1), join(pool, second, 2)
    kept = stays.start(200)
    alone = driver.live()
    goes.start(1200)
    with pytest.raises(kvmem.OutOfMemory):
        stays.core.extend(kept, 1400)
    goes.__dict__.clear()
    stays.healthy()
    assert pool.mapped_bytes == stays.alloc.stats().mapped_bytes
    assert driver.live().mappings == alone.mappings and driver.live().reservations < alone.reservations
    stays.grow(kept, 1400)
    stays.healthy()


def test_a_constructor_that_fails_leaves_the_pool_alone(backend: str) -> None:
    pool, driver = make_pool(60)
    world = join(pool, backend, 1)
    handle = world.start(300)
    before, mapped = held(driver), pool.mapped_bytes
    wrong = {"memory": PAGE - 1}, {"max_sequences": 0}, {"max_tokens": 1 << 40}, {"device": "cpu"}, {"record_ops": True}
    for options in wrong:
        with pytest.raises((kvmem.SpecError, kvmem.OutOfMemory)):  # a block table that long finds no host memory
            join(pool, backend, 2, **options)
    for nth in (1, 2):
        driver.fail("reserve", nth, 2)
        with pytest.raises(kvmem.OutOfMemory):
            join(pool, backend, 2)
    assert held(driver) == before and pool.mapped_bytes == mapped
    join(pool, backend, 3).start(300)
    assert world.run(world.extend(handle, 1000)), "what the failed ones asked for is not held"
    world.healthy()


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_out_of_memory_only_when_live_sequences_hold_everything(a: str, b: str, seed: int) -> None:
    """Tokens are added one page at a time, here and there; what is parked anywhere is always found first."""
    rng = np.random.default_rng(seed)
    pool, _ = make_pool(50)
    worlds = [join(pool, a, 1, debug=False), join(pool, b, 2, plain_spec(3), debug=False)]
    refusals = 0
    while refusals < 40:
        world = worlds[rng.integers(2)]
        need = 64 * len(world.alloc._layouts[0].token_bytes) // 64
        if not world.sequences:
            handle = world.start(0)
        handle = sorted(world.sequences)[rng.integers(len(world.sequences))]
        if world.run(world.extend(handle, 64)):
            assert world.run(world.commit(handle, 64, [0]))
        else:
            refusals += 1
            stats = [w.alloc.stats() for w in worlds]
            parked = sum(s.parked_bytes for s in stats)
            # Blocks of 16 tokens are exact quarters of a page here: of a page for each layer, none can be missing
            # and parked.
            assert pool.budget_bytes - pool.mapped_bytes + parked < need * PAGE, stats
            for w in worlds:
                w.healthy()
            victim = worlds[rng.integers(2)]
            if victim.sequences:
                assert victim.run(victim.free([sorted(victim.sequences)[0]]))
        if len(world.sequences) < 4 and rng.random() < 0.2:
            world.start(0)
