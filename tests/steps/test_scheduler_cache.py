"""SchedulerCache: the same answers as a plain allocator on both backends, None with nothing changed, typed errors."""

from __future__ import annotations

import random
from array import array
from typing import Any

import numpy as np
import pytest
import torch
from support import Steps
from support_scheduler import SIZE, open_allocator, prompt

import kvmem
from kvmem import Allocator, CacheSpec, SchedulerCache, SpecError, StaleHandle, TableChanges

pytestmark = pytest.mark.core


def table_of(allocator: Allocator, sequence: Any) -> list[int]:
    batch = allocator.batch([sequence])
    assert batch.kv_indices_cpu is not None
    return batch.kv_indices_cpu.tolist()


def test_a_request_from_begin_to_end(backend: str) -> None:
    cache = SchedulerCache(open_allocator(backend, events=100))
    tokens = prompt(1, 2, 3)
    assert cache.matched_tokens(tokens) == 0
    began = cache.allocate("a", tokens=tokens)
    assert began is not None and began.blocks.dtype == np.int32 and began.columns.tolist() == [0, 1, 2]
    blocks = began.blocks
    assert blocks.tolist() == cache.block_ids("a").tolist() == table_of(cache.allocator, cache.sequence("a"))
    assert (cache.num_cached_tokens("a"), cache.num_tokens("a"), len(cache), "a" in cache, "b" in cache) == (
        *(0, 3 * SIZE, 1),
        *(True, False),
    )
    cache.publish("a", tokens)
    assert cache.matched_tokens(prompt(1, 2, 4)) == 2 * SIZE
    more = cache.allocate("a", 1)
    assert more is not None and more.blocks.tolist() == cache.block_ids("a")[3:].tolist() and len(more) == 1
    assert (more.rows.tolist(), more.columns.tolist()) == ([0], [3])
    nothing = cache.allocate("a", SIZE - 1)
    assert nothing is not None and len(nothing) == 0

    again = cache.allocate("b", tokens=prompt(1, 2, 4))
    assert again is not None and len(again) == 3 and cache.num_cached_tokens("b") == 2 * SIZE
    if backend == "paged":  # the virtual backend shows shared pages under ids of the other row
        assert again.blocks[:2].tolist() == blocks[:2].tolist()
    assert cache.common_prefix_blocks() == cache.common_prefix_blocks(["a", "b"]) == 2
    assert cache.common_prefix_blocks(["a"]) == 3 and cache.common_prefix_blocks([]) == 0
    used = cache.usage
    assert 0 < used < 1
    cache.truncate("b", 2 * SIZE)
    cache.free("b")
    cache.free("a")
    assert len(cache) == 0 and cache.usage < used
    assert [type(event).__name__ for event in cache.take_events()] == ["BlockStored"]
    assert cache.take_events() == []
    assert cache.matched_tokens(prompt(1, 2, 3, 4)) == 3 * SIZE
    assert cache.clear_cache() == 3 and cache.matched_tokens(tokens) == 0
    assert cache.allocator.check() == []


def test_none_changes_nothing(backend: str) -> None:
    cache = SchedulerCache(open_allocator(backend, blocks=8, max_sequences=2))
    assert cache.allocate("a", tokens=prompt(1, 2, 3, 4, 5)) is not None
    cache.publish("a", prompt(1, 2, 3, 4, 5))

    def state() -> Any:
        stats = cache.allocator.stats()
        return (list(cache), cache.block_ids("a").tolist(), cache.num_tokens("a"), stats.used_bytes,
                stats.num_sequences, cache.matched_tokens(prompt(1, 2, 3, 4, 5, 6)))  # fmt: skip

    before = state()
    assert cache.allocate("b", tokens=prompt(1, 2, 13, 14, 15, 16, 17, 18, 19)) is None
    assert cache.allocate("b", 20 * SIZE) is None
    assert cache.allocate("a", 20 * SIZE) is None
    handles = cache.handles(["a"])
    assert cache.allocate_step(handles, np.array([20 * SIZE], np.int32)) is None
    assert state() == before and "b" not in cache
    assert cache.allocate("b", 1) is not None
    assert cache.allocate("c", 1) is None, "max_sequences are in use"
    cache.free_all(["a", "b"])
    assert len(cache) == 0 and cache.allocator.check() == []


