"""A driver call fails, and taking back what was done fails too: the pool is poisoned (rule 7 of csrc/driver/driver.h).

From then on nobody knows what is mapped, so every call of every allocator of the pool is a ``DeviceError`` that says what failed
and that the pool must be discarded. Ends are safe and leave nothing, and other pools live on.
"""

from __future__ import annotations

import gc
import random
import re
import time
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from support import Steps
from support_world import PAGE, SPECS, World, assert_all_returned, checked, plain_spec

import kvmem
from kvmem import PagePool, _core
from kvmem.allocator.prefetch import Window
from kvmem.tiers import Tiers


@pytest.fixture(autouse=True)
def quick_collections() -> Iterator[None]:
    """What other tests have left in this process is not walked at each of hundreds of collections."""
    gc.freeze()
    yield
    gc.unfreeze()


SENTENCE = r"this pool cannot be trusted any more: .* failed \(.*\) and could not be undone \(.*\).*Discard it"
CODE, UNDO_CODE = 719, 700
PAGES = {"plain": 40, "mixed": 76}


class Scene:
    """Two allocators of one pool and what a caller may hold of the first, before something fails."""

    def __init__(self, name: str, backend: str) -> None:
        self.driver = checked()
        self.pool = PagePool(memory=PAGES[name] * PAGE, page_bytes=PAGE, driver=self.driver)
        sizes: dict[str, Any] = dict(
            pool=self.pool, max_sequences=5, max_tokens=400, interleave=1, tail_guard_tokens=16
        )
        self.alloc = kvmem.Allocator(SPECS[name](), backend=backend, **sizes)
        self.neighbour = kvmem.Allocator(plain_spec(), backend="virtual", **sizes)
        self.tiered = kvmem.Allocator(plain_spec(), backend="virtual", tiers=Tiers(host="64KiB"), **sizes)
        self.live, self.tail = self.alloc.sequence(), self.alloc.sequence()
        self.live.extend(70)
        self.live.commit(count=70)
        self.fork = self.live.fork()
        self.other = self.neighbour.sequence()
        self.other.extend(100)
        self.other.commit(list(range(100)))
        self.pin = self.other.pin()
        self.ids = np.array([self.live.id], np.int32)
        self.batch = self.alloc.batch([self.live])
        gone = self.neighbour.sequence()
        gone.extend(300)
        gone.free()  # its pages are parked: whoever takes them unmaps and zeroes them

    def calls(self) -> dict[str, Callable[[], object]]:
        """What makes the driver map, zero, copy, unmap, create and destroy."""
        return {
            "extend": lambda: self.live.extend(200),
            "fork": self.live.fork,
            "take a neighbour's pages": lambda: self.tail.extend(350),
            "trim": self.neighbour.trim,
            "shrink": lambda: self.pool.set_memory(self.needed_bytes() + PAGE),
        }

    def needed_bytes(self) -> int:
        stats = [alloc.stats() for alloc in (self.alloc, self.neighbour)]
        return sum(s.mapped_bytes - s.parked_bytes for s in stats)


