"""The conformance suites where a block's tokens do not lie one after the other: head-major blocks, on both backends; blocks
that span pages, and pages that hold several blocks."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conformance import *  # noqa: F403 - the tests
from conformance import step
from conformance_memory import *  # noqa: F403
from conformance_prefix import *  # noqa: F403
from conformance_prefix_life import *  # noqa: F403
from lockstep import Lockstep
from support import SIZES, hybrid_windows, make_allocator, plain

import kvmem

#: backend, order, spec, interleave, name of the sizes
CASES = [("virtual", "joined", hybrid_windows, 1, "small pages"), ("paged", "heads", plain, "none", "near")]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case[:2]))
def make(request: pytest.FixtureRequest) -> Callable[..., kvmem.Allocator]:
    backend, order, spec, interleave, size = request.param
    page = SIZES[size]["page_bytes"]

    def make(**options: Any) -> kvmem.Allocator:
        options = {"page_bytes": page, "memory": 3000 * page, "map_ahead_tokens": 0} | options
        blocks = spec(SIZES[size]["block_size"]).with_blocks(order)
        return make_allocator(blocks, backend, **options, interleave=interleave)

    return make


def test_rows_and_blocks_show_the_same_memory(make: Callable[..., kvmem.Allocator]) -> None:
    """Of rows there is no view; blocks are shown in three ways."""
    with make() as alloc:
        seq = alloc.sequence()
        seq.extend(100)
        order, (k, v) = alloc.spec.groups[0].block_order, alloc.kv_by_head(0)
        for logical, stored in zip(alloc.kv(0), (k, v), strict=True):
            plain_k, by_head = logical.as_subclass(torch.Tensor), stored.as_subclass(torch.Tensor)
            assert by_head.data_ptr() == plain_k.data_ptr() and torch.equal(by_head.transpose(1, 2), plain_k)
            assert by_head.stride()[2:] == (by_head.shape[3], 1)
        with pytest.raises(kvmem.SpecError, match=r"rows|do not lie side by side"):
            alloc.rows(0)
        if order == "heads":
            with pytest.raises(kvmem.SpecError, match="one tensor needs"):
                alloc.joined(0)
            return
        both = alloc.joined(0).as_subclass(torch.Tensor)
        k, v = k.as_subclass(torch.Tensor), v.as_subclass(torch.Tensor)
        assert torch.equal(both, torch.cat([k, v], 2)) and k.stride() == v.stride()


def test_the_guard_behind_a_sequence_can_be_read(make: Callable[..., kvmem.Allocator]) -> None:
    """There is none: it would be zeroed token by token."""
    with pytest.raises(kvmem.SpecError, match=r"tail_guard_tokens: got 64; .*block_order"):
        make(tail_guard_tokens=64)


@pytest.mark.parametrize("zero", ["fresh", "always"])
@pytest.mark.parametrize("order", ["heads", "joined"])
@pytest.mark.parametrize("spec", [plain, hybrid_windows])
def test_random_operations_with_contents(
    spec: Callable[[int], kvmem.CacheSpec], order: str, zero: str, backend: str, rng: random.Random
) -> None:
    """Forks, truncations and growth inside of blocks: every token verified. Sizes: pages and blocks of all relations."""
    for name in sorted(SIZES):
        sizes = SIZES[name]
        pair = Lockstep(
            make_allocator(
                spec(sizes["block_size"]).with_blocks(order), backend, interleave=rng.choice([1, "all"]), zero=zero,
                page_bytes=sizes["page_bytes"], memory=50 * sizes["page_bytes"],
            )
        )  # fmt: skip
        for _ in range(60):
            step(pair, rng)
            pair.agree()
        pair.contents_agree()
