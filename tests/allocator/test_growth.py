"""What many requests leave behind, and what one of many costs: by counts and by bytes, never by time."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import kvmem
from kvmem.events import BlockStored

ROUNDS = 20_000


def spec(block_size: int = 4) -> kvmem.CacheSpec:
    return kvmem.CacheSpec.kv(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32", block_size=block_size)


def resident_kib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4


def grown_kib(step: Callable[[int], object]) -> int:
    """By how much ``ROUNDS`` steps grow the process, once it has what it always needs."""
    for i in range(ROUNDS // 10):
        step(-1 - i)
    before = resident_kib()
    for i in range(ROUNDS):
        step(i)
    return resident_kib() - before


@pytest.mark.parametrize("events", [0, 16])
@pytest.mark.parametrize("tokens", [0, 8])
def test_requests_of_a_salt_each_leave_nothing(tokens: int, events: int) -> None:
    alloc = kvmem.Allocator(
        spec(), backend="paged", memory="256KiB", page_bytes=4096, max_sequences=4, max_tokens=64, events=events
    )  # fmt: skip
    if events:  # one event waits for ever: what comes after it must not
        with alloc.sequence([1] * 8) as seq:
            seq.extend(4), seq.commit([1] * 4)

    def step(i: int) -> None:
        with alloc.sequence([1] * 8, salt=f"user {i} " + "x" * 200) as seq:
            if tokens:
                seq.extend(tokens), seq.commit([1] * tokens)

    assert grown_kib(step) < 2048, "KiB, of names of 4 MiB"


@pytest.mark.core
def test_names_of_past_roots_are_told_while_their_events_wait() -> None:
    alloc = kvmem.Allocator(
        spec(), backend="paged", memory="64KiB", page_bytes=4096, max_sequences=4, max_tokens=64, events=4096
    )
    told: list[object] = []
    for i in range(600):  # far more than there is memory for: roots go while their events wait
        with alloc.sequence([1] * 8, salt="salt", extra_key=f"adapter {i}") as seq:
            seq.extend(8), seq.commit([1] * 8)
        if i % 97 == 0:
            told += alloc.events(3)
    told += alloc.events()
    keys = [event.extra_keys[0][0] for event in told if isinstance(event, BlockStored) and event.extra_keys]
    assert keys == [f"adapter {i}" for i in range(600)]


@pytest.mark.core
def test_allocators_that_come_and_go_on_a_pool(backend: str, rng: random.Random) -> None:
    """The numbers of arenas are given out again, also where the oldest allocator always goes first."""
    pool = kvmem.PagePool(memory="1MiB", page_bytes=4096)

    def make() -> kvmem.Allocator:
        return kvmem.Allocator(spec(), backend=backend, pool=pool, max_sequences=2, max_tokens=64, interleave="none")

    live = [make() for _ in range(3)]
    for _ in range(200):
        live.pop(rng.choice([0, 0, 1, -1]))
        live.append(make())
        with live[-1].sequence() as seq:
            seq.extend(9), seq.commit(count=9)
            if backend == "virtual":  # the paged backend gathers a copy, and warns of a write to it
                seq.kv(0)[0].fill_(1)
        assert all(alloc.check() == [] for alloc in live)
    recorded = kvmem.Allocator(spec(), backend=backend, pool=pool, max_sequences=2, max_tokens=64, interleave="none")
    assert recorded.core.first_arena(0) <= 2 * (len(live) + 1)


@pytest.mark.core
def test_huge_blocks_take_no_memory_for_tokens_that_never_come() -> None:
    before = resident_kib()
    alloc = kvmem.Allocator(
        spec(1 << 24), memory="64KiB", page_bytes=4096, max_sequences=4, max_tokens=100, backend="virtual"
    )
    with alloc.sequence([1, 2, 3], salt="a") as seq:
        seq.extend(3), seq.commit([1, 2, 3])
        with seq.fork() as child:
            child.extend(2), child.commit([4, 5])
    assert resident_kib() - before < 64 * 1024 and alloc.check() == []


def mixed(rng: random.Random) -> list[tuple[int, int, int, float | None]]:
    """Ranges of all kinds: nested, side by side, cut into each other, within a block."""
    ranges = []
    for _ in range(rng.randrange(1, 9)):
        start = rng.randrange(0, 60)
        ranges.append((start, start + rng.randrange(1, 50), rng.choice([10, 30, 70, 90]), None))
    return ranges


@pytest.mark.core
def test_the_last_word_on_each_block_counts(rng: random.Random) -> None:
    """Which blocks go first, against a table of the last call that names each: blocks there already, and those to come."""
    for _ in range(60):
        alloc = kvmem.Allocator(
            spec(), backend="paged", memory="64KiB", page_bytes=4096, max_sequences=2, max_tokens=128, policy="lru"
        )  # fmt: skip
        seq, priority = alloc.sequence(), [50] * 24
        there = rng.randrange(0, 96)
        ids = list(range(96))
        seq.extend(96), seq.commit(ids[:there])
        for start, end, value, ttl in mixed(rng):
            seq.retain(start, end, priority=value, ttl=ttl)
            for block in range(24):
                if start <= 4 * block and 4 * block + 4 <= end:
                    priority[block] = value
        seq.commit(ids[there:])
        said = [50] * 24
        for first, stop, value, seconds in alloc.core.retained(seq.id):
            assert said[first:stop] == [50] * len(said[first:stop]) and seconds == float("inf")
            said[first:stop] = [value] * len(said[first:stop])
        assert said == priority
        seq.free()


def test_renewals_do_not_add_up() -> None:
    alloc = kvmem.Allocator(spec(), backend="paged", memory="64KiB", page_bytes=4096, max_sequences=2, max_tokens=128)
    seq = alloc.sequence()
    seq.extend(96), seq.commit(np.arange(96, dtype=np.int32))
    assert grown_kib(lambda i: seq.retain(i % 50, 60 + i % 30, priority=80, ttl=30.0)) < 1024
    assert len(alloc.core.retained(seq.id)) <= 24 and alloc.check() == []
