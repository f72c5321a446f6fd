"""kvmem.integrations.cuda_python, which is what cuda-python does for kvmem: with the real cuda.bindings and cuda.core over the stand-in for
libcuda where they are installed, and with a small double of cuda.bindings in any case.
"""

from __future__ import annotations

import ctypes
import enum
import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest
from support_cuda import MIB, PAGE, as_libcuda, fresh_stub
from support_drivers import CudaStub, assert_runs

import kvmem.integrations.cuda_python
from kvmem import DeviceError, OutOfMemory, PagePool, SpecError


@pytest.fixture
def stub(tmp_path: Path) -> CudaStub:
    return fresh_stub(tmp_path)


class Double(types.ModuleType):
    """The few calls of cuda.bindings.driver that kvmem.integrations.cuda_python makes: a tuple each, the code first."""

    CUresult = enum.IntEnum("CUresult", {"CUDA_SUCCESS": 0, "CUDA_ERROR_OUT_OF_MEMORY": 2, "CUDA_ERROR_NO_DEVICE": 100})
    CUmemAllocationHandleType = enum.IntEnum("Kind", {"CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR": 1})
    CUdevice_attribute = enum.IntEnum(
        "Attribute",
        {
            "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR": 75,
            "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR": 76,
            "CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED": 102,
            "CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED": 103,
            "CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED": 110,
        },
    )

    def __init__(self, stub: CudaStub | None) -> None:
        super().__init__("cuda.bindings.driver")
        self.library = stub and stub.library

    def ask(self, name: str, *arguments: object, kind: type = ctypes.c_int) -> tuple[int, int]:
        if self.library is None:
            raise RuntimeError("Ensure the NVIDIA display driver is installed")
        value = kind()
        return getattr(self.library, name)(ctypes.byref(value), *arguments), value.value or 0

    def cuInit(self, flags: int) -> tuple[int]:
        if self.library is None:
            raise RuntimeError("Ensure the NVIDIA display driver is installed")
        return (self.library.cuInit(flags),)

    def cuDeviceGetCount(self) -> tuple[int, int]:
        return self.ask("cuDeviceGetCount")

    def cuDeviceGet(self, index: int) -> tuple[int, int]:
        return self.ask("cuDeviceGet", index)

    def cuDeviceGetAttribute(self, attribute: int, device: int) -> tuple[int, int]:
        return self.ask("cuDeviceGetAttribute", int(attribute), device)

    def cuDeviceTotalMem(self, device: int) -> tuple[int, int]:
        return self.ask("cuDeviceTotalMem_v2", device, kind=ctypes.c_size_t)

    def cuDriverGetVersion(self) -> tuple[int, int]:
        return self.ask("cuDriverGetVersion")

    def cuCtxGetCurrent(self) -> tuple[int, int]:
        return self.ask("cuCtxGetCurrent", kind=ctypes.c_void_p)

    def cuCtxGetDevice(self) -> tuple[int, int]:
        return self.ask("cuCtxGetDevice")

    def cuMemExportToShareableHandle(self, handle: int, kind: int, flags: int) -> tuple[int, int]:
        return self.ask(
            "cuMemExportToShareableHandle", ctypes.c_ulonglong(handle), int(kind), ctypes.c_ulonglong(flags)
        )


def install(monkeypatch: pytest.MonkeyPatch, stub: CudaStub | None) -> None:
    double, package = Double(stub), types.ModuleType("cuda.bindings")
    package.driver = double  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", double)
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))


def test_without_cuda_python_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    for call in (
        kvmem.integrations.cuda_python.devices,
        kvmem.integrations.cuda_python.current_device,
        lambda: kvmem.integrations.cuda_python.error_text(2),
    ):
        with pytest.raises(ImportError, match=r"pip install 'kvmem\[cuda\]'"):
            call()


def test_without_a_driver_it_is_a_device_error(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)
    with pytest.raises(DeviceError, match="cuInit: Ensure the NVIDIA display driver") as raised:
        kvmem.integrations.cuda_python.devices()
    assert raised.value.call == "cuInit"
    assert kvmem.integrations.cuda_python.error_text(2) == "CUDA_ERROR_OUT_OF_MEMORY"
    assert kvmem.integrations.cuda_python.error_text(31337) == "CUDA error 31337"


