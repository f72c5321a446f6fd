"""The mapper: a native thread that maps ahead of a sequence's growth. It must change nothing but who does the work."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from support_world import NOTHING, PAGE, Digest, World, checked, held, plain_spec

import kvmem
from kvmem import _core

pytestmark = pytest.mark.core

TOKEN_BYTES = 64
PAGE_TOKENS = PAGE // TOKEN_BYTES
AHEAD = 2 * PAGE_TOKENS
MAX_TOKENS = 1500


def make(driver: _core.CheckedDriver, ahead: int = AHEAD, **options: object) -> World:
    sizes = {"memory": 400 * PAGE, "page_bytes": PAGE, "interleave": 1, "max_sequences": 4, "max_tokens": MAX_TOKENS}
    alloc = kvmem.Allocator(plain_spec(), driver=driver, map_ahead_tokens=ahead, **sizes | options)  # type: ignore[arg-type]
    return World(alloc)


def start(world: World, *lengths: int) -> list[int]:
    return [world.start(n) for n in lengths]


def decode(world: World, handle: int) -> None:
    world.grow(handle, 1)


def caught_up(world: World, driver: _core.CheckedDriver) -> bool:
    """The books count a page when it is decided upon; the driver has it when the mapper is done. No page is shared
    here."""
    return driver.live().mappings == world.alloc.stats().mapped_bytes // PAGE


def until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not met():
        assert time.monotonic() < deadline, "the mapper has stopped"
        time.sleep(0.0002)


def test_decoding_gives_the_same_with_and_without() -> None:
    worlds = [make(checked(), ahead) for ahead in (0, AHEAD)]
    live = [start(world, 5, 200) for world in worlds]
    assert live[0] == live[1]
    for step in range(400):
        for world in worlds:
            for handle in live[0]:
                decode(world, handle)
        if step % 40 == 39:
            assert worlds[0].observe()[:-1] == worlds[1].observe()[:-1]  # but for the digests
            for world in worlds:
                world.healthy()
    plain, ahead = (world.alloc.stats() for world in worlds)
    assert ahead.used_bytes == plain.used_bytes and ahead.mapped_bytes > plain.mapped_bytes
    for world in worlds:
        assert world.run(world.truncate(live[0][1], 70))
        assert world.run(world.fork(live[0][1]))
        assert world.run(world.free([live[0][0]]))
        world.healthy()
    assert worlds[0].observe()[:-1] == worlds[1].observe()[:-1]  # but for the digests


def test_a_steady_step_finds_its_memory_mapped() -> None:
    """Before each step, with the mapper given time, the next token of every layer can be written: the step has nothing
    to map. What is posted is posted early, in whole runs: far fewer driver calls than tokens."""
    driver = checked()
    world = make(driver)
    (handle,) = start(world, 10)
    row, tokens = world.core.row(handle), world.alloc._geometry[0].row_tokens
    bases = [world.alloc._arena(0, arena).data_ptr() for arena in range(2)]
    runs = driver.counters().set_access
    for n in range(10, 1000):
        until(lambda: caught_up(world, driver))
        for base in bases:
            driver.touch(base + (row * tokens + n) * TOKEN_BYTES, TOKEN_BYTES)
        decode(world, handle)
    world.healthy()
    assert driver.counters().set_access - runs <= 2 * (1000 // AHEAD + 2)


@pytest.mark.parametrize(
    ("verb", "code"), [("map", 2), ("map", 719), ("set_access", 719), ("create", 2), ("record", 999)]
)
def test_a_failure_in_the_mapper_is_absorbed(verb: str, code: int) -> None:
    """The step that posted the work succeeded and stays so; the next ones find room missing and map it. Only the mapper
    can meet the failure here: it is armed when everything is mapped that the step itself needs."""
    driver = checked()
    world = make(driver)
    (handle,) = start(world, 10)
    absorbed, wait_until = 0, 0
    for step in range(700):
        until(lambda: caught_up(world, driver))
        if step >= wait_until:
            driver.fail(verb, 1 + absorbed % 3 if verb == "map" else 1, code)
        world.core.extend(handle, 1)
        until(lambda: caught_up(world, driver) or driver.pending_failures() == 0)
        if step >= wait_until and driver.pending_failures() == 0:
            absorbed, wait_until = absorbed + 1, step + 8  # room to try again before the step is left without any
        driver.clear_failures()
        world.model.extend(handle, 1)
        assert world.run(world.commit(handle, 1, [0]))
        assert world.alloc.check() == []
    assert absorbed >= 2
    world.healthy()
    world.__dict__.clear()
    assert held(driver) == NOTHING


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize(("code", "error"), [(2, kvmem.OutOfMemory), (719, kvmem.DeviceError)])
def test_when_nothing_can_be_mapped_the_step_says_so(code: int, error: type[Exception], waits: bool) -> None:
    """The mapper fails for ever, in silence; the step that comes to the end of its room raises, and nothing has
    changed. Where each step waits for the mapper, no failure of it comes between that could be the excuse for a change.
    """
    driver = checked()
    world = make(driver)
    (handle,) = start(world, 10)
    until(partial(caught_up, world, driver))
    for nth in range(1, 5000):
        driver.fail("map", nth, code)
    steps = 0
    with pytest.raises(error):
        while True:
            if waits:
                until(partial(caught_up, world, driver))
            before = world.observe()
            world.core.extend(handle, 1)
            world.model.extend(handle, 1)
            assert world.run(world.commit(handle, 1, [0]))
            steps += 1
    assert 0 < steps <= 3 * AHEAD and driver.pending_failures() > 0
    after = world.observe()
    assert after == before and (not waits or after[-1].disturbed == before[-1].disturbed)
    driver.clear_failures()
    for _ in range(200):
        decode(world, handle)
    world.healthy()


class InTurn:
    """The core; whatever is asked of it, the mapper is done before the next question."""

    def __init__(self, world: World, driver: _core.CheckedDriver) -> None:
        self.core, self.done = world.core, partial(caught_up, world, driver)

    def __getattr__(self, name: str) -> Callable[..., object]:
        def ask(*args: object) -> object:
            answer = getattr(self.core, name)(*args)
            until(self.done)
            return answer

        return ask


def test_a_digest_and_its_disturbances_are_of_one_moment() -> None:
    """The mapper fails at the end of a long job, as a rule behind the first question."""
    driver = checked()
    world = make(driver, ahead=250 * PAGE_TOKENS, max_tokens=750 * PAGE_TOKENS, memory=1200 * PAGE)
    assert world.run(world.open())
    driver.fail("map", 1000)
    world.core.extend(max(world.sequences), 1)
    before = Digest(InTurn(world, driver))  # type: ignore[arg-type]
    after = Digest(world.core)
    assert after == before and after.disturbed == 1


def test_taking_memory_away_waits_for_the_mapper(seed: int) -> None:
    """trim, a smaller budget, fork, truncate and free right behind a step that has posted work."""
    rng = np.random.default_rng(seed)
    driver = checked()
    world = make(driver)
    start(world, 20, 100)  # as many as the truncation leaves, or more
    calls = [
        lambda: world.alloc.trim(),
        lambda: world.alloc.set_memory(int(rng.integers(100, 400)) * PAGE),
        lambda: world.run(world.fork(max(world.sequences))) if len(world.sequences) < 4 else world.alloc.trim(PAGE),
        lambda: world.run(world.truncate(min(world.sequences), 20)),
        lambda: world.run(world.free([max(world.sequences)])) if len(world.sequences) > 2 else world.alloc.trim(),
    ]
    for _ in range(400):
        handle = min(world.sequences)
        if world.core.tokens(handle) + 70 <= MAX_TOKENS:
            assert world.run(world.extend(handle, int(rng.integers(1, 70))))
        calls[rng.integers(len(calls))]()
        assert world.alloc.check() == []
        pending = world.core.tokens(handle) - world.core.committed(handle)
        assert world.run(world.commit(handle, pending, [0]))
    world.healthy()


def test_closing_right_after_posting() -> None:
    for lengths in ([10], [PAGE_TOKENS, 300], [700, 1, 64]):
        for _ in range(10):
            driver = checked()
            world = make(driver, ahead=300)
            start(world, *lengths)
            world.__dict__.clear()
            assert held(driver) == NOTHING


def test_the_thread_knows_no_python() -> None:
    """It does its work while this thread sleeps with the interpreter's lock in hand, and the interpreter never hears of
    it."""
    driver = checked()
    world = make(driver)
    threads, tasks = threading.enumerate(), len(os.listdir("/proc/self/task"))
    known = set(sys._current_frames())  # a parallel test runner has threads that `threading` was not told of
    (handle,) = start(world, 10)
    until(lambda: caught_up(world, driver))
    sleep_with_lock = ctypes.PyDLL(None).usleep
    seen = 0
    for _ in range(600):
        mapped = world.alloc.stats().mapped_bytes
        world.core.extend(handle, 1)
        if world.alloc.stats().mapped_bytes > mapped:
            for _ in range(6_000):
                if caught_up(world, driver):
                    break
                sleep_with_lock(10_000)
            assert caught_up(world, driver), "a minute without Python's lock, and nothing was mapped"
            seen += 1
    assert seen >= 2
    assert threading.enumerate() == threads
    assert set(sys._current_frames()) == known
    assert len(os.listdir("/proc/self/task")) == tasks + 1, "one long-lived thread"


def test_there_is_no_thread_without_work_for_it() -> None:
    tasks = len(os.listdir("/proc/self/task"))
    world = make(checked(), ahead=0)
    (handle,) = start(world, 10)
    for _ in range(100):
        decode(world, handle)
    assert len(os.listdir("/proc/self/task")) == tasks
