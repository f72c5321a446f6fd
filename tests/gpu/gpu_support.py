"""Allocators on a real GPU for the conformance suites. Pages are what the driver gives, 2 MiB, so tokens are made wide
enough that sequences of a few hundred cross them."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from support import Layout

import kvmem
from kvmem import _core


def wide(block_size: int) -> kvmem.CacheSpec:
    """9,984 bytes a token: 210 in a page, and one that straddles two."""
    return kvmem.CacheSpec.kv(
        num_layers=3, num_kv_heads=4, head_dim=208, dtype=torch.float16, block_size=block_size
    )  # fmt: skip


def wide_windows(block_size: int) -> kvmem.CacheSpec:
    parts = [kvmem.Component(name, heads=4, width=208, dtype=torch.float16) for name in ("k", "v")]
    groups = (kvmem.Group("full", parts, (0,)), kvmem.Group("local", parts, (1, 2), window_tokens=100))
    return kvmem.CacheSpec(groups, block_size=block_size)


def wide_state(block_size: int) -> kvmem.CacheSpec:
    kv = tuple(kvmem.Component(name, heads=4, width=416, dtype=torch.float16) for name in ("k", "v"))
    state = (kvmem.Component("ssm", heads=16, width=400, dtype=torch.float16, growth="fixed"),)
    return kvmem.CacheSpec(
        (kvmem.Group("attention", kv, (1,)), kvmem.Group("state", state, (0, 2))), block_size=block_size
    )


GPU_LAYOUTS = {
    "wide": Layout(wide),
    "wide G=1": Layout(wide, 1),
    "wide window": Layout(wide_windows),
    "wide state": Layout(wide_state, 1),
}

#: (backend, device, layout, block size). Every test of them is many calls of a driver's, so not every combination.
_EVERY = [
    ("virtual", "cuda", "wide", 16),
    ("paged", "checked cuda", "wide window", 16),
    ("virtual", "cuda", "wide state", 16),
    ("virtual", "checked cuda", "wide G=1", 96),
    ("paged", "cuda", "wide", 16),
    ("virtual", "cuda", "wide window", 16),
    ("paged", "cuda", "wide state", 16),
]


def gpu_cases(count: int) -> list[Any]:
    """The first ``count`` of them, or all with KVMEM_GPU_FULL=1, as parameters of a fixture."""
    chosen = _EVERY if os.environ.get("KVMEM_GPU_FULL") else _EVERY[:count]
    named = [(case, "-".join(map(str, case[:3])).replace(" ", "_")) for case in chosen]
    return [pytest.param(case, marks=pytest.mark.gpu, id=name) for case, name in named]


def open_gpu(checked: bool) -> tuple[str, _core.Driver]:
    """The name of the device for ``Allocator``, and a fresh driver of it."""
    driver = _core.cuda_driver(0)
    return "cuda:0", _core.CheckedDriver(driver) if checked else driver


def gpu_allocator(case: tuple[str, str, str, int], pages: int, options: dict[str, Any]) -> kvmem.Allocator:
    """``options`` as the tests give them, their memory in pages of the driver's size."""
    backend, device, layout, block_size = case
    name, driver = open_gpu(device.startswith("checked"))
    page = max(2 << 20, driver.info.recommended_bytes)
    options = {"memory": pages * page, "map_ahead_tokens": 0, "tail_guard_tokens": 256} | options
    options = {"max_sequences": 6, "max_tokens": 400} | options
    options |= {"page_bytes": page, "interleave": GPU_LAYOUTS[layout].interleave, "debug": True}
    return kvmem.Allocator(
        GPU_LAYOUTS[layout].spec(block_size), backend=backend, device=name, driver=driver, **options
    )  # type: ignore[arg-type]  # fmt: skip