def test_devices(monkeypatch: pytest.MonkeyPatch, stub: CudaStub) -> None:
    install(monkeypatch, stub)
    stub.set("devices", 2)
    stub.set("rdma_supported", 0)
    found = kvmem.integrations.cuda_python.devices()
    assert [device.name for device in found] == ["cuda:0", "cuda:1"]
    assert found[1] == kvmem.integrations.cuda_python.DeviceInfo("cuda:1", (0, 0), 1024 * MIB, 13000, True, True, False)
    assert kvmem.integrations.cuda_python.current_device() is None and stub.get("contexts") == 0, (
        "to look makes no context"
    )
    for code, kind in ((2, OutOfMemory), (100, DeviceError)):
        stub.fail("cuDeviceTotalMem", 1, code)
        with pytest.raises(kind, match="cuDeviceTotalMem failed: CUDA_ERROR_"):
            kvmem.integrations.cuda_python.devices()


def test_the_device_whose_context_is_current(monkeypatch: pytest.MonkeyPatch, stub: CudaStub) -> None:
    install(monkeypatch, stub)
    stub.set("devices", 2)
    driver = stub.driver(1)
    context = ctypes.c_void_p()
    assert stub.library.cuDevicePrimaryCtxRetain(ctypes.byref(context), 1) == 0
    assert stub.library.cuCtxPushCurrent_v2(context) == 0
    assert kvmem.integrations.cuda_python.current_device() == "cuda:1"
    assert stub.library.cuCtxPopCurrent_v2(None) == 0
    del driver


def test_pages_for_other_processes(monkeypatch: pytest.MonkeyPatch, stub: CudaStub) -> None:
    install(monkeypatch, stub)
    with as_libcuda(stub):
        pool = PagePool(device="cuda:0", memory=4 * PAGE, shareable=True)
        plain = PagePool(device="cuda:0", memory=4 * PAGE)
    descriptors = [kvmem.integrations.cuda_python.export_fd(pool, page) for page in range(4)]
    assert len(set(descriptors)) == 4
    for fd in descriptors:
        os.close(fd)
    for page in (-1, 4, 10**9):
        with pytest.raises(SpecError, match="no such page"):
            kvmem.integrations.cuda_python.export_fd(pool, page)
    for stays in (plain, PagePool(memory="1MiB"), PagePool(device="meta", memory="4MiB")):
        with pytest.raises(SpecError, match="shareable=True"):
            kvmem.integrations.cuda_python.export_fd(stays, 0)
    stub.fail("cuMemExportToShareableHandle", 1, 999)
    with pytest.raises(DeviceError, match="cuMemExportToShareableHandle failed: CUDA error 999, page 2") as raised:
        kvmem.integrations.cuda_python.export_fd(pool, 2)
    assert (raised.value.call, raised.value.code) == ("cuMemExportToShareableHandle", 999)


def installed(name: str) -> bool:
    return importlib.util.find_spec("cuda") is not None and importlib.util.find_spec(name) is not None


@pytest.mark.skipif(
    not (installed("cuda.bindings") and installed("cuda.core")),
    reason="cuda-python is not installed (pip install '.[cuda]'); its double was used above",
)
def test_the_real_cuda_python_over_the_stand_in(stub: CudaStub, tmp_path: Path) -> None:
    """cuda-python finds the driver as libcuda.so.1 on the library path."""
    folder = tmp_path / "lib"
    folder.mkdir()
    os.link(stub.path, folder / "libcuda.so.1")
    out = assert_runs(
        """
        import os
        import kvmem, kvmem.integrations.cuda_python
        assert kvmem.integrations.cuda_python.error_text(709) == "CUDA_ERROR_CONTEXT_IS_DESTROYED"
        (device,) = kvmem.integrations.cuda_python.devices()
        assert device.name == "cuda:0" and device.virtual_memory and device.cuda_version == 13000
        assert kvmem.integrations.cuda_python.current_device() is None
        pool = kvmem.PagePool(device=device.name, memory="4MiB", shareable=True)
        os.close(kvmem.integrations.cuda_python.export_fd(pool, 0))
        stream = kvmem.integrations.cuda_python.stream(pool)
        assert int(stream.handle) == pool.streams.handle == 0
        assert kvmem.integrations.cuda_python.current_device() == "cuda:0"
        pool.set_stream(stream)
        print("ok")
        """,
        env={"LD_LIBRARY_PATH": str(folder), "KVMEM_CUDA_DRIVER": ""},
    )
    assert out.strip() == "ok"
