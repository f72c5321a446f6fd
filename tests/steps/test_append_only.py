"""``append_only=True``: for a worker that appends what it is told to tables of its own and never reads an entry again.

No entry that was told becomes another block, except that a window drops it (0); matches end at block edges; the reserved
blocks are never handed out. On the paged backend a worker that writes each token where its table says, and never copies
anything, finds in every live table what was written for exactly these tokens: swapped, shared or reused blocks would show."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
from support_scheduler import SIZE, open_allocator, prompt

from kvmem import CacheSpec, Component, Group, OutOfMemory, SchedulerCache, SpecError, TableChanges
from kvmem.allocator import Allocator

pytestmark = pytest.mark.core

BLOCK, RESERVED = 4, 2


def kv(layer: int, window: int | None = None) -> Group:
    token = Component("kv", width=256, dtype="float32")  # a page of 4 KiB is a block
    return Group(f"group {layer}", (token,), (layer,), window_tokens=window)


SHAPES = {"full": [kv(0)], "full and window": [kv(0), kv(1, 6)], "window": [kv(0, 5)]}


class Worker:
    """Requests that grow over kvmem, tables that are appended to, and what was written where."""

    def __init__(self, shape: str, backend: str, draw: random.Random, **options: Any) -> None:
        spec = CacheSpec(tuple(SHAPES[shape]), block_size=BLOCK)
        pages = draw.choice([10, 16, 40]) * len(SHAPES[shape])
        policy = draw.choice(["lru", "density"])

        def make(**more: Any) -> Allocator:
            return Allocator(
                spec, backend=backend, device="meta", memory=pages * 4096, page_bytes=4096, max_sequences=4, max_tokens=48,
                append_only=True, policy=policy, **more,
            )  # fmt: skip

        allocator, self.make = make(**options), make
        self.allocator, self.cache, self.draw = allocator, SchedulerCache(allocator), draw
        self.writes = backend == "paged"  # virtual: pages of several rows are one, which ids do not show
        self.tables: dict[int, list[list[int]]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.computed: dict[int, int] = {}
        self.memory: dict[tuple[int, int, int], int] = {}  # group, block, offset: the hash of all tokens up to there
        self.next, self.seen = 0, dict.fromkeys(("hits", "doubles", "drops"), 0)

    def hear(self, name: int, changes: TableChanges) -> None:
        for g, table in enumerate(self.tables[name]):
            told = changes.group(g)
            for column, block in zip(told.columns.tolist(), told.blocks.tolist(), strict=True):
                if column == len(table):
                    table.append(block)
                    assert block >= RESERVED or block == 0
                else:  # only a window changes an entry, and only to the null block
                    assert block == 0 and table[column] != 0 and self.allocator.spec.groups[g].window_tokens
                    table[column] = 0
                    self.seen["drops"] += 1

    def begin(self) -> None:
        name, self.next = self.next, self.next + 1
        # Few texts, so that requests compute what is cached already, alone and at the same time.
        text = [self.draw.randrange(2) for _ in range(3)]
        tokens = [text[i // BLOCK % 3] for i in range(self.draw.randrange(1, 25))]
        chunk = self.draw.randrange(len(tokens) + 1)
        blind = self.draw.random() < 0.3  # as a request that may not read the cache, but fills it
        changes = self.cache.allocate(name, chunk, tokens=tokens[:1] if blind else tokens)
        if changes is None:
            return
        self.tables[name] = [[] for _ in self.allocator.spec.groups]
        self.hear(name, changes)
        self.tokens[name], self.computed[name] = tokens, self.cache.num_cached_tokens(name)
        assert self.computed[name] % BLOCK == 0
        self.seen["hits"] += self.computed[name] > 0

    def name(self) -> int | None:
        return self.draw.choice(sorted(self.tables)) if self.tables else None

    def compute(self, name: int) -> None:
        """Write the KV of all tokens that have room, and make up tokens as a model does."""
        room, tokens = self.cache.num_tokens(name), self.tokens[name]
        while len(tokens) < room:
            tokens.append(self.draw.randrange(2))
        for at in range(self.computed[name], room):
            for g, table in enumerate(self.tables[name]):
                self.memory[g, table[at // BLOCK], at % BLOCK] = hash(tuple(tokens[: at + 1]))

    def publish(self, name: int) -> None:
        self.compute(name)
        room, done = self.cache.num_tokens(name), self.computed[name]
        some = self.draw.randrange(done, room + 1)
        self.hear(name, self.cache.publish(name, self.tokens[name][done:some]))
        self.computed[name] = some
        whole = self.tokens[name][: some // BLOCK * BLOCK]
        self.seen["doubles"] += any(
            other != name and self.computed[other] >= len(whole) > 0 and self.tokens[other][: len(whole)] == whole
            and self.tables[other][0][len(whole) // BLOCK - 1] != self.tables[name][0][len(whole) // BLOCK - 1]
            for other in self.tables
        )  # fmt: skip

    def step(self, name: int) -> None:
        self.compute(name)
        room, more = self.cache.num_tokens(name), self.draw.randrange(4)
        if room + more > 48:
            return
        changes = self.cache.step(name, more, self.tokens[name][self.computed[name] : room])
        if changes is None:
            return self.free(name)  # preempted
        self.computed[name] = room
        self.hear(name, changes)

    def grow(self, name: int) -> None:
        more = self.draw.randrange(9)
        if self.cache.num_tokens(name) + more <= 48 and (changes := self.cache.allocate(name, more)) is not None:
            self.hear(name, changes)

    def cut(self, name: int) -> None:
        """Reject draft tokens, which are not published."""
        left = self.draw.randrange(self.computed[name], self.cache.num_tokens(name) + 1)
        self.cache.truncate(name, left)
        del self.tokens[name][max(left, 1) :]
        for table in self.tables[name]:
            del table[-(-left // BLOCK) :]

    def free(self, name: int) -> None:
        self.cache.free(name)
        del self.tables[name], self.tokens[name], self.computed[name]

    def act(self) -> None:
        call = self.draw.choice(
            [self.begin, self.begin, self.publish, self.step, self.step, self.grow, self.cut, self.free]
        )
        if call == self.begin:
            self.begin()
        elif (name := self.name()) is not None:
            call(name)  # type: ignore[call-arg]
        if self.draw.random() < 0.03:
            self.cache.clear_cache()
        if self.draw.random() < 0.05:
            assert self.allocator.compact() == 0 or not self.writes  # moved blocks would be other entries
        self.agrees()

    def agrees(self) -> None:
        for name, tables in self.tables.items():
            for g, table in enumerate(tables):
                assert table == self.cache.block_ids(name, group=g).tolist()
                window = self.allocator.spec.groups[g].window_tokens
                done = self.computed[name]
                for at in range(0 if window is None else max(0, done - window + 1), done if self.writes else 0):
                    assert self.memory[g, table[at // BLOCK], at % BLOCK] == hash(tuple(self.tokens[name][: at + 1]))


@pytest.mark.parametrize("shape", SHAPES)
def test_no_earlier_entry_ever_changes(backend: str, shape: str, seed: int) -> None:
    seen = dict.fromkeys(("hits", "doubles", "drops"), 0)
    for run in range(200 if backend == "paged" else 30):
        worker = Worker(shape, backend, random.Random(f"{seed} {shape} {run}"), debug=run % 20 == 0)
        for _ in range(40):
            worker.act()
        assert worker.allocator.check() == []
        seen = {what: count + worker.seen[what] for what, count in seen.items()}
        worker.cache.free_all(list(worker.cache))
        assert worker.allocator.check() == [] and worker.allocator.stats().num_sequences == 0
        worker.allocator.close()
    assert seen["hits"] > 0 and seen["doubles"] > 0 and (seen["drops"] > 0) == (shape != "full"), seen


def test_a_block_that_is_cached_already_is_kept(backend: str) -> None:
    cache = SchedulerCache(open_allocator(backend, append_only=True))
    tokens = prompt(1, 2, 3)
    for name in "ab":  # at the same time, so neither finds the other
        cache.allocate(name, tokens=tokens)
    mine = cache.block_ids("b").tolist()
    cache.publish("a", tokens)
    assert len(cache.publish("b", tokens)) == 0 and cache.block_ids("b").tolist() == mine
    assert cache.common_prefix_blocks(["a", "b"]) == 0
    cache.allocate("c", tokens=tokens)
    if backend == "paged":  # what was cached first is offered
        assert cache.block_ids("c").tolist()[:2] == cache.block_ids("a").tolist()[:2]
    cache.free_all(["a", "b", "c"])
    assert cache.allocator.stats().cached_blocks == 3 and cache.allocator.check() == []


def test_ranks_that_follow_have_the_same_tables(backend: str, seed: int) -> None:
    for run in range(10):
        worker = Worker("full and window", backend, random.Random(f"{seed} {run}"), record_ops=True)
        follower = worker.make()
        for _ in range(40):
            worker.act()
            follower.apply(worker.allocator.take_ops())
            for name in worker.tables:
                handle = worker.cache.sequence(name).id
                for g in range(2):
                    mine, theirs = (one.core.table(handle, g) for one in (worker.allocator, follower))
                    assert (mine is None and theirs is None) or mine.blocks.tolist() == theirs.blocks.tolist()
        assert follower.check() == []


@pytest.mark.parametrize("others", [1, 2])
def test_who_computed_the_same_offers_its_blocks_when_the_first_ends(others: int) -> None:
    """Or the first one's would be kept beside them, and could not be evicted while they live."""
    cache = SchedulerCache(open_allocator("paged", append_only=True))
    same, names = prompt(1, 2), [f"request {i}" for i in range(1 + others)]
    texts = {name: np.concatenate([same, prompt(3 + i)]) for i, name in enumerate(names)}
    for name, tokens in texts.items():
        cache.allocate(name, tokens=tokens)
    for name, tokens in texts.items():  # so none finds another
        cache.publish(name, tokens)
    tables = {name: cache.block_ids(name).tolist() for name in names}
    for first, second in itertools.pairwise(names):
        cache.free(first)
        assert cache.allocator.check() == [] and cache.block_ids(second).tolist() == tables[second]
        ended = int(first.split()[1]) + 1
        assert cache.allocator.stats().cached_blocks == ended, "only what the others did not compute"
        cache.allocate("new", tokens=prompt(1, 2, 9))
        assert cache.block_ids("new").tolist()[:2] == tables[second][:2]
        cache.free("new")
    cache.free(names[-1])
    assert cache.allocator.stats().cached_blocks == 2 + len(names) and cache.allocator.check() == []


