"""Several allocators over one pool: memory goes where it is needed, contents stay, budgets and limits hold."""

from __future__ import annotations

import gc
import random
from itertools import count

import pytest
import torch
from support_world import BACKENDS, NOTHING, PAGE, World, checked, held, mixed_spec, plain_spec, seed_from_environment

import kvmem
from kvmem import OutOfMemory

SIZES = dict(max_sequences=5, max_tokens=400, interleave=1)


def pool_of(pages: int, driver: object = None) -> kvmem.PagePool:
    return kvmem.PagePool(memory=pages * PAGE, page_bytes=PAGE, driver=driver)


def test_four_allocators_under_pressure_keep_their_contents() -> None:
    """Both backends, two specs. Every step of one may take what another has parked; budgets hold at each of them."""
    rng = random.Random(seed_from_environment(31))
    driver = checked()
    pool = pool_of(90, driver)
    tags = count(1)
    worlds = [
        World(kvmem.Allocator(spec(), backend=b, pool=pool, **SIZES), tags)
        for b in BACKENDS
        for spec in (plain_spec, mixed_spec)
    ]
    served, moved, owned = 0, 0, [0] * len(worlds)
    for step in range(2500):
        at = rng.randrange(len(worlds))
        before = [w.alloc.stats().mapped_bytes for w in worlds]
        action = worlds[at].choose(rng)
        served += worlds[at].run(action)
        after = [w.alloc.stats().mapped_bytes for w in worlds]
        assert sum(after) == pool.mapped_bytes <= pool.budget_bytes
        assert held(driver)["pages"] * PAGE <= pool.budget_bytes
        moved += after[at] > before[at] and any(after[i] < before[i] for i in range(len(worlds)) if i != at)
        owned = [max(a, b) for a, b in zip(owned, after, strict=True)]
        if step % 5 == 0 or moved:
            for world in worlds:
                world.healthy()
    assert moved > 20 and served > 1500
    assert sum(owned) > 1.3 * pool.budget_bytes, "they would not fit together at their largest: memory must have moved"
    for world in worlds:
        world.__dict__.clear()
    del world, worlds, action
    gc.collect()
    assert pool.mapped_bytes == 0
    del pool
    gc.collect()
    assert held(driver) == NOTHING


