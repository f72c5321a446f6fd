"""What the tests of the allocator share: layouts, devices, allocators and allocators made from them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support_drivers import CudaStub, build_stub

import kvmem
from kvmem import _core
from kvmem.memory.device import OPENERS, Device

LONG = os.environ.get("KVMEM_LONG") == "1"  # longer random runs and every case of a grid; read nowhere else
BACKENDS = ("virtual", "paged")
HALF = torch.float16


class Steps:
    """Counts the steps of a random test from 1: ``least`` of them, and on until what the test claims to meet has come about.

    ``most`` times as many without it are a bug, not bad luck."""

    def __init__(self, least: int, most: int = 100) -> None:
        self.least, self.most, self.number = least, least * most, 0

    def next(self, met: object) -> int:
        """The number of the next step; 0 when there need be none."""
        assert self.number < self.most, f"{self.most} steps did not bring about what this test is about"
        self.number += 1
        return self.number if self.number <= self.least or not met else 0


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


# ---- Layouts: one function of the block size each ------------------------------------------------


def _component(name: str, **fields: Any) -> kvmem.Component:
    return kvmem.Component(name, **({"dtype": HALF} | fields))


def plain(block_size: int) -> kvmem.CacheSpec:
    return kvmem.CacheSpec.kv(num_layers=3, num_kv_heads=2, head_dim=8, dtype=HALF, block_size=block_size)


def bytes_kv(block_size: int) -> kvmem.CacheSpec:
    """8-bit elements, and rows of 24 bytes, which are padded to 32."""
    return kvmem.CacheSpec.kv(num_layers=2, num_kv_heads=3, head_dim=8, dtype=torch.int8, block_size=block_size)


def latent(block_size: int) -> kvmem.CacheSpec:
    """As MLA: a latent and a rotary key of unequal width, no heads."""
    parts = [
        _component("ckv", width=36, dtype=torch.bfloat16),
        _component("kpe", width=8, dtype=torch.bfloat16, rope="post"),
    ]
    return kvmem.CacheSpec(components=parts, num_layers=2, block_size=block_size)


def unequal(block_size: int) -> kvmem.CacheSpec:
    """Widths that differ by layer and between K and V, and by head group in the last layer of V."""
    parts = [_component("k", heads=2, width=(4, 16, 24)), _component("v", heads=2, width=((8,), (8,), (8, 16)))]
    return kvmem.CacheSpec(components=parts, num_layers=3, block_size=block_size)


def windows(block_size: int) -> kvmem.CacheSpec:
    """As Gemma: one group of full attention and one of a sliding window, here with a block size of its own. Of blocks of 16
    and 8 tokens or 96 and 48 the common multiple is the larger, of 5 and 2 it is 10."""
    k, v = _component("k", heads=2, width=8, rope="post"), _component("v", heads=2, width=8)
    full = kvmem.Group("full", (k, v), (0, 3))
    local = kvmem.Group("local", (k, v), (1, 2), window_tokens=40, block_size=max(1, block_size // 2))
    return kvmem.CacheSpec((full, local), block_size=block_size)


def hybrid_windows(block_size: int) -> kvmem.CacheSpec:
    """As ``windows``, with equal blocks."""
    k, v = _component("k", heads=2, width=8, rope="post"), _component("v", heads=2, width=8)
    groups = (kvmem.Group("full", (k, v), (0, 3)), kvmem.Group("local", (k, v), (1, 2), window_tokens=100))
    return kvmem.CacheSpec(groups, block_size=block_size)


def all_windows(block_size: int) -> kvmem.CacheSpec:
    return kvmem.CacheSpec.kv(
        num_layers=2, num_kv_heads=2, head_dim=8, dtype=HALF, block_size=block_size, window_tokens=48
    )


def three_sizes(block_size: int) -> kvmem.CacheSpec:
    """Windows in larger and in smaller blocks than those of full attention."""
    k, v = _component("k", heads=2, width=8, rope="post"), _component("v", heads=2, width=8)
    far = kvmem.Group("far", (k, v), (1,), window_tokens=70, block_size=2 * block_size)
    near = kvmem.Group("near", (k, v), (2,), window_tokens=1, block_size=max(1, block_size // 2))
    return kvmem.CacheSpec((kvmem.Group("full", (k, v), (0, 3)), far, near), block_size=block_size)


def encoder_decoder(block_size: int) -> kvmem.CacheSpec:
    k, v = _component("k", heads=2, width=8, rope="post"), _component("v", heads=2, width=8)
    cross = tuple(_component(name, heads=2, width=8, growth="prefill") for name in ("cross_k", "cross_v"))
    groups = (kvmem.Group("self", (k, v), (0, 1)), kvmem.Group("cross", cross, (0, 1), max_tokens=50))
    return kvmem.CacheSpec(groups, block_size=block_size)


def recurrent(block_size: int) -> kvmem.CacheSpec:
    """As a hybrid: attention in one layer, a state of fixed size in the other two."""
    kv = (_component("k", heads=2, width=8), _component("v", heads=2, width=8))
    state = (_component("conv", heads=4, width=6, growth="fixed"), _component("ssm", heads=3, width=40, growth="fixed"))
    groups = (kvmem.Group("attention", kv, (1,)), kvmem.Group("state", state, (0, 2)))
    return kvmem.CacheSpec(groups, block_size=block_size)


def shared_latent(block_size: int) -> kvmem.CacheSpec:
    """As GoldFinch: one compressed key that all layers read, and a value for each layer."""
    parts = [_component("ck", width=10, scope="shared", rope="pre"), _component("v", heads=2, width=8)]
    return kvmem.CacheSpec(components=parts, num_layers=3, block_size=block_size)


@dataclass(frozen=True)
class Layout:
    spec: Callable[[int], kvmem.CacheSpec]
    interleave: int | str = "all"


LAYOUTS = {
    "kv interleaved": Layout(plain),
    "kv G=1": Layout(plain, 1),
    "kv apart": Layout(plain, "none"),
    "kv bytes": Layout(bytes_kv),
    "latent": Layout(latent),
    "latent apart": Layout(latent, "none"),
    "unequal widths": Layout(unequal, 2),
    "two windows": Layout(windows),
    "full and window": Layout(hybrid_windows),
    "three sizes, windows": Layout(three_sizes),
    "window G=1": Layout(all_windows, 1),
    "encoder decoder": Layout(encoder_decoder),
    "recurrent": Layout(recurrent, 1),
    "shared scope": Layout(shared_latent, 2),
}

#: Pages and blocks: equal in no case, far apart in both directions, and once neither divides the other.
SIZES = {
    "small blocks": {"block_size": 16, "page_bytes": 65536},
    "near": {"block_size": 16, "page_bytes": 4096},
    "small pages": {"block_size": 96, "page_bytes": 4096},
    "odd": {"block_size": 5, "page_bytes": 12288},
}


# ---- Devices -------------------------------------------------------------------------------------

DEVICES = ("host", "checked host", "cuda stub")


def open_driver(name: str, folder: Path) -> _core.Driver:
    """A fresh driver by its name in DEVICES. Compiles the stand-in for libcuda the first time; skips without a
    compiler."""
    checked, kind = name.startswith("checked "), name.removeprefix("checked ")
    if kind == "host":
        driver = _core.host_driver()
    else:
        stub = CudaStub(build_stub(), folder)
        stub.set("granularity_bytes", 4096)
        driver = stub.driver()
    return _core.CheckedDriver(driver) if checked else driver


def _pointer(capsule: Any) -> int:
    """The address in a DLPack capsule: the first field of what it points to."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return int(ctypes.c_void_p.from_address(get(capsule, b"dltensor")).value or 0)


