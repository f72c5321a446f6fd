"""Devices by name, and the defaults that differ between them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from kvmem import _core
from kvmem.arguments import format_bytes
from kvmem.errors import DeviceError, OutOfMemory, SpecError

__all__ = ["AUTO_MARGIN_BYTES", "Device", "open_device"]

#: Linux allows 65,530 mappings a process; every page may need one of its own, so a CPU pool keeps well below.
CPU_MAX_PAGES = 1 << 15
#: What ``memory="auto"`` leaves free at least; 1/50 of the device if that is more. It is for what comes after the model
#: has run once: kernels that are loaded late, workspaces of libraries, captured graphs. Activations are in torch's
#: cache by then.
AUTO_MARGIN_BYTES = 512 << 20


@dataclass(frozen=True)
class Device:
    """A device and its defaults. ``driver`` is None on ``"meta"``, which keeps the books only.

    tail_guard_tokens: how far past a sequence's length kernels may read (tiles of FlashAttention 3: up to 224 tokens).
        0 where none do: a guard is zeroed, which costs.
    create_ahead: create all pages at once, because creating one costs (28 us on an H100).
    current_stream: asks torch for the calling thread's stream; None where there is nothing to ask.
    """

    name: str
    driver: _core.Driver | None
    torch_device: torch.device
    tail_guard_tokens: int
    map_ahead_tokens: int
    interleave: int | str
    create_ahead: bool
    current_stream: Callable[[], int] | None = None

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

    def auto_bytes(self, held_bytes: int = 0) -> int:
        """``memory="auto"``: what is free now and what we hold, less a margin. ``SpecError`` but on a CUDA device.

        What torch's caching allocator has reserved is torch's: it does not count as free, in use or not.
        """
        if self.driver is None or not self.create_ahead:
            # On a CPU pages come when they are touched, and the answer to too many is a signal instead of an error.
            raise SpecError(f'memory: "auto" asks a CUDA device what it has free; device {self.name!r} needs a number')
        free, margin = self.driver.available_bytes(), max(AUTO_MARGIN_BYTES, self.driver.info.total_bytes // 50)
        if held_bytes + free <= margin:
            raise OutOfMemory(
                f'memory="auto": {self.name} has {format_bytes(free)} free, of which {format_bytes(margin)} is left to '
                f"others; free something (torch.cuda.empty_cache() gives back what torch keeps), or say how much"
            )
        return held_bytes + free - margin

    def fraction_bytes(self, fraction: float, held_bytes: int = 0) -> int:
        """``memory=0.9``: that part of what is free now and of what we hold. ``SpecError`` but on a CUDA device."""
        if self.driver is None or not self.create_ahead:  # for the same reason as "auto"
            has = "no memory" if self.driver is None else "memory as pages are touched, free or not"
            raise SpecError(
                f"memory: got {float(fraction)!r}; a fraction is one of what a CUDA device has free, and device "
                f'{self.name!r} has {has}: give bytes, as "4GiB"'
            )
        return int(fraction * (held_bytes + self.driver.available_bytes()))

    def free_bytes(self) -> int | None:
        """What any process could still get of a CUDA device; None elsewhere. Costs about 6 us."""
        return self.driver.available_bytes() if self.driver is not None and self.create_ahead else None

    def torch_bytes(self) -> tuple[int | None, int | None]:
        """What torch's caching allocator has given to tensors, and what it has reserved; None but on CUDA."""
        if self.torch_device.type != "cuda":
            return None, None
        stats = torch.cuda.memory_stats_as_nested_dict(self.torch_device)  # empty before torch's first use of CUDA
        allocated, reserved = (stats.get(f"{kind}_bytes", {}) for kind in ("allocated", "reserved"))
        return allocated.get("all", {}).get("current", 0), reserved.get("all", {}).get("current", 0)


def _current_device() -> int:
    """What torch takes "cuda" for."""
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def _current_stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


def _ask_for_stream(index: int) -> Callable[[], int] | None:
    if not torch.cuda.is_available():  # a torch without CUDA has no streams
        return None
    # torch's own inner call: the public one makes an object of the stream first.
    return partial(getattr(torch._C, "_cuda_getCurrentRawStream", _current_stream), index)


def in_debug_mode() -> bool:
    """Whether the environment variable ``KVMEM_DEBUG`` is set."""
    return os.environ.get("KVMEM_DEBUG", "0") not in ("", "0")


def open_device(
    name: str | torch.device, driver: _core.Driver | None = None, shareable: bool = False, rdma: bool = False
) -> Device:
    """``"cpu"``, ``"cuda"``, ``"cuda:N"`` or ``"meta"``. ``driver`` replaces the device's own (a checked one, in
    tests). shareable, rdma: see ``PagePool``.

    ``DeviceError`` when there is no such device or its driver cannot map memory on demand.
    """
    if driver is not None and not isinstance(driver, _core.Driver):
        raise SpecError(f"driver: got {type(driver).__name__}; must be a driver, or None for the device's own")
    text = str(name)
    if (shareable or rdma) and (driver is not None or not text.startswith("cuda")):
        raise SpecError("shareable and rdma are what a CUDA device's own driver makes; leave them out here")
    if text == "meta":
        return Device("meta", None, torch.device("meta"), 0, 0, "all", False)
    if text == "cpu":
        return Device("cpu", driver or _core.host_driver(in_debug_mode()), torch.device("cpu"), 0, 0, "all", False)
    if match := re.fullmatch(r"cuda(?::(\d+))?", text):
        index = _current_device() if match.group(1) is None else int(match.group(1))
        driver = driver or _core.cuda_driver(index, shareable=shareable, rdma=rdma)
        return Device(text, driver, torch.device("cuda", index), 256, 64, "all", True, _ask_for_stream(index))
    raise DeviceError(f'device: got {text!r}; must be "cpu", "cuda", "cuda:N" or "meta"')
