"""The conformance suites where a block's tokens do not lie one after the other: head-major blocks, on both backends; blocks
that span pages, and pages that hold several blocks."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conformance import *  # noqa: F403 - the tests
from conformance_memory import *  # noqa: F403
from conformance_prefix import *  # noqa: F403
from contents import places, write_slots
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


@pytest.mark.parametrize("order", ["heads", "joined"])
@pytest.mark.parametrize("size", sorted(SIZES))
def test_part_of_a_block_is_copied_as_the_whole(order: str, size: str, backend: str, rng: random.Random) -> None:
    """Forks, truncations and growth inside of blocks, with every token verified: pages and blocks of all relations."""
    sizes, spec = SIZES[size], rng.choice([plain, hybrid_windows])
    alloc = make_allocator(
        spec(sizes["block_size"]).with_blocks(order), backend, interleave=rng.choice([1, "all"]), max_sequences=12, max_tokens=2000,
        zero=rng.choice(["fresh", "always"]), page_bytes=sizes["page_bytes"], memory=1000 * sizes["page_bytes"],
    )  # fmt: skip
    pair = Lockstep(alloc)

    def grow(handle: int, n: int) -> None:
        assert pair.extend({handle: n})
        pair.write([handle])
        pair.commit({handle: n})
        pair.contents_agree()

    parts = range(1, sizes["block_size"])
    first = pair.open()
    grow(first, 2 * sizes["block_size"] + rng.choice(parts))
    for _ in range(4):
        twin = pair.fork(first)
        grow(twin, rng.choice(parts)), grow(first, rng.choice(parts))
        tokens = pair.model.sequences[twin][pair.model.main].tokens
        third = pair.fork(twin)
        pair.truncate(third, max(pair.model.least_tokens(third), tokens - rng.choice(parts)))
        grow(third, rng.choice(parts)), grow(twin, 1)
        pair.agree()
        pair.free([twin])
        pair.contents_agree()


def test_a_follower_copies_the_same_blocks(backend: str, rng: random.Random) -> None:
    """Another allocator that is given the ops holds the same bytes, whatever part of a block was shared."""
    blocks = plain(rng.choice([5, 16, 96])).with_blocks(rng.choice(["heads", "joined"]))
    options = {"page_bytes": 4096, "interleave": 1, "record_ops": True, "max_sequences": 12}
    leader, follower = (make_allocator(blocks, backend, **options) for _ in range(2))
    size, seqs = blocks.block_size, [leader.sequence()]
    for writer in range(24):
        seq = rng.choice(seqs)
        seq.extend(n := rng.randint(1, 9))
        follower.apply(leader.take_ops())
        slots, positions = leader.batch([seq]).slot_mapping, np.arange(seq.num_tokens - n, seq.num_tokens)
        for alloc in (leader, follower):
            write_slots(alloc, 0, slots, np.full(n, writer + 1), positions)
        seq.commit(count=n)
        if writer % 3 == 0 and len(seqs) < 9:
            seqs.append(seq.fork())
        elif writer % 3 == 1:
            seq.truncate(rng.randint(0, seq.num_tokens))
        follower.apply(leader.take_ops())
        for one in (one for one in seqs if one.num_tokens):
            (ids,), tokens = leader.batch([one]).block_table.long(), one.num_tokens
            for layer, name in places(blocks, 0):
                held = (
                    a.tensor(layer, name)[ids[: -(-tokens // size)]].flatten(0, 1)[:tokens] for a in (leader, follower)
                )
                mine, other = (part.contiguous().view(torch.uint8) for part in held)
                assert torch.equal(mine, other)
    assert leader.check() == follower.check() == []