def test_chunks_lookahead_and_sharing_keys(backend: str) -> None:
    cache = SchedulerCache(open_allocator(backend))
    tokens = prompt(1, 2, 3, 4)
    first = cache.allocate("a", SIZE, tokens=tokens, salt="x")
    assert first is not None and len(first) == 1
    cache.publish("a", tokens[:SIZE])
    second = cache.allocate("a", 3 * SIZE)
    assert second is not None and len(second) == 3
    cache.publish("a", tokens[SIZE:])
    assert cache.matched_tokens(prompt(1, 2, 3, 4, 5), salt="x") == 4 * SIZE
    assert cache.matched_tokens(prompt(1, 2, 3, 4, 5)) == 0
    assert cache.matched_tokens(prompt(1, 2, 3, 4, 5), salt="x", extra_key="adapter") == 0
    ahead = cache.allocate("b", SIZE + 3, tokens=prompt(1, 2, 3, 4, 5), salt="x")  # three draft tokens
    assert ahead is not None and len(ahead) == 6 and cache.num_tokens("b") == 5 * SIZE + 3


@pytest.mark.parametrize("step", [False, True], ids=["one request", "a step"])
def test_a_tail_that_others_read_is_copied_and_the_change_told(backend: str, step: bool) -> None:
    """After a truncation into a shared block, and where a request begins with no room of its own."""
    cache = SchedulerCache(open_allocator(backend))
    cache.allocate("a", tokens=prompt(1, 2))
    cache.publish("a", prompt(1, 2))
    cut = cache.allocate("b", 0, tokens=prompt(1, 2))  # half a block of "a" may be its tail
    short = cache.allocate("c", tokens=prompt(1, 2, 3))
    assert cut is not None and short is not None and cache.num_tokens("b") == 2 * SIZE - 1
    cache.truncate("c", SIZE + 5)
    tables = {"b": cut.blocks.tolist(), "c": short.blocks.tolist()[:2]}
    for name, table in tables.items():
        one = np.ones(1, np.int32)
        changes = cache.allocate_step(cache.handles([name]), one) if step else cache.allocate(name, 1)
        assert changes is not None
        for column, block in zip(changes.columns.tolist(), changes.blocks.tolist(), strict=True):
            table[column : column + 1] = [block]
        assert table == cache.block_ids(name).tolist()
    assert tables["b"][1] != tables["c"][1] != cache.block_ids("a")[1] != tables["b"][1]


def test_bad_input_is_refused_and_changes_nothing(backend: str) -> None:
    with pytest.raises(SpecError, match="allocator"):
        SchedulerCache("paged")  # type: ignore[arg-type]
    cache = SchedulerCache(open_allocator(backend))
    cache.allocate("a", tokens=prompt(1))
    with pytest.raises(SpecError, match="has begun"):
        cache.allocate("a", 1, tokens=prompt(1))
    with pytest.raises(SpecError, match="has begun"):
        cache.allocate("a", 1, salt="x")
    with pytest.raises(SpecError, match="count: missing"):
        cache.allocate("a")
    with pytest.raises(SpecError, match="count: missing"):
        cache.allocate("b")
    for bad in (-1, 1.5, True, "3"):
        for request in ("a", "b"):
            with pytest.raises(SpecError):
                cache.allocate(request, bad)  # type: ignore[arg-type]
    with pytest.raises(SpecError):
        cache.allocate("b", tokens=[1, -2])
    with pytest.raises(SpecError, match="most"):
        cache.allocate("b", 10**6)
    with pytest.raises(SpecError):
        cache.publish("a", count=10**6)
    with pytest.raises(SpecError, match="group"):
        cache.block_ids("a", group=1)
    with pytest.raises(SpecError):
        cache.allocate_step(cache.handles(["a"]).astype(np.float32), np.ones(1, np.int32))
    for call in (cache.publish, cache.truncate):
        with pytest.raises(StaleHandle, match="not here"):
            call("b", 1)
    for named in (cache.free, cache.block_ids, cache.num_tokens, cache.num_cached_tokens, cache.sequence):
        with pytest.raises(StaleHandle, match="not here"):
            named("b")
    with pytest.raises(StaleHandle):
        cache.free_all(["a", "b"])
    assert list(cache) == ["a"] and cache.num_tokens("a") == SIZE and cache.allocator.stats().num_sequences == 1


