"""Failures where more than one is at work: in the mapper's thread, and while one allocator takes memory from another."""

from __future__ import annotations

import random
import sys
import time

import numpy as np
import pytest
from support import BACKENDS, Steps
from support_drivers import assert_runs
from support_world import PAGE, SPECS, World, assert_all_returned, calls_made, checked, plain_spec

import kvmem
from kvmem import OutOfMemory, _core

SIZES = dict(max_sequences=5, max_tokens=400, interleave=1)


def make(
    driver: _core.CheckedDriver | None = None, ahead: int = 40, pages: int = 400, name: str = "plain", **options: object
) -> kvmem.Allocator:
    sizes = dict(memory=pages * PAGE, page_bytes=PAGE, interleave=1, max_sequences=6, max_tokens=2000)
    return kvmem.Allocator(SPECS[name](), driver=driver, map_ahead_tokens=ahead, **(sizes | options))


def quiet(driver: _core.CheckedDriver) -> int:
    """Waits until nothing calls the driver any more; returns the number of calls so far."""
    before = -1
    while before != (now := calls_made(driver)):
        before = now
        time.sleep(0.01)
    return before


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("code", [2, 719])
def test_failures_in_the_mapper_are_absorbed(name: str, code: int, rng: random.Random) -> None:
    """Its calls fail now and then; the step finds its room missing and maps it itself, or says what the driver says then."""
    driver = checked()
    world = World(make(driver, 40, 400, name))
    errors = 0
    loop = Steps(1500)
    while step := loop.next(code == 2 or errors):
        if step % 3 == 0 and not driver.pending_failures():  # one at a time: undoing succeeds
            driver.fail(rng.choice(["map", "set_access", "create", "zero"]), rng.randint(1, 4), code)
        action = world.choose(rng)
        before = world.observe()
        try:
            if not world.run(action):
                assert world.observe() == before
        except kvmem.DeviceError as error:
            assert error.code == code != 2
            assert world.observe() == before
            errors += 1
        world.healthy()
        if step % 50 == 0:
            driver.clear_failures()
    driver.clear_failures()
    alloc = world.alloc
    world.run(world.free(sorted(world.sequences)))
    alloc.trim()
    assert alloc.check() == [] and alloc.stats().parked_bytes == 0
    world.__dict__.clear()
    del world, alloc, action
    assert_all_returned(driver)


def test_every_call_of_the_mapper_fails_in_turn() -> None:
    """One growing sequence, nothing else calls the driver but the mapper; after its n-th call has failed, tokens are right."""
    for nth in range(1, 60):
        driver = checked()
        world = World(make(driver))
        world.run(world.open())
        (handle,) = world.sequences
        world.run(world.extend(handle, 30))
        quiet(driver)
        driver.fail("", nth, 719)
        for _ in range(40):
            for _ in range(3):  # a failure that the mapper left for the step to meet
                try:
                    assert world.run(world.extend(handle, 25))
                    break
                except kvmem.DeviceError:
                    continue
            assert world.run(world.commit(handle, 25, [0]))
        driver.clear_failures()
        world.healthy()


def test_a_pool_outlives_the_allocator_whose_mapping_failed() -> None:
    """A failure that nobody has taken back when its allocator goes must not fall to a neighbour."""
    for _ in range(40):
        driver = checked()
        pool = kvmem.PagePool(memory=400 * PAGE, page_bytes=PAGE, driver=driver)
        sizes = dict(pool=pool, max_sequences=6, max_tokens=2000, interleave=1)
        neighbour = World(kvmem.Allocator(plain_spec(), backend="paged", **sizes))
        alloc = kvmem.Allocator(plain_spec(), backend="virtual", map_ahead_tokens=100, **sizes)
        neighbour.run(neighbour.open())
        (handle,) = neighbour.sequences
        alloc.extend_batch(alloc.open_batch(1), np.array([50], np.int32))
        driver.fail("map", 1, 719)
        del alloc
        driver.clear_failures()
        neighbour.grow(handle, 400)
        neighbour.healthy()
        other = pool.core.mapped_pages * PAGE - neighbour.alloc.stats().mapped_bytes
        assert other == 0


def test_the_mapper_runs_while_python_does_not() -> None:
    """It needs no GIL: while this thread keeps it, memory is mapped all the same."""
    driver = checked()
    alloc = make(driver, ahead=500, pages=2000)
    sequence = alloc.sequence()
    sequence.extend(100)
    quiet(driver)
    before = calls_made(driver)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # nobody takes the GIL from us
    try:
        sequence.extend(700)  # there is room, but less than is kept ahead: a job for the mapper
        end = time.perf_counter() + 60
        while calls_made(driver) == before and time.perf_counter() < end:
            pass  # counters() does not let go of the GIL
        time_left = end - time.perf_counter()
    finally:
        sys.setswitchinterval(interval)
    assert time_left > 0


def test_an_allocator_with_a_mapper_at_interpreter_exit() -> None:
    assert_runs("""
        import sys
        sys.path.insert(0, "tests/support")
        from support_world import *
        alloc = kvmem.Allocator(plain_spec(), memory=2000 * PAGE, page_bytes=PAGE, max_sequences=4, max_tokens=2000, map_ahead_tokens=500)
        sequences = [alloc.sequence() for _ in range(4)]
        for s in sequences: s.extend(100)
    """)


def pool_of(pages: int, driver: object = None) -> kvmem.PagePool:
    return kvmem.PagePool(memory=pages * PAGE, page_bytes=PAGE, driver=driver)


def test_a_failure_while_a_neighbour_gives_changes_neither(rng: random.Random) -> None:
    """Each driver call of a step that takes a neighbour's pages fails in turn."""
    driver = checked()
    pool = pool_of(40, driver)
    worlds = [World(kvmem.Allocator(plain_spec(), backend=b, pool=pool, **SIZES)) for b in BACKENDS]
    failures = 0
    loop = Steps(400)
    while loop.next(failures > 300):
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
