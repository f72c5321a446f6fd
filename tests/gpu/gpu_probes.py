"""One function for each rule of gpu_rules.py: it returns what else was seen, raises ``Refused`` at the call in question,
or ``Wrong`` when that is allowed and does something else. Each has a process of its own and cleans nothing up."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from ctypes import c_void_p

from gpu_costs import map_one, timed, us
from gpu_door import READ, Door

MIB = 1 << 20


class Wrong(Exception):
    """Allowed, but the memory does not hold what it should."""


def expect(found: bytes, value: int, where: str) -> None:
    if found != bytes([value]) * len(found):
        raise Wrong(f"{where} holds {found[:4].hex()}..., not {value:02x}")


def mapped(door: Door, count: int = 1, room: int = 0) -> tuple[int, list[int]]:
    """``count`` pages back to back, accessible, with addresses for ``room`` more behind them."""
    base = door.reserve((count + room) * door.page)
    pages = [door.create() for _ in range(count)]
    for i, page in enumerate(pages):
        door.map(base + i * door.page, page)
    door.access(base, count * door.page)
    return base, pages


# ---- Memory ----------------------------------------------------------------------------------------------------------


def granularity(door: Door) -> str:
    least, recommended = door.granularity(0), door.granularity(1)
    if least & (least - 1) or recommended % least:
        raise Wrong(f"minimum {least}, recommended {recommended}")
    return f"minimum {least >> 10} KiB, recommended {recommended >> 10} KiB"


def reserve_16_tib(door: Door) -> str:
    door.reserve(16 << 40)
    for power in range(47, 43, -1):
        try:
            door.reserve(1 << power)
        except Exception as refused:  # noqa: BLE001  only how far it goes
            last = str(refused)
            continue
        return f"{1 << (power - 40)} TiB more in one piece"
    return f"16 TiB more: {last}"


def page_at_several_addresses(door: Door) -> str:
    base, (page,) = mapped(door, 1, room=2)
    for i in (1, 2):
        door.map(base + i * door.page, page)
    door.access(base + door.page, 2 * door.page)
    door.fill(base + 2 * door.page, 0x5A)
    door.synchronize()
    for i in range(3):
        expect(door.read(base + i * door.page), 0x5A, f"address {i}")
    return "3 addresses, one content"


def read_through_an_alias_after_a_write(door: Door) -> str:
    """Written at one address and copied from the other in the same stream, with nothing in between, 200 times."""
    base, (page, _) = mapped(door, 2, room=1)
    alias, copy, stream = base + 2 * door.page, base + door.page, door.stream()
    door.map(alias, page)
    door.access(alias)
    for i in range(200):
        door.fill(base, i, stream=stream)
        door.copy(copy, alias, stream=stream)
        if i % 20 == 0:
            door.synchronize()
            expect(door.read(copy + door.page - 64), i, f"the copy of write {i}")
    return "200 writes, each followed by a copy from the other address"


def content_survives_unmap_and_map(door: Door) -> str:
    base, (page,) = mapped(door, 1, room=3)
    door.fill(base, 0x3C)
    door.synchronize()
    door.unmap(base)
    door.map(base + 3 * door.page, page)
    door.access(base + 3 * door.page)
    expect(door.read(base + 3 * door.page), 0x3C, "the page at its new address")
    return ""


def set_access_over_several_mappings(door: Door) -> str:
    base, _ = mapped(door, 16)
    door.fill(base, 1, 16 * door.page)
    door.synchronize()
    return "16 pages, one call"


def in_another_thread(work: Callable[[], None]) -> None:
    """Runs it there, and raises here what it raises."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(work).result()


def calls_without_a_current_context(door: Door) -> str:
    base = door.reserve(2 * door.page)

    def work() -> None:
        door.map(base, door.create())
        door.access(base)
        door.unmap(base)

    in_another_thread(work)
    return "create, map, set_access, unmap from a fresh thread"


