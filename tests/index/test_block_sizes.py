"""Groups with blocks of different sizes share prefixes in units that are whole blocks of each of them."""

from __future__ import annotations

import random

import pytest
from event_world import Router
from support import HALF, compute, make_allocator

import kvmem
from kvmem.events import BlockStored
from kvmem.events.digests import block_digests

pytestmark = pytest.mark.core
K, V = (kvmem.Component(name, heads=2, width=8, dtype=HALF) for name in "kv")


def spec(*groups: tuple[int, int | None]) -> kvmem.CacheSpec:
    """A group of one layer for each (block size, window)."""
    return kvmem.CacheSpec(
        tuple(
            kvmem.Group(f"group {i}", (K, V), (i,), block_size=size, window_tokens=window)
            for i, (size, window) in enumerate(groups)
        )
    )


def tokens(count: int, seed: int = 0) -> list[int]:
    return [random.Random(seed * 10_007 + i).randrange(50_000) for i in range(count)]


@pytest.mark.parametrize("order", [1, -1])
def test_a_window_of_smaller_blocks_beside_full_attention(backend: str, order: int) -> None:
    """Full attention in blocks of 32 and a window of 32 tokens in blocks of 16: all six blocks of 96 tokens are found again,
    while their writer lives and when it has gone; of a prompt that parts from it after 70 tokens, two units of 32."""
    groups = [(32, None), (16, 32)][::order]
    alloc = make_allocator(spec(*groups), backend, partial_reuse=False)
    prompt = tokens(97)
    with compute(alloc, prompt[:96]):
        assert alloc.match(prompt) == kvmem.PrefixMatch(96, "complete")
        with compute(alloc, prompt) as again:
            assert again.num_cached_tokens == 96
    assert alloc.match(prompt).num_tokens == 96
    compute(alloc, prompt[:64])  # so that the window of these is there
    assert alloc.match(prompt[:70] + tokens(30, 1)).num_tokens == 64
    assert alloc.check() == []


@pytest.mark.parametrize(("sizes", "unit"), [((4, 6), 12), ((6, 4), 12), ((1, 5), 5), ((16, 2), 16), ((8, 12, 3), 24)])
def test_hits_come_in_common_multiples(backend: str, sizes: tuple[int, ...], unit: int) -> None:
    alloc = make_allocator(spec(*((size, None) for size in sizes)), backend, partial_reuse=False, events=4096)
    whole = make_allocator(spec(*((size, None) for size in sizes)), backend)  # with parts of a unit besides
    prompt, router = tokens(5 * unit), Router()
    compute(alloc, prompt)
    compute(whole, prompt)
    for same in range(1, 5 * unit):
        other = prompt[:same] + tokens(9, 2)
        assert alloc.match(other).num_tokens == same // unit * unit
        assert whole.match(other).num_tokens == same
    events = alloc.events()
    router.follow(events)
    stored = [event for event in events if isinstance(event, BlockStored)]
    assert {event.block_size for event in stored} == {unit}
    for group in range(len(sizes)):
        told = [name for event in stored if event.group == group for name in event.block_hashes]
        assert told == block_digests(alloc.spec, prompt) and len(told) == 5


def test_sizes_without_a_small_common_multiple_share_nothing_and_say_so(backend: str) -> None:
    """4,095 and 4,096 have none below 16 million tokens. All else works, and a window lets go of its own blocks."""
    alloc = make_allocator(
        spec((4095, None), (4096, None), (4, 8)), backend, memory="32MiB", max_tokens=9000, events=16
    )
    prompt = tokens(8500)
    with compute(alloc, prompt) as sequence:
        assert alloc.match(prompt) == kvmem.PrefixMatch(0, "block sizes")
        assert alloc.core.first_token(sequence.id, 2) == 8492
    assert compute(alloc, prompt).num_cached_tokens == 0 and alloc.events() == []
    off = make_allocator(alloc.spec, backend, memory="32MiB", max_tokens=9000, prefix_cache=False)
    assert off.match(prompt).reason == "off"
    assert make_allocator(spec((4096, None), (1, None)), backend, memory="32MiB").match(prompt).reason == "never seen"
    assert make_allocator(spec((8192, None), (8192, 9)), backend, memory="32MiB").match(prompt).reason == "never seen"


def test_a_window_lets_go_of_whole_units_where_prefixes_are_shared(backend: str) -> None:
    groups = spec((12, None), (4, 6))
    shares, alone = (make_allocator(groups, backend, prefix_cache=on, tail_guard_tokens=0) for on in (True, False))
    one, two = (compute(alloc, tokens(40)) for alloc in (shares, alone))
    assert (shares.core.first_token(one.id, 1), alone.core.first_token(two.id, 1)) == (24, 32)


def test_forks_within_a_unit_publish_units_of_their_own() -> None:
    """Two forks agree on three blocks of a unit of four, and go on apart: each of them is found, neither has the other's.
    A block that both read could be part of one unit only, so it is copied."""
    alloc = make_allocator(spec((16, None), (4, None)), "paged", partial_reuse=False)
    start, ends = tokens(28), [tokens(12, seed) for seed in (1, 2)]
    parent = compute(alloc, start)
    child = parent.fork()
    one, two = (alloc.batch([each]).group(1).block_table[0].tolist() for each in (parent, child))
    assert one[:4] == two[:4] and not set(one[4:7]) & set(two[4:7])
    for sequence, end in zip((parent, child), ends, strict=True):
        sequence.extend(12)
        sequence.commit(end)
    for end in ends:
        assert alloc.match([*start, *end]).num_tokens == 32
    assert alloc.check() == []
