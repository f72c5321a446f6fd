"""The checked driver itself: failures on request, held events, the log. What it refuses is in driver_conformance.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmem import _core
from kvmem.errors import DeviceError, OutOfMemory

PAGE = 65536
Scene = tuple[int, list[int]]


@pytest.fixture
def driver() -> _core.CheckedDriver:
    return _core.CheckedDriver(_core.host_driver())


def state(driver: _core.CheckedDriver) -> tuple[int, ...]:
    live = driver.live()
    return live.reservations, live.pages, live.mappings, live.events, live.page_bytes


@pytest.fixture
def scene(driver: _core.CheckedDriver) -> Scene:
    """A range of 16 places, 4 pages mapped and accessible in the first, 4 more pages mapped nowhere."""
    base = driver.reserve(16 * PAGE)
    pages = [driver.create(PAGE) for _ in range(8)]
    driver.map_run(base, PAGE, pages[:4])
    driver.set_access(base, 4 * PAGE)
    return base, pages


def calls_of(driver: _core.CheckedDriver, base: int, pages: list[int]) -> dict[str, Callable[[], object]]:
    spare = driver.reserve(PAGE)
    return {
        "reserve": lambda: driver.release(driver.reserve(PAGE), PAGE),
        "create": lambda: driver.destroy(driver.create(PAGE)),
        "map": lambda: driver.map(base + 4 * PAGE, PAGE, 0, pages[4]),
        "set_access": lambda: driver.set_access(base, 4 * PAGE),
        "unmap": lambda: driver.unmap(base, PAGE),
        "zero": lambda: driver.zero(base + PAGE, PAGE),
        "copy": lambda: driver.copy(base + PAGE, base + 2 * PAGE, PAGE),
        "record": lambda: driver.forget(driver.record()),
        "wait": lambda: driver.wait(0),
        "destroy": lambda: driver.destroy(pages[7]),
        "release": lambda: driver.release(spare, PAGE),
    }


@pytest.mark.parametrize(("code", "error"), [(2, OutOfMemory), (719, DeviceError)])
def test_every_verb_fails_as_asked_and_changes_nothing(
    driver: _core.CheckedDriver, scene: Scene, code: int, error: type[Exception]
) -> None:
    for verb, call in calls_of(driver, *scene).items():
        before, inner_bytes = state(driver), driver.physical_bytes()
        driver.fail(verb, 1, code)
        with pytest.raises(error, match=f"{verb} fails as asked") as raised:
            call()
        assert getattr(raised.value, "code", 2) == code
        assert (state(driver), driver.physical_bytes()) == (before, inner_bytes), verb
        assert driver.pending_failures() == 0
        call()  # once is once


def test_the_nth_call_counts_from_now_and_per_verb(driver: _core.CheckedDriver) -> None:
    driver.fail("create", 3, 2)
    driver.fail("", 6, 999)
    base = driver.reserve(4 * PAGE)
    driver.create(PAGE)
    driver.create(PAGE)
    with pytest.raises(OutOfMemory):
        driver.create(PAGE)
    driver.create(PAGE)
    with pytest.raises(DeviceError, match="999"):
        driver.release(base, 4 * PAGE)
    driver.release(base, 4 * PAGE)


def test_nonsense_in_fail_is_refused(driver: _core.CheckedDriver) -> None:
    for verb, nth, code in [("mpa", 1, 2), ("map", 0, 2), ("map", 1, 0)]:
        with pytest.raises(ValueError):
            driver.fail(verb, nth, code)


@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_a_run_that_fails_in_the_middle_is_undone(driver: _core.CheckedDriver, scene: Scene, nth: int) -> None:
    """Unmapping a run is one call, as CUDA's."""
    base, pages = scene
    _core.write_bytes(base, bytes([1, 2, 3, 4]) * PAGE)
    before = state(driver)
    driver.fail("map", nth, 2)
    with pytest.raises(OutOfMemory):
        driver.map_run(base + 4 * PAGE, PAGE, pages[4:])
    assert state(driver) == before
    driver.fail("unmap", 1, 700)
    with pytest.raises(DeviceError):
        driver.unmap_run(base, PAGE, 4)
    assert state(driver) == before
    driver.touch(base, 4 * PAGE)  # access came back with the pages
    assert _core.read_bytes(base, 4 * PAGE) == bytes([1, 2, 3, 4]) * PAGE, "each page is back in its own place"


def test_undoing_is_spared_from_failures_unless_asked(driver: _core.CheckedDriver, scene: Scene) -> None:
    base, pages = scene
    before = state(driver)
    driver.fail("map", 3, 2)
    driver.fail("unmap", 1, 700)
    with pytest.raises(OutOfMemory):
        driver.map_run(base + 4 * PAGE, PAGE, pages[4:])
    assert state(driver) == before and driver.pending_failures() == 1
    driver.clear_failures()
    driver.fail("map", 3, 2)
    driver.fail("unmap", 1, 700, undo_too=True)
    with pytest.raises(DeviceError, match="could not be undone"):
        driver.map_run(base + 4 * PAGE, PAGE, pages[4:])


