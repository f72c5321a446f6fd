"""os.fork(): the child has the parent's objects and none of its memory. Its calls raise, it ends in peace, the parent goes on."""

from __future__ import annotations

import pytest
from support_drivers import assert_runs, assert_runs_on_both

SETUP = """
import os, signal, sys, time, threading
sys.path.insert(0, "tests/support")
import numpy as np, torch, kvmem
from support_world import *
def finish(pid, seconds=20):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done: return status
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
    return "hung"
"""


def test_calls_in_the_child_raise_and_the_parent_goes_on(seed: int) -> None:
    assert_runs_on_both(
        f"""
alloc = kvmem.Allocator(mixed_spec(), backend=backend, memory=90 * PAGE, page_bytes=PAGE, max_sequences=4, max_tokens=300, interleave=1, events=50)
world, rng = World(alloc), random.Random({seed})
for _ in range(100): world.run(world.choose(rng))
while not world.sequences: world.run(world.choose(rng))
handle = min(world.sequences)
alloc.kv(0)
if alloc.backend == "virtual": alloc.rows(0)
ids, one, wide = np.array([handle], np.int32), np.array([1], np.int32), np.zeros(1, np.int64)
pid = os.fork()
if pid == 0:
    core = alloc.core
    calls = [alloc.sequence, alloc.events, alloc.clear_cache, alloc.compact, lambda: alloc.match([1]), lambda: alloc.pin([1]),
             lambda: alloc.open_batch(1), lambda: alloc.admit_batch(one), lambda: alloc.extend_batch(ids, one),
             lambda: alloc.free_batch(ids), lambda: alloc.kv(0), lambda: core.arena_bytes(0, 0), lambda: core.lengths(ids, 0, wide, wide),
             lambda: core.row(handle), lambda: core.table(handle, 0), lambda: core.is_live(handle), core.handles, core.take_ops,
             lambda: core.common_blocks(ids, 0, wide), lambda: core.cascade_order(ids, 0, wide), lambda: core.mapped_extent_bytes(0, 0),
             lambda: core.retain(handle, 0, 9, 1, 1.0), lambda: core.unpin(1), lambda: core.snapshot(handle), core.record,
             lambda: core.apply([]), lambda: alloc.apply([]), lambda: alloc.set_stream(0), lambda: alloc.pool.core.page_handle(0),
             lambda: alloc.pool.core.present_pages, lambda: alloc.pool.mapped_bytes, lambda: core.first_token(handle),
             lambda: alloc.pool.device.driver.counters(), lambda: core.committed(handle), lambda: core.extend(handle, 1, -1, True),
             lambda: core.commit(handle, None, -1, [1], True), lambda: core.commit(handle, 1, -1, None, True), lambda: core.step(handle, 1, None, True),
             *([lambda: alloc.rows(0)] if alloc.backend == "virtual" else []), lambda: world.core.fork(handle), lambda: world.core.extend(handle, 1), lambda: world.core.free(handle),
             lambda: world.core.tokens(handle), lambda: alloc.batch([handle]), alloc.stats, alloc.check, alloc.trim,
             lambda: alloc.set_memory("1MiB"), lambda: alloc.pool.budget_bytes, lambda: alloc.pool.set_memory("1MiB"),
             lambda: alloc.tensor(0, "k"), lambda: world.core.commit(handle, 0), lambda: world.core.truncate(handle, 0)]
    for index, call in enumerate(calls):
        try:
            call()
        except kvmem.DeviceError as error:
            assert "fork" in str(error), error
        else:
            print("call", index, "went through", flush=True); os._exit(1)
    fresh = kvmem.Allocator(plain_spec(), backend=backend, memory="1MiB", max_sequences=2, max_tokens=100)
    with fresh.sequence() as s: s.extend(50)
    assert fresh.check() == []
    os._exit(0)
assert finish(pid) == 0
world.healthy()
for _ in range(200): world.run(world.choose(rng))
world.healthy()
""",
        SETUP,
    )