def public_calls(scene: Scene) -> dict[str, dict[str, Callable[[], object]]]:
    """Every public name of what a caller holds, and a call of it."""
    alloc, seq, ids, batch, one = scene.alloc, scene.live, scene.ids, scene.batch, np.ones(1, np.int32)
    allocator: dict[str, Callable[[], object]] = {
        "admit_batch": lambda: alloc.admit_batch(one, one),
        "apply": lambda: alloc.apply([]),
        "batch": lambda: alloc.batch([seq]),
        "can_fit": lambda: alloc.can_fit(1),
        "cascade_order": lambda: alloc.cascade_order([seq]),
        "check": alloc.check,
        "clear_cache": alloc.clear_cache,
        "commit_batch": lambda: alloc.commit_batch(ids, 0 * one),
        "compact": alloc.compact,
        "events": alloc.events,
        "extend_batch": lambda: alloc.extend_batch(ids, one),
        "flush": scene.tiered.flush,
        "prefetch": lambda: scene.tiered.prefetch([1]),
        "hold": lambda: scene.tiered.hold([1]),
        "block_set": lambda: scene.tiered.block_set([1], to="host"),
        "read_set": lambda: alloc.read_set(0, [seq]),
        "current_ranges": lambda: alloc.current_ranges(Window((), Fraction(1), 0, 0)),
        "ready": scene.tiered.ready,
        "store": lambda: scene.tiered.store([1]),
        "fill": lambda: alloc.fill(ids, batch),
        "free_batch": lambda: alloc.free_batch(ids),
        "free_tokens": alloc.free_tokens,
        "kv": lambda: alloc.kv(0),
        "kv_by_head": lambda: alloc.kv_by_head(0),
        "by_head": lambda: alloc.by_head(0, "k"),
        "joined": lambda: alloc.joined(0),
        "make_batch": lambda: alloc.make_batch(max_new_tokens=1),
        "match": lambda: alloc.match([1]),
        "open_batch": lambda: alloc.open_batch(1),
        "pin": lambda: alloc.pin([1]),
        "pins": alloc.pins,
        "rows": lambda: alloc.rows(0) if alloc.backend == "virtual" else alloc.tensor(0, "k"),
        "sequence": alloc.sequence,
        "sequence_tensor": lambda: alloc.sequence_tensor(seq, 0, "k"),
        "sequences": alloc.sequences,
        "set_memory": lambda: alloc.set_memory(30 * PAGE),
        "set_stream": lambda: alloc.set_stream(0),
        "stats": alloc.stats,
        "ledger": lambda: alloc.ledger.held,
        "step": lambda: alloc.step(ids, batch),
        "take_ops": alloc.take_ops,
        "tensor": lambda: alloc.tensor(0, "k"),
        "trim": alloc.trim,
        "try_extend_batch": lambda: alloc.try_extend_batch(ids, one),
    }
    sequence: dict[str, Callable[[], object]] = {
        "commit": lambda: seq.commit(count=0),
        "extend": lambda: seq.extend(1),
        "fork": seq.fork,
        "free": seq.free,
        "kv": lambda: seq.kv(0),
        "num_committed_tokens": lambda: seq.num_committed_tokens,
        "num_tokens": lambda: seq.num_tokens,
        "pin": seq.pin,
        "retain": lambda: seq.retain(priority=1),
        "snapshot": seq.snapshot,
        "step": seq.step,
        "truncate": lambda: seq.truncate(1),
        "try_extend": lambda: seq.try_extend(1),
    }
    pool: dict[str, Callable[[], object]] = {
        "budget_bytes": lambda: scene.pool.budget_bytes,
        "mapped_bytes": lambda: scene.pool.mapped_bytes,
        "parse_pages": lambda: scene.pool.parse_pages("1MiB"),
        "set_memory": lambda: scene.pool.set_memory(30 * PAGE),
        "set_stream": lambda: scene.pool.set_stream(0),
    }
    neighbour: dict[str, Callable[[], object]] = {
        "extend": lambda: scene.other.extend(1),
        "stats": scene.neighbour.stats,
        "check": scene.neighbour.check,
        "new": lambda: kvmem.Allocator(plain_spec(), pool=scene.pool, max_sequences=1, max_tokens=10),
    }
    return {
        "batch": {"cascade": batch.cascade, "check_current": batch.check_current},  # a fill that fails empties it
        "allocator": allocator, "sequence": sequence, "pool": pool, "pin": {"unpin": scene.pin.unpin}, "neighbour": neighbour,
    }  # fmt: skip


#: Names that ask neither the core nor the device.
NO_CALLS = {
    kvmem.Allocator: {"close", "closed", "tiering"},
    kvmem.Sequence: {"allocator", "detach", "id", "label", "num_cached_tokens", "pending", "wait"},
    PagePool: {"page_bytes", "pages"},
}


def test_the_calls_below_are_all_there_are() -> None:
    calls = public_calls(Scene("plain", "virtual"))
    for kind, names in ((kvmem.Allocator, "allocator"), (kvmem.Sequence, "sequence"), (PagePool, "pool")):
        assert {n for n in dir(kind) if not n.startswith("_")} == set(calls[names]) | NO_CALLS[kind]


def assert_poisoned(scene: Scene, *, every: bool) -> None:
    """Every call is refused; the ends of what a caller holds are safe and give all back."""
    scene.driver.clear_failures()
    went_through = []
    for kind, calls in public_calls(scene).items():
        for name in calls if every else list(calls)[:3]:
            try:
                calls[name]()
                went_through.append((kind, name))
            except kvmem.DeviceError as error:
                assert re.match(SENTENCE, str(error)), (kind, name)
    assert went_through == []
    for thing in (scene.alloc, scene.live, scene.pool, scene.pin):
        assert repr(thing)
    with pytest.raises(KeyError), scene.live:  # what the body raises is what is raised
        raise KeyError
    for alloc in (scene.alloc, scene.neighbour, scene.tiered):
        alloc.close()
        alloc.close()
        assert alloc.closed
    driver = scene.driver
    scene.__dict__.clear()
    del alloc, thing, calls
    assert_all_returned(driver)


