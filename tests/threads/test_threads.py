"""Several Python threads on one allocator, and on two that share a pool; and what the others can do meanwhile."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count

import pytest
import torch
from support import BACKENDS, LONG
from support_world import NOTHING, PAGE, SPECS, World, checked, held, plain_spec

import kvmem
from kvmem import _core

pytestmark = pytest.mark.core

THREADS = 8
OPERATIONS = 1500 if LONG else 400


def work(world: World, seed: int, barrier: threading.Barrier) -> int:
    """A random life of the sequences of one thread; returns how often memory ran out."""
    rng = random.Random(seed)
    refused = 0
    barrier.wait(30)
    for step in range(OPERATIONS):
        refused += not world.run(world.choose(rng))
        if step % 16 == 0:
            world.verify()
    world.verify()
    for handle, groups in world.sequences.items():
        for g, mine in enumerate(groups):
            assert (world.core.tokens(handle, g), world.core.committed(handle, g)) == (mine.tokens, mine.committed)
    return refused


def run_threads(worlds: list[World], seed: int) -> int:
    """A thread for each world; the error of any of them is the test's."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        barrier = threading.Barrier(len(worlds))
        with ThreadPoolExecutor(len(worlds)) as pool:
            futures = [pool.submit(work, world, seed + i, barrier) for i, world in enumerate(worlds)]
            return sum(future.result(60) for future in futures)
    finally:
        sys.setswitchinterval(interval)


def separate_tags(n: int) -> list[count[int]]:
    """Tags that no two threads ever share, so that a token of another thread is seen as such."""
    return [count(1 + (i << 40)) for i in range(n)]


@pytest.mark.parametrize(("backend", "ahead"), [("virtual", 0), ("virtual", 40), ("paged", 0)])
@pytest.mark.parametrize("name", SPECS)
def test_threads_share_an_allocator(name: str, backend: str, ahead: int, seed: int) -> None:
    driver = checked()
    alloc = kvmem.Allocator(
        SPECS[name](), backend=backend, memory=(40 if name == "plain" else 160) * PAGE, page_bytes=PAGE, interleave=1,
        max_sequences=20, max_tokens=400, map_ahead_tokens=ahead, driver=driver,
    )  # fmt: skip
    worlds = [World(alloc, tags) for tags in separate_tags(THREADS)]
    refused = run_threads(worlds, seed)
    assert refused > 0, "memory never ran out: nobody took from anybody"
    assert alloc.check() == []
    assert sorted(alloc.core.handles()) == sorted(handle for world in worlds for handle in world.sequences)
    for world in worlds:
        world.verify()
        world.run(world.free(sorted(world.sequences)))
    alloc.trim()
    assert alloc.stats().parked_bytes == 0 and alloc.check() == []
    for world in worlds:
        world.__dict__.clear()
    del alloc, world
    assert held(driver) == NOTHING


@pytest.mark.parametrize("zero", ["fresh", "always"])
def test_threads_share_a_pool(zero: str, seed: int) -> None:
    driver = checked()
    pool = kvmem.PagePool(memory=120 * PAGE, page_bytes=PAGE, driver=driver)
    allocs = [
        kvmem.Allocator(
            SPECS[name](), backend=backend, pool=pool, interleave=1, max_sequences=12, max_tokens=400, zero=zero,  # type: ignore[arg-type]
            map_ahead_tokens=40,
        )
        for backend, name in (("virtual", "plain"), ("paged", "mixed"))
    ]  # fmt: skip
    worlds = [World(allocs[i % 2], tags) for i, tags in enumerate(separate_tags(THREADS))]
    assert run_threads(worlds, seed) > 0, "memory never ran out"
    for alloc in allocs:
        assert alloc.check() == []
    for world in worlds:
        world.verify()
    assert pool.mapped_bytes <= pool.budget_bytes


