"""A pool of physical pages under one budget. Allocators that share one hand memory to each other."""

from __future__ import annotations

import torch

from kvmem import _core
from kvmem.device import Device, open_device
from kvmem.errors import SpecError
from kvmem.units import format_bytes, parse_bytes

__all__ = ["PagePool"]

_LEAST_PAGE = 4096
#: Page ids are int32 in the core's books.
MAX_PAGES = 2**31 - 1


class PagePool:
    """Physical memory for one or more allocators of one device.

    An allocator that finds no free page takes parked ones: its own first, then those of its neighbours. So memory
    moves to where it is needed, at the price of unmapping and mapping (about 0.1 ms a page on a GPU).

    memory: budget in bytes, an int or a text such as ``"20GiB"``; rounded down to whole pages, and never exceeded.
    page_bytes: size of a page, a multiple of the driver's granularity; None takes the device's default.
    driver: replaces the device's own driver; for tests.
    """

    def __init__(
        self,
        *,
        device: str | torch.device = "cpu",
        memory: int | str,
        page_bytes: int | None = None,
        driver: _core.Driver | None = None,
    ) -> None:
        self.device: Device = open_device(device, driver)
        budget = parse_bytes("memory", memory)
        page = self.device.default_page_bytes(budget) if page_bytes is None else parse_bytes("page_bytes", page_bytes)
        # Without a driver nobody else would object to what no device can map.
        if page <= 0 or (self.device.driver is None and page % _LEAST_PAGE):
            raise SpecError(
                f"page_bytes: got {page_bytes!r}; must be a positive multiple of {_LEAST_PAGE}, what devices map"
            )
        self.core = _core.PagePool(
            page_bytes=page,
            budget_pages=self.pages("memory", budget, page),
            driver=self.device.driver,
            create_ahead=self.device.create_ahead,
        )

    @staticmethod
    def pages(field: str, count_bytes: int, page_bytes: int) -> int:
        """Whole pages in ``count_bytes``; ``SpecError`` when there is not even one."""
        if count_bytes < page_bytes:
            raise SpecError(
                f"{field}: got {format_bytes(count_bytes)}; one page is {format_bytes(page_bytes)}, which is the least "
                f"that works: give more memory or a smaller page_bytes"
            )
        pages = count_bytes // page_bytes
        if pages > MAX_PAGES:
            raise SpecError(
                f"{field}: got {format_bytes(count_bytes)}, which is {pages} pages of {format_bytes(page_bytes)}; page "
                f"ids go to {MAX_PAGES}: give a larger page_bytes"
            )
        return pages

    @property
    def page_bytes(self) -> int:
        return self.core.page_bytes

    @property
    def budget_bytes(self) -> int:
        return self.core.budget_pages * self.page_bytes

    @property
    def mapped_bytes(self) -> int:
        return self.core.mapped_pages * self.page_bytes

    def set_memory(self, memory: int | str) -> None:
        """Grows or shrinks the budget. ``OutOfMemory``, and nothing changed, when live sequences hold more."""
        self.core.set_budget(self.pages("memory", parse_bytes("memory", memory), self.page_bytes))
