"""``Allocator.prefetch``: what it touches after the memory has changed, that it changes nothing, and blocks of tiers."""

from __future__ import annotations

import random
import threading
from collections import Counter
from typing import Any

import dict_tier
import numpy as np
import pytest
import torch
from prefetch_world import BLOCK, LAYERS, bytes_in_order, grow, make

import kvmem
from kvmem import DeviceError, SpecError, StaleHandle, _core
from kvmem.allocator.prefetch import Ranges, ReadSet, Window
from kvmem.kernels import reference
from kvmem.plan import prefetch
from kvmem.tiers import Identity, Tiers

ENOUGH: dict[str, Any] = dict(window_seconds=1, bytes_per_second=1 << 40, budget_bytes="1GiB")


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The addresses of all bytes that a cache was asked for."""
    found: list[int] = []

    def record(table: Any, state: Any) -> None:
        found.extend(bytes_in_order(Ranges(table)))
        state[0] = len(found)

    monkeypatch.setattr(_core, "prefetch_lines", record)
    return found


def by_sequence(reads: ReadSet) -> dict[int, Counter[int]]:
    return {
        handle: Counter(bytes_in_order(Ranges(reads.rows[reads.where[:, 1] == handle])))
        for handle in set(reads.where[:, 1].tolist())
    }


def change(alloc: kvmem.Allocator, live: list[kvmem.Sequence], rng: random.Random) -> None:
    """Free, cut, grow, fork and open sequences, and take memory away."""
    for _ in range(rng.randrange(1, 12)):
        call, one = rng.randrange(7), rng.choice(live)
        if call == 0 and len(live) > 1:
            live.remove(one)
            one.free()
        elif call == 1 and alloc.spec.groups[0].window_tokens is None:
            one.truncate(rng.randrange(one.num_tokens + 1))
        elif call in (2, 3) and one.num_tokens < 300:
            if one.num_tokens > one.num_committed_tokens:
                one.commit(count=one.num_tokens - one.num_committed_tokens)
            grow(one, rng.randrange(1, 40), rng)
        elif call == 4 and len(live) < 10:
            live.append(one.fork() if rng.random() < 0.5 else alloc.sequence([rng.randrange(1000) for _ in range(9)]))
        elif call == 5:
            alloc.trim()
        else:
            alloc.clear_cache()


@pytest.mark.parametrize("interleave", ["all", "none"])
@pytest.mark.parametrize("window", [None, 23])
def test_what_changed_since_the_plan_is_not_touched(
    backend: str, interleave: Any, window: int | None, rng: random.Random, touched: list[int]
) -> None:
    """Touched is what was planned for a sequence, and is still read by that sequence: no more, and no less."""
    driver, gone = _core.CheckedDriver(_core.host_driver()), 0
    alloc = make(backend, interleave, window, driver=driver)
    live = [alloc.sequence() for _ in range(4)]
    for sequence in live:
        grow(sequence, rng.randrange(1, 120), rng)
    for _ in range(25):
        named = rng.sample(live, rng.randrange(1, len(live) + 1))
        planned = alloc.read_set(1, named)
        (item,) = prefetch([planned], **ENOUGH | {"budget_bytes": rng.choice([1 << 30, planned.num_bytes // 2])})
        change(alloc, live, rng)
        expected = Counter[int]()
        for handle, theirs in by_sequence(item.parts[0] if item.parts else planned.cut(0)).items():  # type: ignore[arg-type]
            if handle in [s.id for s in live]:
                expected += theirs & Counter(bytes_in_order(alloc.read_set(1, [handle])))
        touched.clear()
        under_way = alloc.prefetch(item)
        assert under_way.wait(60) and Counter(touched) == expected
        assert under_way.skipped_bytes == item.num_bytes - len(touched)
        gone += under_way.skipped_bytes
        for at in touched:
            driver.touch(at, 1)  # mapped
    assert gone > 0


def test_a_block_that_another_sequence_of_the_plan_has_now(touched: list[int]) -> None:
    """Its address is in the plan, and its new owner reads it, but not as what was planned."""
    alloc = make("paged", prefix_cache=False)
    first, second = alloc.sequence(), alloc.sequence()
    grow(first, 8 * BLOCK, random.Random(1))
    grow(second, BLOCK, random.Random(2))
    reads = alloc.read_set(0, [first, second])
    planned = by_sequence(reads)
    (item,) = prefetch([reads], **ENOUGH)
    first.truncate(0)
    grow(second, 8 * BLOCK, random.Random(3))
    assert set(planned[first.id]) & set(bytes_in_order(alloc.read_set(0, [second])))
    assert alloc.prefetch(item).wait(60)
    assert Counter(touched) == planned[second.id]


def test_a_row_that_is_unmapped_is_not_touched(touched: list[int]) -> None:
    driver = _core.CheckedDriver(_core.host_driver())
    alloc = make("virtual", prefix_cache=False, driver=driver)
    first, second = alloc.sequence(), alloc.sequence()
    for sequence in (first, second):
        grow(sequence, 200, random.Random(1))
    reads = alloc.read_set(0, [first, second])
    (item,) = prefetch([reads], **ENOUGH)
    first.free()
    alloc.trim()
    with pytest.raises(DeviceError):
        driver.touch(int(reads.rows[0, 0]), 1)
    under_way = alloc.prefetch(item)
    assert under_way.wait(60) and under_way.skipped_bytes == reads.num_bytes // 2 == len(touched)


def test_results_are_the_same_on_off_and_cancelled(backend: str, rng: random.Random) -> None:
    alloc = make(backend)
    sequences = [alloc.sequence() for _ in range(4)]
    for sequence in sequences:
        grow(sequence, rng.randrange(20, 120), rng)
        sequence.extend(1)
    batch = alloc.batch(sequences)
    for layer in range(LAYERS):
        for cache in alloc.kv(layer):
            ids = batch.kv_indices.long()
            cache[ids] = torch.randn(len(ids), *cache.shape[1:])
    q = torch.randn(batch.num_new_tokens, 2, 4)
    off = [reference.sdpa(q, alloc.kv(layer), batch) for layer in range(LAYERS)]
    weights = [torch.randn(1 << 20) for _ in range(LAYERS)]
    items = prefetch([alloc.read_set(i, batch) for i in range(LAYERS)], extra=weights, **ENOUGH)
    digest = alloc.core.digest()
    for cancelled in (False, True):
        for layer, item in enumerate(items):
            under_way = alloc.prefetch(item)
            if cancelled:
                under_way.cancel()
            assert torch.equal(reference.sdpa(q, alloc.kv(layer), batch), off[layer])
            assert under_way.wait(60)
            assert under_way.issued_bytes == item.num_bytes or cancelled
            assert under_way.issued_bytes <= item.num_bytes and under_way.skipped_bytes == 0
    assert alloc.core.digest() == digest and alloc.check() == []


def test_other_threads_change_the_tables_meanwhile(backend: str, touched: list[int], rng: random.Random) -> None:
    """Whatever they do, nothing raises, and no byte is touched that was not planned."""
    alloc, stop = make(backend), threading.Event()
    sequence = alloc.sequence()
    grow(sequence, 50, rng)

    def churn() -> None:
        while not stop.is_set():
            with sequence.fork() as other:
                grow(other, 30, random.Random(1))

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(100):
            touched.clear()
            other = sequence.fork()
            reads = alloc.read_set(1, [other, sequence])
            (item,) = prefetch([reads], **ENOUGH)
            other.free()
            under_way = alloc.prefetch(item)
            assert under_way.wait(60) and set(touched) <= set(bytes_in_order(reads))
    finally:
        stop.set()
        thread.join()


def test_a_plan_of_a_changing_table_ends(backend: str, monkeypatch: pytest.MonkeyPatch, touched: list[int]) -> None:
    """A table that changes at every look is left alone."""
    alloc = make(backend)
    sequence = alloc.sequence()
    grow(sequence, 50, random.Random(1))
    (item,) = prefetch([alloc.read_set(1, [sequence])], **ENOUGH)
    look = alloc._intersection

    def looked(*args: Any) -> Any:
        alloc.sequence().free()
        return look(*args)

    alloc.sequence().free()
    monkeypatch.setattr(alloc, "_intersection", looked)
    assert alloc.prefetch(item).skipped_bytes == item.num_bytes and touched == []


@pytest.mark.core
def test_the_native_call_stops_where_it_is_told() -> None:
    data = np.zeros(1 << 16, np.uint8)
    at = data.ctypes.data
    table = np.array([[at + 5, 1000, 1, 1000], [at + 2000, 48, 100, 96], [at + 20_000, 40_000, 1, 40_000]], np.int64)
    total = 1000 + 4800 + 40_000
    for most in (0, 1, 999, 1000, 1030, 5800, 5801, total, total + 1):
        state = np.array([0, most], np.int64)
        _core.prefetch_lines(table, state)
        assert state[0] == min(most, total)
    state = np.array([0, 2**63 - 1], np.int64)
    _core.prefetch_lines(np.array([[0, 100, 10, 1 << 40], [1 << 62, 1, 1, 1]], np.int64), state)  # nothing is there
    assert state[0] == 1001
    with pytest.raises(TypeError):
        _core.prefetch_lines(table[:, :3], state)


def test_bad_input(backend: str) -> None:
    alloc, other = make(backend), make(backend)
    sequence = alloc.sequence()
    grow(sequence, 9, random.Random(0))
    (item,) = prefetch([alloc.read_set(0, [sequence])], **ENOUGH)
    with pytest.raises(SpecError, match="another allocator"):
        other.prefetch(item)
    with pytest.raises(SpecError, match="no streams"):
        alloc.prefetch(item, 5)
    with pytest.raises(SpecError, match="a stream is for a window"):
        alloc.prefetch([1, 2], 5)  # type: ignore[call-overload]
    with pytest.raises(SpecError, match="no tiers"):
        alloc.block_set([1, 2], to="host")
    (elsewhere,) = prefetch([torch.empty(5, device="meta")], **ENOUGH)
    with pytest.raises(SpecError, match="on meta"):
        alloc.prefetch(elsewhere)
    nothing = alloc.prefetch(Window((), item.seconds, 0, 0))
    assert nothing.done() and nothing.issued_bytes == nothing.num_bytes == 0
    nothing.cancel()
    with pytest.raises(DeviceError):
        make(backend, device="meta").read_set(0, [])
    alloc.close()
    with pytest.raises(StaleHandle):
        alloc.prefetch(item)


# ---- Blocks of tiers -------------------------------------------------------------------------------------------------


def with_tiers(backend: str, lower: list[Any], host: int = 1 << 20) -> kvmem.Allocator:
    return make(backend, prefix_cache=True, tiers=Tiers(host=host, lower=lower, identity=Identity("model")))


def filled(alloc: kvmem.Allocator, prompt: list[int]) -> dict[str, bytes]:
    """Compute a prompt; return the bytes of its K and V, by layer and component."""
    with alloc.sequence(prompt) as sequence:
        sequence.extend(len(prompt) - sequence.num_tokens)
        batch = alloc.batch([sequence])
        for layer in range(LAYERS):
            for cache in alloc.kv(layer):
                ids = batch.kv_indices.long()
                cache[ids] = torch.randn(len(ids), *cache.shape[1:])
        sequence.commit(prompt[sequence.num_committed_tokens :])
        return contents(sequence)


def contents(sequence: kvmem.Sequence) -> dict[str, bytes]:
    return {
        f"{layer}{i}": sequence.kv(layer)[i][: 12 * BLOCK].clone().numpy().tobytes()
        for layer in range(LAYERS)
        for i in (0, 1)
    }


def test_blocks_go_up_window_by_window(backend: str) -> None:
    """From a lower tier to host memory, and on to the device; what is found then is what was written."""
    tier, prompt = dict_tier.DictTier(1000, 1 << 20), list(range(12 * BLOCK + 1))
    with with_tiers(backend, [tier]) as writer:
        written = filled(writer, prompt)
        assert writer.store(prompt) == 12 and writer.flush(60)
    with with_tiers(backend, [tier]) as alloc:
        up = alloc.block_set(prompt, to="host")
        block = up.num_bytes // 12
        assert up.num_blocks == 12 and alloc.block_set(prompt, to="device").num_bytes == 0
        items = prefetch([up] * 4, window_seconds=1, bytes_per_second=5 * block + 1, budget_bytes="1GiB")
        assert [item.num_bytes // block for item in items] == [5, 5, 2, 0]
        reads = [up, torch.zeros(1)]  # what is read after blocks that do not fit does not take their room
        assert prefetch([reads], **ENOUGH | {"budget_bytes": block + 9})[0].num_bytes == block
        for item, reached in zip(items, (5, 10, 12, 12), strict=True):
            assert alloc.prefetch(item).wait(60)
            assert alloc.block_set(prompt, to="host").num_bytes == (12 - reached) * block
        onward = alloc.block_set(prompt, to="device")
        items = prefetch([onward, onward], window_seconds=1, bytes_per_second=1 << 30, budget_bytes=8 * block)
        assert [item.num_bytes // block for item in items] == [8, 4]
        for item, reached in zip(items, (8, 12), strict=True):
            assert alloc.prefetch(item).done()
            assert alloc.match(prompt).by_tier["device"] == reached * BLOCK
        with alloc.sequence(prompt, load="device") as sequence:
            assert sequence.num_cached_tokens == 12 * BLOCK and contents(sequence) == written
        assert alloc.check() == []


def test_blocks_that_are_cancelled_gone_or_there_already(backend: str) -> None:
    tier, prompt = dict_tier.DictTier(1000, 1 << 20), list(range(6 * BLOCK + 1))
    with with_tiers(backend, [tier]) as writer:
        filled(writer, prompt)
        writer.store(prompt)
        writer.flush(60)
    with with_tiers(backend, [tier]) as alloc:
        up = alloc.block_set(prompt, to="host")
        (item,) = prefetch([up], **ENOUGH)
        under_way = alloc.prefetch(item)
        under_way.cancel()
        assert under_way.wait(60)
        tier.data.clear()
        assert alloc.prefetch(item).wait(60)  # a miss
        with alloc.sequence(prompt) as sequence:
            assert sequence.num_cached_tokens % BLOCK == 0
        filled(alloc, prompt)
        reads = alloc.tiering.counters.total()
        assert alloc.prefetch(item).wait(60) and alloc.tiering.counters.total() == reads
    with make(backend) as plain, pytest.raises(SpecError, match="no tiers"):
        plain.prefetch(item)
