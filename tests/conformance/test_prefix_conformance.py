"""Prefix sharing on every backend, device and layout; ``"meta"`` among them, where there are no bytes to compare, and for
some layouts a host whose index has hashes of one bit (``KVMEM_HASH_BITS``): not one answer may be another then."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from conformance_cases import cases_of, maker, named
from conformance_prefix import *  # noqa: F403 - the tests
from conformance_prefix_life import *  # noqa: F403
from gpu_support import gpu_allocator, gpu_cases
from support import BACKENDS, DEVICES

import kvmem

COLLIDING = product(BACKENDS, ["colliding hashes"], ["kv interleaved", "full and window", "recurrent"], ["near"])


@pytest.fixture(params=[*named([*cases_of(*DEVICES, "meta"), *COLLIDING]), *gpu_cases(3)])
def make(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., kvmem.Allocator]:
    backend, device, *rest = request.param
    if "cuda" in device and "stub" not in device:
        return lambda **options: gpu_allocator(request.param, 1500, options)
    if device == "colliding hashes":
        monkeypatch.setenv("KVMEM_HASH_BITS", "1")
        device = "host"
    return maker((backend, device, *rest), 3000, tmp_path)