def make_allocator(
    spec: kvmem.CacheSpec, backend: str, *, driver: _core.Driver | None = None, device: str = "cpu", **options: Any
) -> kvmem.Allocator:
    """An allocator over ``driver``; small by default.

    The stand-in's memory is ordinary memory at a CUDA address, and torch has no CUDA here: such an allocator is opened
    with the defaults of a CUDA device, and its arenas are shown to torch as CPU tensors."""
    options = {"memory": "4MiB", "max_sequences": 6, "max_tokens": 400, "debug": True} | options
    if driver is None or driver.info.dlpack_device_type == 1:
        return kvmem.Allocator(spec, backend=backend, device=device, driver=driver, **options)  # type: ignore[arg-type]
    cuda = Device(name="cuda:0", driver=driver, info=driver.info, torch_device=torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OPENERS, "cuda", lambda *_, **__: cuda)
        alloc = kvmem.Allocator(spec, backend=backend, device="cuda:0", **options)  # type: ignore[arg-type]
    core = alloc.core

    def show(group: int, arena: int, begin: int, size: int) -> torch.Tensor:
        capsule = core.arena_bytes(group, arena, begin, size)
        memory = (ctypes.c_uint8 * size).from_address(_pointer(capsule))
        memory.owner = capsule  # as torch does: the tensor keeps what keeps the memory
        return torch.frombuffer(memory, dtype=torch.uint8)

    for group, geometry in enumerate(alloc._geometry):
        for arena, slots in enumerate(geometry.arena_slots):
            alloc._arenas[group, arena] = show(group, arena, 0, slots * alloc.pool.page_bytes)
    alloc._part = show  # type: ignore[method-assign]
    return alloc


def compute(alloc: kvmem.Allocator, prompt: list[int], **keys: Any) -> kvmem.Sequence:
    """A sequence that has computed and committed what is not cached of ``prompt``."""
    sequence = alloc.sequence(prompt, **keys)
    rest = prompt[sequence.num_cached_tokens :]
    sequence.extend(len(rest))
    sequence.commit(rest)
    return sequence
