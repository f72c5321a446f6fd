"""Every driver call of a workload fails in turn: a typed error, nothing changed, nothing leaked, usable afterwards.

Two ways. ``test_every_call_of_every_step``: before each step of one long workload succeeds, it is tried with its first driver
call failing, its second, ... until it makes no more calls; each time all that can be seen must be as before. So every call fails,
in time that grows with the workload, because a failed call changes nothing. Three codes for each call, in rotation (each verb
meets each code, which is asserted), or all of them under ``KVMEM_LONG=1``. The literal form, the workload from its start with
call n failing and then on to its end, is ``test_the_workload_with_one_call_failing``: a sample of n, or all under
``KVMEM_LONG=1``, again with the codes in rotation (minutes: give pytest ``--timeout 0 -o faulthandler_timeout=0``).
"""

from __future__ import annotations

import gc
import random
from typing import Any

import numpy as np
import pytest
from support import LONG, Steps
from support_world import PAGE, SPECS, VERBS, Digest, World, assert_all_returned, calls_made, checked, held, plain_spec

import kvmem
from kvmem import _core

OUT_OF_MEMORY = 2
#: CUDA's invalid value, out of memory, not initialized, invalid handle, not permitted, launch failure, unknown.
CODES = (OUT_OF_MEMORY, 1, 3, 400, 719, 800, 999)
PAGES = {"plain": 24, "mixed": 54}  # with the 10 that come and go no more than trim() gives back in one piece
ARENAS = 2  # of the plain layout, one for each layer
LEAST_CALLS = 2000 if LONG else 1000
VERBS_THAT_FAIL = ("create", "destroy", "map", "set_access", "unmap", "zero", "copy", "record")
CODES_A_CALL = len(CODES) if LONG else 3


def make_world(name: str, backend: str, driver: _core.CheckedDriver, **options: Any) -> World:
    alloc = kvmem.Allocator(
        SPECS[name](), backend=backend, memory=PAGES[name] * PAGE, page_bytes=PAGE, interleave=1, max_sequences=6,
        max_tokens=400, driver=driver, **options,
    )  # fmt: skip
    return World(alloc)


def use_pages(neighbour: kvmem.Allocator) -> None:
    """All that can be had becomes pages that its sequence had and nobody needs: who takes one next zeroes it."""
    with neighbour.sequence() as sequence:
        while sequence.try_extend(64):
            pass


def fail_at(driver: _core.CheckedDriver, nth: int, code: int) -> None:
    driver.fail("", nth, code)


def expected_error(code: int) -> type[kvmem.KVMemError]:
    return kvmem.OutOfMemory if code == OUT_OF_MEMORY else kvmem.DeviceError


def close(world: World, driver: _core.CheckedDriver) -> None:
    """Free and trim leave only what the allocator needs to exist; without it nothing is left."""
    alloc = world.alloc
    world.run(world.free(sorted(world.sequences)))
    alloc.trim()
    stats = alloc.stats()
    assert stats.parked_bytes == stats.free_bytes == stats.used_bytes == 0
    assert alloc.check() == []
    live = held(driver)
    trash = stats.mapped_bytes // PAGE  # the blocks that padding rows read and write stay
    assert live["mappings"] == live["pages"] == trash and live["events"] == 0
    world.__dict__.clear()
    del alloc
    assert_all_returned(driver)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("zero", ["fresh", "always"])
