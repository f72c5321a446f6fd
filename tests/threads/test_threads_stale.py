"""Threads that share handles on purpose: whoever comes too late gets ``StaleHandle``, and nothing else goes wrong."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import numpy as np
from support import LONG
from support_world import PAGE, plain_spec

import kvmem

THREADS = 8
STEPS = 4000 if LONG else 250


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


def test_one_thread_may_free_what_another_uses(backend: str, seed: int) -> None:
    """Handles are shared on purpose: whoever comes too late gets StaleHandle, and nothing else."""
    alloc = kvmem.Allocator(
        plain_spec(), backend=backend, memory=200 * PAGE, page_bytes=PAGE, max_sequences=16, max_tokens=400
    )
    handles, stale = [0] * 8, [0] * THREADS

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
