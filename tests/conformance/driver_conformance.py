"""What every driver must do: the rules of csrc/driver/driver.h as tests. One file, run on every driver there is.

A test gets a fresh ``device`` and must leave nothing behind; the fixture in test_driver_conformance.py checks that."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from support_drivers import Device

from kvmem.errors import DeviceError, OutOfMemory

TIB = 1 << 40


def far_from(base: int) -> int:
    """An address at which nothing is reserved. A GPU's driver may reserve at low ones too, so it is on either side."""
    return base - 4 * TIB if base > 8 * TIB else base + 4 * TIB


def pattern(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(64) * (size // 64)


def finish(device: Device) -> None:
    """Waits until everything put on the default stream so far is done."""
    event = device.driver.record()
    device.driver.wait(event)
    device.driver.forget(event)


@contextmanager
def mapped(device: Device, count: int, room: int = 0) -> Iterator[tuple[int, list[int]]]:
    """``count`` fresh pages mapped back to back and accessible, at the start of a range with ``room`` more pages."""
    driver, size = device.driver, device.page_bytes
    base = driver.reserve((count + room) * size)
    pages = [driver.create(size) for _ in range(count)]
    driver.map_run(base, size, pages)
    driver.set_access(base, count * size)
    yield base, pages
    driver.unmap_run(base, size, count)
    for page in pages:
        driver.destroy(page)
    driver.release(base, (count + room) * size)


# ---- What is promised ------------------------------------------------------------------------------------------------


def test_info_is_usable(device: Device) -> None:
    info = device.driver.info
    assert info.granularity_bytes > 0 and info.granularity_bytes & (info.granularity_bytes - 1) == 0
    assert info.recommended_bytes >= info.granularity_bytes and info.recommended_bytes % info.granularity_bytes == 0
    assert info.total_bytes > 16 << 20
    assert info.dlpack_device_type == (1 if "host" in device.name else 2)
    assert 0 < device.driver.available_bytes() <= info.total_bytes


@pytest.mark.parametrize("alignment", [0, 1 << 12, 2 << 20, 1 << 30])
def test_reserve_costs_no_memory_and_keeps_alignment(device: Device, alignment: int) -> None:
    driver = device.driver
    before = driver.physical_bytes()
    bases = [driver.reserve(TIB, alignment) for _ in range(3)]
    assert all(base % max(alignment, device.page_bytes) == 0 for base in bases)
    bases.sort()
    assert all(b - a >= TIB for a, b in itertools.pairwise(bases)), "reservations overlap"
    assert driver.physical_bytes() == before
    for base in bases:
        driver.release(base, TIB)


def test_memory_holds_what_was_written(device: Device) -> None:
    with mapped(device, 3) as (base, _):
        data = pattern(1, 3 * device.page_bytes)
        device.write(base, data)
        assert device.read(base, len(data)) == data


def test_one_page_at_several_addresses_is_one_memory(device: Device) -> None:
    driver, size = device.driver, device.page_bytes
    with mapped(device, 1, room=2) as (base, (page,)):
        driver.map_run(base + size, size, [page, page])
        driver.set_access(base + size, 2 * size)
        device.write(base + size, pattern(2, size))
        assert device.read(base, size) == device.read(base + 2 * size, size) == pattern(2, size)
        driver.unmap_run(base + size, size, 2)
        assert device.read(base, size) == pattern(2, size)


def test_a_page_keeps_its_content_while_unmapped(device: Device) -> None:
    driver, size = device.driver, device.page_bytes
    first, second = driver.reserve(size), driver.reserve(size)
    page = driver.create(size)
    driver.map(first, size, 0, page)
    driver.set_access(first, size)
    device.write(first, pattern(3, size))
    driver.unmap(first, size)
    driver.map(second, size, 0, page)
    driver.set_access(second, size)
    assert device.read(second, size) == pattern(3, size)
    driver.unmap(second, size)
    driver.destroy(page)
    driver.release(first, size)
    driver.release(second, size)


def test_a_run_puts_each_page_in_its_place(device: Device) -> None:
    driver, size = device.driver, device.page_bytes
    with mapped(device, 8, room=8) as (base, pages):
        for i in range(8):
            device.write(base + i * size, pattern(i, size))
        order = [3, 4, 5, 0, 7, 6, 1, 2]
        driver.map_run(base + 8 * size, size, [pages[i] for i in order])
        driver.set_access(base + 8 * size, 8 * size)
        for place, i in enumerate(order):
            assert device.read(base + (8 + place) * size, size) == pattern(i, size)
        driver.unmap_run(base + 8 * size, size, 8)


def test_pages_may_be_larger_than_the_granularity(device: Device) -> None:
    driver, size = device.driver, 3 * device.page_bytes
    base = driver.reserve(4 * size)
    pages = [driver.create(size) for _ in range(2)]
    driver.map_run(base + size, size, pages[::-1])
    driver.set_access(base + size, 2 * size)
    driver.zero(base + size, 2 * size)
    device.write(base + 2 * size, pattern(4, size))
    assert device.read(base + size, 2 * size) == bytes(size) + pattern(4, size)
    driver.unmap_run(base + size, size, 2)
    for page in pages:
        driver.destroy(page)
    driver.release(base, 4 * size)


def test_fresh_pages_are_zero_where_promised(device: Device) -> None:
    for _ in range(2):
        with mapped(device, 2) as (base, _):
            if device.driver.info.fresh_pages_are_zero:
                assert device.read(base, 2 * device.page_bytes) == bytes(2 * device.page_bytes)
            device.write(base, b"\xff" * 2 * device.page_bytes)


@pytest.mark.parametrize(("begin", "size"), [(0, 1), (1, 1), (63, 4097), (0, 0)])
def test_zero_and_copy_touch_their_bytes_and_no_other(device: Device, begin: int, size: int) -> None:
    driver = device.driver
    with mapped(device, 4) as (base, _):
        whole = 4 * device.page_bytes
        start = device.page_bytes - 64 + begin  # across the border of two pages
        before = pattern(5, whole)
        device.write(base, before)
        driver.zero(base + start, size)
        expected = before[:start] + bytes(size) + before[start + size :]
        finish(device)
        assert device.read(base, whole) == expected
        to = 3 * device.page_bytes + 7
        driver.copy(base + to, base + 11, min(size, device.page_bytes - 7))
        size = min(size, device.page_bytes - 7)
        expected = expected[:to] + expected[11 : 11 + size] + expected[to + size :]
        finish(device)
        assert device.read(base, whole) == expected


def test_events_complete(device: Device) -> None:
    driver = device.driver
    with mapped(device, 1) as (base, _):
        for _ in range(3):
            driver.zero(base, device.page_bytes)
            events = [driver.record() for _ in range(4)]
            driver.wait(events[-1])
            assert all(driver.done(event) for event in events), "earlier events of a stream complete before later ones"
            for event in events:
                driver.forget(event)
    assert driver.done(0), "event 0 has always completed"
    driver.wait(0)
    driver.forget(0)


def test_calls_may_come_from_any_thread(device: Device) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with mapped(device, 2) as (base, _):
                device.driver.zero(base, device.page_bytes)
                finish(device)
                assert device.read(base, device.page_bytes) == bytes(device.page_bytes)
        except BaseException as error:  # noqa: BLE001  the thread hands it to the test
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


def test_counters_count(device: Device) -> None:
    driver = device.driver
    before = driver.counters()
    with mapped(device, 1) as (base, _):
        driver.zero(base, 1)
    after = driver.counters()
    for verb in ("reserve", "create", "map", "set_access", "unmap", "destroy", "release", "zero"):
        assert getattr(after, verb) - getattr(before, verb) == 1, verb
    assert after.total - before.total == 7
    with pytest.raises(DeviceError):
        driver.destroy(0)
    assert driver.counters().destroy == after.destroy + 1, "a call that fails is a call"


# ---- What is refused -------------------------------------------------------------------------------------------------


def misuses(device: Device, base: int, pages: list[int], spare: int) -> dict[str, Callable[[], object]]:
    """Pages 0-3 lie mapped at base, 4 free places behind; ``spare`` is a page mapped nowhere."""
    driver, size = device.driver, device.page_bytes
    free = base + 4 * size
    return {
        "map at an offset": lambda: driver.map(free, size, size, spare),
        "map a part of a handle": lambda: driver.map(free, size // 2, 0, spare),
        "map more than a handle": lambda: driver.map(free, 2 * size, 0, spare),
        "map off the granularity": lambda: driver.map(free + 512, size, 0, spare),
        "map where nothing is reserved": lambda: driver.map(far_from(base), size, 0, spare),
        "map beyond the reservation": lambda: driver.map(base + 8 * size, size, 0, spare),
        "map a run that ends beyond it": lambda: driver.map_run(base + 7 * size, size, [spare, pages[0]]),
        "map where a page is": lambda: driver.map(base, size, 0, spare),
        "map the same page there again": lambda: driver.map(base, size, 0, pages[0]),
        "map a run that meets a page": lambda: driver.map_run(base + 3 * size, size, [spare, spare]),
        "map page 0": lambda: driver.map(free, size, 0, 0),
        "map a page that never was": lambda: driver.map(free, size, 0, 1 << 60),
        "map a run with a bad page last": lambda: driver.map_run(free, size, [spare, pages[0], 1 << 60]),
        "set access where nothing is mapped": lambda: driver.set_access(free, size),
        "set access across the end of the mappings": lambda: driver.set_access(base + 3 * size, 2 * size),
        "set access off the granularity": lambda: driver.set_access(base, size // 2),
        "set access from the middle of a page": lambda: driver.set_access(base + size // 2, size),
        "set access to nothing": lambda: driver.set_access(base, 0),
        "unmap a part": lambda: driver.unmap(base, size // 2),
        "unmap several as one": lambda: driver.unmap(base, 2 * size),
        "unmap where nothing is": lambda: driver.unmap(free, size),
        "unmap a run that ends in a hole": lambda: driver.unmap_run(base + 2 * size, size, 3),
        "destroy a mapped page": lambda: driver.destroy(pages[1]),
        "destroy page 0": lambda: driver.destroy(0),
        "destroy a page that never was": lambda: driver.destroy(1 << 60),
        "release while mapped": lambda: driver.release(base, 8 * size),
        "release a part": lambda: driver.release(base, 4 * size),
        "release from the middle": lambda: driver.release(free, 4 * size),
        "release what never was": lambda: driver.release(far_from(base), size),
        "create nothing": lambda: driver.create(0),
        "create off the granularity": lambda: driver.create(size + 512),
        "create a negative size": lambda: driver.create(-size),
        "reserve nothing": lambda: driver.reserve(0),
        "reserve with an odd alignment": lambda: driver.reserve(size, 3 * size),
    }


def test_misuse_is_refused_and_changes_nothing(device: Device) -> None:
    driver, size = device.driver, device.page_bytes
    with mapped(device, 4, room=4) as (base, pages):
        spare = driver.create(size)
        contents = pattern(6, 4 * size)
        device.write(base, contents)
        physical = driver.physical_bytes()
        for what, call in misuses(device, base, pages, spare).items():
            with pytest.raises((DeviceError, OutOfMemory)):
                call()
                pytest.fail(f"not refused: {what}")
            assert driver.physical_bytes() == physical, what
            assert device.read(base, 4 * size) == contents, what
            driver.map_run(base + 4 * size, size, [spare] * 4)  # the rest of the range is still free ...
            driver.set_access(base, 8 * size)
            driver.unmap_run(base + 4 * size, size, 4)
        driver.destroy(spare)  # ... and no page has one mapping too many


def test_what_is_gone_stays_gone(device: Device) -> None:
    driver, size = device.driver, device.page_bytes
    base, page = driver.reserve(size), driver.create(size)
    driver.map(base, size, 0, page)
    driver.unmap(base, size)
    with pytest.raises(DeviceError):
        driver.unmap(base, size)
    driver.destroy(page)
    with pytest.raises(DeviceError):
        driver.destroy(page)
    with pytest.raises(DeviceError):
        driver.map(base, size, 0, page)
    driver.release(base, size)
    with pytest.raises(DeviceError):
        driver.release(base, size)


def test_contents_are_out_of_reach_before_access(device: Device) -> None:
    if not device.checks_contents:
        pytest.skip("on a real GPU this is an asynchronous fault that ends the context; the checked driver refuses it")
    driver, size = device.driver, device.page_bytes
    with mapped(device, 1, room=3) as (base, (page,)):
        driver.map(base + size, size, 0, page)  # mapped, no access
        for at, length in [(base + size, 1), (base, size + 1), (base + 2 * size, 1), (far_from(base), 1)]:
            with pytest.raises(DeviceError):
                driver.zero(at, length)
            with pytest.raises(DeviceError):
                driver.copy(base, at, length)
            with pytest.raises(DeviceError):
                driver.copy(at, base, length)
        driver.unmap(base + size, size)
        driver.map(base + size, size, 0, page)
        driver.set_access(base + size, size)
        driver.zero(base + size, size)
        driver.unmap(base + size, size)
        driver.map(base + size, size, 0, page)  # a new mapping starts without access again
        with pytest.raises(DeviceError):
            driver.zero(base + size, 1)
        driver.unmap(base + size, size)


def test_more_than_there_is_is_out_of_memory(device: Device) -> None:
    driver, size = device.driver, device.page_bytes
    before = driver.physical_bytes()
    with pytest.raises(OutOfMemory):
        driver.create((driver.info.total_bytes // size + 1) * size)
    assert driver.physical_bytes() == before
    with mapped(device, 1) as (base, _):
        driver.zero(base, size)


# ---- Anything at all -------------------------------------------------------------------------------------------------


def test_random_walk_keeps_every_page_apart(device: Device, rng: random.Random) -> None:
    """Random creates, maps, aliases, writes, unmaps and destroys against a model of which bytes lie where."""
    driver, size, slots = device.driver, device.page_bytes, 24
    base = driver.reserve(slots * size)
    content: dict[int, bytes | None] = {}  # page -> its bytes; None until written
    table: list[int | None] = [None] * slots
    steps = 300 if size <= 65536 else 60
    for _ in range(steps):
        action = rng.choice(["create", "map", "map", "write", "unmap", "destroy"])
        at = rng.randrange(slots)
        span = range(at, min(slots, at + rng.randint(1, 4)))
        where = base + at * size
        if action == "create" and len(content) < 12:
            content[driver.create(size)] = None
        elif action == "map" and content and all(table[i] is None for i in span):
            chosen = [rng.choice(list(content)) for _ in span]
            driver.map_run(where, size, chosen)
            driver.set_access(where, len(span) * size)
            for i, page in zip(span, chosen, strict=True):
                table[i] = page
        elif action == "write" and (page := table[at]) is not None:
            content[page] = pattern(rng.randrange(1 << 30), size)
            device.write(where, content[page])
        elif action == "unmap" and all(table[i] is not None for i in span):
            driver.unmap_run(where, size, len(span))
            for i in span:
                table[i] = None
        elif action == "destroy" and (loose := [p for p in content if p not in table]):
            driver.destroy(victim := rng.choice(loose))
            del content[victim]
        check = rng.randrange(slots)
        if (page := table[check]) is not None and content[page] is not None:
            assert device.read(base + check * size, size) == content[page]
    for i in range(slots):
        if table[i] is not None:
            driver.unmap(base + i * size, size)
    for page in content:
        driver.destroy(page)
    driver.release(base, slots * size)