def test_memory_is_not_shared_by_accident() -> None:
    """A write of the child to an address of the parent's cache ends the child, and the parent's bytes stay."""
    assert_runs_on_both(
        """
alloc = kvmem.Allocator(plain_spec(), backend=backend, memory="1MiB", max_sequences=2, max_tokens=300)
world = World(alloc)
world.run(world.open()); (handle,) = world.sequences
world.run(world.extend(handle, 200)); world.run(world.commit(handle, 200, [0]))
tensor = alloc.tensor(0, "k")
block = int(alloc.batch([handle]).block_table[0, 0])
pid = os.fork()
if pid == 0:
    torch.zeros(1)
    tensor[block].fill_(9)
    os._exit(0)
status = finish(pid)
assert os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGSEGV, signal.SIGBUS), status
world.healthy()
""",
        SETUP,
    )


def test_a_child_that_ends_as_usual_does_not_hang() -> None:
    """Also when the mapper was at work and other threads held the locks at the moment of the fork."""
    assert_runs_on_both(
        """
import gc
alloc = kvmem.Allocator(plain_spec(), backend=backend, memory=400 * PAGE, page_bytes=PAGE, max_sequences=8, max_tokens=2000,
                        map_ahead_tokens=64)
stop = threading.Event()
def busy(n):
    handles = alloc.open_batch(2); ones = np.full(2, 7, np.int32)
    while not stop.is_set():
        try:
            alloc.extend_batch(handles, ones); alloc.commit_batch(handles, ones)
        except kvmem.KVMemError:
            alloc.free_batch(handles); alloc.trim(); handles = alloc.open_batch(2)
threads = [threading.Thread(target=busy, args=(n,)) for n in range(3)]
for t in threads: t.start()
for round_number in range(12):
    time.sleep(0.02)
    pid = os.fork()
    if pid == 0:
        try:
            alloc.stats(); os._exit(3)
        except kvmem.DeviceError:
            pass
        del alloc
        gc.collect()
        os._exit(0)
    assert finish(pid) == 0, round_number
stop.set()
for t in threads: t.join()
assert alloc.check() == []
""",
        SETUP,
        timeout=120,
    )


def test_a_child_ends_through_the_interpreters_own_exit() -> None:
    assert_runs(
        SETUP
        + """
alloc = kvmem.Allocator(plain_spec(), memory=400 * PAGE, page_bytes=PAGE, max_sequences=8, max_tokens=2000, map_ahead_tokens=64)
s = alloc.sequence(); s.extend(10); s.commit(count=10); s.extend(10)
time.sleep(0.1)
pid = os.fork()
if pid == 0:
    sys.exit(0)
assert finish(pid) == 0
s.commit(count=10); assert alloc.check() == []
"""
    )


@pytest.mark.parametrize("call", ["alloc.events()", "alloc.rows(0)", "pool.driver_calls", "driver.counters()"])
def test_no_call_waits_for_a_thread_that_is_not_there(call: str) -> None:
    """Forks from under threads that hold every lock there is, at any moment."""
    assert_runs(
        SETUP
        + f"""
driver = checked()
alloc = kvmem.Allocator(plain_spec(), memory=400 * PAGE, page_bytes=PAGE, max_sequences=32, max_tokens=800, map_ahead_tokens=20,
                        events=500, driver=driver)
alloc.rows(0)
pool, stop = alloc.pool.core, threading.Event()
def busy():
    while not stop.is_set():
        with alloc.sequence(list(range(50))) as s:
            s.extend(20), s.commit([1] * (s.num_tokens - s.num_committed_tokens))
        alloc.clear_cache(), alloc.trim(), alloc.events(restart=True), driver.counters()
threads = [threading.Thread(target=busy) for _ in range(3)]
for t in threads: t.start()
for n in range(25):
    time.sleep(0.003)
    pid = os.fork()
    if pid == 0:
        try:
            {call}
        except kvmem.DeviceError:
            del alloc, pool, driver
            os._exit(0)
        os._exit(1)
    assert finish(pid) == 0, n
stop.set()
for t in threads: t.join()
assert alloc.check() == []
""",
        timeout=120,
    )