def test_threads_open_and_close_allocators_of_a_pool(seed: int) -> None:
    """One thread's allocator comes and goes while the others' live on the same pages."""
    driver = checked()
    pool = kvmem.PagePool(memory=80 * PAGE, page_bytes=PAGE, driver=driver)

    def life(number: int) -> None:
        rng = random.Random(seed + number)
        for _ in range(12):
            backend = rng.choice(BACKENDS)
            alloc = kvmem.Allocator(
                plain_spec(), backend=backend, pool=pool, interleave=1, max_sequences=4, max_tokens=400
            )
            world = World(alloc, count(1 + (rng.randrange(1 << 20) << 40)))
            for _ in range(12):
                world.run(world.choose(rng))
            world.verify()
            world.__dict__.clear()

    with ThreadPoolExecutor(4) as executor:
        for future in [executor.submit(life, i) for i in range(4)]:
            future.result(60)
    assert pool.mapped_bytes == 0
    pool.set_memory(PAGE)
    live = driver.live()
    assert (live.reservations, live.mappings, live.events) == (0, 0, 0) and live.pages <= 1


@contextmanager
def counting() -> Iterator[Callable[[], int]]:
    """A Python thread that counts about every half millisecond. The interpreter never takes its lock from a thread that
    wants to keep it here: only a call that gives it up lets the other go on."""
    ticks, stop = [0], threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks[0] += 1
            time.sleep(0.0005)

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=tick)
    thread.start()
    sys.setswitchinterval(60)
    try:
        yield lambda: ticks[0]
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join(30)


MEMORY = 192 << 20


def big(backend: str, page_bytes: int) -> tuple[kvmem.Allocator, int]:
    """An allocator of ordinary, unchecked memory, and the length of a sequence that takes most of it."""
    spec = kvmem.CacheSpec.kv(num_layers=4, num_kv_heads=8, head_dim=64, dtype=torch.float16, block_size=16)
    tokens = MEMORY * 7 // 8 // spec.bytes_per_token
    return kvmem.Allocator(
        spec, backend=backend, memory=MEMORY, page_bytes=page_bytes, max_sequences=2, max_tokens=tokens, zero="always",  # type: ignore[arg-type]
        driver=_core.host_driver(),
    ), tokens  # fmt: skip


def test_long_calls_leave_the_interpreter_to_others(backend: str) -> None:
    """Zeroing much memory, and unmapping and destroying many pages: both take milliseconds at least. A busy machine may
    not run the other thread in just these, so there are more tries than one; a call that kept the lock would fail all.
    """
    alloc, tokens = big(backend, 256 << 10)
    during_extend = during_trim = 0
    with counting() as ticks:
        for _ in range(100):
            with alloc.sequence() as first:
                first.extend(tokens)
            sequence = alloc.sequence()
            before = ticks()
            sequence.extend(tokens)  # in the memory that was parked: zeroed once more
            during_extend += ticks() - before
            sequence.free()
            before = ticks()
            given = alloc.trim()
            during_trim += ticks() - before
            assert given > MEMORY // 2
            if during_extend > 0 and during_trim > 0:
                break
    assert during_extend > 0 and during_trim > 0
    assert alloc.check() == []


def test_closing_an_allocator_is_safe_beside_a_working_one(backend: str) -> None:
    """The destructor takes the pool's lock with the interpreter's in hand, while other threads hold the first and want
    the second: it must come through."""
    pool = kvmem.PagePool(memory=100 * PAGE, page_bytes=PAGE, driver=checked())
    options = dict(backend=backend, pool=pool, interleave=1, max_sequences=8, max_tokens=400)
    alloc = kvmem.Allocator(plain_spec(), **options)  # type: ignore[arg-type]
    stop = threading.Event()

    def busy() -> int:
        done = 0
        while not stop.is_set():
            with alloc.sequence() as seq:
                seq.extend(130)
                seq.commit(count=130)
            alloc.trim()
            done += 1
        return done

    with ThreadPoolExecutor(2) as executor:
        futures = [executor.submit(busy) for _ in range(2)]
        for _ in range(40):
            other = kvmem.Allocator(plain_spec(), **options)  # type: ignore[arg-type]
            seq = other.sequence()
            seq.extend(100)
            del other, seq
        stop.set()
        assert all(future.result(30) > 0 for future in futures)
    assert alloc.check() == []
