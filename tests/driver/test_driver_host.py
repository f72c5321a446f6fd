"""What is true of the host driver alone: its memory is a real file's, and the kernel agrees with its bookkeeping."""

from __future__ import annotations

import random
import re
import signal
from pathlib import Path

import pytest
from support_drivers import assert_runs, run_python

from kvmem import _core
from kvmem.errors import DeviceError, OutOfMemory

PAGE = 65536
TIB = 1 << 40


def resident_shared() -> int:
    """RSS of shared memory, in bytes: what else the process takes or frees meanwhile does not show."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssShmem"))
    return int(line.split()[1]) << 10


def resident_within(base: int, size: int) -> int:
    """RSS of the mappings that begin in [base, base + size), in bytes."""
    resident, inside, met = 0, False, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-[0-9a-f]+ ", line):
            inside = base <= int(bounds[1], 16) < base + size
            met = met or inside
        elif inside and line.startswith("Rss:"):
            resident += int(line.split()[1]) << 10
    assert met, "nothing is mapped there"
    return resident


def smaps_rollup(field: str) -> int:
    with open("/proc/self/smaps_rollup") as file:
        return int(re.search(rf"^{field}:\s+(\d+) kB", file.read(), re.M).group(1)) * 1024


def kernel_pieces(base: int, size: int) -> list[tuple[int, int, str, int]]:
    """(begin, end, permissions, file offset or -1) of what the kernel maps, clipped to [base, base + size)."""
    found = []
    with open("/proc/self/maps") as file:
        for line in file:
            addresses, permissions, offset, _, inode = line.split()[:5]
            begin, end = (int(x, 16) for x in addresses.split("-"))
            if begin < base + size and end > base:
                inside = max(begin, base), min(end, base + size)
                found.append((*inside, permissions[:2], int(offset, 16) if inode != "0" else -1))
    return found


@pytest.fixture(params=[False, True], ids=["holes read as zeros", "holes fault"])
def holes_fault(request: pytest.FixtureRequest) -> bool:
    return bool(request.param) or _core.debug_build


@pytest.fixture
def driver(holes_fault: bool) -> _core.Driver:
    return _core.host_driver(holes_fault)


def test_reserving_a_tebibyte_costs_nothing(driver: _core.Driver) -> None:
    before = smaps_rollup("Pss")
    bases = [driver.reserve(TIB) for _ in range(4)]
    assert driver.physical_bytes() == 0
    assert smaps_rollup("Pss") - before < 1 << 20
    for base in bases:
        driver.release(base, TIB)


def test_physical_bytes_grow_only_with_pages_touched(driver: _core.Driver) -> None:
    """fstat (what the file holds) and Pss (what this process is charged) move by the page, to the byte."""
    base = driver.reserve(TIB)
    pages = [driver.create(PAGE) for _ in range(64)]
    assert driver.physical_bytes() == 0
    driver.map_run(base, PAGE, pages)
    driver.set_access(base, 64 * PAGE)
    assert driver.physical_bytes() == 0
    before = smaps_rollup("Pss_Shmem")
    driver.zero(base, 16 * PAGE)
    assert driver.physical_bytes() == 16 * PAGE
    driver.zero(base + 16 * PAGE, 48 * PAGE)
    assert driver.physical_bytes() == 64 * PAGE
    assert smaps_rollup("Pss_Shmem") - before == 64 * PAGE


def test_a_page_mapped_twice_is_held_once(driver: _core.Driver) -> None:
    """RSS counts an alias twice; Pss and the file do not."""
    count = 256
    one, two = driver.reserve(count * PAGE), driver.reserve(count * PAGE)
    pages = [driver.create(PAGE) for _ in range(count)]
    pss, rss = smaps_rollup("Pss_Shmem"), resident_shared()
    for base in (one, two):
        driver.map_run(base, PAGE, pages)
        driver.set_access(base, count * PAGE)
    driver.zero(one, count * PAGE)
    driver.copy(two, one, 0)
    assert _core.read_bytes(two, count * PAGE) == bytes(count * PAGE)
    assert driver.physical_bytes() == count * PAGE
    assert resident_shared() - rss == 2 * count * PAGE
    # The kernel halves each page between its two mappings here; together they are charged once.
    assert smaps_rollup("Pss_Shmem") - pss == count * PAGE


def test_destroying_gives_memory_back_to_the_system(driver: _core.Driver) -> None:
    count = 512
    base = driver.reserve(count * PAGE)
    pages = [driver.create(PAGE) for _ in range(count)]
    driver.map_run(base, PAGE, pages)
    driver.set_access(base, count * PAGE)
    driver.zero(base, count * PAGE)
    shared_before = meminfo("Shmem")
    driver.unmap_run(base, PAGE, count)
    assert driver.physical_bytes() == count * PAGE, "unmapping alone keeps a page's content"
    for page in pages[::2]:
        driver.destroy(page)
    assert driver.physical_bytes() == count // 2 * PAGE
    for page in pages[1::2]:
        driver.destroy(page)
    assert driver.physical_bytes() == 0
    assert shared_before - meminfo("Shmem") > count * PAGE // 2  # system-wide, so only roughly


def meminfo(field: str) -> int:
    with open("/proc/meminfo") as file:
        return int(re.search(rf"^{field}:\s+(\d+) kB", file.read(), re.M).group(1)) * 1024


def test_destroyed_memory_reads_zero_when_created_again(driver: _core.Driver) -> None:
    base = driver.reserve(PAGE)
    page = driver.create(PAGE)
    driver.map(base, PAGE, 0, page)
    driver.set_access(base, PAGE)
    _core.write_bytes(base, b"\xff" * PAGE)
    driver.unmap(base, PAGE)
    driver.destroy(page)
    again = driver.create(PAGE)
    assert again == page, "the lowest free range is handed out first"
    driver.map(base, PAGE, 0, again)
    driver.set_access(base, PAGE)
    assert _core.read_bytes(base, PAGE) == bytes(PAGE)


def test_pages_created_in_order_are_adjacent_and_map_in_one_call(driver: _core.Driver) -> None:
    base = driver.reserve(1000 * PAGE)
    pages = [driver.create(PAGE) for _ in range(1000)]
    driver.map_run(base, PAGE, pages)
    driver.set_access(base, 1000 * PAGE)
    assert driver.counters().map == 1
    assert [piece[2] for piece in kernel_pieces(base, 1000 * PAGE)] == ["rw"]


@pytest.mark.parametrize("order", [1, -1])
def test_a_run_mapped_open_is_accessible_at_once(driver: _core.Driver, holes_fault: bool, order: int) -> None:
    """The kernel agrees, unmaps, and shows the same bytes where the pages are mapped again the other way."""
    base = driver.reserve(16 * PAGE)
    pages = [driver.create(PAGE) for _ in range(8)][::order]
    assert driver.map_run_open(base, PAGE, pages)
    assert driver.counters().map == (1 if order == 1 else 8)
    assert {piece[2] for piece in kernel_pieces(base, 8 * PAGE)} == {"rw"}
    driver.copy(base, base + PAGE, 16)  # access was given in the books too
    for i in range(8):
        _core.write_bytes(base + i * PAGE, bytes([i + 1]) * 8)
    with pytest.raises(DeviceError, match="already mapped"):
        driver.map_run_open(base + 7 * PAGE, PAGE, pages[:1])
    driver.map_run(base + 8 * PAGE, PAGE, pages)
    driver.set_access(base + 8 * PAGE, 8 * PAGE)
    assert [_core.read_bytes(base + (8 + i) * PAGE, 8)[0] for i in range(8)] == list(range(1, 9))
    driver.unmap_run(base, PAGE, 16)
    assert [piece[2:] for piece in kernel_pieces(base, 16 * PAGE)] == [("--" if holes_fault else "r-", -1)]
    driver.release(base, 16 * PAGE)


def test_holes_in_the_file_are_filled_lowest_first(driver: _core.Driver) -> None:
    pages = [driver.create(PAGE) for _ in range(8)]
    for index in (5, 2, 3):
        driver.destroy(pages[index])
    big = driver.create(2 * PAGE)
    assert big == pages[2], "two neighbours freed apart are one range again"
    assert driver.create(PAGE) == pages[5]


def test_access_over_pieces_that_have_it_in_part(driver: _core.Driver, rng: random.Random) -> None:
    """Each cut of a piece takes one of a few prepared entries: however access alternates in a range, two are enough."""
    count = 16
    base = driver.reserve(count * PAGE)
    pages = [driver.create(PAGE) for _ in range(count)]
    for _ in range(50):
        driver.map_run(base, PAGE, pages)
        for i in rng.sample(range(count), count // 2):
            driver.set_access(base + i * PAGE, PAGE)
        driver.set_access(base, count * PAGE)
        assert [piece[2] for piece in kernel_pieces(base, count * PAGE)] == ["rw"]
        driver.copy(base, base + (count - 1) * PAGE, PAGE)  # access was given in the books too
        driver.unmap_run(base, PAGE, count)
    driver.release(base, count * PAGE)


def test_our_pieces_are_the_kernels(driver: _core.Driver, holes_fault: bool) -> None:
    """Random maps, unmaps and accesses: /proc/self/maps shows every page's offset and protection as a model says."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    slots, grain = 48, driver.info.granularity_bytes
    base = driver.reserve(slots * grain)
    pages = [driver.create(grain) for _ in range(24)]
    model: list[tuple[int, bool] | None] = [None] * slots
    for number in range(600):
        at = rng.randrange(slots)
        count = rng.randint(1, min(rng.choice([3, 12]), slots - at))
        span = range(at, at + count)
        where = base + at * grain
        action = rng.choice(["map", "unmap", "access"])
        if action == "map" and all(model[i] is None for i in span):
            first = rng.randrange(len(pages))
            chosen = [pages[(first + k) % len(pages)] for k in range(count)]
            driver.map_run(where, grain, chosen)
            for i, page in zip(span, chosen, strict=True):
                model[i] = (page, False)
        elif action == "unmap" and all(model[i] is not None for i in span):
            driver.unmap_run(where, grain, count)
            for i in span:
                model[i] = None
        elif action == "access" and all(model[i] is not None for i in span):
            driver.set_access(where, count * grain)
            for i in span:
                model[i] = (model[i][0], True)
        if number % 6 == 0:  # /proc/self/maps is long where much was tested before
            assert kernel_view(base, slots, grain, holes_fault) == model, f"seed {seed}"
        hole = next((i for i in range(slots) if model[i] is None), None)
        if hole is not None and not holes_fault:  # a hole that was read merges like any other
            assert not any(_core.read_bytes(base + hole * grain, grain))
    assert kernel_view(base, slots, grain, holes_fault) == model, f"seed {seed}"
    assert len(kernel_pieces(base, slots * grain)) == len(merged(model))


