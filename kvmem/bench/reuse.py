"""Which share of a trace's prompts a cache of a given size finds again, by eviction policy, beside the best possible.

The requests run one after the other through a real `Allocator` whose device has metadata only (``device="meta"``). A
prefix block of the trace is one block of one token here, and one page. A request's hits are its leading run of cached
blocks; the blocks that it reads are cached afterwards, those that it wrote are not.
"""

from __future__ import annotations

import heapq
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmem import Allocator, CacheSpec, _core
from kvmem.bench.model import BACKENDS
from kvmem.bench.text import BenchError, Progress
from kvmem.bench.traces import Trace
from kvmem.tiers import Tiers

UNLIMITED = "unlimited"
PAGE_BYTES = 4096  # the smallest page, and one token of the spec below
_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # of the distinct blocks: the default capacities


@dataclass(frozen=True)
class ReuseRow:
    """One replay.

    ``capacity``: in blocks of the trace, or ``"unlimited"``. ``hit_rate``: ``hits`` of all ``blocks`` read.
    ``belady_hit_rate``: the best possible at this capacity; ``share_of_belady``: ``hit_rate`` of that. ``seconds``: of
    the replay, all of the allocator's work included. ``evicted_blocks``: how often a block was evicted.
    """

    policy: str
    capacity: int | str
    hit_rate: float
    hits: int
    blocks: int
    belady_hit_rate: float
    share_of_belady: float
    evicted_blocks: int
    seconds: float


@dataclass(frozen=True)
class TierReplayRow:
    """A trace replayed on a device of metadata. Counts are of the blocks of prompts: ``hits`` are those found, of them
    ``host_hits`` in host memory. ``one_cache_hits``: what a device as large as both finds under the device's policy.
    """

    backend: str
    device_policy: str
    host_policy: str
    device_blocks: int
    host_blocks: int
    blocks: int
    hits: int
    host_hits: int
    one_cache_hits: int
    share: float
    seconds: float
    goal: float = 0.97


@dataclass(frozen=True)
class Workload:
    """A trace's requests as block ids that count from 0: int32 arrays, none empty."""

    trace: Trace
    requests: tuple[npt.NDArray[np.int32], ...]
    blocks: int
    distinct: int

    @classmethod
    def of(cls, trace: Trace) -> Workload:
        """Raises `BenchError` where the trace does not say which prompts begin alike."""
        if trace.prefix_ids is None or trace.prefix_offsets is None:
            raise BenchError(
                f"{trace.name}: a trace of format {trace.format} has lengths only; `reuse` needs to know which blocks "
                "are the same (`hash_ids`): give a Mooncake or Qwen-Bailian trace"
            )
        if not len(trace.prefix_ids):
            raise BenchError(f"{trace.name}: no request names a block in `hash_ids`; there is nothing to find again")
        distinct, ids = np.unique(trace.prefix_ids, return_inverse=True)
        parts = np.split(ids.astype(np.int32), trace.prefix_offsets[1:-1])
        return cls(trace, tuple(part for part in parts if len(part)), len(ids), len(distinct))

    @property
    def longest(self) -> int:
        """Blocks of the longest request: the smallest capacity that holds every one whole."""
        return max(map(len, self.requests))

    @property
    def facts(self) -> dict[str, Any]:
        """Of the trace, for a document."""
        trace = self.trace
        return {"name": trace.name, "format": trace.format, "requests": trace.num_requests, "blocks": self.blocks,
                "distinct_blocks": self.distinct, "block_tokens": trace.prefix_block_tokens}  # fmt: skip


def default_policy() -> str:
    """An `Allocator`'s eviction policy if none is given."""
    return str(inspect.signature(Allocator).parameters["policy"].default)


def parse_policies(text: str | None) -> tuple[str, ...]:
    """``"lru,density"``; None: all policies. Raises `BenchError` for a name that is none."""
    known = _core.eviction_policy_names()
    names = known if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise BenchError(f"--policy: no eviction policy is called {name!r}; there are: {', '.join(known)}")
    return tuple(dict.fromkeys(names))


def parse_capacities(text: str | None, workload: Workload) -> tuple[int | str, ...]:
    """``"1000,5000,unlimited"``; None: shares of the distinct blocks. Raises `BenchError` for what is no number."""
    if text is None:
        shares = {max(workload.longest, round(share * workload.distinct)) for share in _SHARES}
        return (*sorted(shares), UNLIMITED)
    return tuple(dict.fromkeys(_capacity(word.strip()) for word in text.split(",")))


def _capacity(word: str) -> int | str:
    if word == UNLIMITED:
        return UNLIMITED
    blocks = int(word) if word.isascii() and word.isdigit() else 0
    if not 0 < blocks < 1 << 31:
        raise BenchError(f"--capacity: {word!r} is no number of blocks; give numbers from 1 on, or {UNLIMITED!r}")
    return blocks