def attempt(name: str, backend: str, call: str, nth: int, undo: int) -> tuple[str, str]:
    """The ``nth`` driver call fails, and the ``undo``-th by which that is taken back: how it ended, and the verb of the last."""
    scene, code = Scene(name, backend), CODE if nth % 2 else 2
    before = scene.alloc.core.digest()
    scene.driver.fail("", nth, code)
    scene.driver.fail("", nth + undo, UNDO_CODE, undo_too=True)
    poisoned, verb = False, ""
    try:
        scene.calls()[call]()
        return "done", verb
    except kvmem.DeviceError as error:
        poisoned = "cannot be trusted" in str(error)
        assert error.code == (UNDO_CODE if poisoned else code)
        verb = error.call
    except kvmem.OutOfMemory:
        assert code == 2
    if poisoned:
        assert_poisoned(scene, every=undo == 1)
        return "poisoned", verb
    # Waiting for what may still be written is tried only: the device does nothing any more where that fails.
    left = scene.driver.pending_failures()
    scene.driver.clear_failures()
    value, disturbed = scene.alloc.core.digest()
    assert disturbed != before[1] or value == before[0]
    assert scene.alloc.check() == scene.neighbour.check() == []
    return "unchanged" if left else "tried", verb


@pytest.mark.parametrize("name", SPECS)
def test_each_call_fails_and_then_each_call_of_its_undo(name: str, backend: str) -> None:
    warnings.simplefilter("ignore", ResourceWarning)  # sequences of scenes that are left as they are
    poisoned: dict[str, int] = {}
    for call in Scene(name, backend).calls():
        nth, ended = 0, ""
        while ended != "done":
            nth, undo, ended = nth + 1, 0, "poisoned"
            while ended in ("poisoned", "tried") and undo < 4:
                undo += 1
                ended, verb = attempt(name, backend, call, nth, undo)
                if ended == "poisoned":
                    poisoned[verb] = poisoned.get(verb, 0) + 1
        print(f"{name}, {backend}, {call}: {nth - 1} calls, poisoned by {poisoned}")
    assert set(poisoned) >= {"map", "unmap"} and {"create", "destroy"} & set(poisoned)


def test_random_failures_poison_their_own_pool_only(backend: str, rng: random.Random) -> None:
    """Two worlds on one driver, each with a pool of its own: the one whose undoing fails ends, the other never notices."""
    ends = 0
    loop = Steps(8)
    while loop.next(ends >= 4):
        driver = checked()
        sizes: dict[str, Any] = dict(page_bytes=PAGE, interleave=1, max_sequences=5, max_tokens=400, driver=driver)
        worlds = [World(kvmem.Allocator(SPECS[n](), backend=backend, memory=40 * PAGE, **sizes)) for n in SPECS]
        sick, well = worlds
        for _ in range(300):
            if rng.random() < 0.2:
                nth = rng.randint(1, 6)
                for more in range(rng.randint(1, 4)):
                    driver.fail("", nth + more, rng.choice((2, CODE)), undo_too=True)
            try:
                sick.run(sick.choose(rng))
            except kvmem.DeviceError as error:
                if "cannot be trusted" in str(error):
                    ends += 1
                    break
            driver.clear_failures()
            well.run(well.choose(rng))
        driver.clear_failures()
        for _ in range(30):
            well.run(well.choose(rng))
        well.healthy()
        sick.alloc.close()
        for world in worlds:
            world.__dict__.clear()
        del sick, well, world, worlds
        assert_all_returned(driver)


def test_undoing_that_fails_in_the_mapper_poisons_too() -> None:
    """A background job fails half done: the next call of whatever kind says so."""
    ends = 0
    for nth in range(7, 31):  # the step itself makes six calls
        driver = checked()
        alloc = kvmem.Allocator(
            plain_spec(), backend="virtual", memory=400 * PAGE, page_bytes=PAGE, interleave=1, max_sequences=2,
            max_tokens=4000, map_ahead_tokens=300, driver=driver,
        )  # fmt: skip
        (handle,) = alloc.open_batch(1).tolist()
        driver.fail("", nth, CODE)
        driver.fail("", nth + 1, UNDO_CODE, undo_too=True)
        alloc.core.extend(handle, 64)
        wait_for_mapper(driver)
        if driver.pending_failures() == 0:
            ends += 1
            with pytest.raises(kvmem.DeviceError, match=SENTENCE):
                alloc.stats()
            with pytest.raises(kvmem.DeviceError, match=SENTENCE):
                alloc.core.extend(handle, 1)
        driver.clear_failures()
        alloc.close()
        del alloc
        assert_all_returned(driver)
    assert ends >= 10


def wait_for_mapper(driver: _core.CheckedDriver) -> None:
    """Until nothing calls the driver any more."""
    before, now = -1, driver.counters().total
    while before != now:
        time.sleep(0.02)
        before, now = now, driver.counters().total
