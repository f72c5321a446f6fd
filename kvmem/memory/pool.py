"""A pool of physical pages under one budget. Memory moves between the allocators that share it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from kvmem import _core
from kvmem.arguments import INT32_MAX, format_bytes, is_auto, is_fraction, parse_bytes
from kvmem.errors import KVMemError, SpecError
from kvmem.memory.device import Device, open_device
from kvmem.memory.streams import Streams

__all__ = ["PagePool", "pool_for"]

#: Page ids are int32 in the core.
MAX_PAGES = INT32_MAX


class PagePool:
    """Physical memory for one or more allocators of one device.

    An allocator that finds no free page reclaims parked ones: its own first, then those of others. So memory moves to
    where it is needed, at the price of unmapping and mapping (about 0.1 ms a page on a GPU).

    memory: the budget in bytes, an int or a text such as ``"20GiB"`` or ``"20G"``, which is the same (``"20GB"`` is
        decimal); rounded down to whole pages, and never exceeded. On a CUDA device also a float, ``0.9`` for nine
        tenths of what is free now; or ``"auto"``: what is free now, less 1/50 of the device or 512 MiB, whichever is
        more. Use either after the model is loaded and has run once; memory that torch's caching allocator has reserved
        is left to torch.
    page_bytes: bytes of a page, a multiple of the driver's granularity; None takes the device's default.
    shareable: pages can be exported to other processes as file descriptors
        (``kvmem.integrations.cuda_python.export_fd``). CUDA only.
    rdma: an RDMA adapter may read and write the pages (GPUDirect). Pages may have to be larger for it. CUDA only.
        ``DeviceError``, which names the attribute, if the device does not support ``rdma`` or ``shareable``.
    driver: replaces the device's own driver; for tests.

    ``OutOfMemory``, and no page is kept, if the device has less than the budget, or if another process takes it while
    pages are created.
    """

    def __init__(
        self,
        *,
        device: str | torch.device = "cpu",
        memory: int | float | str,
        page_bytes: int | Callable[[Device, int], int] | None = None,
        shareable: bool = False,
        rdma: bool = False,
        driver: _core.Driver | None = None,
    ) -> None:
        self.device: Device = open_device(device, driver=driver, shareable=shareable, rdma=rdma)
        budget = self._bytes(memory, 0)
        if callable(page_bytes):  # an allocator chooses by device and budget, which are known only here
            page_bytes = page_bytes(self.device, budget)
        page = self.device.default_page_bytes(budget) if page_bytes is None else parse_bytes("page_bytes", page_bytes)
        if page <= 0 or page % self.device.info.granularity_bytes:
            raise SpecError(
                f"page_bytes: got {page_bytes!r}; must be a positive multiple of {self.device.info.granularity_bytes}, "
                f"since device {self.device.name!r} maps multiples of {self.device.info.granularity_bytes} bytes"
            )
        self.core = _core.PagePool(
            page_bytes=page,
            budget_pages=self.pages("memory", budget, page),
            driver=self.device.driver,
            create_ahead=self.device.info.creates_ahead,
        )
        self.is_recorded = False  # set by an allocator with record_ops
        self.streams = Streams(self.core, self.device)

    @staticmethod
    def pages(field: str, count_bytes: int, page_bytes: int) -> int:
        """Return how many whole pages ``count_bytes`` holds; ``SpecError`` if none."""
        if count_bytes < page_bytes:
            raise SpecError(
                f"{field}: got {count_bytes} B; one page is {format_bytes(page_bytes)}, which is the least "
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
        """Bytes of a page."""
        return self.core.page_bytes

    @property
    def budget_bytes(self) -> int:
        """The most bytes that the pool may create, a multiple of ``page_bytes``."""
        return self.core.budget_pages * self.page_bytes

    @property
    def mapped_bytes(self) -> int:
        """Bytes of the pages that allocators have mapped; a page that is mapped several times counts once."""
        return self.core.mapped_pages * self.page_bytes

    def set_memory(self, memory: int | float | str) -> None:
        """Grow or shrink the budget. ``OutOfMemory``, and nothing has changed, if live sequences hold more or the
        device has less. ``"auto"`` and a fraction count what the pool holds as free.
        """
        self.core.set_budget(self.parse_pages(memory))

    def parse_pages(self, memory: int | float | str) -> int:
        """Return a budget, in any form that ``memory`` takes, in whole pages."""
        return self.pages("memory", self._bytes(memory, self.core.present_pages * self.page_bytes), self.page_bytes)

    def _bytes(self, memory: int | float | str, held_bytes: int) -> int:
        if is_auto(memory):
            return self.device.part_bytes(None, held_bytes)
        if is_fraction("memory", memory):
            return self.device.part_bytes(float(memory), held_bytes)
        return parse_bytes("memory", memory)  # type: ignore[arg-type]  # no float

    def set_stream(self, stream: Any) -> None:
        """Name the only stream on which kernels use the memory from now on; None follows torch again, the default.

        Zeroing and copies go to that stream, and no page is taken away before the work queued on it is done.
        stream: a ``torch.cuda.Stream``, an object with ``__cuda_stream__`` (cuda.core), or the driver's handle as an
        int, which must stay valid.

        By default the pool uses torch's current stream at each call that hands out memory (``batch``, ``fill``, ``kv``,
        ``tensor``, ``rows``), and waits for all streams that it has seen. Name a stream if kernels run on another one,
        for example if a scheduler's thread makes the batches. ``DeviceError``, and nothing has changed, for a stream of
        another device.
        """
        self.streams.pin(stream)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise SpecError(
            f"{self!r}: a pool is memory of this process, and is not pickled or copied; give the other process the "
            "arguments to make its own, or pages by kvmem.integrations.cuda_python.export_fd()"
        )

    def __repr__(self) -> str:
        try:
            budget = f", {format_bytes(self.mapped_bytes)} of {format_bytes(self.budget_bytes)} mapped"
        except KVMemError:  # in a forked child
            budget = ""
        return f"PagePool(device={self.device.name!r}, page_bytes={format_bytes(self.page_bytes)}{budget})"


def pool_for(
    pool: PagePool | None,
    device: str | torch.device | None,
    memory: int | float | str | None,
    page_bytes: int | None,
    driver: _core.Driver | None,
    record_ops: bool,
    choose_page: Callable[[Device, int], int],
) -> PagePool:
    """Return the pool for an allocator that is made with these arguments: the given one, or a new one.

    choose_page: returns the page size of a new pool if ``page_bytes`` is None.
    """
    if pool is None:
        if memory is None:
            raise SpecError('memory: missing; give a budget such as "20GiB", or a pool to share')
        page = choose_page if page_bytes is None else page_bytes
        return PagePool(device="cpu" if device is None else device, memory=memory, page_bytes=page, driver=driver)
    if not isinstance(pool, PagePool):
        raise SpecError(f"pool: got {type(pool).__name__}; must be a PagePool")
    if device is not None or page_bytes is not None or driver is not None:
        raise SpecError(
            "device, page_bytes and driver belong to the pool; an allocator that is given one takes them from it"
        )
    if record_ops or pool.is_recorded:
        raise SpecError(
            "record_ops: the ops of a shared pool belong to several allocators; record with a pool of its own"
        )
    return pool