def apply(tables: dict[int, list[int]], names: list[int], changes: TableChanges) -> int:
    for row, column, block in zip(changes.rows, changes.columns, changes.blocks, strict=True):
        assert tables[names[row]][column] != block
        tables[names[row]][column] = int(block)
    return len(changes)


MOST_STEPS = 40_000


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_steps_say_what_a_plain_allocator_does(backend: str, device: str, rng: random.Random) -> None:
    """Random steps on both; tables kept up from the deltas alone are those that the allocator fills. A request begins
    as by ``admit_batch``, with room for its prompt or not at all."""
    options: dict[str, Any] = {"blocks": 40, "device": device, "map_ahead_tokens": 0, "tail_guard_tokens": 0,
                               "max_tokens": 50 * SIZE}  # fmt: skip
    cache, plain = SchedulerCache(open_allocator(backend, **options)), open_allocator(backend, **options)
    tables: dict[int, list[int]] = {}
    written = np.zeros((101 + MOST_STEPS, 60), np.int32)  # the same by write(), request i in row i + 100
    twins: dict[int, int] = {}  # handles
    refused = began_refused = merged = 0
    paged = backend == "paged"
    loop = Steps(400, MOST_STEPS // 400)
    while number := loop.next(refused > began_refused > 0 and (merged or not paged)):
        if len(tables) < 6 and rng.random() < 0.4:
            tokens = prompt(*(rng.randrange(3) for _ in range(rng.randrange(1, 6))))
            assert cache.matched_tokens(tokens) == plain.match(tokens).num_tokens
            blocks = cache.allocate(number, tokens=tokens)
            # sequence() and extend() are two transactions: the hit counts before the room is made, and stays when that fails.
            twin, cached = plain.admit_batch(tokens)
            assert len(twin) == (blocks is not None)
            if blocks is None:
                refused += 1
                began_refused += 1
                continue
            assert cached.tolist() == [cache.num_cached_tokens(number)]
            rest = tokens[cache.num_cached_tokens(number) :]
            tables[number], twins[number] = blocks.blocks.tolist(), int(twin[0])
            blocks.write(written, 100 + number)
            (changes := cache.publish(number, rest)).write(written, 100 + number)
            merged += apply(tables, [number], changes)
            plain.commit_batch(twin, np.array([len(rest)], np.int32), rest)
        elif tables and rng.random() < 0.2:
            gone = rng.choice(list(tables))
            cache.free(gone)
            plain.free_batch(np.array([twins.pop(gone)], np.int32))
            del tables[gone]
        elif tables:
            names = list(tables)
            counts = np.array([rng.randrange(2 * SIZE) for _ in names], np.int32)
            new = cache.allocate_step(cache.handles(names), counts)
            ids = np.array([twins[name] for name in names], np.int32)
            assert plain.try_extend_batch(ids, counts) == (new is not None)
            if new is None:
                refused += 1
                victim = rng.choice(names)
                cache.free(victim)
                plain.free_batch(np.array([twins.pop(victim)], np.int32))
                del tables[victim]
                continue
            for row, column, block in zip(new.rows, new.columns, new.blocks, strict=True):
                assert column == len(tables[names[row]])
                tables[names[row]].append(int(block))
            said = np.array([rng.randrange(5) for _ in range(int(counts.sum()))], np.int32)
            changes = cache.publish_step(cache.handles(names), counts, said)
            merged += apply(tables, names, changes)
            step = np.zeros((3 + len(names), 60), np.int32)
            step[3:] = written[[100 + name for name in names]]
            new.write(step, 3)
            changes.write(step, 3)
            written[[100 + name for name in names]] = step[3:]
            plain.commit_batch(ids, counts, said)
        for name, entries in tables.items():
            assert entries == cache.block_ids(name).tolist() == table_of(cache.allocator, cache.sequence(name))
            assert entries == table_of(plain, twins[name]), "the allocator below decides as if it were called itself"
            assert written[100 + name, : len(entries)].tolist() == entries
    assert paged or not merged
    assert cache.allocator.check() == []
    assert cache.usage == pytest.approx(
        (plain.stats().mapped_bytes - plain.stats().parked_bytes) / plain.stats().budget_bytes
    )


def test_token_ids_of_every_form(backend: str) -> None:
    """What the core reads itself and what is converted for it, within a block and to the end of one."""
    tokens = prompt(1, 2)
    strided = np.repeat(tokens, 2)[::2]
    forms: list[Any] = [tokens, tokens.tolist(), tuple(tokens.tolist()), tokens.astype(np.int64), strided,
                        tokens.astype(">i4"), torch.from_numpy(tokens), array("i", tokens.tolist())]  # fmt: skip
    for form in forms:
        cache = SchedulerCache(open_allocator(backend))
        cache.allocate("a", 2 * SIZE)
        for start, end in ((0, 3), (3, SIZE), (SIZE, SIZE), (SIZE, SIZE + 1), (SIZE + 1, 2 * SIZE)):
            cache.publish("a", form[start:end])
            assert cache.sequence("a").num_committed_tokens == end
        assert cache.matched_tokens(prompt(1, 2, 3)) == 2 * SIZE, type(form)
        assert cache.allocate("a", np.int32(1)) is not None and cache.num_tokens("a") == 2 * SIZE + 1  # type: ignore[arg-type]


def test_what_is_no_token_ids_is_refused(backend: str) -> None:
    cache = SchedulerCache(open_allocator(backend))
    cache.allocate("a", 2 * SIZE)
    cache.publish("a", [1, 2])
    bad: list[Any] = [True, [True], [1, 2.5], [-1], [2**31], np.array([1, -1], np.int32), np.array([1.0]), "ab", b"abcd",
                      None, 3.0, -1, 2**40, np.zeros((1, 1), np.int32), [1] * (2 * SIZE)]  # fmt: skip
    for given in bad:
        with pytest.raises(SpecError):
            cache.publish("a", given)
        with pytest.raises(SpecError):
            cache.sequence("a").commit(given)
    with pytest.raises(SpecError, match=r"publish takes ids, \[1\] for one; a count is publish\(count=1\)"):
        cache.publish("a", 1)  # type: ignore[arg-type]
    for count in (-1, 2**40, 1.0, True, "1", [1]):
        with pytest.raises(SpecError, match="count: got"):
            cache.publish("a", count=count)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="one of them"):
        cache.publish("a", [1], count=1)
    assert cache.sequence("a").num_committed_tokens == 2
    cache.publish("a", [2**31 - 1])
    cache.publish("a", count=1)  # from here on nothing is known
    cache.publish("a", list(range(SIZE - 4)))
    assert cache.matched_tokens([1, 2, 2**31 - 1, *range(SIZE)]) <= 3