@pytest.mark.parametrize("giver_backend", BACKENDS)
@pytest.mark.parametrize("taker_backend", BACKENDS)
@pytest.mark.parametrize("zero", ["fresh", "always", "never"])
def test_a_neighbours_page_is_zeroed(giver_backend: str, taker_backend: str, zero: str) -> None:
    """And with ``zero="never"`` it is not: what that option gives up, and that this test can see it."""
    pool = pool_of(20)
    giver = World(kvmem.Allocator(plain_spec(), backend=giver_backend, pool=pool, **SIZES))
    handle = giver.core.open()
    giver.run(("", lambda: handle, giver.open()[2]))
    giver.run(giver.extend(handle, 400))
    giver.run(giver.commit(handle, 400, [0]))
    taker = kvmem.Allocator(plain_spec(), backend=taker_backend, pool=pool, zero=zero, **SIZES)
    giver.run(giver.free([handle]))
    sequence = taker.sequence()
    sequence.extend(400)
    # by bits: a pattern may read as NaN
    seen = any(
        bool(taker.sequence_tensor(sequence, layer, c).view(dtype=torch.int16).any()) for layer in (0, 1) for c in "kv"
    )
    assert seen == (zero == "never")
    assert giver.alloc.check() == [] and taker.check() == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_always_zeroes_what_a_sequence_of_ones_own_left(backend: str) -> None:
    alloc = kvmem.Allocator(plain_spec(), backend=backend, memory=20 * PAGE, page_bytes=PAGE, zero="always", **SIZES)
    world = World(alloc)
    for _ in range(3):
        world.run(world.open())
        (handle,) = world.sequences
        world.run(world.extend(handle, 300))
        assert not alloc.sequence_tensor(handle, 0, "k").any() and not alloc.sequence_tensor(handle, 1, "v").any()
        world.run(world.commit(handle, 300, [0]))
        world.verify()
        world.run(world.free([handle]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_limit_holds_within_a_pool(backend: str) -> None:
    pool = pool_of(40)
    limited = kvmem.Allocator(plain_spec(), backend=backend, pool=pool, memory=10 * PAGE, **SIZES)
    free = kvmem.Allocator(plain_spec(), backend=backend, pool=pool, **SIZES)
    first, second = limited.sequence(), free.sequence()
    with pytest.raises(OutOfMemory, match="of 10 allowed pages"):
        first.extend(400)
    first.extend(256)
    assert limited.stats().mapped_bytes <= 10 * PAGE
    second.extend(400)  # the neighbour has no limit but the pool's
    limited.set_memory(20 * PAGE)
    first.extend(100)
    with pytest.raises(OutOfMemory, match="smallest that would fit"):
        limited.set_memory(5 * PAGE)
    first.truncate(64)
    limited.set_memory(5 * PAGE)
    assert limited.stats().mapped_bytes <= 5 * PAGE and pool.budget_bytes == 40 * PAGE


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_pools_budget_grows_and_shrinks_under_its_users(backend: str) -> None:
    rng = random.Random(seed_from_environment(37))
    driver = checked()
    pool = pool_of(40, driver)
    worlds = [World(kvmem.Allocator(plain_spec(), backend=b, pool=pool, **SIZES)) for b in (backend, "virtual")]
    refused = 0
    for _ in range(600):
        world = rng.choice(worlds)
        world.run(world.choose(rng))
        if rng.random() < 0.2:
            pages, before = rng.randint(4, 60), pool.budget_bytes
            live = sum(s.mapped_bytes - s.parked_bytes for s in (w.alloc.stats() for w in worlds))
            try:
                pool.set_memory(pages * PAGE)
            except OutOfMemory:
                refused += 1
                assert pool.budget_bytes == before and live > pages * PAGE
            else:
                assert pool.budget_bytes == pages * PAGE
        assert held(driver)["pages"] * PAGE <= pool.budget_bytes
        for world in worlds:
            world.healthy()
    assert refused > 5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("live", [True, False])
def test_an_allocator_that_goes_leaves_its_pages_to_the_pool(backend: str, live: bool) -> None:
    driver = checked()
    pool = pool_of(20, driver)
    for _ in range(3):
        one = kvmem.Allocator(plain_spec(), backend=backend, pool=pool, **SIZES)
        with_tokens = one.sequence()
        with_tokens.extend(400)
        view = with_tokens.kv(0)
        if not live:
            with_tokens.free()
        assert pool.mapped_bytes >= 14 * PAGE
        del one, with_tokens
        gc.collect()
        if backend == "virtual":
            view[0].fill_(1)  # a view keeps its memory, and so the allocator, alive
            assert pool.mapped_bytes >= 14 * PAGE
        del view
        gc.collect()
        assert pool.mapped_bytes == 0
        two = kvmem.Allocator(plain_spec(), backend="virtual", pool=pool, **SIZES)
        taker = two.sequence()
        taker.extend(400)
        assert two.check() == [] and not two.sequence_tensor(taker, 0, "k").any()
        del two, taker
        gc.collect()
    assert held(driver)["reservations"] == held(driver)["mappings"] == 0


def test_a_failure_while_a_neighbour_gives_changes_neither() -> None:
    """Each driver call of a step that takes a neighbour's pages fails in turn."""
    rng = random.Random(seed_from_environment(41))
    driver = checked()
    pool = pool_of(40, driver)
    worlds = [World(kvmem.Allocator(plain_spec(), backend=b, pool=pool, **SIZES)) for b in BACKENDS]
    failures = 0
    for _ in range(400):
        step = rng.choice(worlds).choose(rng)
        for nth in range(1, 200):
            before = [w.observe() for w in worlds]
            driver.fail("", nth, (2, 719, 999)[nth % 3])
            try:
                result = step[1]()
            except (OutOfMemory, kvmem.DeviceError):
                met = driver.pending_failures() == 0
                driver.clear_failures()
                assert [w.observe() for w in worlds] == before
                for world in worlds:
                    world.healthy()
                failures += met
                if not met:
                    break
                continue
            driver.clear_failures()
            step[2](result)
            break
    assert failures > 300
