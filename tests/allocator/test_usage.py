"""What requests hold, what is only cached, and what is waste: the sums of ``Stats``, and ``SchedulerCache.usage`` as a
promise of what one more request can have."""

from __future__ import annotations

import random

import pytest
from support import LONG, make_allocator

import kvmem
from kvmem import SchedulerCache

pytestmark = pytest.mark.core

PAGE = 4096


def open_cache(backend: str, block_size: int, width: int, pages: int) -> SchedulerCache:
    """A token is 2 * width * 4 bytes."""
    spec = kvmem.CacheSpec.kv(num_layers=1, num_kv_heads=1, head_dim=width, dtype="float32", block_size=block_size)
    options = {"device": "meta", "memory": pages * PAGE, "page_bytes": PAGE, "max_sequences": 80, "max_tokens": 4000}
    return SchedulerCache(make_allocator(spec, backend, **options))


class Ledger:
    """Which blocks hold what, from the tables alone: published whole blocks stay where they were when a request ends."""

    def __init__(self, cache: SchedulerCache, block_bytes: int) -> None:
        self.cache, self.block_bytes = cache, block_bytes
        self.cached: set[int] = set()

    def end(self, name: int) -> None:
        whole = self.cache.sequence(name).num_committed_tokens // self.cache.allocator.spec.block_size
        self.cached |= set(self.cache.block_ids(name)[:whole].tolist())
        self.cache.free(name)

    def pages(self, block: int) -> range:
        return range(block * self.block_bytes // PAGE, -(-(block + 1) * self.block_bytes // PAGE))

    def agrees(self) -> None:
        stats = self.cache.allocator.stats()
        live = {block for name in self.cache for block in self.cache.block_ids(name).tolist()}
        in_use = {page for block in live | {0, 1} for page in self.pages(block)}
        beside = 0
        for block in self.cached - live:
            for page in self.pages(block):
                first, end = (
                    max(block * self.block_bytes, page * PAGE),
                    min((block + 1) * self.block_bytes, (page + 1) * PAGE),
                )
                beside += end - first if page in in_use else 0
        assert stats.cached_beside_bytes == beside
        assert stats.cached_bytes == len(self.cached - live) * self.block_bytes
        trash = stats.held_bytes - len(live) * self.block_bytes
        assert trash in (0, 2 * self.block_bytes), "whole blocks, each once, and the trash blocks if there are any"
        assert stats.mapped_bytes == stats.used_bytes + stats.wasted_bytes + stats.parked_bytes + beside
        tails = len(live) * self.block_bytes - stats.used_bytes
        assert stats.wasted_bytes <= len(in_use) * PAGE - len(live) * self.block_bytes + tails - beside


@pytest.mark.parametrize(("block_size", "width"), [(4, 4), (16, 4), (3, 12), (16, 40), (5, 100)])
def test_cached_beside_live_tokens_is_neither_waste_nor_parked(block_size: int, width: int, rng: random.Random) -> None:
    """Paged: blocks of a fraction of a page, some that straddle two, and of pages; with memory enough to forget nothing."""
    block_bytes = block_size * width * 8
    cache = open_cache("paged", block_size, width, 4000)
    ledger = Ledger(cache, block_bytes)
    for number in range(1500 if LONG else 250):
        if len(cache) == 60 or (len(cache) > 5 and rng.random() < 0.5):
            ledger.end(rng.choice(list(cache)))
        else:
            prompt = [rng.randrange(4)] * rng.randrange(8 * block_size) + [number] * rng.randrange(1, 3 * block_size)
            assert cache.allocate(number, rng.choice([None, len(prompt) + 5]), tokens=prompt) is not None
            ids = prompt[cache.num_cached_tokens(number) : cache.num_tokens(number)]
            cache.publish(number, ids)
        ledger.agrees()
    assert cache.allocator.stats().evicted_blocks == 0 and cache.allocator.stats().cached_beside_bytes > 0
    assert cache.allocator.check() == []


def most(cache: SchedulerCache) -> int:
    """The longest request that is admitted now, by trying; each try forgets what it must."""
    low, high = 0, 4000
    while low < high:
        middle = (low + high + 1) // 2
        if cache.allocate("probe", middle) is None:
            high = middle - 1
        else:
            cache.free("probe")
            low = middle
    return low


def test_usage_says_what_one_more_request_can_have(backend: str, rng: random.Random) -> None:
    """Within a block, or a page, whatever is cached, on whichever pages."""
    token_bytes, unit = 32, 4 * 32 if backend == "paged" else PAGE
    for _ in range(30 if LONG else 6):
        cache = open_cache(backend, 4, 4, 24)
        number = 0
        while len(cache) < 80 and cache.allocate(number, tokens=[number] * rng.randrange(1, 90)) is not None:
            cache.publish(number, [number] * cache.num_tokens(number))
            number += 1
        cache.free_all([name for name in cache if rng.random() < rng.choice([0.5, 0.9])])
        usage, budget = cache.usage, cache.allocator.stats().budget_bytes
        free = round((1 - usage) * budget)
        got = most(cache) * token_bytes
        assert free - unit - 2 * 4 * token_bytes <= got <= free or got == 4000 * token_bytes
        assert 0 <= usage <= 1
        cache.free_all(list(cache))
        assert cache.usage <= 2 * 4 * token_bytes / budget, "trash blocks alone"
