"""Invariant 4 over time: shared pages, copy-on-write, and a random life on a driver that holds its events back."""

from __future__ import annotations

import random

import pytest
from support import Steps
from support_world import PAGE, SPECS, World, checked, plain_spec

import kvmem
from kvmem import _core


def make(
    backend: str, driver: _core.CheckedDriver, pages: int = 16, spec: kvmem.CacheSpec | None = None, **options: object
) -> kvmem.Allocator:
    return kvmem.Allocator(
        spec or plain_spec(), backend=backend, memory=pages * PAGE, page_bytes=PAGE, interleave=1, max_sequences=4,
        max_tokens=512, driver=driver, **options,
    )  # fmt: skip


def used(alloc: kvmem.Allocator, tokens: int) -> kvmem.Sequence:
    """A sequence whose tokens kernels in flight may be reading."""
    sequence = alloc.sequence()
    sequence.extend(tokens)
    sequence.commit(count=tokens)
    return sequence


def verbs(driver: _core.CheckedDriver) -> list[str]:
    return [call.verb for call in driver.log()]


def test_a_shared_page_outlives_the_first_of_its_users(backend: str) -> None:
    """A fork is freed: its pages are still the parent's and stay. The parent is freed too: then they go, behind both fences."""
    driver = checked()
    alloc = make(backend, driver)
    parent = used(alloc, 256)
    child = parent.fork()
    driver.hold_events(True)
    child.free()
    alloc.trim()
    assert alloc.check() == [] and parent.num_committed_tokens == 256
    address = alloc.tensor(0, "k").data_ptr()
    block = int(alloc.batch([parent]).block_table[0, 0])
    driver.touch(address + block * 16 * 64, 16 * 64)
    waits = driver.held_waits()
    parent.free()
    driver.clear_log()
    alloc.trim()
    log = verbs(driver)
    assert driver.held_waits() > waits and log.index("wait") < log.index("unmap")


def test_copy_on_write_unmaps_the_old_page_behind_the_copy() -> None:
    """The tail page of a truncated fork is replaced under the row's own address: only after what reads it, the copy too."""
    driver = checked()
    alloc = make("virtual", driver)
    parent = used(alloc, 256)
    child = parent.fork()
    child.truncate(32)  # amid the first page, which the parent shows as well
    driver.hold_events(True)
    driver.clear_log()
    child.extend(1)
    log = verbs(driver)
    assert driver.held_waits() >= 1
    copied = log.index("copy")
    assert "record" in log[copied:] and "wait" in log[copied : log.index("unmap")]


@pytest.mark.parametrize("name", SPECS)
def test_no_unmap_runs_ahead_of_an_event_in_a_random_life(name: str, backend: str, rng: random.Random) -> None:
    """Whatever the calls: when something is unmapped, no event recorded since it was last used is still out.

    Each step's log is read: an unmap of memory that a live or freed sequence used is behind the wait for every fence up
    to the one that covers it. What the driver holds back at that moment is younger than the page's last use."""
    driver = checked()
    alloc = make(backend, driver, 60 if name == "mixed" else 20, SPECS[name]())
    world = World(alloc)
    driver.hold_events(True)
    unmaps = waits = 0
    loop = Steps(1500)
    while loop.next(unmaps > 50 and waits > 20):
        kind = world.choose(rng)
        driver.clear_log()
        before = driver.held_waits()
        world.run(kind)
        log = verbs(driver)
        world.healthy()
        waits += driver.held_waits() - before
        if "unmap" in log and kind[0].startswith(("free", "commit")):
            assert "wait" in log[: log.index("unmap")], kind[0]
        if kind[0].startswith("free") or kind[0] == "open":
            assert "unmap" not in log and "wait" not in log, kind[0]
        unmaps += log.count("unmap")


def test_events_do_not_pile_up(backend: str) -> None:
    """Each free leaves a fence; those that are done are forgotten with the next."""
    driver = checked()
    alloc = make(backend, driver)
    driver.hold_events(True)
    for _ in range(50):
        used(alloc, 20).free()
        driver.complete_events()
    assert driver.live().events <= 2