def test_every_group_has_a_table(backend: str) -> None:
    config = {"model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
              "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 32, "sliding_window_pattern": 2,
              "layer_types": ["sliding_attention", "full_attention"] * 2}  # fmt: skip
    spec = CacheSpec.from_config(config, dtype="bfloat16", block_size=16)
    allocator = Allocator(spec, backend=backend, device="meta", memory="4MiB", page_bytes=4096, max_sequences=4, max_tokens=512)  # type: ignore[arg-type]  # fmt: skip
    cache = SchedulerCache(allocator)
    cache.allocate("a", 128)
    cache.publish("a", count=128)
    assert cache.allocate("a", 1) is not None
    batch = allocator.batch([cache.sequence("a")])
    for index, group in enumerate(batch.groups):
        assert group.kv_indices_cpu is not None
        assert cache.block_ids("a", group=index).tolist() == group.kv_indices_cpu.tolist()
    assert kvmem.SchedulerCache is SchedulerCache


def test_a_snapshot_at_each_chunk_is_where_others_begin(backend: str) -> None:
    """A model with a recurrent state: three chunks of a prompt, a snapshot behind each, and what others find of it."""
    parts = tuple(kvmem.Component(name, width=8, dtype="float32") for name in "kv")
    state = (kvmem.Component("s", width=8, dtype="float32", growth="fixed"),)
    groups = (kvmem.Group("attention", parts, (0,)), kvmem.Group("state", state, (1,)))
    spec = CacheSpec(groups, block_size=16)
    allocator = Allocator(spec, backend=backend, device="meta", memory=32 * 4096, page_bytes=4096, max_sequences=8, max_tokens=4000)  # type: ignore[arg-type]  # fmt: skip
    cache, ids = SchedulerCache(allocator), list(range(60))
    assert cache.allocate("a", 16, tokens=ids) is not None
    with pytest.raises(SpecError, match="committed"):
        cache.snapshot("a")
    for end in (16, 32, 48):
        cache.publish("a", ids[end - 16 : end])
        assert cache.matched_tokens(ids) == end - 16, "the state of these tokens is not kept yet"
        assert cache.snapshot("a")
        assert cache.matched_tokens(ids) == end
        assert cache.allocate("a", 16) is not None
    assert cache.allocate("b", tokens=ids) is not None and cache.num_cached_tokens("b") == 48
    with pytest.raises(StaleHandle, match="not here"):
        cache.snapshot("c")
    cache.truncate("a", 48)
    cache.publish("a", [])
    with pytest.raises(SpecError, match="more than its 48"):
        cache.snapshot("a")
    assert cache.allocate("a", 16) is not None
    cache.publish("a", list(range(100, 116)))
    while cache.allocate("b", 1) is not None:
        pass  # until nothing is left for a copy
    kept = cache.snapshot("a")
    assert kept == (cache.matched_tokens([*ids[:48], *range(100, 117)]) == 64)
    assert not kept or backend == "paged", "a row needs a page; a block may still have room in one"
    assert allocator.check() == []


def test_usage_in_a_shared_pool_is_of_what_the_allocator_may_have(backend: str) -> None:
    """Its own limit, or what a neighbour's live sequences leave."""
    page = 4096
    spec = CacheSpec.kv(num_layers=1, num_kv_heads=1, head_dim=64, dtype="float32", block_size=8)  # a page each
    pool = kvmem.PagePool(device="cpu", memory=64 * page, page_bytes=page)

    def made(pages: int) -> SchedulerCache:
        alloc = kvmem.Allocator(
            spec, backend=backend, pool=pool, memory=pages * page, max_sequences=70, max_tokens=64, tail_guard_tokens=0
        )
        return SchedulerCache(alloc)

    def fill(cache: SchedulerCache) -> int:
        n = 0
        while cache.allocate(n, 8) is not None:
            n += 1
        return n

    small, large = made(16), made(64)
    assert fill(small) == 16 and small.usage == 1.0
    assert large.usage == 0.0
    assert fill(large) == 48 and large.usage == 1.0
    for request in list(small):
        small.free(request)
    assert small.usage == 0.0 and large.usage == 48 / 64
