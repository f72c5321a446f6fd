"""Many Python threads over one allocator, and over two that share a pool: contents, books, progress."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from support_world import BACKENDS, LONG, PAGE, SPECS, World, plain_spec, seed_from_environment

import kvmem

THREADS = 8
STEPS = 4000 if LONG else 250
#: Tags of one thread; another's in its memory would show.
TAGS = 1 << 40


class Share(World):
    """What one thread owns of an allocator that it shares: it looks at its own sequences only."""

    def limit(self) -> int:
        return max(1, self.alloc.max_sequences // THREADS)

    def choose(self, rng: random.Random, memory: tuple[int, int] | None = None) -> tuple:
        while True:
            step = super().choose(rng, memory)
            grows = step[0] == "open" or step[0].startswith("fork")
            if not (grows and len(self.sequences) >= self.limit()):
                return step
            if len(self.sequences) >= self.limit() and rng.random() < 0.2:
                return self.free([rng.choice(sorted(self.sequences))])


def run_threads(work: list[Callable[[], None]], timeout: float = 60) -> None:
    errors: list[BaseException] = []

    def guarded(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001  # handed to the test, whatever it is
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(call,), daemon=True) for call in work]
    for thread in threads:
        thread.start()
    end = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
        assert not thread.is_alive(), "a thread does not come to an end"
    if errors:
        raise errors[0]


def lives(allocators: list[kvmem.Allocator], seed: int) -> list[Share]:
    """Each thread leads a random life with an allocator, verifying its tokens after each step."""
    from itertools import count

    shares = [Share(allocators[i % len(allocators)], count(1 + i * TAGS)) for i in range(THREADS)]
    short = [0] * THREADS

    def life(i: int) -> Callable[[], None]:
        def run() -> None:
            rng = random.Random(seed * THREADS + i)
            for _ in range(STEPS):
                short[i] += not shares[i].run(shares[i].choose(rng))
                shares[i].verify()

        return run

    run_threads([life(i) for i in range(THREADS)])
    print(f"{sum(short)} of {THREADS * STEPS} calls found no memory")
    return shares


def at_rest(allocators: list[kvmem.Allocator], shares: list[Share]) -> None:
    for alloc in allocators:
        assert alloc.check() == []
        handles = sorted(h for s in shares if s.alloc is alloc for h in s.sequences)
        assert sorted(alloc.core.handles()) == handles
    for share in shares:
        share.verify()
        share.run(share.free(sorted(share.sequences)))
    for alloc in allocators:
        assert alloc.check() == [] and alloc.stats().used_bytes == 0


@pytest.mark.parametrize("ahead", [0, 40])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SPECS)
def test_eight_threads_over_one_allocator(name: str, backend: str, ahead: int) -> None:
    alloc = kvmem.Allocator(
        SPECS[name](), backend=backend, memory=500 * PAGE, page_bytes=PAGE, interleave=1, max_sequences=3 * THREADS,
        max_tokens=400, map_ahead_tokens=ahead,
    )  # fmt: skip
    at_rest([alloc], lives([alloc], seed_from_environment(43)))


@pytest.mark.parametrize("ahead", [0, 40])
def test_eight_threads_over_two_allocators_of_one_pool(ahead: int) -> None:
    pool = kvmem.PagePool(memory=150 * PAGE, page_bytes=PAGE)
    sizes = dict(pool=pool, interleave=1, max_sequences=2 * THREADS, max_tokens=400, map_ahead_tokens=ahead)
    allocators = [kvmem.Allocator(plain_spec(), backend=backend, **sizes) for backend in BACKENDS]
    at_rest(allocators, lives(allocators, seed_from_environment(47)))
    assert pool.mapped_bytes <= pool.budget_bytes


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_thread_may_free_what_another_uses(backend: str) -> None:
    """Handles are shared on purpose: whoever comes too late gets StaleHandle, and nothing else."""
    alloc = kvmem.Allocator(
        plain_spec(), backend=backend, memory=200 * PAGE, page_bytes=PAGE, max_sequences=16, max_tokens=400
    )
    handles, stale = [0] * 8, [0] * THREADS
    seed = seed_from_environment(53)

    def life(i: int) -> Callable[[], None]:
        def run() -> None:
            rng = random.Random(seed + i)
            for _ in range(STEPS):
                at = rng.randrange(len(handles))
                try:
                    kind = rng.random()
                    if kind < 0.3:
                        fresh = alloc.core.open()
                        handles[at] = fresh
                    elif kind < 0.5:
                        alloc.core.free(handles[at])
                    elif kind < 0.9:
                        alloc.core.extend(handles[at], rng.randint(1, 50), -1)
                    else:
                        alloc.core.truncate(handles[at], 0)
                except kvmem.StaleHandle:
                    stale[i] += 1
                except (kvmem.OutOfMemory, kvmem.SpecError):
                    alloc.free_batch(np.empty(0, np.int32))
                    if rng.random() < 0.5:
                        for handle in alloc.core.handles():
                            try:
                                alloc.core.free(handle)
                            except kvmem.StaleHandle:
                                stale[i] += 1

        return run

    run_threads([life(i) for i in range(THREADS)])
    assert sum(stale) > 0 and alloc.check() == []


def test_long_calls_let_other_threads_run() -> None:
    """A call that takes long (it zeroes 240 MB that another sequence had) runs without the GIL: another thread goes on."""
    alloc = kvmem.Allocator(
        plain_spec(), memory="1GiB", page_bytes=PAGE, interleave=1, max_sequences=2, max_tokens=4_000_000, zero="always"
    )
    sequence = alloc.sequence()
    sequence.extend(1_900_000)
    ticks, stop, longest = [], threading.Event(), 0.0

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    ticker = threading.Thread(target=tick)
    ticker.start()
    spans = []
    for _ in range(2):
        sequence.free()
        alloc.trim()
        with alloc.sequence() as earlier:
            earlier.extend(1_900_000)  # mapped, and not yet touched
        sequence = alloc.sequence()
        begin = time.perf_counter()
        sequence.extend(1_900_000)
        spans.append((begin, time.perf_counter()))
    stop.set()
    ticker.join()
    for begin, end in spans:
        inside = sum(begin < t < end for t in ticks)
        longest = max(longest, end - begin)
        assert end - begin > 0.02, "too short a call to show anything"
        assert inside >= (end - begin) / 0.05, f"{inside} ticks in {end - begin:.3f} s"
    print(f"longest call {longest:.3f} s")