def test_every_call_of_every_step(name: str, backend: str, zero: str, rng: random.Random) -> None:
    driver = checked()
    world = make_world(name, backend, driver, zero=zero)
    # Of itself an allocator takes pages that are new, and zero on this driver, or were its own: zero="fresh" has no work.
    sizes = dict(interleave=1, max_sequences=1, max_tokens=64 * PAGES[name])
    neighbour = kvmem.Allocator(plain_spec(), backend="virtual", pool=world.alloc.pool, **sizes)
    verbs_hit: set[tuple[str, int]] = set()
    first, failed, steps, turn = calls_made(driver), 0, 0, 0
    succeeded = 0  # calls made by steps when they were let through
    wanted = {(v, c) for v in VERBS_THAT_FAIL for c in CODES if c != OUT_OF_MEMORY}  # it has no DeviceError
    while succeeded < LEAST_CALLS or not wanted <= verbs_hit:
        assert steps < 50_000, f"never made to fail: {wanted - verbs_hit}"
        step = world.choose(rng, (PAGES[name] - 10, PAGES[name] + 10))
        if rng.random() < 0.1:
            use_pages(neighbour)
        nth, code_at, before = 1, 0, (world.observe(), Digest(neighbour.core))
        while True:
            code = CODES[(code_at + turn) % len(CODES)]
            fail_at(driver, nth, code)
            made = calls_made(driver)
            try:
                result = step[1]()
            except kvmem.KVMemError as error:
                if driver.pending_failures():  # it had not come to the n-th call: memory was short
                    driver.clear_failures()
                    assert isinstance(error, kvmem.OutOfMemory), (step[0], error)
                    assert (world.observe(), Digest(neighbour.core)) == before, step[0]
                    break
                assert isinstance(error, expected_error(code)), (step[0], code, error)
                if isinstance(error, kvmem.DeviceError):
                    assert error.code == code and error.call in VERBS
                    verbs_hit.add((error.call, code))
                assert (world.observe(), Digest(neighbour.core)) == before, (step[0], nth, code)
                world.healthy()
                failed += 1
                code_at += 1
                if code_at == CODES_A_CALL:
                    nth, code_at, turn = nth + 1, 0, turn + CODES_A_CALL
                continue
            driver.clear_failures()
            succeeded += calls_made(driver) - made
            step[2](result)
            break
        world.healthy()
        steps += 1
    print(f"{name}, {backend}, zero={zero}: {steps} steps, {succeeded} calls, {failed} injected failures")
    assert failed >= LEAST_CALLS * CODES_A_CALL * 0.9 and calls_made(driver) - first > failed
    assert neighbour.check() == []
    del neighbour
    close(world, driver)


def whole_workload(name: str, backend: str, seed: int, nth: int, code: int, calls: int) -> tuple[int, bool]:
    """The workload with its ``nth`` call failing; returns how many calls it made, and whether the failure was met."""
    rng = random.Random(seed)
    driver = checked()
    world = make_world(name, backend, driver)
    first, met = calls_made(driver), False
    if nth:
        fail_at(driver, nth, code)
    while calls_made(driver) - first < calls:
        step = world.choose(rng, (PAGES[name] - 10, PAGES[name] + 10))
        armed = driver.pending_failures() > 0
        close_by = armed and calls_made(driver) - first + 400 > nth  # looking costs more than the workload itself
        before = world.observe() if close_by else None
        try:
            if not world.run(step) and before is not None:
                assert world.observe() == before
        except kvmem.DeviceError as error:
            assert armed and not driver.pending_failures() and error.code == code != OUT_OF_MEMORY, (step[0], error)
            assert world.observe() == before, (step[0], nth, code)
        if armed and not driver.pending_failures():
            met = True
            world.healthy()
    made = calls_made(driver) - first
    driver.clear_failures()
    world.healthy()
    close(world, driver)
    return made, met


@pytest.mark.parametrize("name", SPECS)
def test_the_workload_with_one_call_failing(name: str, backend: str, seed: int) -> None:
    made, _ = whole_workload(name, backend, seed, 0, 0, LEAST_CALLS)
    assert made >= LEAST_CALLS
    stride = 1 if LONG else 131  # coprime to the number of codes: the sample meets each of them
    for index, nth in enumerate(range(1, LEAST_CALLS - 60, stride)):
        _, met = whole_workload(name, backend, seed, nth, CODES[index % len(CODES)], LEAST_CALLS)
        assert met, f"call {nth} was not reached"