def map_over_a_mapping(door: Door) -> str:
    base, _ = mapped(door, 1)
    door.map(base, door.create())
    return ""


def set_access_over_a_gap(door: Door) -> str:
    base, _ = mapped(door, 1, room=2)
    door.map(base + 2 * door.page, door.create())
    door.access(base, 3 * door.page)
    return ""


# ---- While kernels run, and graphs -----------------------------------------------------------------------------------


def busy(door: Door, seconds: float = 0.1) -> tuple[c_void_p, c_void_p]:
    """A stream with about so much work on memory of its own, and the event of its end. Filling memory is a kernel."""
    real = door.page >= MIB  # the stand-in has small pages and does everything at once: no use in much of it
    size = 256 * MIB // door.page * door.page if real else door.page
    base, stream = door.reserve(size), door.stream()
    door.map(base, door.create(size), size)
    door.access(base, size)
    for i in range(int(seconds * 2.5e12 / size) if real else 4):
        door.fill(base, i & 0xFF, size, stream)
    return stream, door.event(stream)


def map_while_kernels_run(door: Door) -> str:
    base = door.reserve(32 * door.page)
    pages = [door.create() for _ in range(32)]
    idle = [timed(lambda i=i: map_one(door, base + i * door.page, pages[i])) for i in range(16)]
    _, end = busy(door)
    loaded = [timed(lambda i=i: map_one(door, base + i * door.page, pages[i])) for i in range(16, 32)]
    still = "they were still running" if not door.done(end) else "they had ended: it may have waited for them"
    stream = door.stream()
    door.fill(base + 31 * door.page, 0x77, stream=stream)
    door.synchronize()
    expect(door.read(base + 31 * door.page), 0x77, "the last page mapped")
    return f"map + set_access {us(idle)} idle, {us(loaded)} beside kernels; {still}"


def unmap_while_kernels_run_elsewhere(door: Door) -> str:
    base, _ = mapped(door, 32)
    idle = [timed(lambda i=i: door.unmap(base + i * door.page)) for i in range(16)]
    _, end = busy(door)
    loaded = [timed(lambda i=i: door.unmap(base + i * door.page)) for i in range(16, 32)]
    still = "they were still running" if not door.done(end) else "they had ended: it may have waited for them"
    door.synchronize()
    return f"unmap {us(idle)} idle, {us(loaded)} beside kernels; {still}"


def map_during_graph_capture(door: Door) -> str:
    """As torch captures: in global mode, where calls that could disturb it fail, on this thread and on another. The calls
    are kvmem's: relaxed.
    """
    return _during_capture(door, door.relaxed)


def map_during_graph_capture_unrelaxed(door: Door) -> str:
    """Without asking an event, which is known to be refused."""
    return _during_capture(door, nullcontext, ask=False)


def _during_capture(door: Door, mode: Callable[[], AbstractContextManager[None]], ask: bool = True) -> str:
    base, _ = mapped(door, 1, room=2)
    stream, side, spare = door.stream(), door.stream(), door.create()
    door.synchronize()
    door.begin_capture(stream)
    door.fill(base, 0x11, stream=stream)

    def work(at: int) -> None:
        with mode():
            map_one(door, at, page := door.create())
            if ask:
                door.fill(at, 0, stream=side)  # as the mapper zeroes fresh pages
            while ask and not door.done(door.event(side)):
                pass
            door.unmap(at)
            door.destroy(page)
            map_one(door, at, spare)
            door.fill(at, 0, stream=side)

    def elsewhere() -> None:
        door("cuCtxPushCurrent_v2", door.context)
        work(base + 2 * door.page)

    work(base + door.page)
    in_another_thread(elsewhere)
    graph = door.end_capture(stream)
    door.launch(graph, stream)
    expect(door.read(base), 0x11, "what the graph writes")
    asked = "ask an event, " if ask else ""
    return f"create, map, zero, {asked}unmap, release, in the capturing thread and in another; it stayed valid"


