"""Drivers for tests: which ones there are, how to make a fresh one, how to look at their memory."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvmem import _core
from kvmem.errors import DeviceError

ROOT = Path(__file__).resolve().parents[2]
STUB_SOURCES = sorted((ROOT / "tests" / "native" / "cuda_stub").glob("*stub*.*"))
STUB_GRANULARITY_BYTES = 65536  # small, so that tests touch little memory; a GPU's is 2 MiB


# ---- Subprocesses ----------------------------------------------------------------------------------------------------


def run_python(code: str, timeout: float = 60, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` in a fresh interpreter: for what may fork, crash, or use up a limit of the process."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
    )


def assert_runs(code: str, timeout: float = 60, env: dict[str, str] | None = None) -> str:
    """``run_python`` that must succeed; returns what it printed."""
    done = run_python(code, timeout, env)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def assert_runs_on_both(code: str, setup: str = "", timeout: float = 60, env: dict[str, str] | None = None) -> str:
    """Runs ``code`` with each ``backend`` in one process: to import torch takes longer than most of these."""
    loop = "for backend in ('virtual', 'paged'):\n" + textwrap.indent(textwrap.dedent(code), "    ")
    return assert_runs(textwrap.dedent(setup) + loop, timeout, env)


# ---- C++ that only tests need ----------------------------------------------------------------------------------------


def build_library(name: str, sources: list[Path], headers: list[Path], *flags: str) -> Path:
    """Compiles a shared library, once per content and flags, into a cache outside the repository."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if not compiler:
        pytest.skip(f"no C++ compiler (c++ or $CXX) to build {name}")
    command = [
        *compiler.split(),
        "-std=c++17",
        "-O1",
        "-g",
        "-fPIC",
        "-shared",
        "-Wl,-Bsymbolic",
        *flags,
        f"-I{ROOT / 'csrc'}",
        *map(str, sources),
        "-pthread",
    ]
    content = b"".join(p.read_bytes() for p in [*sources, *headers])
    digest = hashlib.sha256(content + " ".join(command).encode()).hexdigest()[:16]
    cache = Path(tempfile.gettempdir()) / f"kvmem-tests-{os.getuid()}"
    library = cache / f"{name}-{digest}.so"
    if not library.exists():
        cache.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built = Path(folder) / library.name
            subprocess.run([*command, "-o", str(built)], check=True, timeout=120)
            built.rename(library)  # atomic: another test process may be building the same
    return library


# ---- The stand-in for libcuda ----------------------------------------------------------------------------------------


def build_stub(*flags: str) -> Path:
    sources = [p for p in STUB_SOURCES if p.suffix == ".cpp"]
    headers = [p for p in STUB_SOURCES if p.suffix == ".h"]
    headers += [ROOT / "csrc/driver/cuda/cuda_api.h", ROOT / "csrc/base/types.h"]
    return build_library("libcuda_stub", sources, headers, *flags)


class CudaStub:
    """One fresh stand-in device. The library is copied, because each loaded file has its own state."""

    def __init__(self, library: Path, folder: Path) -> None:
        # Never over one that is loaded: that would change its code while it runs.
        self.path = folder / f"libcuda_stub_{len(list(folder.glob('libcuda_stub_*.so')))}.so"
        shutil.copy(library, self.path)
        self.library = ctypes.CDLL(str(self.path))
        self.library.kvmem_stub_get.restype = ctypes.c_longlong
        self.library.kvmem_stub_calls.restype = ctypes.c_longlong
        self.library.kvmem_stub_pending.restype = ctypes.c_longlong
        self.set("granularity_bytes", STUB_GRANULARITY_BYTES)

    def set(self, name: str, value: int) -> None:
        """A setting of the device: devices, vmm_supported, hold_events, memory_bytes, granularity_bytes, dead ..."""
        assert self.library.kvmem_stub_set(name.encode(), ctypes.c_longlong(value)) == 0, name

    def get(self, name: str) -> int:
        value = self.library.kvmem_stub_get(name.encode())
        assert value >= 0, name
        return int(value)

    def held(self) -> dict[str, int]:
        """What the device holds: all zero when nothing has leaked."""
        return {
            name: self.get(name)
            for name in (
                "reservations",
                "allocations",
                "mappings",
                "events",
                "streams",
                "contexts",
                "created_bytes",
                "physical_bytes",
            )
        }

    def fail(self, call: str, nth: int, code: int) -> None:
        self.library.kvmem_stub_fail(call.encode(), ctypes.c_longlong(nth), code)

    def pending(self) -> int:
        return int(self.library.kvmem_stub_pending())

    def calls(self, call: str) -> int:
        return int(self.library.kvmem_stub_calls(call.encode()))

    def hide(self, symbol: str) -> None:
        self.library.kvmem_stub_hide(symbol.encode())

    def complete_events(self) -> None:
        self.library.kvmem_stub_complete_events()

    def stream(self, device: int = 0) -> int:
        """A stream of a device's primary context. Like torch's, it is never destroyed."""
        self.library.kvmem_stub_stream.restype = ctypes.c_void_p
        return int(self.library.kvmem_stub_stream(device))

    def hold_stream(self, stream: int, hold: bool) -> None:
        """What is put on the stream from now on is not done; with False, all of it is."""
        self.library.kvmem_stub_hold_stream(ctypes.c_void_p(stream), int(hold))

    def capture(self, stream: int, on: bool) -> None:
        self.library.kvmem_stub_capture(ctypes.c_void_p(stream), int(on))

    def trace(self) -> list[str]:
        """What was put on streams, asked of events and unmapped since the last call, in order."""
        self.library.kvmem_stub_trace.restype = ctypes.c_char_p
        return str(self.library.kvmem_stub_trace(1).decode()).splitlines()

    def driver(self, index: int = 0, **pages: bool) -> _core.Driver:
        return _core.cuda_driver(index, str(self.path), **pages)