@pytest.mark.parametrize("code", [OUT_OF_MEMORY, 719])
@pytest.mark.parametrize("name", SPECS)
def test_a_driver_that_fails_for_ever(name: str, backend: str, code: int, seed: int) -> None:
    """From amid some step on everything fails, undoing too: typed errors only. When the driver is back, a pool that was
    poisoned stays so, and ends without a trace; else all contents are intact, and the allocator goes on and closes."""
    errors = ends = 0
    # A round alone may need no driver: parked rows are taken over.
    loop = Steps(100 if LONG else 10)
    while round_number := loop.next(errors or code == OUT_OF_MEMORY):
        rng = random.Random(seed + round_number)
        driver = checked()
        world = make_world(name, backend, driver)
        while calls_made(driver) < 40 * round_number:
            world.run(world.choose(rng))
        into = rng.randint(1, 25)
        for nth in range(into, into + 500):
            driver.fail("", nth, code, undo_too=True)
        poisoned = False
        for _ in range(30):
            try:
                world.run(world.choose(rng))
            except kvmem.DeviceError as error:
                assert not poisoned or "cannot be trusted" in str(error)
                poisoned = "cannot be trusted" in str(error)
                errors += 1
        driver.clear_failures()
        if poisoned:
            ends += 1
            with pytest.raises(kvmem.DeviceError, match="cannot be trusted"):
                world.healthy()
            world.alloc.close()
            world.__dict__.clear()
            assert_all_returned(driver)
            continue
        world.healthy()
        for _ in range(40):
            world.run(world.choose(rng))
        world.healthy()
        close(world, driver)
    print(f"{errors} errors, {ends} pools poisoned")


def test_the_last_reader_of_shared_memory_does_not_zero_what_the_other_may_come_back_to(backend: str) -> None:
    """Both are cut off within what they share, and grow in one call: the first gets a copy, the second has the memory alone then,
    and with a guard what it has cut off is to be zeroed. Should the call fail after that, the first is back there."""
    failures = 0
    for nth in range(1, 60):
        driver = checked()
        world = make_world("plain", backend, driver, tail_guard_tokens=16)
        world.run(world.open())
        (first,) = world.sequences
        world.grow(first, 64)
        assert world.run(world.fork(first))
        second = max(world.sequences)
        assert world.run(world.truncate(first, 61)) and world.run(world.truncate(second, 50))
        before = world.observe()
        fail_at(driver, nth, 719)
        try:
            world.alloc.extend_batch(np.array([first, second], np.int32), np.array([3, 3], np.int32))
        except kvmem.DeviceError:
            failures += 1
            assert world.observe() == before
            world.healthy()
            continue
        break
    assert failures >= 2 * ARENAS, "a copy in each arena, and what is zeroed"


@pytest.mark.parametrize("code", CODES)
def test_a_failing_constructor_leaves_nothing_behind(backend: str, code: int, rng: random.Random) -> None:
    """Also when a pool is shared: the allocator that could not be made is no owner of it, and its neighbour works on."""
    driver = checked()
    pool = kvmem.PagePool(memory=60 * PAGE, page_bytes=PAGE, driver=driver)
    sizes = dict(max_sequences=3, max_tokens=200, interleave=1)
    neighbour = World(kvmem.Allocator(SPECS["plain"](), backend="virtual", pool=pool, **sizes))
    for _ in range(30):
        neighbour.run(neighbour.choose(rng))
    before = held(driver)
    for nth in range(1, 8):
        driver.fail("reserve", nth, code)
        with pytest.raises(expected_error(code)):
            kvmem.Allocator(SPECS["mixed"](), backend=backend, pool=pool, **sizes)
        assert held(driver) == before
        for _ in range(10):
            neighbour.run(neighbour.choose(rng))
            neighbour.healthy()
        neighbour.alloc.trim()
        before = held(driver)
    other = World(kvmem.Allocator(SPECS["mixed"](), backend=backend, pool=pool, **sizes))
    for _ in range(100):
        other.run(other.choose(rng))
        other.healthy()
        neighbour.healthy()


def test_failures_while_closing_do_not_end_the_process(backend: str, rng: random.Random) -> None:
    """A destructor has nobody to tell; it carries on with the rest, and what a single failure leaves behind is bounded by it."""
    for nth in range(1, 60) if LONG else rng.sample(range(1, 60), 8):
        driver = checked()
        world = make_world("mixed", backend, driver)
        program = random.Random(rng.random())
        for _ in range(60):
            world.run(world.choose(program))
        driver.fail("", nth, 999)
        world.__dict__.clear()
        gc.collect()
        left = held(driver)
        assert left["mappings"] <= 1 and left["pages"] <= 1 and left["reservations"] <= 1 and left["events"] == 0