def kernel_view(base: int, slots: int, grain: int, holes_fault: bool) -> list[tuple[int, bool] | None]:
    """Which page the kernel shows in each slot, and whether it may be written; None for a hole."""
    seen: list[tuple[int, bool] | None] = [None] * slots
    for begin, end, permissions, offset in kernel_pieces(base, slots * grain):
        for address in range(begin, end, grain):
            if offset >= 0:
                page = (offset + address - begin) // grain + 1
                seen[(address - base) // grain] = (page, permissions == "rw")
            else:
                assert permissions == ("--" if holes_fault else "r-")
    return seen


def merged(model: list[tuple[int, bool] | None]) -> list[tuple[int, bool] | None]:
    """Neighbours that are one mapping of the kernel's: holes, and pages that are adjacent in the file."""
    found: list[tuple[int, bool] | None] = []
    last: object = ()
    for entry in model:
        follows = last is None if entry is None else isinstance(last, tuple) and last == (entry[0] - 1, entry[1])
        if not follows:
            found.append(entry)
        last = entry
    return found


def test_create_promises_no_more_than_the_machine_has(driver: _core.Driver) -> None:
    total = driver.info.total_bytes
    page = driver.create(total // 2 // PAGE * PAGE)
    with pytest.raises(OutOfMemory, match="destroy pages first"):
        driver.create(total // 2 // PAGE * PAGE + 2 * PAGE)
    driver.destroy(page)
    assert driver.create(total // PAGE * PAGE)
    assert driver.available_bytes() < PAGE
    assert driver.physical_bytes() == 0


def test_address_space_that_does_not_exist_is_a_typed_error(driver: _core.Driver) -> None:
    with pytest.raises(OutOfMemory, match="reserve of"):
        driver.reserve(1 << 50)
    with pytest.raises(OutOfMemory):
        driver.reserve(1 << 62)


def test_touching_before_access_and_after_unmap_is_a_fault() -> None:
    """Not the bookkeeping's opinion: a plain store there is SIGSEGV."""
    code = """
        import ctypes
        from kvmem import _core
        driver = _core.host_driver()
        base = driver.reserve(65536)
        page = driver.create(65536)
        driver.map(base, 65536, 0, page)
        {step}
        ctypes.memset(base, 1, 1)
    """
    assert run_python(code.format(step="")).returncode == -signal.SIGSEGV
    assert run_python(code.format(step="driver.set_access(base, 65536)")).returncode == 0
    gone = "driver.set_access(base, 65536); driver.unmap(base, 65536)"
    assert run_python(code.format(step=gone)).returncode == -signal.SIGSEGV


def test_a_forked_child_has_no_share_in_the_cache() -> None:
    out = assert_runs("""
        import os, signal, ctypes, warnings
        from kvmem import _core
        from kvmem.errors import DeviceError
        P = 65536
        driver = _core.host_driver()
        base = driver.reserve(4 * P)
        pages = [driver.create(P) for _ in range(2)]
        driver.map_run(base, P, pages)
        driver.set_access(base, 2 * P)
        _core.write_bytes(base, b"parent")

        def in_child(work):
            child = os.fork()
            if child == 0:
                try:
                    os._exit(work() or 0)
                except BaseException as error:
                    print(repr(error), flush=True)
                    os._exit(99)
            return os.waitpid(child, 0)[1]

        def refused():
            calls = [lambda: driver.create(P), lambda: driver.map(base + 2 * P, P, 0, pages[0]),
                     lambda: driver.unmap(base, P), lambda: driver.reserve(P),
                     lambda: driver.release(base, 4 * P), lambda: driver.destroy(pages[0]),
                     lambda: driver.zero(base, P), lambda: driver.copy(base, base + P, P), driver.physical_bytes,
                     driver.available_bytes, lambda: driver.set_access(base, P), driver.record]
            for call in calls:
                try:
                    call()
                except DeviceError as error:
                    assert "fork" in str(error), error
                else:
                    return 1
            links = []
            for fd in os.listdir("/proc/self/fd"):
                try:
                    links.append(os.readlink(f"/proc/self/fd/{fd}"))
                except FileNotFoundError:
                    pass  # the one that listed the folder
            assert not any("kvmem" in link for link in links), links

        def teardown_touches_nothing():
            global driver
            driver = None

        def own_driver_works():
            mine = _core.host_driver()
            at = mine.reserve(P)
            mine.map(at, P, 0, mine.create(P))
            mine.set_access(at, P)
            _core.write_bytes(at, b"child!")
            assert _core.read_bytes(at, 6) == b"child!"

        assert in_child(refused) == 0
        assert in_child(lambda: ctypes.memset(base, 0, 6) and 0) == signal.SIGSEGV
        assert in_child(teardown_touches_nothing) == 0
        assert in_child(own_driver_works) == 0
        assert _core.read_bytes(base, 6) == b"parent"
        driver.unmap_run(base, P, 2)
        driver.map(base, P, 0, pages[0])  # a mapping made anew must have the flag again
        driver.set_access(base, P)
        assert in_child(lambda: ctypes.memset(base, 0, 6) and 0) == signal.SIGSEGV
        assert _core.read_bytes(base, 6) == b"parent"
        print("ok")
    """)
    assert out.strip().endswith("ok")


def test_reading_where_nothing_is_mapped(driver: _core.Driver, holes_fault: bool) -> None:
    base = driver.reserve(TIB)
    if holes_fault:
        with pytest.raises(DeviceError, match="read_bytes"):
            _core.read_bytes(base, 1)
    else:
        assert not any(_core.read_bytes(base + (TIB >> 1), 1 << 24))
        assert resident_within(base, TIB) == 0, "zeros are one page of the kernel's, charged to nobody"
    with pytest.raises(DeviceError, match="write_bytes"):
        _core.write_bytes(base, b"x")
