"""Devices by name: the registry, and what a pool and an allocator need to know of a device."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from kvmem import _core
from kvmem.arguments import format_bytes
from kvmem.errors import DeviceError, OutOfMemory, SpecError
from kvmem.memory import torch_cuda

__all__ = ["AUTO_MARGIN_BYTES", "OPENERS", "Device", "Opener", "open_device"]

#: The least that ``memory="auto"`` leaves free; 1/50 of the device if that is more. It is for what is allocated after
#: the model has run once: kernels that are loaded late, workspaces of libraries, captured graphs. By then activations
#: are in torch's cache.
AUTO_MARGIN_BYTES = 512 << 20


def _only_ints(stream: Any) -> int:
    raise SpecError(f"stream: got {type(stream).__name__}; must be the driver's handle as an int of 0 or more")


def _nothing_known() -> tuple[int | None, int | None]:
    return None, None


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device, and what differs between devices.

    name: as ``Allocator(device=)`` takes it, with its index. torch_device: the same for torch.
    driver: None on ``"meta"``, which keeps metadata only.
    info: the driver's properties (``csrc/driver/driver.h``); all that a pool and an allocator treat differently.
    current_stream: returns the calling thread's current torch stream; None if the device has no streams.
    stream_handle: returns the driver's handle of a stream object; ``SpecError`` for any other object.
    torch_bytes: returns the bytes that torch's caching allocator has given to tensors, and has reserved; None each if
        it has none on this device.
    """

    name: str
    driver: _core.Driver | None
    info: _core.DriverInfo
    torch_device: torch.device
    current_stream: Callable[[], int] | None = None
    stream_handle: Callable[[Any], int] = _only_ints
    torch_bytes: Callable[[], tuple[int | None, int | None]] = _nothing_known

    @property
    def total_bytes(self) -> int | None:
        """Bytes of the device's memory; None if unknown."""
        return self.info.total_bytes or None

    def default_page_bytes(self, memory_bytes: int) -> int:
        """Return the driver's recommended page size, doubled until memory is at most ``info.most_pages`` pages."""
        page = self.info.recommended_bytes
        while 0 < self.info.most_pages * page < memory_bytes:
            page *= 2
        return page

    def free_bytes(self) -> int | None:
        """Return the bytes of the device that are free for any process, or None if unknown. About 6 us on CUDA."""
        return self.driver.available_bytes() if self.driver is not None and self.info.tells_free_bytes else None

    def part_bytes(self, part: float | None, held_bytes: int = 0) -> int:
        """Return the budget of ``memory=0.9``: that part of the free bytes and of ``held_bytes``, which are the pool's
        own; or of ``memory="auto"`` (None): all of them, less a margin.

        What torch's caching allocator has reserved, used or not, does not count as free. ``SpecError`` if the device
        does not report free memory; ``OutOfMemory`` if no more than the margin is free.
        """
        free, margin = self.free_bytes(), max(AUTO_MARGIN_BYTES, self.info.total_bytes // 50)
        if free is None:
            # On a CPU a page is allocated when it is touched, and if there is none, the process is killed.
            asked = '"auto"' if part is None else f"{float(part)!r}"
            raise SpecError(
                f'memory: got {asked}, but device {self.name!r} does not report its free memory; give bytes, as "4GiB"'
            )
        if part is not None:
            return int(part * (held_bytes + free))
        if held_bytes + free <= margin:
            raise OutOfMemory(
                f'memory="auto": {self.name} has {format_bytes(free)} free, of which {format_bytes(margin)} is left to '
                f"others; free something (torch.cuda.empty_cache() frees what torch has cached), or give bytes"
            )
        return held_bytes + free - margin


class Opener(Protocol):
    """Returns the device of a name in ``OPENERS``; ``index`` is the N of ``"name:N"``, or None.

    driver: replaces the device's own. shareable, rdma: which pages the device's own driver must make.
    ``DeviceError`` if there is no such device, or if its driver cannot map memory on demand or make such pages.
    """

    def __call__(
        self, index: int | None, *, driver: _core.Driver | None, shareable: bool, rdma: bool
    ) -> Device: ...  # pragma: no cover


def in_debug_mode() -> bool:
    """Return whether the environment variable ``KVMEM_DEBUG`` is set, to something other than 0."""
    return os.environ.get("KVMEM_DEBUG", "0") not in ("", "0")


def _check_one(name: str, index: int | None) -> None:
    if index is not None:
        raise DeviceError(f"device: got '{name}:{index}'; must be {name!r}, since there is only one")


def _open_cpu(index: int | None, *, driver: _core.Driver | None, **_: bool) -> Device:
    _check_one("cpu", index)
    driver = driver or _core.host_driver(in_debug_mode())
    return Device(name="cpu", driver=driver, info=driver.info, torch_device=torch.device("cpu"))


def _open_cuda(index: int | None, *, driver: _core.Driver | None, shareable: bool, rdma: bool) -> Device:
    where = torch.device("cuda", torch_cuda.current_device() if index is None else index)
    driver = driver or _core.cuda_driver(where.index, shareable=shareable, rdma=rdma)
    return Device(
        name=str(where),
        driver=driver,
        info=driver.info,
        torch_device=where,
        current_stream=torch_cuda.ask_for_stream(where.index),
        stream_handle=partial(torch_cuda.stream_handle, where),
        torch_bytes=partial(torch_cuda.allocator_bytes, where),
    )


def _open_meta(index: int | None, **_: Any) -> Device:
    _check_one("meta", index)
    info = _core.DriverInfo(name="meta", granularity_bytes=4096, recommended_bytes=2 << 20)
    return Device(name="meta", driver=None, info=info, torch_device=torch.device("meta"))


#: Every kind of device. For a new kind, add a driver in ``csrc/driver/`` and an entry here.
OPENERS: dict[str, Opener] = {"cpu": _open_cpu, "cuda": _open_cuda, "meta": _open_meta}


def open_device(
    name: str | torch.device, *, driver: _core.Driver | None = None, shareable: bool = False, rdma: bool = False
) -> Device:
    """Return the device of that name: a key of ``OPENERS``, followed by ``":N"`` if there are several.

    driver: replaces the device's own, in tests. shareable, rdma: see ``PagePool``. ``DeviceError`` if there is no such
    device, or if its driver cannot map memory on demand; ``SpecError`` if the driver cannot make pages as asked.
    """
    if driver is not None and not isinstance(driver, _core.Driver):
        raise SpecError(f"driver: got {type(driver).__name__}; must be a driver, or None for the device's own")
    parts = re.fullmatch(r"(\w+)(?::(\d+))?", str(name))
    if parts is None or parts[1] not in OPENERS:
        known = ", ".join(f'"{one}"' for one in OPENERS)
        raise DeviceError(f'device: got {str(name)!r}; must be one of {known}, with ":N" where there are several')
    index = None if parts[2] is None else int(parts[2])
    device = OPENERS[parts[1]](index, driver=driver, shareable=shareable, rdma=rdma)
    for option, wanted in (("shareable", shareable), ("rdma", rdma)):
        if wanted and not getattr(device.info, option):
            raise SpecError(
                f"{option}: the driver of device {device.name!r} makes no such pages; leave out {option}=True"
            )
    return device
