"""Who waits for whom: long calls let others in, nobody waits with Python's lock in hand, a batch is filled by one thread."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from support_drivers import assert_runs

import kvmem

pytestmark = pytest.mark.core

TOKENS, SEQUENCES = 8_000, 24


@pytest.fixture(autouse=True)
def quick_switches() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(interval)


def spec(block_size: int = 4) -> kvmem.CacheSpec:
    return kvmem.CacheSpec.kv(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32", block_size=block_size)


def filled(backend: str, **more: object) -> kvmem.Allocator:
    """Some 48,000 cached blocks."""
    alloc = kvmem.Allocator(
        spec(), backend=backend, device="meta", memory="64MiB", page_bytes=4096, max_sequences=2 * SEQUENCES,
        max_tokens=TOKENS, **more,
    )  # fmt: skip
    refill(alloc)
    return alloc


@contextmanager
def watched(look: Callable[[], int]) -> Iterator[set[int]]:
    """What another thread sees meanwhile, each time that it gets in."""
    seen: set[int] = set()
    stop, begun = threading.Event(), threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.add(look())
            begun.set()

    thread = threading.Thread(target=watch)
    thread.start()
    assert begun.wait(20)
    try:
        yield seen
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


def refill(alloc: kvmem.Allocator) -> None:
    for i in range(SEQUENCES):
        with alloc.sequence() as seq:
            seq.extend(TOKENS), seq.commit(np.arange(i, i + TOKENS, dtype=np.int32))


def sees_the_middle(alloc: kvmem.Allocator, look: Callable[[], int], call: Callable[[], object]) -> bool:
    """Whether another thread sees the call half done. It must be waiting just then, so it has some tries."""
    for _ in range(30):
        before = look()
        with watched(look) as seen:
            call()
        if any(look() < middle < before for middle in seen):
            return True
        refill(alloc)
    return False


def test_clear_cache_lets_others_in(backend: str) -> None:
    alloc = filled(backend)
    assert sees_the_middle(alloc, lambda: alloc.core.stats().cached_blocks, alloc.clear_cache)
    alloc.clear_cache()
    assert alloc.stats().cached_blocks == 0 and alloc.check() == []
    refill(alloc)
    before = alloc.stats().cached_blocks
    assert alloc.clear_cache() == before > 40_000


@pytest.mark.parametrize("how", ["trim", "set_memory"])
def test_giving_memory_back_lets_others_in(how: str, backend: str) -> None:
    alloc = filled(backend)
    live = alloc.sequence()
    live.extend(4)

    def give_back() -> None:
        if how == "trim":
            alloc.trim()
        else:
            alloc.set_memory("64KiB")
            assert alloc.stats().mapped_bytes <= 64 * 1024 and alloc.check() == []

    def look() -> int:
        return alloc.core.stats().mapped_bytes

    if how == "trim":
        assert sees_the_middle(alloc, look, give_back)
    else:
        for _ in range(30):
            before = look()
            with watched(look) as seen:
                give_back()
            if any(look() < middle < before for middle in seen):
                break
            alloc.set_memory("64MiB")
            refill(alloc)
        else:
            raise AssertionError("set_memory() let nobody in")
    assert alloc.check() == []
    live.commit([1, 2, 3, 4])


def test_set_memory_of_a_shared_pool_lets_others_in() -> None:
    pool = kvmem.PagePool(device="meta", memory="64MiB", page_bytes=4096)
    alloc = kvmem.Allocator(spec(), backend="paged", pool=pool, max_sequences=SEQUENCES, max_tokens=TOKENS)
    for _ in range(30):
        refill(alloc)
        before = pool.mapped_bytes
        with watched(lambda: pool.mapped_bytes) as seen:
            pool.set_memory("64KiB")
        assert pool.budget_bytes == 64 * 1024 and alloc.check() == []
        if any(64 * 1024 < middle < before for middle in seen):
            return
        pool.set_memory("64MiB")
    raise AssertionError("set_memory() let nobody in")


def test_what_live_sequences_hold_is_refused_with_nothing_lost(backend: str) -> None:
    alloc = filled(backend)
    live = alloc.sequence()
    live.extend(TOKENS)
    before = alloc.stats()
    with pytest.raises(kvmem.OutOfMemory):
        alloc.set_memory("64KiB")
    assert alloc.stats() == before and alloc.check() == []


def test_two_that_clear_and_one_that_fills(backend: str) -> None:
    """Calls in pieces give way to each other, and end though somebody always caches more."""
    alloc = filled(backend)
    with watched(alloc.clear_cache), watched(alloc.trim):
        for i in range(40):
            with alloc.sequence() as seq:
                seq.extend(TOKENS), seq.commit(np.arange(i, i + TOKENS, dtype=np.int32))
    alloc.clear_cache()
    assert alloc.stats().cached_blocks == 0 and alloc.check() == []


def getters(alloc: kvmem.Allocator, seq: kvmem.Sequence) -> dict[str, Callable[[], object]]:
    core, one, out = alloc.core, np.array([seq.id], np.int32), np.zeros(1, np.int64)
    return {
        "num_tokens": lambda: seq.num_tokens, "committed": lambda: seq.num_committed_tokens,
        "first_token": lambda: core.first_token(seq.id), "row": lambda: core.row(seq.id), "batch": lambda: alloc.batch([seq]),
        "lengths": lambda: core.lengths(one, 0, out, out), "table": lambda: core.table(seq.id, 0),
        "pool": lambda: alloc.pool.mapped_bytes, "take_ops": core.take_ops, "events": alloc.events, "extend": lambda: seq.extend(0),
        "commit": lambda: seq.commit([]), "is_live": lambda: core.is_live(seq.id),
    }  # fmt: skip


def test_nobody_waits_for_the_pool_with_pythons_lock() -> None:
    """While one thread is in check(), which nobody gets into, another asks; a third, which never calls kvmem, goes on."""
    alloc = filled("paged", events=8)
    seq = alloc.sequence()
    counted, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            counted[0] += 1

    counter = threading.Thread(target=count)
    counter.start()
    try:
        for name, ask in getters(alloc, seq).items():
            for _ in range(50):
                checking = threading.Thread(target=alloc.check)
                checking.start()
                most = 0
                while checking.is_alive():
                    before = counted[0]
                    ask()
                    most = max(most, counted[0] - before)
                checking.join()
                if most > 30_000:  # far more than the other thread counts in its turn between two looks
                    break
            else:
                raise AssertionError(f"{name} kept Python's lock while it waited for the pool")
    finally:
        stop.set()
        counter.join()


def test_a_batch_is_filled_by_one_thread_at_a_time() -> None:
    alloc = filled("paged")
    seq = alloc.sequence()
    seq.extend(1)
    batch, ids = alloc.make_batch(max_sequences=1, max_new_tokens=1), np.array([seq.id], np.int32)
    refused = [0]

    def fill() -> None:
        for _ in range(20_000):
            if refused[0]:
                return
            try:
                alloc.fill(ids, batch)
            except kvmem.SpecError as error:
                assert "another thread is filling it" in str(error)
                refused[0] += 1

    with watched(lambda: len(alloc.check())):
        threads = [threading.Thread(target=fill) for _ in range(2)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert refused[0] > 0, "the threads never met"
    alloc.fill(ids, batch)
    assert batch.seq_lens.tolist() == [1]


def test_a_body_that_frees_its_sequence_or_fails() -> None:
    alloc = kvmem.Allocator(spec(), memory="1MiB", max_sequences=2, max_tokens=64)
    with alloc.sequence() as seq:
        seq.free()
    with pytest.raises(ZeroDivisionError), alloc.sequence() as seq:
        seq.free()
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), alloc.sequence() as seq:
        raise ZeroDivisionError
    assert alloc.core.handles() == []


def test_daemon_threads_at_the_end_of_the_interpreter() -> None:
    """They wait in the core, or come back from it, when Python is going: the process ends with 0, and without a word.
    Not so in torch, whose own calls end the process then; so this makes no tensors."""
    for _ in range(2):
        out = assert_runs(
            """
import threading, time
import kvmem
spec = kvmem.CacheSpec.kv(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32", block_size=4)
alloc = kvmem.Allocator(spec, backend="paged", memory="4MiB", page_bytes=4096, max_sequences=32, max_tokens=800, events=500)
def busy():
    while True:
        with alloc.sequence(list(range(50))) as seq:
            seq.extend(300), seq.commit([1] * (seq.num_tokens - seq.num_committed_tokens))
        alloc.clear_cache(), alloc.trim(), alloc.events(restart=True), alloc.stats()
for _ in range(4): threading.Thread(target=busy, daemon=True).start()
time.sleep(0.1)
"""
        )
        assert out == ""