def test_a_request_alone_never_needs_room_for_a_second_copy() -> None:
    """The last block of a prompt is computed again even if it is cached: one token is left to compute. If no request
    reads the cached one, the new one takes its place, or a pool of the request's own size would be too small for ever."""
    cache = SchedulerCache(open_allocator("paged", blocks=2, append_only=True))  # and the two reserved ones, unused
    tokens = prompt(1, 2, 3)
    for _ in range(3):
        assert cache.allocate("a", tokens=tokens) is not None
        cache.publish("a", tokens[cache.num_cached_tokens("a") :])
        assert cache.allocate("a", SIZE) is not None and cache.allocator.stats().cached_blocks == 0
        assert cache.allocator.check() == []
        cache.free("a")
        assert cache.allocator.stats().cached_blocks == 3


def test_matches_end_at_block_edges(backend: str) -> None:
    for whole in (False, True):
        cache = SchedulerCache(open_allocator(backend, append_only=whole))
        tokens = prompt(1, 2, 3)
        cache.allocate("a", tokens=tokens)
        cache.publish("a", tokens)
        for end in (2 * SIZE - 1, 2 * SIZE, 2 * SIZE + 1):
            found = cache.matched_tokens(tokens[:end])
            assert found == ((end - 1) // SIZE * SIZE if whole else end - 1)
        assert cache.allocator.append_only == whole


def test_truncating_into_a_published_block_is_refused(backend: str) -> None:
    cache = SchedulerCache(open_allocator(backend, append_only=True))
    tokens = np.concatenate([prompt(1, 2), prompt(3)[:5]])
    cache.allocate("a", len(tokens) + 9, tokens=tokens)
    cache.publish("a", tokens)
    told = cache.block_ids("a").tolist()
    with pytest.raises(SpecError, match=rf"append_only=True cut at {SIZE} or at {2 * SIZE}"):
        cache.truncate("a", SIZE + 1)
    for left in (2 * SIZE + 7, 2 * SIZE + 2, 2 * SIZE, SIZE, 0):
        cache.truncate("a", left)
        assert cache.block_ids("a").tolist() == told[: -(-left // SIZE)] and cache.allocator.check() == []


@pytest.mark.parametrize("given", [1, "yes", None])
def test_it_is_a_bool(given: Any) -> None:
    with pytest.raises(SpecError, match="append_only"):
        open_allocator("paged", append_only=given)


def test_short_memory_changes_nothing() -> None:
    cache = SchedulerCache(open_allocator("paged", blocks=1, append_only=True))  # and the two reserved ones, unused
    assert cache.allocate("a", tokens=prompt(1, 2)) is not None
    assert cache.allocate("b", tokens=prompt(1, 2)) is None and len(cache) == 1
    with pytest.raises(OutOfMemory):
        cache.sequence("a").extend(5 * SIZE)
    assert cache.allocator.check() == []
