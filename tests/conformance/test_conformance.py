"""The conformance suite on every backend, device and layout; page, block and guard sizes go round among them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
from conformance import *  # noqa: F403 - the tests
from conformance_memory import *  # noqa: F403
from gpu_support import gpu_allocator, gpu_cases
from support import BACKENDS, DEVICES, LAYOUTS, LONG, SIZES, make_allocator, open_driver

import kvmem

# Every triple of backend, device and layout once; sizes take turns, so that each layout meets several. KVMEM_LONG=1:
# all.
TRIPLES = list(product(BACKENDS, DEVICES, LAYOUTS))
SIZE_OF = cycle(["near", "small pages", "odd", "small blocks", "near"])
CASES = list(product(BACKENDS, DEVICES, LAYOUTS, SIZES)) if LONG else [(*triple, next(SIZE_OF)) for triple in TRIPLES]


NAMED = [pytest.param(case, id="-".join(case).replace(" ", "_")) for case in CASES]


@pytest.fixture(params=[*NAMED, *gpu_cases(5)])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., kvmem.Allocator]:
    backend, device, layout, size = request.param
    if "cuda" in device and "stub" not in device:
        return lambda **options: gpu_allocator(request.param, 400, options)
    sizes = SIZES[size]

    def make(**options: Any) -> kvmem.Allocator:
        options = {
            "page_bytes": sizes["page_bytes"],
            "memory": 400 * sizes["page_bytes"],
            "map_ahead_tokens": 0,
        } | options
        return make_allocator(
            LAYOUTS[layout].spec(sizes["block_size"]), backend, driver=open_driver(device, tmp_path),
            interleave=LAYOUTS[layout].interleave, **options,
        )  # fmt: skip

    return make