def map_after_graph_capture(door: Door) -> str:
    base, _ = mapped(door, 1, room=1)
    stream = door.stream()
    graph = _fill_graph(door, base, 0x22, stream)
    door.launch(graph, stream)
    map_one(door, base + door.page, door.create())
    door.launch(graph, stream)
    expect(door.read(base), 0x22, "what the graph writes")
    return ""


def other_page_after_graph_capture(door: Door) -> str:
    base, (first,) = mapped(door, 1, room=1)
    stream, second = door.stream(), door.create()
    graph = _fill_graph(door, base, 0x33, stream)
    door.unmap(base)
    map_one(door, base, second)
    map_one(door, base + door.page, first)
    door.fill(base, 0, 2 * door.page)
    door.synchronize()
    door.launch(graph, stream)
    expect(door.read(base), 0x33, "the new page")
    expect(door.read(base + door.page), 0, "the page that was there when it was captured")
    return "the replay writes the page that is there now"


def _fill_graph(door: Door, at: int, value: int, stream: c_void_p) -> c_void_p:
    door.synchronize()
    door.begin_capture(stream)
    door.fill(at, value, stream=stream)
    return door.end_capture(stream)


# ---- What kvmem does not do ------------------------------------------------------------------------------------------


def map_a_part_of_a_page(door: Door) -> str:
    base = door.reserve(2 * door.page)
    door.map(base, door.create(2 * door.page), door.page)
    door.access(base)
    door.fill(base, 1)
    door.synchronize()
    return "the first half of a page of two granules"


def map_at_an_offset(door: Door) -> str:
    base = door.reserve(2 * door.page)
    door.map(base, door.create(2 * door.page), door.page, offset=door.page)
    return ""


def unmap_several_mappings_at_once(door: Door) -> str:
    base, pages = mapped(door, 4)
    door.unmap(base, 4 * door.page)
    for i, page in enumerate(pages):
        door.map(base + i * door.page, page)  # all of them are free again
    return "4 mappings, one call"


def unmap_a_part_of_a_mapping(door: Door) -> str:
    base = door.reserve(2 * door.page)
    door.map(base, door.create(2 * door.page), 2 * door.page)
    door.unmap(base)
    return ""


def release_a_page_while_mapped(door: Door) -> str:
    base, (page,) = mapped(door, 1)
    door.destroy(page)
    door.fill(base, 0x44)
    door.synchronize()
    expect(door.read(base), 0x44, "the page")
    return "the memory lives until it is unmapped"


def free_addresses_while_mapped(door: Door) -> str:
    base, _ = mapped(door, 1)
    door.release(base, door.page)
    return ""


def read_without_access(door: Door) -> str:
    base = door.reserve(door.page)
    door.map(base, door.create())
    door.read(base)
    return ""


def read_through_a_read_only_alias(door: Door) -> str:
    base = _read_only_alias(door)
    door.fill(base, 0x66)
    door.synchronize()
    expect(door.read(base + door.page), 0x66, "the read-only address")
    return ""


def write_through_a_read_only_alias(door: Door) -> str:
    door.fill(_read_only_alias(door) + door.page, 0x66)
    door.synchronize()
    return ""


def _read_only_alias(door: Door) -> int:
    base, (page,) = mapped(door, 1, room=1)
    door.map(base + door.page, page)
    door.access(base + door.page, flags=READ)
    return base


def fresh_pages_are_zero(door: Door) -> str:
    base, pages = mapped(door, 8)
    door.fill(base, 0xFF, 8 * door.page)
    door.synchronize()
    for i, page in enumerate(pages):
        door.unmap(base + i * door.page)
        door.destroy(page)
    base, _ = mapped(door, 8)
    dirty = sum(any(door.read(base + i * door.page, door.page)) for i in range(8))
    return f"{dirty} of 8 pages hold what another allocation left" if dirty else "8 of 8 were zero; nothing promises it"
