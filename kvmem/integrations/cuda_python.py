"""Device attributes, error names, streams and exported pages by cuda-python: ``pip install kvmem[cuda]``.

The allocator itself needs none of this. Errors are ``DeviceError`` with the driver's call and code, and ``ImportError``
if cuda-python is not installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvmem import PagePool, SpecError
from kvmem.errors import DeviceError, OutOfMemory

__all__ = ["DeviceInfo", "current_device", "devices", "error_text", "export_fd", "stream"]

_OUT_OF_MEMORY = 2


@dataclass(frozen=True)
class DeviceInfo:
    """The attributes of a CUDA device that kvmem uses.

    name: as ``Allocator(device=...)`` takes it. compute_capability: ``(major, minor)``. total_bytes: of device memory.
    cuda_version: of the driver, 13000 for 13.0.
    virtual_memory: kvmem can use the device. posix_fd, rdma: ``PagePool`` takes ``shareable=True``, ``rdma=True``.
    """

    name: str
    compute_capability: tuple[int, int]
    total_bytes: int
    cuda_version: int
    virtual_memory: bool
    posix_fd: bool
    rdma: bool


def devices() -> list[DeviceInfo]:
    """Return the devices that CUDA_VISIBLE_DEVICES leaves, in torch's order. Makes no context."""
    cu = _bindings()
    _call(cu, "cuInit", 0)
    return [_describe(cu, index) for index in range(_call(cu, "cuDeviceGetCount"))]


def current_device() -> str | None:
    """Return ``"cuda:N"``, the device whose context is current in this thread; None if there is none.

    ``cuda.core.Device(N).set_current()`` and torch make a context current.
    """
    cu = _bindings()
    _call(cu, "cuInit", 0)
    if int(_call(cu, "cuCtxGetCurrent")) == 0:
        return None
    return f"cuda:{int(_call(cu, 'cuCtxGetDevice'))}"


def error_text(code: int) -> str:
    """Return the name of an error, ``"CUDA_ERROR_OUT_OF_MEMORY"`` for 2. Needs no driver."""
    results = _bindings().CUresult
    try:
        return str(results(code).name)
    except ValueError:
        return f"CUDA error {code}"


def stream(pool: PagePool) -> Any:
    """Return the stream on which the pool was used last, as a ``cuda.core.Stream``, to wait for events and record them:
    ``kvmem.integrations.cuda_python.stream(alloc.pool).wait(event)``.

    The object does not own the stream. ``PagePool.set_stream`` is the opposite direction. Makes the pool's device
    current if none is; ``DeviceError`` if another one is.
    """
    try:
        import cuda.core
    except ImportError as error:
        raise _missing(error) from error
    current, home = current_device(), pool.device.torch_device
    if current is None:
        cuda.core.Device(home.index).set_current()
    elif current != str(home):
        raise DeviceError(f"{current} is current, but the pool is on {home}: make {home} current", "cuCtxGetDevice")
    return cuda.core.Stream.from_handle(pool.streams.handle)


def export_fd(pool: PagePool, page: int) -> int:
    """Return a file descriptor of physical page ``page`` (0 to ``pool.budget_bytes // pool.page_bytes - 1``).

    Another process imports it (cuMemImportFromShareableHandle) and maps it. The caller closes it. The memory lives
    until both processes have released it, so an exported page may outlive its pool. ``SpecError`` unless the pool was
    made with ``shareable=True`` and has the page.
    """
    info = None if pool.device.driver is None else pool.device.driver.info
    if info is None or not info.shareable:
        raise SpecError(f"pool: its pages on {pool.device.name!r} cannot be exported; make it with shareable=True")
    handle = pool.core.page_handle(page)
    if handle == 0:
        raise SpecError(f"page: got {page}; the pool has no such page now")
    cu = _bindings()
    kind = cu.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    return int(_call(cu, "cuMemExportToShareableHandle", handle, kind, 0, what=f"page {page}"))


def _describe(cu: Any, index: int) -> DeviceInfo:
    device = _call(cu, "cuDeviceGet", index)

    def attribute(name: str) -> int:
        return int(_call(cu, "cuDeviceGetAttribute", getattr(cu.CUdevice_attribute, name), device, what=name))

    prefix = "CU_DEVICE_ATTRIBUTE_"
    return DeviceInfo(
        name=f"cuda:{index}",
        compute_capability=(
            attribute(prefix + "COMPUTE_CAPABILITY_MAJOR"),
            attribute(prefix + "COMPUTE_CAPABILITY_MINOR"),
        ),
        total_bytes=int(_call(cu, "cuDeviceTotalMem", device)),
        cuda_version=int(_call(cu, "cuDriverGetVersion")),
        virtual_memory=bool(attribute(prefix + "VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED")),
        posix_fd=bool(attribute(prefix + "HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED")),
        rdma=bool(attribute(prefix + "GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED")),
    )


def _call(cu: Any, name: str, *arguments: Any, what: str = "") -> Any:
    """Return the value of one call of cuda.bindings.driver. ``DeviceError`` or ``OutOfMemory`` if it fails."""
    try:
        result: Sequence[Any] = getattr(cu, name)(*arguments)
    except RuntimeError as error:  # no libcuda, or one without this entry point
        raise DeviceError(f"{name}: {error}", name) from error
    code, *values = result
    if int(code) != 0:
        message = f"{name} failed: {error_text(int(code))}" + (f", {what}" if what else "")
        raise OutOfMemory(message) if int(code) == _OUT_OF_MEMORY else DeviceError(message, name, int(code))
    return values[0] if values else None


def _bindings() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise _missing(error) from error
    return driver


def _missing(error: ImportError) -> ImportError:
    return ImportError(f"{error}: this needs cuda-python; pip install 'kvmem[cuda]'")
