"""Memory under vLLM's KV cache on a CPU: a reservation of kvmem's host driver, resident only where it was touched.

vLLM makes its KV cache with one ``torch.zeros`` of bytes, inside the context that a connector's
``get_mem_pool_context()`` returns. :class:`LazyMemory` is such a context: it answers that call with a tensor over
addresses that take no memory until they are written. ``release_blocks`` gives the memory of freed blocks back to the
system; the addresses stay, and read as zeros.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple
from weakref import finalize

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from kvmem import DeviceError, SpecError
from kvmem.memory.device import open_device

__all__ = ["LazyMemory", "Placement", "Reservation", "lazy_memory"]

_MADV_REMOVE: Final = 9  # of Linux: frees the pages of a range of shared memory; the next access finds zeros
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


class Placement(NamedTuple):
    """Where one layer keeps its blocks in the KV cache: ``page_bytes`` from ``offset + block * stride`` on."""

    offset: int
    stride: int
    page_bytes: int


class Reservation:
    """Bytes of the host driver, mapped whole and backed page by page at the first write.

    size_bytes: how many. ``OutOfMemory`` if the machine has less in all; ``DeviceError`` if the system refuses.

    Attributes: ``tensor``, int8 [size_bytes], all zeros. It keeps the memory alive; so does a view of it.
    """

    def __init__(self, size_bytes: int) -> None:
        if not isinstance(size_bytes, int) or size_bytes <= 0:
            raise SpecError(f"size_bytes: got {size_bytes!r}; must be an int above 0")
        driver = open_device("cpu").driver
        assert driver is not None  # a CPU has one
        self._driver, self._bytes = driver, -(-size_bytes // _PAGE) * _PAGE
        self._base = driver.reserve(self._bytes)
        page = 0
        try:
            page = driver.create(self._bytes)  # one page of the driver: a single mapping, of sparse memory
            if not driver.map_run_open(self._base, self._bytes, [page]):
                driver.set_access(self._base, self._bytes)
        except BaseException:
            _give_back(driver, self._base, self._bytes, page)
            raise
        kind: Any = type("_Bytes", (ctypes.c_byte * size_bytes,), {})  # a class of its own: finalize needs a weakref
        view = kind.from_address(self._base)
        # Not at exit: threads may still use the tensor then, and the system takes all back anyway.
        finalize(view, _give_back, driver, self._base, self._bytes, page).atexit = False
        self.tensor = torch.frombuffer(view, dtype=torch.int8)

    @property
    def resident_bytes(self) -> int:
        """Bytes of physical memory that the reservation holds now, as the system counts them."""
        return self._driver.physical_bytes()

    def release(self, ranges: Iterable[tuple[int, int]]) -> int:
        """Give back the whole pages inside ``[begin, end)`` of each range; their content becomes zeros. Return how many
        bytes the ranges have in whole pages.

        ``SpecError``, and nothing was given back, for a range outside; ``DeviceError`` if the system refuses.
        Cost: a system call a range.
        """
        found = list(ranges)
        for begin, end in found:
            if not 0 <= begin <= end <= self.tensor.numel():
                raise SpecError(f"ranges: [{begin}, {end}) is not inside [0, {self.tensor.numel()})")
        total = 0
        for begin, end in found:
            first, last = -(-begin // _PAGE) * _PAGE, end // _PAGE * _PAGE
            if last > first:
                if _madvise(self._base + first, last - first, _MADV_REMOVE) != 0:
                    code = ctypes.get_errno()
                    raise DeviceError(f"madvise(MADV_REMOVE) failed: {os.strerror(code)}", "madvise", code)
                total += last - first
        return total


def _give_back(driver: Any, base: int, size: int, page: int) -> None:
    if page:
        with suppress(DeviceError):  # it was never mapped
            driver.unmap_run(base, size, 1)
        driver.destroy(page)
    driver.release(base, size)


def _system_call(name: str) -> Callable[[int, int, int], int]:
    call = getattr(ctypes.CDLL(None, use_errno=True), name)
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    call.restype = ctypes.c_int
    return call  # type: ignore[no-any-return]


_madvise = _system_call("madvise")


class LazyMemory(TorchFunctionMode):
    """The context of vLLM's KV allocation; afterwards, the memory of its blocks.

    Leaving the context without an allocation raises ``DeviceError``: vLLM then allocates in another way than this
    version of the plug-in knows.
    """

    def __init__(self) -> None:
        super().__init__()
        self._memory: Reservation | None = None
        self._placements: tuple[Placement, ...] = ()
        self._num_blocks = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.zeros or kwargs.get("dtype") is not torch.int8 or len(args) != 1:
            return func(*args, **kwargs)
        device = torch.device(kwargs.get("device") or "cpu")
        if device.type != "cpu":
            raise _refuse(device)
        if self._memory is not None:
            raise DeviceError("vLLM allocates a second KV cache, and this version of the plug-in knows one")
        self._memory = Reservation(int(args[0]))
        return self._memory.tensor

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        if kind is None and self._memory is None:
            raise DeviceError(
                "vLLM made its KV cache without torch.zeros(bytes, dtype=torch.int8), so kvmem's memory is not under "
                'it: install the version that docs/engines/vllm.md names, or set "memory": "vllm"'
            )

    @property
    def resident_bytes(self) -> int:
        """Bytes of physical memory under the KV cache now; 0 before its allocation."""
        return 0 if self._memory is None else self._memory.resident_bytes

    def place(self, placements: Iterable[Placement], num_blocks: int) -> None:
        """Say where the blocks lie, which ``release_blocks`` needs. Layers of several groups may share a place."""
        self._placements, self._num_blocks = tuple(dict.fromkeys(placements)), num_blocks

    def release_blocks(self, ids: Iterable[int]) -> int:
        """Give the memory of blocks back to the system, all layers. Return how many bytes that were at most.

        ids: blocks whose content nobody needs, in any order; a block that holds no memory costs a system call. A system
        page that a block shares with one that is not in ``ids`` stays. ``SpecError`` for ids that do not exist.
        Cost: a system call a layer and run of adjacent ids.
        """
        wanted = np.unique(np.fromiter(ids, np.int64))
        if self._memory is None or wanted.size == 0:
            return 0
        if wanted[0] < 0 or wanted[-1] >= self._num_blocks:
            raise SpecError(f"ids: {wanted[0]} to {wanted[-1]}; blocks are 0 to {self._num_blocks - 1}")
        breaks = np.flatnonzero(np.diff(wanted) != 1) + 1
        runs = [(int(run[0]), int(run[-1]) + 1) for run in np.split(wanted, breaks)]
        ranges = []
        for offset, stride, page in self._placements:
            if stride == page:
                ranges += [(offset + first * stride, offset + last * stride) for first, last in runs]
            else:
                ranges += [(offset + block * stride, offset + block * stride + page) for block in wanted.tolist()]
        return self._memory.release(ranges)


def lazy_memory(device: str | torch.device) -> LazyMemory:
    """Return a new context for the KV cache of a device. ``SpecError`` for any device but a CPU."""
    if torch.device(device).type != "cpu":
        raise _refuse(torch.device(device))
    return LazyMemory()


def _refuse(device: torch.device) -> SpecError:
    return SpecError(
        f"memory: device {device} needs a torch.cuda.MemPool over kvmem's pages, which kvmem does not have; set "
        '"memory": "vllm" in kv_connector_extra_config'
    )
