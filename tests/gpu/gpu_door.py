"""A typed door to libcuda for probes of the driver's own rules.

ctypes, not cuda-python: it is always there, also where that package is not, it opens the stand-in that
``KVMEM_CUDA_DRIVER`` names as it opens libcuda.so.1, and it calls what the header declares with nothing in between. It
knows no rules: it refuses nothing that the driver might allow.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_int, c_size_t, c_uint, c_uint64, c_void_p

READ, READ_WRITE = 1, 3  # CUmemAccess_flags
CAPTURE_GLOBAL, CAPTURE_RELAXED = 0, 2  # CUstreamCaptureMode; the first is torch's default, and every thread's own
TORN_CONTEXT = ("CUDA_ERROR_ILLEGAL_ADDRESS", "CUDA_ERROR_LAUNCH_FAILED")


class Location(ctypes.Structure):
    _fields_ = [("type", c_int), ("id", c_int)]


class AllocationProp(ctypes.Structure):
    """CUmemAllocationProp, 32 bytes: pinned memory of one device, nothing to export."""

    _fields_ = [
        ("type", c_int), ("handle_types", c_int), ("location", Location), ("win32", c_void_p), ("flags", c_uint64),
    ]  # fmt: skip


class AccessDesc(ctypes.Structure):
    _fields_ = [("location", Location), ("flags", c_int)]


class Refused(Exception):
    """A call that did not return CUDA_SUCCESS: ``.call`` and ``.code``, by its name."""

    def __init__(self, call: str, code: str) -> None:
        super().__init__(f"{call}: {code}")
        self.call, self.code = call, code


class Missing(Exception):
    """The library has no such entry point: an old driver, or the stand-in."""


class Door:
    """libcuda, device 0, its primary context current on the calling thread."""

    def __init__(self, library: str = "") -> None:
        self.lib = ctypes.CDLL(library or os.environ.get("KVMEM_CUDA_DRIVER") or "libcuda.so.1")
        self("cuInit", c_uint(0))
        self.context = c_void_p()
        self("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), c_int(0))
        self("cuCtxPushCurrent_v2", self.context)
        self.prop = AllocationProp(1, 0, Location(1, 0), None, 0)
        self.page = self.granularity(0)

    def __call__(self, call: str, *args: object) -> None:
        code = self.code(call, *args)
        if code != 0:
            raise Refused(call.removesuffix("_v2"), self.name_of(code))

    def code(self, call: str, *args: object) -> int:
        try:
            entry = getattr(self.lib, call)
        except AttributeError as error:
            raise Missing(call) from error
        return int(entry(*args))

    def name_of(self, code: int) -> str:
        text = ctypes.c_char_p()
        self.lib.cuGetErrorName(c_int(code), ctypes.byref(text))
        return text.value.decode() if text.value else f"CUDA error {code}"

    # ---- Virtual memory management ----

    def granularity(self, option: int) -> int:
        found = c_size_t()
        self("cuMemGetAllocationGranularity", ctypes.byref(found), ctypes.byref(self.prop), c_int(option))
        return found.value

    def reserve(self, size: int) -> int:
        at = c_uint64()
        self("cuMemAddressReserve", ctypes.byref(at), c_size_t(size), c_size_t(self.page), c_uint64(0), c_uint64(0))
        return at.value

    def release(self, at: int, size: int) -> None:
        self("cuMemAddressFree", c_uint64(at), c_size_t(size))

    def create(self, size: int | None = None) -> int:
        handle = c_uint64()
        self("cuMemCreate", ctypes.byref(handle), c_size_t(size or self.page), ctypes.byref(self.prop), c_uint64(0))
        return handle.value

    def destroy(self, handle: int) -> None:
        self("cuMemRelease", c_uint64(handle))

    def map(self, at: int, handle: int, size: int | None = None, offset: int = 0) -> None:
        size = self.page if size is None else size
        self("cuMemMap", c_uint64(at), c_size_t(size), c_size_t(offset), c_uint64(handle), c_uint64(0))

    def access(self, at: int, size: int | None = None, flags: int = READ_WRITE) -> None:
        desc = AccessDesc(Location(1, 0), flags)
        self("cuMemSetAccess", c_uint64(at), c_size_t(size or self.page), ctypes.byref(desc), c_size_t(1))

    def unmap(self, at: int, size: int | None = None) -> None:
        self("cuMemUnmap", c_uint64(at), c_size_t(size or self.page))

    # ---- Contents, streams, graphs ----

    def fill(self, at: int, value: int, size: int | None = None, stream: c_void_p | None = None) -> None:
        self("cuMemsetD8Async", c_uint64(at), ctypes.c_ubyte(value), c_size_t(size or self.page), stream or c_void_p())

    def copy(self, to: int, at: int, size: int | None = None, stream: c_void_p | None = None) -> None:
        call = "cuMemcpyDtoDAsync_v2"
        self(call, c_uint64(to), c_uint64(at), c_size_t(size or self.page), stream or c_void_p())

    def read(self, at: int, size: int = 64) -> bytes:
        data = ctypes.create_string_buffer(size)
        self("cuMemcpyDtoH_v2", data, c_uint64(at), c_size_t(size))
        return data.raw

    def synchronize(self) -> None:
        self("cuCtxSynchronize")

    def stream(self) -> c_void_p:
        """A stream that does not wait for the default one."""
        made = c_void_p()
        self("cuStreamCreate", ctypes.byref(made), c_uint(1))
        return made

    def event(self, stream: c_void_p | None = None) -> c_void_p:
        made = c_void_p()
        self("cuEventCreate", ctypes.byref(made), c_uint(2))
        self("cuEventRecord", made, stream or c_void_p())
        return made

    def done(self, event: c_void_p) -> bool:
        code = self.code("cuEventQuery", event)
        if code not in (0, 600):
            raise Refused("cuEventQuery", self.name_of(code))
        return code == 0

    def begin_capture(self, stream: c_void_p) -> None:
        self("cuStreamBeginCapture_v2", stream, c_int(CAPTURE_GLOBAL))

    @contextmanager
    def relaxed(self) -> Iterator[None]:
        """This thread may do what could disturb a capture, as kvmem's driver says before each of its calls."""
        mode = c_int(CAPTURE_RELAXED)
        self("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        try:
            yield
        finally:
            self("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))

    def end_capture(self, stream: c_void_p) -> c_void_p:
        graph, runnable = c_void_p(), c_void_p()
        self("cuStreamEndCapture", stream, ctypes.byref(graph))
        self("cuGraphInstantiateWithFlags", ctypes.byref(runnable), graph, c_uint64(0))
        return runnable

    def launch(self, graph: c_void_p, stream: c_void_p) -> None:
        self("cuGraphLaunch", graph, stream)
        self("cuStreamSynchronize", stream)