# ---- One device under test -------------------------------------------------------------------------------------------


@dataclass
class Device:
    """A driver and a way to look at its memory."""

    name: str
    driver: _core.Driver
    read: Callable[[int, int], bytes]
    write: Callable[[int, bytes], None]
    checks_contents: bool  # zero and copy refuse what is not accessible; a real GPU's context would be lost instead
    stub: CudaStub | None = None

    @property
    def page_bytes(self) -> int:
        return self.driver.info.granularity_bytes


class CudaMemory:
    """Reads and writes device memory through libcuda itself, the real one or the stand-in."""

    def __init__(self, library: str) -> None:
        self.lib = ctypes.CDLL(library)
        self.context = ctypes.c_void_p()
        self.check(self.lib.cuDevicePrimaryCtxRetain(ctypes.byref(self.context), 0))

    @staticmethod
    def check(code: int) -> None:
        assert code == 0, f"CUDA error {code}"

    def read(self, at: int, size: int) -> bytes:
        data = ctypes.create_string_buffer(size)
        self._in_context(lambda: self.lib.cuMemcpyDtoH_v2(data, ctypes.c_uint64(at), ctypes.c_size_t(size)))
        return data.raw

    def write(self, at: int, data: bytes) -> None:
        self._in_context(lambda: self.lib.cuMemcpyHtoD_v2(ctypes.c_uint64(at), data, ctypes.c_size_t(len(data))))

    def close(self) -> None:
        self.check(self.lib.cuDevicePrimaryCtxRelease_v2(0))

    def _in_context(self, call: Callable[[], int]) -> None:
        self.check(self.lib.cuCtxPushCurrent_v2(self.context))
        code = call()
        self.check(self.lib.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p())))
        self.check(code)


DEVICES = ["host", "checked host", "cuda stub", "checked cuda stub", "cuda", "checked cuda"]


def open_device(name: str, folder: Path) -> tuple[Device, Callable[[], None]]:
    """A fresh device and what closes it. Skips where the machine has none."""
    checked = name.startswith("checked ")
    kind = name.removeprefix("checked ")
    wrap = _core.CheckedDriver if checked else lambda driver: driver
    if kind == "host":
        return Device(name, wrap(_core.host_driver()), _core.read_bytes, _core.write_bytes, True), lambda: None
    if kind == "cuda stub":
        stub = CudaStub(build_stub(), folder)
        driver = stub.driver()
        memory = CudaMemory(str(stub.path))
        return Device(name, wrap(driver), memory.read, memory.write, True, stub), memory.close
    try:
        driver = _core.cuda_driver(0, os.environ.get("KVMEM_CUDA_DRIVER", "libcuda.so.1"))
    except DeviceError as error:
        pytest.skip(f"no GPU here: {error}")
    memory = CudaMemory(os.environ.get("KVMEM_CUDA_DRIVER", "libcuda.so.1"))
    return Device(name, wrap(driver), memory.read, memory.write, checked), memory.close
