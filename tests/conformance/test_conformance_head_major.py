"""The conformance suite where a block's tokens do not lie one after the other: head-major blocks, on both backends; blocks
that span pages, and pages that hold several blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conformance import *  # noqa: F403 - the tests
from conformance_memory import *  # noqa: F403
from support import BACKENDS, SIZES, hybrid_windows, make_allocator, plain

import kvmem

#: order, spec, interleave, name of the sizes
CASES = [("heads", plain, "none", "near"), ("joined", hybrid_windows, 1, "small pages")]


@pytest.fixture(params=[(backend, *case) for backend in BACKENDS for case in CASES], ids=str)
def make(request: pytest.FixtureRequest) -> Callable[..., kvmem.Allocator]:
    backend, order, spec, interleave, size = request.param
    page = SIZES[size]["page_bytes"]

    def make(**options: Any) -> kvmem.Allocator:
        options = {"page_bytes": page, "memory": 400 * page, "map_ahead_tokens": 0} | options
        options["interleave"] = interleave
        blocks = spec(SIZES[size]["block_size"]).with_blocks(order)
        return make_allocator(blocks, backend, **options)

    return make
