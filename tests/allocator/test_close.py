"""`close()` and the with-statements: what is freed, what stays, what every later call says, whose exception is raised."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import numpy as np
import pytest
from support import make_allocator, plain
from support_drivers import assert_runs

import kvmem
from kvmem import PagePool, SpecError, StaleHandle
from kvmem.allocator.scheduler import SchedulerCache

pytestmark = pytest.mark.core


def later_calls(alloc: kvmem.Allocator, seq: kvmem.Sequence, batch: kvmem.Batch) -> dict[str, Callable[[], object]]:
    ids, ones = np.array([1], np.int32), np.array([1], np.int32)
    return {
        "sequence": lambda: alloc.sequence(), "prompt": lambda: alloc.sequence([1, 2]), "match": lambda: alloc.match([1, 2]),
        "sequences": alloc.sequences, "admit_batch": lambda: alloc.admit_batch([1, 2]), "pin": lambda: alloc.pin([1] * 16),
        "pins": alloc.pins, "clear_cache": alloc.clear_cache, "events": alloc.events, "open_batch": lambda: alloc.open_batch(1),
        "extend_batch": lambda: alloc.extend_batch(ids, ones), "try_extend_batch": lambda: alloc.try_extend_batch(ids, ones),
        "commit_batch": lambda: alloc.commit_batch(ids, ones), "free_batch": lambda: alloc.free_batch(ids),
        "batch": lambda: alloc.batch([seq]), "make_batch": lambda: alloc.make_batch(max_new_tokens=1),
        "fill": lambda: alloc.fill(ids, batch), "step": lambda: alloc.step(ids, batch), "kv": lambda: alloc.kv(0),
        "cascade_order": lambda: alloc.cascade_order([seq]), "tensor": lambda: alloc.tensor(0, "k"),
        "sequence_tensor": lambda: alloc.sequence_tensor(seq, 0, "k"), "set_memory": lambda: alloc.set_memory("1MiB"),
        "trim": alloc.trim, "compact": alloc.compact, "set_stream": lambda: alloc.set_stream(None), "stats": alloc.stats,
        "free_tokens": alloc.free_tokens, "can_fit": lambda: alloc.can_fit(1), "check": alloc.check,
        "take_ops": alloc.take_ops, "apply": lambda: alloc.apply([]),
        "extend": lambda: seq.extend(1), "commit": lambda: seq.commit([1]), "free": seq.free, "fork": seq.fork,
        "seq.kv": lambda: seq.kv(0), "num_tokens": lambda: seq.num_tokens,
    }  # fmt: skip


def test_every_later_call_is_refused(backend: str) -> None:
    alloc = make_allocator(plain(16), backend, events=16)
    seq = alloc.sequence()
    seq.extend(20)
    batch = alloc.batch([seq])
    calls = later_calls(alloc, seq, batch)
    named = {n for n, value in vars(kvmem.Allocator).items() if callable(value) and not n.startswith("_")}
    assert named - {"rows", "close"} <= calls.keys(), "a public method that is not asked here"
    alloc.close()
    assert alloc.closed and "closed" in repr(alloc) and repr(seq) == f"Sequence(id={seq.id}, freed)"
    for name, call in calls.items():
        with pytest.raises(StaleHandle) as raised:
            call()
        assert "closed" in str(raised.value) or "freed" in str(raised.value), name
    alloc.close()


def test_a_scheduler_over_it(backend: str) -> None:
    alloc = make_allocator(plain(16), backend)
    cache = SchedulerCache(alloc)
    cache.allocate("a", 20)
    alloc.close()
    for call in (
        lambda: cache.allocate("b", 1),
        lambda: cache.allocate("a", 1),
        lambda: cache.publish("a", [1]),
        lambda: cache.step("a"),
        lambda: cache.usage,
        lambda: cache.matched_tokens([1, 2]),
    ):
        with pytest.raises(StaleHandle, match="closed"):
            call()


def test_tensors_keep_their_memory_and_nothing_else_does() -> None:
    alloc = make_allocator(plain(16), "virtual", page_bytes=4096, debug=False)
    seq = alloc.sequence()
    seq.extend(30)
    k = seq.kv(0)[0]
    k.fill_(3.0)
    alloc.close()
    assert bool((k == 3.0).all()), "close() took memory that a tensor shows"
    core = seq._core
    del k, seq
    gc.collect()
    assert core.handles() == [] and core.check() == []


def test_a_pool_that_was_given_stays(backend: str) -> None:
    pool = PagePool(device="cpu", memory="4MiB", page_bytes=4096)
    with kvmem.Allocator(plain(16), backend=backend, pool=pool, max_sequences=4, max_tokens=400) as alloc:
        seq = alloc.sequence()
        seq.extend(100)
        assert pool.mapped_bytes > 0
    del seq, alloc
    gc.collect()
    assert pool.mapped_bytes == 0
    again = kvmem.Allocator(plain(16), backend=backend, pool=pool, max_sequences=4, max_tokens=400)
    with again, again.sequence() as seq:
        seq.extend(100)
        assert pool.mapped_bytes > 0


class Own(Exception):
    pass


def test_the_exception_of_a_body_is_what_is_raised(backend: str) -> None:
    with pytest.raises(Own), make_allocator(plain(16), backend) as alloc, alloc.sequence() as seq:
        seq.free()
        raise Own
    with pytest.raises(Own), make_allocator(plain(16), backend) as alloc:
        alloc.close()
        raise Own
    with make_allocator(plain(16), backend) as alloc, alloc.sequence() as seq:
        seq.free()
    with make_allocator(plain(16), backend) as alloc, alloc.sequence() as seq:
        alloc.close()
    with make_allocator(plain(16), backend) as alloc:
        seq = alloc.sequence()
        seq.extend(16), seq.commit(list(range(16)))
        with alloc.pin(list(range(16))) as pin:
            pin.unpin()
        with pytest.raises(Own), seq.pin() as pin:
            pin.unpin()
            raise Own
        assert alloc.stats().pinned_blocks == 0


def test_a_forked_child_gets_its_own_exception() -> None:
    assert_runs(
        """
