"""A driver that kvmem does not know: one file of C++ and one entry in the registry, and allocators run on it.

tests/native/dummy_driver.cpp is the driver. The conformance suite of allocators runs on it as on the others, also with a checked
driver around it, which sees that no rule of csrc/driver/driver.h is broken.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import nanobind
import pytest
import torch
from conformance import *  # noqa: F403 - the tests
from support import BACKENDS, LAYOUTS
from support_drivers import ROOT, build_library

import kvmem
from kvmem import _core
from kvmem.memory.device import OPENERS, Device

NANOBIND = Path(nanobind.include_dir()).parent
PAGE = 4096


@pytest.fixture(scope="module")
def native() -> ModuleType:
    """The module that the one file makes."""
    csrc = ROOT / "csrc"
    sources = [ROOT / "tests/native/dummy_driver.cpp"]
    sources += [csrc / name for name in ("bindings/nanobind.cpp", "driver/driver.cpp", "base/fork_guard.cpp")]
    headers = [csrc / name for name in ("driver/driver.h", "base/types.h", "base/fork_guard.h")]
    folders = [
        NANOBIND / "include",
        NANOBIND / "src",
        NANOBIND / "ext/robin_map/include",
        sysconfig.get_path("include"),
    ]
    flags = [part for folder in folders for part in ("-isystem", str(folder))]
    options = ["-fvisibility=hidden", "-fno-strict-aliasing", "-DNDEBUG", "-DNB_COMPACT_ASSERTIONS"]
    built = build_library("dummy_driver", sources, headers, *options, *flags)
    loader = importlib.machinery.ExtensionFileLoader("dummy_driver", str(built))
    spec = importlib.util.spec_from_file_location("dummy_driver", built, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def entry(native: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one entry."""

    def open_dummy(index: int | None, *, driver: _core.Driver | None, **_: bool) -> Device:
        driver = driver or native.open()
        return Device(name="dummy", driver=driver, info=driver.info, torch_device=torch.device("cpu"))

    monkeypatch.setitem(OPENERS, "dummy", open_dummy)


@pytest.fixture(params=[(backend, checked) for backend in BACKENDS for checked in (False, True)])
def make(request: pytest.FixtureRequest, native: ModuleType) -> Callable[..., kvmem.Allocator]:
    backend, checked = request.param

    def make(**options: Any) -> kvmem.Allocator:
        if checked:
            options["driver"] = _core.CheckedDriver(native.open())
        sizes = {"page_bytes": PAGE, "memory": 400 * PAGE, "max_sequences": 6, "max_tokens": 400}
        spec = next(iter(LAYOUTS.values())).spec(16)
        return kvmem.Allocator(spec, backend=backend, device="dummy", debug=True, **sizes | options)  # type: ignore[arg-type]

    return make


def test_what_differs_is_read_from_its_info() -> None:
    """Nothing in kvmem knows the name: the traits alone say what a pool and an allocator do."""
    pool = kvmem.PagePool(device="dummy", memory="1MiB")
    driver = pool.device.driver
    assert driver is not None and pool.page_bytes == driver.info.recommended_bytes
    assert driver.physical_bytes() == 1 << 20, "creates_ahead"
    alloc = kvmem.Allocator(LAYOUTS["kv interleaved"].spec(16), pool=pool, max_sequences=2, max_tokens=100)
    assert (alloc.tail_guard_tokens, alloc.map_ahead_tokens) == (3, 5)
    assert alloc.stats().device_free_bytes == (1 << 30) - (1 << 20), "tells_free_bytes"
    assert kvmem.PagePool(device="dummy", memory=0.25).budget_bytes == 1 << 28
    alloc.set_stream(0)
    with pytest.raises(kvmem.SpecError, match="must be the driver's handle as an int"):
        alloc.set_stream(object())
    with pytest.raises(kvmem.SpecError, match="makes no such pages; leave out shareable=True"):
        kvmem.PagePool(device="dummy", memory="1MiB", shareable=True)
    with pytest.raises(kvmem.DeviceError, match='must be one of "cpu", "cuda", "meta", "dummy"'):
        kvmem.PagePool(device="dumb", memory="1MiB")
