"""A worker that keeps block tables of its own from ``TableChanges`` alone has, after each call, what ``block_ids`` says: in
every group, what windows drop included, on both backends."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support import BACKENDS, LONG, Steps, i32, make_allocator

import kvmem
from kvmem import Component, Group, SchedulerCache, SpecError, TableChanges

pytestmark = pytest.mark.core

SIZE, WIDTH = 4, 128  # tokens of a block, entries of a table


def kv(layer: int, window: int | None = None, **fields: Any) -> Group:
    parts = tuple(Component(part, width=64, dtype="float32") for part in "kv")
    return Group(f"group {layer}", parts, (layer,), window_tokens=window, **fields)


STATE = Group("state", (Component("s", width=64, dtype="float32", growth="fixed"),), (0,))
#: For a window of 1 token to 5 blocks, and another: alone, before and behind full attention, with a state, with blocks
#: of another size.
SHAPES: dict[str, Callable[[int, int], tuple[Group, ...]]] = {
    "window": lambda one, _: (kv(0, one),),
    "full and window": lambda one, _: (kv(0), kv(1, one)),
    "windows first": lambda one, two: (kv(0, one), kv(1, two), kv(2)),
    "state first": lambda one, _: (STATE, kv(1), kv(2, one)),
    "unequal blocks": lambda one, _: (kv(0), kv(1, one, block_size=2)),
    "larger blocks": lambda *_: (
        kv(0),
        kv(1, block_size=6),
    ),  # a unit of 12 that is cached takes the place of all of its blocks
    "full": lambda *_: (kv(0),),
}


def open_cache(groups: tuple[Group, ...], backend: str, **options: Any) -> SchedulerCache:
    options = {"memory": 60 * 4096, "page_bytes": 4096, "max_sequences": 5, "max_tokens": 200} | options
    spec = kvmem.CacheSpec(groups, block_size=SIZE)
    return SchedulerCache(make_allocator(spec, backend, device="meta", **options))


class Worker:
    """Tables of its own, a row for each request, and nothing else to go by."""

    def __init__(self, cache: SchedulerCache) -> None:
        self.cache, self.rows = cache, dict[int, int]()
        self.tables = [np.full((8, WIDTH), -1, np.int32) for _ in cache.allocator.spec.groups]

    def hear(self, changes: TableChanges, names: list[int]) -> None:
        changes = pickle.loads(pickle.dumps(changes))  # it is another process
        told = [changes.group(g) for g in range(len(self.tables))]
        assert [g for g, one in enumerate(told) if one] == list(changes.groups)
        assert sum(map(len, told)) == len(changes)
        for table, one in zip(self.tables, told, strict=True):
            for row, column, block in zip(one.rows.tolist(), one.columns.tolist(), one.blocks.tolist(), strict=True):
                assert table[self.rows[names[row]], column] != block, "told, but it was so before"
                table[self.rows[names[row]], column] = block

    def begin(self, name: int) -> None:
        self.rows[name] = next(row for row in range(8) if row not in self.rows.values())
        for table in self.tables:
            table[self.rows[name]] = -1

    def cut(self, name: int, tokens: int) -> None:
        for table, group in zip(self.tables, self.cache.allocator.spec.groups, strict=True):
            if group.growth == "token":
                table[self.rows[name], -(-tokens // group.block_size) :] = -1

    def agrees(self) -> None:
        for name, row in self.rows.items():
            for g, table in enumerate(self.tables):
                real = self.cache.block_ids(name, group=g)
                assert table[row, : len(real)].tolist() == real.tolist(), (name, g)


class Program:
    """Random calls of a scheduler, what they tell given to a worker."""

    def __init__(self, cache: SchedulerCache, walk: random.Random) -> None:
        self.cache, self.walk, self.worker, self.number = cache, walk, Worker(cache), 0
        self.dropped = self.merged = self.refused = self.adopted = self.quiet = 0
        self.state = any(g.growth == "fixed" for g in cache.allocator.spec.groups)

    def ids(self, start: int, n: int) -> list[int]:
        return [self.walk.randrange(2) if i % (3 * SIZE) == 0 else 7 for i in range(start, start + n)]

    def due(self, name: int) -> list[int]:
        sequence = self.cache.sequence(name)
        return self.ids(sequence.num_committed_tokens, sequence.num_tokens - sequence.num_committed_tokens)

    def hear(self, changes: TableChanges | None, names: list[int], grown: bool = False) -> None:
        if changes is None:
            self.refused += 1
            self.end(self.walk.choice(list(self.cache)))
            return
        self.dropped += bool((changes.blocks == 0).any()) or any((changes.group(g).blocks == 0).any() for g in changes.groups)  # fmt: skip
        self.merged += bool(changes) and not grown
        self.worker.hear(changes, names)

    def end(self, name: int) -> None:
        self.cache.free(name)
        del self.worker.rows[name]

    def begin(self) -> None:
        self.number += 1
        prompt = self.ids(0, self.walk.randrange(90)) if self.walk.random() < 0.9 else None
        count = self.walk.choice([None, 0, 3, 30]) if prompt is not None else self.walk.randrange(9)
        changes = self.cache.allocate(self.number, count, tokens=prompt)
        if changes is None:
            self.refused += 1
        else:
            self.worker.begin(self.number)
            self.hear(changes, [self.number], grown=True)
        if changes is None and len(self.cache):
            self.end(self.walk.choice(list(self.cache)))

    def one(self, name: int) -> None:
        cache, walk, due = self.cache, self.walk, self.due(name)
        kind = walk.choice(
            ["allocate", "publish", "publish", "count", "step", "step", "step", "truncate", "snapshot", "fork"]
        )
        room = 200 - cache.num_tokens(name)
        if kind == "allocate":
            self.hear(cache.allocate(name, min(room, walk.choice([0, 1, 1, 7, 25]))), [name], grown=True)
        elif kind == "publish":
            self.hear(cache.publish(name, due[: walk.choice([len(due), walk.randint(0, len(due))])]), [name])
        elif kind == "count":
            self.hear(cache.publish(name, count=walk.randint(0, len(due))), [name])
        elif kind == "step":
            self.step_of(name, min(room, walk.choice([0, 1, 1, 6])), walk.choice([due, i32(*due), None]))
        elif kind == "truncate":
            keep = walk.randint(walk.choice([0, cache.sequence(name).num_committed_tokens]), cache.num_tokens(name))
            try:
                cache.truncate(name, keep)
            except SpecError:  # its window has moved on
                assert any(g.window_tokens for g in cache.allocator.spec.groups)
            else:
                self.worker.cut(name, keep)
        elif kind == "fork":
            self.fork(name)
        elif self.state:
            try:
                cache.snapshot(name)
            except SpecError:
                assert cache.num_tokens(name) % SIZE or due or kind == "snapshot"

    def step_of(self, name: int, count: int, due: list[int] | np.ndarray | None) -> None:
        """Refused, and nothing has changed; or all is committed, in blocks that others have cached if there are such."""
        cache, seq, before = self.cache, self.cache.sequence(name), self.cache.block_ids(name).tolist()
        done, have = seq.num_committed_tokens, seq.num_tokens
        changes = cache.step(name, count, due)
        if changes is None:
            assert (seq.num_committed_tokens, seq.num_tokens, cache.block_ids(name).tolist()) == (done, have, before)
        else:
            assert seq.num_committed_tokens == have
            self.adopted += bool((changes.columns < len(before) - 1).any())
            self.quiet += not changes
        self.hear(changes, [name], grown=True)

    def fork(self, name: int) -> None:
        try:
            self.cache.sequence(name).fork().free()  # its tail is another's now, and is copied when it grows
        except kvmem.OutOfMemory:
            self.refused += 1

    def many(self) -> None:
        cache, walk = self.cache, self.walk
        names = walk.sample(list(cache), walk.randint(1, len(cache)))
        handles = cache.handles(names)
        if walk.random() < 0.5:
            counts = [min(walk.randrange(9), 200 - cache.num_tokens(name)) for name in names]
            self.hear(cache.allocate_step(handles, i32(*counts)), names, grown=True)
            return
        due = [self.due(name) for name in names]
        given = [ids[: walk.choice([len(ids), walk.randint(0, len(ids))])] for ids in due]
        flat = np.array([token for ids in given for token in ids], np.int32)
        counts = i32(*map(len, given))
        self.hear(cache.publish_step(handles, counts, walk.choice([flat, flat, None])), names)

    def compact(self) -> None:
        """Blocks move, and the worker asks for everything."""
        self.cache.allocator.compact()
        names = list(self.cache)
        for table in self.worker.tables:
            table[:] = -1
        self.worker.hear(self.cache.tables(self.cache.handles(names)), names)

    def step(self) -> None:
        chance, names = self.walk.random(), list(self.cache)
        if chance < 0.15 or not names:
            self.begin()
        elif chance < 0.22:
            self.end(self.walk.choice(names))
        elif chance < 0.4:
            self.many()
        elif chance < 0.42:
            self.compact()
        else:
            self.one(self.walk.choice(names))
        self.worker.agrees()


def all_met(counts: list[int], backend: str, drops: bool) -> bool:
    dropped, merged, refused, adopted, quiet = counts
    sure = refused and quiet and (adopted or backend == "virtual") and (dropped or not drops)
    return bool(sure and (merged or (backend, dropped) == ("virtual", 0)))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_worker_needs_nothing_but_the_changes(backend: str, shape: str, rng: random.Random) -> None:
    counts, names = [0] * 5, ("dropped", "merged", "refused", "adopted", "quiet")
    drops = "window" in shape or shape in ("state first", "unequal blocks")
    loop = Steps(60 if LONG else 4)
    while loop.next(all_met(counts, backend, drops)):
        groups = SHAPES[shape](rng.randint(1, 5 * SIZE), rng.randint(1, 5 * SIZE))
        cache = open_cache(groups, backend, partial_reuse=rng.random() < 0.7)
        program = Program(cache, rng)
        for _ in range(150):
            program.step()
        counts = [n + getattr(program, name) for n, name in zip(counts, names, strict=True)]
        assert cache.allocator.check() == []
    assert drops or not counts[0], "no window, and yet a block was dropped"


def test_without_a_prefix_cache_no_block_becomes_another(backend: str, rng: random.Random) -> None:
    program = Program(open_cache((kv(0),), backend, prefix_cache=False), rng)
    for _ in range(500):
        program.step()
    assert (program.merged, program.adopted) == (0, 0) and program.refused > 0


def test_changes_of_several_groups() -> None:
    """The main group's entries are the fields of the changes themselves, those of any group by its index."""
    for backend in BACKENDS:
        cache = open_cache((kv(0, SIZE), kv(1)), backend)
        began = cache.allocate("a", 3 * SIZE)
        assert began is not None and began.groups == (0, 1) and len(began) == 6
        assert began.columns.tolist() == began.group(0).columns.tolist() == began.group(1).columns.tolist() == [0, 1, 2]
        passed = cache.publish("a", count=3 * SIZE)
        assert passed.groups == (0,) and repr(passed) == "TableChanges([0, 0]: 0, [0, 1]: 0)"
        assert len(passed.group(1)) == 0 and passed.group(0).group(0).columns.tolist() == [0, 1]
        table = np.full((2, 4), 9, np.int32)
        began.group(1).write(table)
        began.write(table, 1)
        passed.write(table, 1)
        assert table[:, :3].tolist() == [cache.block_ids("a", group=g).tolist() for g in (1, 0)]
        assert repr(began.group(1)).startswith("TableChanges([0, 0]: ") and "group 1 [0, 0]: " in repr(began)
        with pytest.raises(SpecError, match="group"):
            began.group(-1)
