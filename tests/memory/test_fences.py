"""Invariant 4: no page is unmapped before the event of its last user, and the step waits for nobody.

The driver holds every event back, as a GPU does that is still at work, and counts who waited for one. So "waited" and
"did not wait" are facts here and not timings. The calls that must wait are those that take memory away; the calls of a
step must neither wait nor unmap."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from support import BACKENDS
from support_world import PAGE, World, checked, plain_spec

import kvmem
from kvmem import _core

pytestmark = pytest.mark.core

#: Tokens in a page: 64 bytes a token and layer, each layer in a range of its own.
PAGE_TOKENS = 64


def make(backend: str, **options: object) -> tuple[World, _core.CheckedDriver]:
    driver = checked()
    sizes = {"memory": 64 * PAGE, "page_bytes": PAGE, "interleave": 1, "max_sequences": 6, "max_tokens": 2048}
    alloc = kvmem.Allocator(options.pop("spec", plain_spec()), backend=backend, driver=driver, **sizes | options)  # type: ignore[arg-type]
    return World(alloc), driver


def start(world: World, *lengths: int) -> list[int]:
    return [world.start(n) for n in lengths]


@contextmanager
def no_wait(driver: _core.CheckedDriver) -> Iterator[None]:
    """Nothing in here waits for the device or takes memory away."""
    before, waits = driver.counters(), driver.held_waits()
    yield
    after = driver.counters()
    assert driver.held_waits() == waits
    assert (after.wait, after.unmap, after.destroy) == (before.wait, before.unmap, before.destroy)


def waits_before_unmapping(driver: _core.CheckedDriver, call: Callable[[], object], user: int) -> None:
    """``call`` unmaps, and not before it has waited for ``user``, the event of the last one there. A page that two rows
    show had two users: the first row may let go of it after its own event, the last one only after ``user``."""
    driver.clear_log()
    waits = driver.held_waits()
    call()
    log = driver.log()
    unmapped = Counter(entry.id for entry in log if entry.verb == "unmap")
    assert unmapped, "nothing was unmapped: the test asks nothing"
    assert driver.held_waits() > waits
    verbs = [entry.verb for entry in log]
    assert "wait" in verbs[: verbs.index("unmap")]
    waited = next(i for i, entry in enumerate(log) if entry.verb == "wait" and entry.id == user)
    shared = {page for page, times in unmapped.items() if times > 1}
    last = {entry.id: i for i, entry in enumerate(log) if entry.verb == "unmap"}
    assert all(last[page] > waited for page in shared or unmapped), log


def last_event(driver: _core.CheckedDriver) -> int:
    """The newest event, which is that of whoever used the memory last."""
    return max(entry.id for entry in driver.log() if entry.verb == "record")


#: What ends the use of memory while the device may still be reading it. Each leaves parked pages behind.
def _free(world: World) -> None:
    world.run(world.free([max(world.sequences)]))


def _truncate(world: World) -> None:
    world.run(world.truncate(max(world.sequences), 3))


def _fork_drop(world: World) -> None:
    """The parent goes and then the child: the pages they share have had two users, and the last one counts."""
    handle = max(world.sequences)
    world.run(world.fork(handle))
    world.run(world.free([handle]))
    world.run(world.free([max(world.sequences)]))


ENDS = {"free": _free, "truncate": _truncate, "fork and drop": _fork_drop}
TAKES = {
    "trim": lambda alloc: alloc.trim(),
    "shrink": lambda alloc: alloc.set_memory(12 * PAGE),
    "shrink the pool": lambda alloc: alloc.pool.set_memory(12 * PAGE),
}


@pytest.mark.parametrize("take", TAKES)
@pytest.mark.parametrize("end", ENDS)
def test_what_is_taken_away_waits_for_its_last_user(end: str, take: str, backend: str) -> None:
    world, driver = make(backend)
    start(world, 100, 500)
    driver.hold_events(True)
    with no_wait(driver):
        ENDS[end](world)
    waits_before_unmapping(driver, lambda: TAKES[take](world.alloc), last_event(driver))
    world.healthy()
    assert world.alloc.stats().physical_bytes <= 12 * PAGE


def test_what_a_window_leaves_behind_waits_too(backend: str) -> None:
    spec = kvmem.CacheSpec.kv(
        num_layers=2, num_kv_heads=1, head_dim=16, dtype=torch.float16, block_size=16, window_tokens=PAGE_TOKENS
    )
    world, driver = make(backend, spec=spec)
    (handle,) = start(world, 100)
    driver.hold_events(True)
    for _ in range(6):
        world.grow(handle, PAGE_TOKENS)
    assert world.core.first_token(handle) >= 6 * PAGE_TOKENS - 64
    assert driver.held_waits() == 0, "while there is memory"
    world.grow(handle, 300)  # more than the window: the paged backend cannot use all of it again
    waits_before_unmapping(driver, lambda: world.alloc.trim(), last_event(driver))
    world.healthy()


@pytest.mark.parametrize("taker", BACKENDS)
@pytest.mark.parametrize("giver", BACKENDS)
def test_a_page_is_handed_to_a_neighbour_after_its_last_user(giver: str, taker: str) -> None:
    driver = checked()
    pool = kvmem.PagePool(memory=24 * PAGE, page_bytes=PAGE, driver=driver)
    first, second = (
        World(kvmem.Allocator(plain_spec(), backend=b, pool=pool, interleave=1, max_sequences=4, max_tokens=2048))
        for b in (giver, taker)
    )
    keep, gone = start(first, 60, 600)
    driver.hold_events(True)
    with no_wait(driver):
        assert first.run(first.free([gone]))
    user = last_event(driver)
    waits_before_unmapping(driver, lambda: start(second, 600), user)
    assert [*first.sequences] == [keep]
    first.healthy()
    second.healthy()


def test_an_event_that_has_passed_is_not_waited_for(backend: str) -> None:
    world, driver = make(backend)
    (handle,) = start(world, 500)
    driver.hold_events(True)
    assert world.run(world.free([handle]))
    driver.complete_events()
    waits = driver.held_waits()
    world.alloc.trim()
    stats = world.alloc.stats()
    assert driver.held_waits() == waits and driver.counters().unmap > 0
    assert stats.parked_bytes == stats.used_bytes == 0


def test_a_part_that_is_taken_waits_for_the_one_freed_longest_ago(backend: str) -> None:
    """Under pressure the pages of the oldest free go first, because its event has most likely passed (virtual backend;
    the paged one keeps an event for all its free blocks)."""
    world, driver = make(backend)
    old, new = start(world, 500, 500)
    driver.hold_events(True)
    assert world.run(world.free([old]))
    driver.complete_events()
    assert world.run(world.free([new]))
    waits = driver.held_waits()
    world.alloc.trim(4 * PAGE)
    assert driver.held_waits() == waits + (backend == "paged")


def test_a_step_never_waits_and_never_unmaps(backend: str) -> None:
    """Decoding, freeing, the next sequence in the freed memory, commits, forks, rejected drafts and metadata, all with
    a device that has not finished a single thing."""
    world, driver = make(backend)
    live = start(world, 130, 70, 10)
    driver.hold_events(True)
    with no_wait(driver):
        for step in range(3 * PAGE_TOKENS):
            ids, ones = np.array(live, np.int32), np.ones(len(live), np.int32)
            world.alloc.extend_batch(ids, ones)
            world.alloc.fill(ids, world.tags.batch)
            world.alloc.commit_batch(ids, ones)
            if step % 40 == 7:  # the next sequence adopts what this one leaves
                world.alloc.free_batch(ids[:1])
                live[0] = int(world.alloc.open_batch(1)[0])
                world.alloc.extend_batch(np.array(live[:1], np.int32), np.array([90], np.int32))
                world.alloc.commit_batch(np.array(live[:1], np.int32), np.array([90], np.int32))
            if step % 16 == 3:
                world.core.extend(live[1], 5)
                world.core.truncate(live[1], world.core.committed(live[1]))
    assert world.alloc.check() == []


def test_a_parked_row_is_adopted_with_no_driver_call(backend: str) -> None:
    world, driver = make(backend)
    (handle,) = start(world, 600)
    driver.hold_events(True)
    assert world.run(world.free([handle]))
    calls = driver.counters().total
    with no_wait(driver):
        start(world, 600)
    assert driver.counters().total == calls, "the memory was there"
    world.healthy()


def test_a_closed_allocator_waits_before_its_neighbour_gets_the_pages() -> None:
    for backend in BACKENDS:
        driver = checked()
        pool = kvmem.PagePool(memory=24 * PAGE, page_bytes=PAGE, driver=driver)
        world = World(
            kvmem.Allocator(plain_spec(), backend=backend, pool=pool, interleave=1, max_sequences=4, max_tokens=2048)
        )
        start(world, 300)
        driver.hold_events(True)
        driver.clear_log()
        world.__dict__.clear()
        verbs = [entry.verb for entry in driver.log()]
        assert "wait" in verbs and verbs.index("wait") < verbs.index("unmap"), backend
        assert driver.held_waits() == 1 and driver.live().mappings == 0