def replay(
    workload: Workload, policies: Sequence[str], capacities: Sequence[int | str],
    progress: Progress = lambda done: None,
) -> list[ReuseRow]:  # fmt: skip
    """Every policy at every capacity. ``progress`` gets how many of them are done. About 3 us a block and replay."""
    best = Belady([ids.tolist() for ids in workload.requests])
    rows: list[ReuseRow] = []
    for capacity in capacities:
        # Not the distinct ones: a trace may give one id to blocks that continue different prefixes.
        blocks = workload.blocks if isinstance(capacity, str) else capacity
        belady = best.hits(blocks)
        for policy in policies:
            begin = perf_counter()
            hits, evicted = run(workload.requests, policy, blocks)
            row = ReuseRow(
                policy, capacity, hits / workload.blocks, hits, workload.blocks, belady / workload.blocks,
                share_of_belady=hits / belady if belady else 1.0, evicted_blocks=evicted,
                seconds=perf_counter() - begin,
            )  # fmt: skip
            rows.append(row)
            progress(len(rows))
    return rows


def run(requests: Sequence[npt.NDArray[np.int32]], policy: str, capacity: int) -> tuple[int, int]:
    """Serves ``requests`` one after the other with ``capacity`` blocks of memory; hits and evicted blocks.

    Of a longer request, only the first ``capacity`` blocks are read and cached.
    """
    with open_cache(policy, capacity, longest=max(map(len, requests))) as allocator:
        return serve(requests, capacity, allocator), allocator.stats().evicted_blocks


def open_cache(policy: str, capacity: int, *, longest: int, **options: Any) -> Allocator:
    """An allocator on a device of ``capacity`` blocks, for requests of at most ``longest`` blocks."""
    return Allocator(
        CacheSpec.kv(num_layers=1, num_kv_heads=1, head_dim=512, dtype="float32", block_size=1), device="meta",
        memory=capacity * PAGE_BYTES, page_bytes=PAGE_BYTES, max_sequences=1, max_tokens=1 + min(capacity, longest),
        policy=policy, **({"backend": "paged"} | options),
    )  # fmt: skip


def serve(requests: Sequence[npt.NDArray[np.int32]], capacity: int, allocator: Allocator) -> int:
    """Hits of ``requests``, of each its first ``capacity`` blocks, one after the other."""
    hits = 0
    for ids in (request[:capacity] for request in requests):
        sequence = allocator.sequence(np.append(ids, 0))  # one token more, since a match never includes the last one
        found = sequence.num_cached_tokens
        sequence.extend(len(ids) - found)
        sequence.commit(ids[found:])
        sequence.free()
        hits += found
    return hits


def replay_tiers(
    workload: Workload, device_blocks: int, host_blocks: int, progress: Progress = lambda done: None
) -> list[TierReplayRow]:
    """Every policy of the device with every one of host memory, on both backends.

    REQUIRES: the device holds the longest request. About 10 us a block and replay.
    """
    rows: list[TierReplayRow] = []
    both, policies = device_blocks + host_blocks, _core.eviction_policy_names()
    for backend, policy in product(BACKENDS, policies):
        # A row for each block: each may end another prompt (virtual).
        cache = partial(open_cache, policy, longest=workload.longest, backend=backend, cached_rows=both)
        with cache(both) as alone:
            one_cache = serve(workload.requests, workload.longest, alone)
        for of_host in policies:
            begin = perf_counter()
            with cache(device_blocks, tiers=Tiers(host=host_blocks * PAGE_BYTES, policy=of_host)) as allocator:
                hits = serve(workload.requests, workload.longest, allocator)
                host_hits = allocator.tiering.counters["host"]
            rows.append(TierReplayRow(
                backend, policy, of_host, device_blocks, host_blocks, workload.blocks, hits, host_hits, one_cache,
                hits / one_cache if one_cache else 1.0, perf_counter() - begin,
            ))  # fmt: skip
            progress(len(rows))
    return rows


class Belady:
    """The best hit rate a cache of prefix blocks can have when the future is known (Belady, IBM Systems Journal 1966):
    for a list of requests, each the ids of its blocks from the first on.

    The block whose next use lies farthest ahead is evicted first, the deepest of those that the same request uses next,
    so that whole prefixes stay; a block that is never used again is not cached.
    """

    def __init__(self, requests: Sequence[Sequence[int]]) -> None:
        self.requests, self.never = requests, len(requests)
        later: dict[int, int] = {}  # block -> the next request that uses it
        self._next_use: list[list[int]] = []
        for index in range(len(requests) - 1, -1, -1):
            self._next_use.append([later.get(block, self.never) for block in requests[index]])
            later.update(dict.fromkeys(requests[index], index))
        self._next_use.reverse()

    def hits(self, capacity: int) -> int:
        """Blocks found, summed over all requests: each one's leading run of cached blocks. About 2 us a block."""
        cached: dict[int, int] = {}  # block -> its next use
        farthest: list[tuple[int, int, int]] = []  # a heap; entries with an outdated next use are ignored
        hits = 0
        for blocks, next_uses in zip(self.requests, self._next_use, strict=True):
            for block in blocks:
                if block not in cached:
                    break
                hits += 1
            for depth, (block, use) in enumerate(zip(blocks, next_uses, strict=True)):
                if use == self.never:
                    cached.pop(block, None)
                else:
                    cached[block] = use
                    heapq.heappush(farthest, (-use, -depth, block))
            while len(cached) > capacity:
                use, _, block = heapq.heappop(farthest)
                if cached.get(block) == -use:
                    del cached[block]
        return hits
