"""Prefix sharing on every backend, device and layout; ``"meta"`` among them, where there are no bytes to compare, and for
some layouts a host whose index has hashes of one bit (``KVMEM_HASH_BITS``): not one answer may be another then."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count, cycle, product
from pathlib import Path
from typing import Any

import pytest
from conformance_prefix import *  # noqa: F403 - the tests
from conformance_prefix_life import *  # noqa: F403
from gpu_support import gpu_allocator, gpu_cases
from support import BACKENDS, DEVICES, LAYOUTS, LONG, SIZES, make_allocator, open_driver

import kvmem

# Every triple of backend, device and layout once; sizes take turns, so that each layout meets several. KVMEM_LONG=1:
# all.
TRIPLES = list(product(BACKENDS, (*DEVICES, "meta"), LAYOUTS))
SIZE_OF = cycle(["near", "small pages", "odd", "small blocks", "near"])
QUADRUPLES = product(BACKENDS, (*DEVICES, "meta"), LAYOUTS, SIZES)
CASES = list(QUADRUPLES) if LONG else [(*triple, next(SIZE_OF)) for triple in TRIPLES]
CASES += product(BACKENDS, ["colliding hashes"], ["kv interleaved", "full and window", "recurrent"], ["near"])


NAMED = [pytest.param(case, id="-".join(case).replace(" ", "_")) for case in CASES]


@pytest.fixture(params=[*NAMED, *gpu_cases(3)])
def make(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., kvmem.Allocator]:
    backend, device, layout, size = request.param
    if "cuda" in device and "stub" not in device:
        return lambda **options: gpu_allocator(request.param, 1500, options)
    sizes = SIZES[size]
    if device == "colliding hashes":
        monkeypatch.setenv("KVMEM_HASH_BITS", "1")
        device = "host"

    folders = (
        count()
    )  # a stand-in for a driver has one of its own: it is loaded from there, and must not be written again

    def make(**options: Any) -> kvmem.Allocator:
        page = sizes["page_bytes"]
        options = {"page_bytes": page, "memory": 3000 * page, "map_ahead_tokens": 0} | options
        options["interleave"] = LAYOUTS[layout].interleave
        spec = LAYOUTS[layout].spec(sizes["block_size"])
        if device == "meta":
            return make_allocator(spec, backend, device="meta", **options)
        folder = tmp_path / str(next(folders))
        folder.mkdir()
        return make_allocator(spec, backend, driver=open_driver(device, folder), **options)

    return make
