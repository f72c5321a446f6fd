"""Devices by name, and the defaults that differ between them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from kvmem import _core
from kvmem.errors import DeviceError

__all__ = ["Device", "open_device"]

#: Linux allows 65,530 mappings a process; every page may need one of its own, so a CPU pool keeps well below.
CPU_MAX_PAGES = 1 << 15


@dataclass(frozen=True)
class Device:
    """A device and its defaults. ``driver`` is None on ``"meta"``, which keeps the books only.

    tail_guard_tokens: how far past a sequence's length kernels may read (tiles of FlashAttention 3: up to 224 tokens).
    create_ahead: create all pages at once, because creating one costs (28 us on an H100).
    """

    name: str
    driver: _core.Driver | None
    torch_device: torch.device
    tail_guard_tokens: int
    map_ahead_tokens: int
    interleave: int | str
    create_ahead: bool

    @property
    def total_bytes(self) -> int | None:
        return None if self.driver is None else self.driver.info.total_bytes

    def default_page_bytes(self, memory_bytes: int) -> int:
        """CPU: 64 KiB, doubled until the memory is at most 32,768 pages. Others: what the driver recommends, 2 MiB."""
        if self.name != "cpu":
            return 2 << 20 if self.driver is None else self.driver.info.recommended_bytes
        page = 64 << 10
        while page * CPU_MAX_PAGES < memory_bytes:
            page *= 2
        return page


def open_device(name: str | torch.device, driver: _core.Driver | None = None) -> Device:
    """``"cpu"``, ``"cuda"``, ``"cuda:N"`` or ``"meta"``. ``driver`` replaces the device's own (a checked one, in
    tests).

    ``DeviceError`` when there is no such device or its driver cannot map memory on demand.
    """
    text = str(name)
    if text == "meta":
        return Device("meta", None, torch.device("meta"), 0, 0, "all", False)
    if text == "cpu":
        return Device("cpu", driver or _core.host_driver(), torch.device("cpu"), 0, 0, "all", False)
    if match := re.fullmatch(r"cuda(?::(\d+))?", text):
        index = int(match.group(1) or 0)
        return Device(text, driver or _core.cuda_driver(index), torch.device("cuda", index), 256, 64, "all", True)
    raise DeviceError(f'device: got {text!r}; must be "cpu", "cuda", "cuda:N" or "meta"')
