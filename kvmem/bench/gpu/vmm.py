"""The cost of the driver's calls, by page size and number of pages mapped at a time, with and without kernels that run
meanwhile. The calls go through kvmem's own driver, so the times include its metadata.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from kvmem import _core
from kvmem.bench.gpu.device import KernelLoad
from kvmem.bench.gpu.measure import Part
from kvmem.bench.timing import WARM_UP, Spread, timed

Access = Literal["run", "page"]
_PAGE_SECONDS = 2.0
_ACCESS: tuple[Access, ...] = ("run", "page")


@dataclass(frozen=True)
class PageCost:
    """Microseconds to create a page of ``page_bytes`` and to give it back; to reserve and release addresses."""

    page_bytes: int
    create_us: Spread
    destroy_us: Spread
    reserve_us: Spread
    release_us: Spread


@dataclass(frozen=True)
class RunCost:
    """Microseconds of each call when ``run_pages`` pages are mapped back to back, then made accessible by one call for
    the ``"run"`` or by one for each ``"page"``. ``gib_per_second``: bytes over map and set_access together.

    load: ``"kernels"`` ran on another stream, or ``"none"``. drained: repetitions in which that load had
    ended before the last call returned, as happens when a call waits for the device.
    """

    page_bytes: int
    run_pages: int
    access: Access
    load: str
    map_us: Spread
    set_access_us: Spread
    unmap_us: Spread
    run_us: Spread
    gib_per_second: float
    drained: int


class _Range:
    """Reserved addresses and the pages to map there."""

    def __init__(self, driver: _core.Driver, page_bytes: int, pages: int) -> None:
        self.driver, self.page_bytes = driver, page_bytes
        self.create_ns: list[int] = []
        self.base = driver.reserve(pages * page_bytes)
        self.pages: list[int] = []
        for _ in range(pages):
            self.create_ns.append(timed(lambda: self.pages.append(driver.create(page_bytes))))

    def map(self, count: int) -> int:
        return timed(lambda: self.driver.map_run(self.base, self.page_bytes, self.pages[:count]))

    def set_access(self, count: int, access: Access) -> int:
        step = count if access == "run" else 1

        def grant() -> None:
            for first in range(0, count, step):
                self.driver.set_access(self.base + first * self.page_bytes, step * self.page_bytes)

        return timed(grant)

    def unmap(self, count: int) -> int:
        return timed(lambda: self.driver.unmap_run(self.base, self.page_bytes, count))

    def close(self) -> PageCost:
        destroy = [timed(lambda page=page: self.driver.destroy(page)) for page in self.pages]  # type: ignore[misc]
        size = len(self.pages) * self.page_bytes
        release = [timed(lambda: self.driver.release(self.base, size))]
        reserve: list[int] = []
        for _ in range(5):
            at: list[int] = []
            reserve.append(timed(lambda at=at: at.append(self.driver.reserve(size))))  # type: ignore[misc]
            release.append(timed(lambda at=at: self.driver.release(at[0], size)))  # type: ignore[misc]
        costs = (self.create_ns, destroy, reserve, release)
        return PageCost(self.page_bytes, *(Spread.of_ns(ns) for ns in costs))


def vmm(part: Part) -> None:
    """All page sizes and run lengths. At most 16 GiB of pages exist at once."""
    device, sizes = part.device, part.sizes
    driver, load = device.driver(), device.load()
    if load is None:
        part.report.skip("under running kernels", "a CPU has no stream to run them on")
    for page_bytes in sizes.vmm_pages:
        if not part.allows(f"pages of {page_bytes} bytes", _PAGE_SECONDS):
            continue
        area = _Range(driver, page_bytes, max(sizes.vmm_runs))
        try:
            for busy in (None, load) if load is not None else (None,):
                for count in sizes.vmm_runs:
                    for access in _ACCESS[: 1 + (count > 1)]:
                        part.report.add("runs", _measure(area, count, access, busy, sizes.repetitions))
        finally:
            device.synchronize()
            cost = area.close()
        part.report.add("pages", cost)


def _measure(area: _Range, count: int, access: Access, load: KernelLoad | None, repetitions: int) -> RunCost:
    ns: list[tuple[int, int, int]] = []
    drained = 0
    for repetition in range(WARM_UP + repetitions):
        if load is not None:
            load.top_up()
        cost = area.map(count), area.set_access(count, access), area.unmap(count)
        if repetition >= WARM_UP:
            ns.append(cost)
            drained += load is not None and not load.busy()
    mapped, accessed, unmapped = (np.array(column, dtype=np.float64) for column in zip(*ns, strict=True))
    size = count * area.page_bytes / 2**30
    return RunCost(
        area.page_bytes, count, access, "none" if load is None else "kernels", Spread.of_ns(mapped / count),
        Spread.of_ns(accessed / (count if access == "page" else 1)), Spread.of_ns(unmapped / count),
        Spread.of_ns(mapped + accessed), float(size / (np.median(mapped + accessed) / 1e9)), drained,
    )  # fmt: skip
