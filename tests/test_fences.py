"""Invariant 4: no page is unmapped, zeroed for another or handed on before its last user's event has completed.

Events are held back on the checked driver, as if a GPU were still at work. A wait for a held event is counted, and the driver's
log shows what was done when: an unmap may follow the record of the event that covers its users only behind the wait for it.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
from support_world import BACKENDS, PAGE, SPECS, World, checked, plain_spec, seed_from_environment

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
    sequence.commit(tokens)
    return sequence


def verbs(driver: _core.CheckedDriver) -> list[str]:
    return [call.verb for call in driver.log()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_step_never_waits(backend: str) -> None:
    """Decoding, freeing and a new sequence in the freed memory: no wait, no unmap."""
    driver = checked()
    alloc = make(backend, driver, pages=40)
    driver.hold_events(True)
    handles = alloc.open_batch(3)
    ones = np.ones(3, np.int32)
    for round_number in range(5):
        for _ in range(200):
            alloc.extend_batch(handles, ones)
            alloc.commit_batch(handles, ones)
        alloc.free_batch(handles)
        handles = alloc.open_batch(3)
        if round_number == 0:
            driver.clear_log()
    assert driver.held_waits() == 0
    assert not {"unmap", "wait", "map", "create", "set_access"} & set(verbs(driver)), (
        "rounds after the first reuse what is there"
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("give_up", ["trim", "set_memory", "pressure"])
def test_a_freed_page_is_unmapped_only_behind_its_event(backend: str, give_up: str) -> None:
    driver = checked()
    alloc = make(backend, driver, pages=12)
    first = used(alloc, 256)
    driver.hold_events(True)
    first.free()
    assert driver.held_waits() == 0 and "record" in verbs(driver)
    driver.clear_log()
    if give_up == "trim":
        assert alloc.trim() > 0
    elif give_up == "set_memory":
        alloc.set_memory(4 * PAGE)
    else:  # the parked row goes to the first that asks, who needs a part of it; the next one must take the rest
        small, large = alloc.sequence(), alloc.sequence()
        small.extend(64)
        large.extend(200)
        if backend == "paged":
            assert driver.held_waits() == 0  # blocks change hands with their pages mapped
            return
    log = verbs(driver)
    assert driver.held_waits() >= 1 and "unmap" in log
    assert log.index("wait") < log.index("unmap")


@pytest.mark.parametrize("backend", BACKENDS)
def test_completed_events_cost_no_wait(backend: str) -> None:
    driver = checked()
    alloc = make(backend, driver)
    driver.hold_events(True)
    used(alloc, 256).free()
    driver.complete_events()
    assert alloc.trim() >= 8 * PAGE
    assert driver.held_waits() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_truncated_pages(backend: str) -> None:
    """What lies behind a shorter length stays mapped, and goes under the fence of the truncation."""
    driver = checked()
    alloc = make(backend, driver)
    sequence = used(alloc, 256)
    driver.hold_events(True)
    sequence.truncate(10)
    assert driver.held_waits() == 0 and "record" in verbs(driver)
    driver.clear_log()
    assert alloc.trim() >= 6 * PAGE
    log = verbs(driver)
    assert driver.held_waits() >= 1 and log.index("wait") < log.index("unmap")


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_that_a_window_leaves_behind(backend: str) -> None:
    spec = kvmem.CacheSpec.kv(
        num_layers=1, num_kv_heads=1, head_dim=16, dtype="float16", block_size=16, window_tokens=40
    )
    driver = checked()
    alloc = make(backend, driver, spec=spec)
    alloc.fill(np.empty(0, np.int32), alloc.make_batch(max_new_tokens=8), pad_to=1)  # the trash blocks exist
    sequence = alloc.sequence()
    driver.hold_events(True)
    for _ in range(300):
        sequence.extend(1)
        sequence.commit(1)
    assert driver.held_waits() == 0
    assert alloc.core.first_token(sequence.id, 0) > 200
    if backend == "paged":  # the blocks went round: a later token lies where an earlier one was
        assert alloc.stats().mapped_bytes <= 3 * PAGE
        return
    driver.clear_log()
    assert alloc.trim() >= PAGE
    log = verbs(driver)
    assert driver.held_waits() >= 1 and log.index("wait") < log.index("unmap")


@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("other", BACKENDS)
def test_a_neighbour_gets_a_page_behind_its_event_and_zeroed(backend: str, other: str) -> None:
    driver = checked()
    pool = kvmem.PagePool(memory=16 * PAGE, page_bytes=PAGE, driver=driver)
    sizes = dict(pool=pool, max_sequences=4, max_tokens=512, interleave=1)
    giver = kvmem.Allocator(plain_spec(), backend=backend, **sizes)
    taker = kvmem.Allocator(plain_spec(), backend=other, **sizes)
    first = used(giver, 448)  # 14 pages, or 15 with what the trash blocks begin
    first.kv(0)[0].fill_(7.0) if backend == "virtual" else giver.tensor(0, "k")[
        giver.batch([first]).block_table[0].long()
    ].fill_(7.0)
    driver.hold_events(True)
    first.free()
    assert driver.held_waits() == 0
    driver.clear_log()
    second = taker.sequence()
    second.extend(300)
    log = verbs(driver)
    assert driver.held_waits() >= 1
    taken = log[log.index("wait") :]
    assert "unmap" not in log[: log.index("wait")]
    assert taken.index("unmap") < taken.index("map") < taken.index("zero")
    assert not taker.sequence_tensor(second, 0, "k").any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_closing_an_allocator_waits_for_the_device(backend: str) -> None:
    """Its sequences are live, and no fence covers them yet: one is made."""
    driver = checked()
    pool = kvmem.PagePool(memory=16 * PAGE, page_bytes=PAGE, driver=driver)
    alloc = kvmem.Allocator(plain_spec(), backend=backend, pool=pool, max_sequences=4, max_tokens=512, interleave=1)
    used(alloc, 256)
    driver.hold_events(True)
    driver.clear_log()
    del alloc
    log = verbs(driver)
    assert driver.held_waits() >= 1 and log.index("record") < log.index("wait") < log.index("unmap")
    assert pool.mapped_bytes == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SPECS)
def test_no_unmap_runs_ahead_of_an_event_in_a_random_life(name: str, backend: str) -> None:
    """Whatever the calls: when something is unmapped, no event recorded since it was last used is still out.

    Each step's log is read: an unmap of memory that a live or freed sequence used is behind the wait for every fence up to
    the one that covers it. What the driver holds back at that moment is younger than the page's last use.
    """
    rng = random.Random(seed_from_environment(29))
    driver = checked()
    alloc = make(backend, driver, 60 if name == "mixed" else 20, SPECS[name]())
    world = World(alloc)
    driver.hold_events(True)
    unmaps = waits = 0
    for _ in range(1500):
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
    assert unmaps > 50 and waits > 20


@pytest.mark.parametrize("backend", BACKENDS)
def test_events_do_not_pile_up(backend: str) -> None:
    """Each free leaves a fence; those that are done are forgotten with the next."""
    driver = checked()
    alloc = make(backend, driver)
    driver.hold_events(True)
    for _ in range(50):
        used(alloc, 20).free()
        driver.complete_events()
    assert driver.live().events <= 2
