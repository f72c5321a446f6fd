"""The combinations of backend, device, layout and sizes that the conformance suites run on: every triple of the first three
once; sizes take turns, so that each layout meets several. KVMEM_LONG=1: all."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count, cycle, product
from pathlib import Path
from typing import Any

import pytest
from support import BACKENDS, LAYOUTS, LONG, SIZES, make_allocator, open_driver

import kvmem

Case = tuple[str, str, str, str]


def cases_of(*devices: str) -> list[Case]:
    if LONG:
        return list(product(BACKENDS, devices, LAYOUTS, SIZES))
    size_of = cycle(["near", "small pages", "odd", "small blocks", "near"])
    return [(*triple, next(size_of)) for triple in product(BACKENDS, devices, LAYOUTS)]


def named(cases: list[Case]) -> list[Any]:
    return [pytest.param(case, id="-".join(case).replace(" ", "_")) for case in cases]


def maker(case: Case, pages: int, folder: Path) -> Callable[..., kvmem.Allocator]:
    """``make`` of the suites. A stand-in for a driver is loaded from a folder of its own, and never written again."""
    backend, device, layout, size = case
    page, number = SIZES[size]["page_bytes"], count()

    def make(**options: Any) -> kvmem.Allocator:
        options = {"page_bytes": page, "memory": pages * page, "map_ahead_tokens": 0} | options
        options["interleave"] = LAYOUTS[layout].interleave
        spec = LAYOUTS[layout].spec(SIZES[size]["block_size"])
        if device == "meta":
            return make_allocator(spec, backend, device="meta", **options)
        own = folder / str(next(number))
        own.mkdir()
        return make_allocator(spec, backend, driver=open_driver(device, own), **options)

    return make
