"""``Stats.lookup_tokens`` and ``hit_tokens`` count prompts that began, each once: who waits for memory and is tried in every
step counts nothing, whichever call refused it, and why."""

from __future__ import annotations

import random

import numpy as np
import pytest
from support import LONG, Steps, all_windows, i32, make_allocator, plain

import kvmem
from kvmem import SchedulerCache, _core

pytestmark = pytest.mark.core


class Counter:
    """A scheduler cache, and what its statistics should say."""

    def __init__(self, alloc: kvmem.Allocator) -> None:
        self.alloc, self.cache = alloc, SchedulerCache(alloc)
        self.lookups = self.hits = self.refused = self.failed = 0
        self.open: list[kvmem.Sequence] = []

    def began(self, tokens: int, cached: int) -> None:
        self.lookups += max(0, tokens - 1)
        self.hits += cached

    def agree(self) -> None:
        stats = self.alloc.stats()
        assert (stats.lookup_tokens, stats.hit_tokens) == (self.lookups, self.hits)

    def allocate(self, name: int, prompt: list[int], count: int | None) -> None:
        if self.cache.allocate(name, count, tokens=prompt) is None:
            self.refused += 1
            return
        cached = self.cache.num_cached_tokens(name)
        self.began(len(prompt), cached)
        self.cache.publish(name, prompt[cached : self.cache.num_tokens(name)])

    def admit(self, prompts: list[list[int]]) -> None:
        flat = np.array([token for prompt in prompts for token in prompt], np.int32)
        ids, cached = self.alloc.admit_batch(flat, i32(*map(len, prompts)))
        self.refused += len(ids) < len(prompts)
        for handle, found, prompt in zip(ids.tolist(), cached.tolist(), prompts, strict=False):
            self.began(len(prompt), found)
            self.open.append(kvmem.Sequence(self.alloc, handle))
            self.open[-1].commit(prompt[found:])

    def sequence(self, prompt: list[int]) -> None:
        try:
            self.open.append(self.alloc.sequence(prompt))
        except kvmem.OutOfMemory:
            self.refused += 1
            return
        self.began(len(prompt), self.open[-1].num_cached_tokens)


def random_call(counter: Counter, walk: random.Random, number: int, prompts: list[list[int]]) -> None:
    kind, cache = walk.random(), counter.cache
    prompt = walk.choice(prompts) + [walk.randrange(3)] * walk.randrange(9)
    if kind < 0.4:
        counter.allocate(number, prompt, walk.choice([None, None, 0, 9, 200]))
    elif kind < 0.55:
        counter.admit([prompt, *walk.sample(prompts, 2)])
    elif kind < 0.65:
        counter.sequence(prompt)
    elif kind < 0.8 and counter.open:
        counter.open.pop(walk.randrange(len(counter.open))).free()
    elif len(cache):
        cache.free(walk.choice(list(cache)))


@pytest.mark.parametrize("layout", ["plain", "windows"])
def test_only_prompts_that_began_count(backend: str, layout: str, rng: random.Random) -> None:
    """Little memory, few places, and prompts that share starts, also within a block."""
    spec = plain(8) if layout == "plain" else all_windows(8)
    prompts = [[start] * 40 + [rng.randrange(3) for _ in range(rng.randrange(40))] for start in (1, 2, 3) for _ in range(3)]  # fmt: skip
    counter = Counter(make_allocator(spec, backend, device="meta", memory=40 * 4096, page_bytes=4096, max_sequences=6))
    loop = Steps(4000 if LONG else 600)
    while number := loop.next(counter.refused and counter.hits):
        random_call(counter, rng, number, prompts)
        counter.agree()
    assert counter.alloc.check() == []


def test_a_driver_that_fails_counts_nothing(backend: str, seed: int) -> None:
    walk, driver = random.Random(seed), _core.CheckedDriver(_core.host_driver())
    counter = Counter(
        make_allocator(plain(8), backend, driver=driver, memory=40 * 4096, page_bytes=4096, max_sequences=6)
    )
    prompts = [[start] * (30 + n) for n, start in enumerate((1, 2, 3, 1, 2, 3))]
    loop = Steps(400)
    while number := loop.next(counter.failed and counter.refused and counter.hits):
        if walk.random() < 0.6:
            driver.fail("", walk.choice([1, 1, 2, 3, 5]), walk.choice([2, 999]))
        try:
            counter.allocate(number, walk.choice(prompts), walk.choice([None, 9]))
        except (kvmem.DeviceError, kvmem.OutOfMemory):  # of the publishing
            counter.failed += 1
        driver.clear_failures()
        counter.agree()
        if len(counter.cache) > 3:
            counter.cache.free_all(list(counter.cache))
            if walk.random() < 0.5:
                counter.alloc.trim()