def test_a_run_of_pages_without_access_is_put_back_without_access(driver: _core.CheckedDriver, scene: Scene) -> None:
    base, pages = scene
    driver.map_run(base + 4 * PAGE, PAGE, pages[4:])
    driver.fail("unmap", 1, 700)
    with pytest.raises(DeviceError):
        driver.unmap_run(base + 4 * PAGE, PAGE, 4)
    with pytest.raises(DeviceError, match="before set_access"):
        driver.touch(base + 4 * PAGE, 1)


def test_held_events_are_not_done_until_completed(driver: _core.CheckedDriver) -> None:
    early = driver.record()
    driver.hold_events(True)
    held = [driver.record() for _ in range(3)]
    assert driver.done(early) and not any(driver.done(event) for event in held)
    driver.wait(held[1])
    assert driver.held_waits() == 1, "a wait on a held event is seen"
    assert [driver.done(event) for event in held] == [False, True, False]
    driver.wait(held[1])
    assert driver.held_waits() == 1
    driver.complete_events()
    assert all(driver.done(event) for event in held)
    assert not driver.done(late := driver.record()), "events recorded after are still held"
    driver.hold_events(False)
    assert driver.done(driver.record())
    assert driver.live().events == 4
    for event in [*held, late]:
        driver.forget(event)
    assert driver.live().events == 0


def test_an_event_is_forgotten_once(driver: _core.CheckedDriver) -> None:
    driver.hold_events(True)
    event = driver.record()
    driver.forget(event)  # done() need not be true
    for call in (driver.done, driver.wait, driver.forget):
        with pytest.raises(DeviceError, match="forgotten"):
            call(event)


def test_the_log_tells_what_happened_in_order(driver: _core.CheckedDriver) -> None:
    base = driver.reserve(2 * PAGE)
    page = driver.create(PAGE)
    driver.fail("map", 1, 2)
    with pytest.raises(OutOfMemory):
        driver.map(base, PAGE, 0, page)  # failed calls are counted, not logged
    driver.map_run(base, PAGE, [page, page])
    driver.set_access(base, 2 * PAGE)
    driver.zero(base, 7)
    driver.unmap(base + PAGE, PAGE)
    assert [(call.verb, call.at, call.bytes, call.id) for call in driver.log()] == [
        ("reserve", base, 2 * PAGE, 0),
        ("create", 0, PAGE, page),
        ("map", base, PAGE, page),
        ("map", base + PAGE, PAGE, page),
        ("set_access", base, 2 * PAGE, 0),
        ("zero", base, 7, 0),
        ("unmap", base + PAGE, PAGE, page),
    ]
    assert driver.counters().map == 3
    driver.clear_log()
    assert driver.log() == []


def test_the_log_is_bounded(driver: _core.CheckedDriver) -> None:
    for _ in range(70_000):
        driver.wait(0)
    assert len(driver.log()) == 65_536


def test_live_shows_a_leak(driver: _core.CheckedDriver, scene: Scene) -> None:
    assert state(driver) == (1, 8, 4, 0, 8 * PAGE)


@pytest.mark.parametrize(
    ("rule", "misuse"),
    [
        ("offset is 65536 and must be 0", lambda d, base, pages: d.map(base + 8 * PAGE, PAGE, PAGE, pages[5])),
        ("never in part", lambda d, base, pages: d.map(base + 8 * PAGE, PAGE // 2, 0, pages[5])),
        (
            "before set_access",
            lambda d, base, pages: (d.map(base + 4 * PAGE, PAGE, 0, pages[5]), d.touch(base, 5 * PAGE)),
        ),
        ("mapped already", lambda d, base, pages: d.map(base, PAGE, 0, pages[5])),
        ("a part of one, or several", lambda d, base, pages: d.unmap(base, PAGE // 2)),
        ("nothing is mapped there", lambda d, base, pages: d.unmap(base + 9 * PAGE, PAGE)),
        ("destroyed while mapped", lambda d, base, pages: d.destroy(pages[0])),
        ("released while pages are mapped", lambda d, base, pages: d.release(base, 16 * PAGE)),
        ("not reserved", lambda d, base, pages: d.map(base + 16 * PAGE, PAGE, 0, pages[5])),
        ("off the granularity", lambda d, base, pages: d.create(PAGE + 1)),
        ("covers a part of the mapping", lambda d, base, pages: d.set_access(base, PAGE + PAGE // 2)),
        ("not wholly mapped", lambda d, base, pages: d.touch(base, 5 * PAGE)),
        ("overlap", lambda d, base, pages: d.copy(base, base + 1, PAGE)),
        ("does not exist", lambda d, base, pages: d.destroy(12345)),
    ],
)
def test_a_refusal_names_the_rule(
    driver: _core.CheckedDriver, scene: Scene, rule: str, misuse: Callable[..., object]
) -> None:
    with pytest.raises(DeviceError, match=rule):
        misuse(driver, *scene)
