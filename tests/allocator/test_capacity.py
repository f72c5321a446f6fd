"""`can_fit` and `free_tokens` against what a new sequence really gets, over random traffic."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from support import LONG, Steps, make_allocator, plain

import kvmem
from kvmem import CacheSpec, Component, Group, SpecError

pytestmark = pytest.mark.core

PAGE = 4096
MOST = 400


def _kv(width: int) -> tuple[Component, ...]:
    return tuple(Component(name, heads=1, width=width, dtype="float32") for name in "kv")


def _state(width: int) -> Group:
    return Group("state", (Component("s", width=width, dtype="float32", growth="fixed"),), (9,))


#: Blocks of 1, 3 and 2 KiB (which divide a page or do not), windows, states, and groups in each order.
SPECS: dict[str, CacheSpec] = {
    "plain": CacheSpec((Group("a", _kv(16), (0, 1)),), block_size=8),
    "across pages": CacheSpec((Group("a", _kv(12), (0, 1, 2)),), block_size=8),
    "window": CacheSpec((Group("w", _kv(16), (0, 1), window_tokens=20),), block_size=8),
    "hybrid": CacheSpec((Group("a", _kv(16), (0,)), Group("w", _kv(16), (1, 2), window_tokens=20)), block_size=8),
    "state": CacheSpec((Group("a", _kv(16), (0,)), _state(700)), block_size=8),
    "three": CacheSpec(
        (Group("w", _kv(16), (0,), window_tokens=30), Group("a", _kv(32), (1,)), Group("v", _kv(8), (2,), window_tokens=20)),
        block_size=8,
    ),
}  # fmt: skip


def draw(rng: random.Random, spec: CacheSpec, backend: str) -> kvmem.Allocator:
    return kvmem.Allocator(
        spec, backend=backend, device="meta", memory=PAGE * rng.choice([6, 20, 60]), page_bytes=PAGE, max_sequences=6,
        max_tokens=MOST, interleave=rng.choice(["all", 1, "none"]), tail_guard_tokens=rng.choice([0, 0, 16]),
        zero=rng.choice(["fresh", "always"]), map_ahead_tokens=rng.choice([0, 0, 8]),
    )  # type: ignore[arg-type]  # fmt: skip


class Traffic:
    def __init__(self, rng: random.Random, alloc: kvmem.Allocator, pins: bool) -> None:
        self.rng, self.alloc, self.pins = rng, alloc, pins
        self.texts = [[rng.randrange(50) for _ in range(MOST)] for _ in range(3)]
        self.live: list[kvmem.Sequence] = []

    def step(self) -> None:
        kinds = ["begin", "begin", "begin", "grow", "free", "fork", "cut", "pad"] + ["pin"] * self.pins
        kind = self.rng.choice(kinds)
        try:
            if kind == "begin" and len(self.live) < 5:
                self.begin()
            elif kind == "pad":
                self.alloc.batch(self.live, pad_to=len(self.live) + self.rng.randrange(3))
            elif kind != "begin" and self.live and (kind != "fork" or len(self.live) < 5):
                getattr(self, kind)(self.live[self.rng.randrange(len(self.live))])
        except kvmem.OutOfMemory:
            pass

    def begin(self) -> None:
        prompt = self.rng.choice(self.texts)[: self.rng.randrange(1, 300)]
        seq = self.alloc.sequence(prompt)
        if not seq.try_extend(len(prompt) - seq.num_tokens):
            return seq.free()
        seq.commit(prompt[seq.num_committed_tokens :])
        self.live.append(seq)

    def grow(self, seq: kvmem.Sequence) -> None:
        n = self.rng.randrange(1, 30)
        if seq.num_tokens + n <= MOST and seq.try_extend(n):
            seq.commit([self.rng.randrange(50) for _ in range(seq.num_tokens - seq.num_committed_tokens)])

    def fork(self, seq: kvmem.Sequence) -> None:
        self.live.append(seq.fork())

    def free(self, seq: kvmem.Sequence) -> None:
        self.live.remove(seq)
        seq.free()

    def cut(self, seq: kvmem.Sequence) -> None:
        with suppress(SpecError):  # a window has passed it, or a pin keeps it
            seq.truncate(self.rng.randrange(seq.num_tokens + 1))

    def pin(self, seq: kvmem.Sequence) -> None:
        with suppress(SpecError):  # not all of it could be found again
            seq.pin()


def really_fits(alloc: kvmem.Allocator, n: int) -> bool:
    try:
        with alloc.sequence() as probe:
            return probe.try_extend(n)
    except kvmem.OutOfMemory:  # no place
        return False


@pytest.mark.parametrize("name", SPECS)
def test_what_is_said_to_fit_does(name: str, backend: str, rng: random.Random) -> None:
    spec, answers = SPECS[name], {True: 0, False: 0}
    loop = Steps(60 if LONG else 9)
    while run := loop.next(min(answers.values()) > 10):
        pins = run % 3 == 2
        alloc = draw(rng, spec, backend)
        traffic = Traffic(rng, alloc, pins)
        for _ in range(30):
            traffic.step()
            most = alloc.free_tokens()
            n = min(MOST + 1, max(0, rng.choice([0, 1, 8, rng.randrange(1, MOST), most, most * 9 // 10, most // 2])))
            before, counted, said = alloc.core.digest(), alloc.stats(), alloc.can_fit(n)
            assert (alloc.core.digest(), alloc.stats()) == (before, counted), "a question has changed something"
            did = n <= MOST and really_fits(alloc, n)
            assert said == did, f"{n} tokens, run {run}"
            assert n <= most or not did, f"{n} tokens where there was room for {most}"
            answers[did] += 1
        assert alloc.check() == []


def test_by_hand(backend: str) -> None:
    """8 tokens of 256 bytes are a block, of which a page holds two."""
    alloc = kvmem.Allocator(
        SPECS["plain"], backend=backend, device="meta", memory=8 * PAGE, page_bytes=PAGE, max_sequences=2, max_tokens=MOST
    )  # type: ignore[arg-type]  # fmt: skip
    assert alloc.free_tokens() == 128
    assert alloc.can_fit(128) and not alloc.can_fit(129) and alloc.can_fit(0)
    first = alloc.sequence()
    first.extend(40)  # two pages and a half, of which the rest is another's on the paged backend alone
    assert alloc.free_tokens() == {"virtual": 80, "paged": 88}[backend]
    assert alloc.can_fit(80) and alloc.can_fit(88) == (backend == "paged")
    second = alloc.sequence()
    assert not alloc.can_fit(1), "no place"
    first.commit(list(range(40))), first.free(), second.free()
    assert alloc.stats().cached_blocks == 5
    assert alloc.free_tokens() == 128 and alloc.can_fit(128), "what is cached can be given up"
    assert alloc.stats().cached_blocks == 5, "and was not"


def test_beyond_the_longest_and_what_is_no_count(backend: str) -> None:
    alloc = make_allocator(plain(16), backend, max_tokens=100, memory="4MiB")
    assert alloc.free_tokens() > 100 and alloc.can_fit(100) and not alloc.can_fit(101)
    assert alloc.can_fit(np.int64(100))  # type: ignore[arg-type]
    bad: list[object] = [-1, 1.0, "1", None, True]
    for n in bad:
        with pytest.raises(SpecError, match="n: got"):
            alloc.can_fit(n)  # type: ignore[arg-type]


def test_a_state_alone_has_no_length(backend: str) -> None:
    alloc = make_allocator(CacheSpec((_state(64),), block_size=8), backend)
    assert alloc.free_tokens() == 2**31 - 1


def test_a_neighbour_in_the_pool(backend: str) -> None:
    pool = kvmem.PagePool(device="meta", memory=10 * PAGE, page_bytes=PAGE)

    def make(**more: Any) -> kvmem.Allocator:
        return kvmem.Allocator(SPECS["plain"], backend=backend, pool=pool, max_sequences=2, max_tokens=MOST, **more)

    mine, other = make(), make(memory=0.5)
    assert other.free_tokens() == 80, "half of the pool"
    with other.sequence() as seq:
        seq.extend(80)
        assert mine.free_tokens() == 80 and mine.can_fit(80) and not mine.can_fit(81)
    assert mine.free_tokens() == 160


@pytest.mark.parametrize("name", SPECS)
def test_what_is_refused_would_not_fit_beside_an_empty_cache_either(
    name: str, backend: str, rng: random.Random
) -> None:
    """Whatever is cached, wherever its blocks lie on the pages of several groups."""
    refused, loop = 0, Steps(100)
    while loop.next(refused > 10):
        with draw(rng, SPECS[name], backend) as alloc:
            texts = [[rng.randrange(3) for _ in range(MOST)] for _ in range(4)]
            live: list[tuple[kvmem.Sequence, list[int]]] = []
            for _ in range(30):
                if live and (len(live) == 6 or rng.random() < 0.5):
                    seq, tokens = live.pop(rng.randrange(len(live)))
                    seq.free()
                    continue
                tokens = rng.choice(texts)[: rng.randrange(1, MOST)]
                seq = alloc.sequence(tokens)
                new = len(tokens) - seq.num_tokens
                if seq.try_extend(new):
                    seq.commit(tokens[seq.num_cached_tokens :])
                    live.append((seq, tokens))
                    continue
                alloc.clear_cache()
                assert not seq.try_extend(new), f"{new} tokens after {seq.num_cached_tokens} fit now"
                refused += 1
                seq.free()
            assert alloc.check() == []
