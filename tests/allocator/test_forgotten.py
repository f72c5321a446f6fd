"""A `Sequence` that is garbage while it is live: a warning says so, it stays, and whatever runs just then goes on."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
import warnings

import pytest
from support import make_allocator, plain
from support_drivers import assert_runs

import kvmem
from kvmem import SpecError
from kvmem.allocator.scheduler import SchedulerCache

pytestmark = pytest.mark.core


@pytest.fixture
def alloc(backend: str) -> kvmem.Allocator:
    return make_allocator(plain(16), backend, max_sequences=8)


def test_a_warning_names_it_and_it_stays(alloc: kvmem.Allocator) -> None:
    seq = alloc.sequence(label="request 7")
    seq.extend(40)
    words = rf"unfreed Sequence\(id={seq.id}, label='request 7', num_tokens=40, committed=0\)"
    with pytest.warns(ResourceWarning, match=words):
        del seq
    assert [(one.num_tokens, one.label) for one in alloc.sequences()] == [(40, "request 7")]
    alloc.free_batch([one.id for one in alloc.sequences()])


def test_a_forgotten_fork(alloc: kvmem.Allocator) -> None:
    seq = alloc.sequence()
    with pytest.warns(ResourceWarning, match="unfreed"):
        seq.fork()
    assert len(alloc.sequences()) == 2


@pytest.mark.filterwarnings("error")
def test_what_was_freed_goes_in_silence(alloc: kvmem.Allocator) -> None:
    first = alloc.sequence()
    first.free()
    with alloc.sequence() as second:
        second.extend(1)
    third = alloc.sequence()
    alloc.free_batch([third.id])
    keeper = alloc.sequence()
    lent = kvmem.Sequence(alloc, keeper.id)  # another object for the same handle
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        del first, second, third, lent
        gc.collect()
    assert not told and alloc.core.handles() == [keeper.id]
    keeper.free()


def test_the_requests_of_a_scheduler_that_is_garbage(alloc: kvmem.Allocator) -> None:
    cache = SchedulerCache(alloc)
    cache.allocate("a", 20)
    cache.allocate("b", 20)
    cache.free("b")
    with pytest.warns(ResourceWarning, match="unfreed") as told:
        del cache
    assert len(told) == 1 and len(alloc.sequences()) == 1


def test_a_filter_that_makes_errors_of_warnings(alloc: kvmem.Allocator, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be raised there."""
    seq, seen = alloc.sequence(), []
    with warnings.catch_warnings(), monkeypatch.context() as patch:
        warnings.simplefilter("error", ResourceWarning)
        patch.setattr(sys, "unraisablehook", lambda raised: seen.append(str(raised.exc_value)))
        del seq
    assert len(seen) == 1 and "unfreed Sequence" in seen[0]


def test_it_may_come_within_any_call_and_thread(alloc: kvmem.Allocator) -> None:
    """Cycles, which the collector finds wherever it happens to run, while two threads call: no lock stays closed."""

    class Holder:
        def __init__(self) -> None:
            self.seq, self.itself = alloc.sequence(label="held"), self

    def free_held() -> None:
        gc.collect()
        alloc.free_batch([one.id for one in alloc.sequences() if one.label == "held"])

    stop, done = threading.Event(), []

    def work() -> None:
        while not stop.is_set():
            try:
                with alloc.sequence(list(range(20))) as seq:
                    seq.extend(20 - seq.num_tokens), alloc.batch([seq]), alloc.stats(), alloc.match([1, 2])
            except kvmem.OutOfMemory:  # all places are held
                pass
        done.append(True)

    threshold = gc.get_threshold()
    threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
    try:
        gc.set_threshold(5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            for thread in threads:
                thread.start()
            for _ in range(60):
                try:
                    Holder()
                except kvmem.OutOfMemory:
                    free_held()
            stop.set()
            for thread in threads:
                thread.join(20)
            free_held()
    finally:
        gc.set_threshold(*threshold)
    assert len(done) == 2, "a thread did not come back"
    assert alloc.core.handles() == [] and alloc.check() == []


def test_a_copy_is_refused(alloc: kvmem.Allocator) -> None:
    """Else the end of one would speak of the other."""
    seq = alloc.sequence()
    for call in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(SpecError, match=r"Sequence\(id=.*not pickled or copied; fork\(\) makes a second one"):
            call(seq)
    seq.extend(3)
    seq.free()


def test_in_a_forked_child_and_at_the_end_of_the_process() -> None:
    """The child's copies are not its own: they go in silence."""
    assert_runs(
        """
import gc, os, sys, warnings
sys.path.insert(0, "tests/support")
warnings.simplefilter("always")
from support import make_allocator, plain
alloc = make_allocator(plain(16), "paged")
seq = alloc.sequence(); seq.extend(20)
repr(seq)
pid = os.fork()
if pid == 0:
    assert repr(seq) == f"Sequence(id={seq.id})"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        del seq; gc.collect()
    os._exit(len(told))
assert os.waitpid(pid, 0)[1] == 0
assert seq.num_tokens == 20 and alloc.check() == []
kept = seq  # live when the interpreter ends
"""
    )


def test_a_detached_sequence_is_its_handles_keepers(alloc: kvmem.Allocator) -> None:
    handle = alloc.sequence([1] * 20).detach()
    gc.collect()
    assert [one.id for one in alloc.sequences()] == [handle]
    alloc.free_batch([handle])
    assert alloc.sequences() == []