import os, sys
sys.path.insert(0, "tests/support")
import kvmem
from support import make_allocator, plain
alloc = make_allocator(plain(16), "virtual")
seq = alloc.sequence(); seq.extend(20)
pid = os.fork()
if pid == 0:
    try:
        with alloc, seq:
            raise KeyError("mine")
    except KeyError:
        pass
    try:
        alloc.close()
    except kvmem.DeviceError:
        os._exit(0)
    os._exit(1)
assert os.waitpid(pid, 0)[1] == 0
assert seq.num_tokens == 20
alloc.close()
"""
    )


def test_threads_that_open_while_it_closes(backend: str) -> None:
    alloc = make_allocator(plain(16), backend, max_sequences=64)
    core, started, ended = alloc.core, threading.Barrier(4), []

    def work() -> None:
        started.wait(10)
        try:
            while True:
                alloc.free_batch(alloc.open_batch(2))
        except StaleHandle:
            ended.append(True)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    started.wait(10)
    alloc.close()
    for thread in threads:
        thread.join(20)
    assert len(ended) == 3
    core.free_batch(np.array(core.handles(), np.int32))  # of a call that was on its way as it closed
    assert core.check() == []


def test_beginning_after_the_end(backend: str) -> None:
    alloc = make_allocator(plain(16), backend)
    alloc.close()
    with pytest.raises(StaleHandle, match="closed"):
        SchedulerCache(alloc).allocate("a", 1)
    with pytest.raises(SpecError, match="label"):
        make_allocator(plain(16), backend).sequence(label=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["virtual", "paged"])
def test_a_thread_that_has_the_core_in_hand_opens_no_more(backend: str) -> None:
    alloc = make_allocator(plain(16), backend, page_bytes=4096)
    core = alloc.core
    alloc.close()
    with pytest.raises(StaleHandle, match="this allocator is closed"):
        core.open_batch(np.empty(1, np.int32))
    assert core.handles() == []
