"""The two halves apart: one allocator decides without a device, others act in other processes, joined by lists of ops."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import msgpack
import pytest
from ops_rank import digest, make, receive, send
from support import LONG, Steps
from support_world import NOTHING, PAGE, World, checked, held

import kvmem
from kvmem.allocator.ops import HEADER, KINDS

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
PAGES = {"plain": 24, "mixed": 70}
STEPS = 10_000 if LONG else 5_000


class Rank:
    """A process that holds a CPU allocator and follows."""

    def __init__(self, name: str, backend: str, pages: int) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(SUPPORT)])}
        command = [sys.executable, str(SUPPORT / "ops_rank.py"), name, backend, str(pages)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def tell(self, *frame: Any) -> None:
        assert self.process.stdin is not None
        send(self.process.stdin, list(frame))

    def ask(self, *frame: Any) -> Any:
        self.tell(*frame)
        assert self.process.stdout is not None
        answer = receive(self.process.stdout)
        assert answer is not None, f"the rank ended with status {self.process.wait()}"
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        assert self.process.wait(timeout=30) == 0
        self.process.stdout.close()


@pytest.mark.parametrize(
    ("name", "backend"), [("plain", "virtual"), ("mixed", "virtual"), ("plain", "paged"), ("mixed", "paged")]
)
def test_two_ranks_follow_a_scheduler_that_has_no_device(name: str, backend: str, rng: random.Random) -> None:
    alloc = make(name, backend, "meta", PAGES[name], record_ops=True)
    world = World(alloc)
    ranks = [Rank(name, backend, PAGES[name]) for _ in range(2)]
    kinds, pending = set(), []
    for step in range(1, STEPS + 1):
        world.run(world.choose(rng))
        if step % 1_000 == 0:
            world.fill_memory()
        ops = alloc.take_ops()
        kinds |= {op[0] for op in ops}
        assert all(type(op) is tuple and type(op[0]) is str and all(type(x) is int for x in op[1:]) for op in ops)
        pending += ops
        if rng.random() < 0.3 or step == STEPS:  # lists of one step and of several
            for rank in ranks:
                rank.tell("ops", pending)
            pending = []
        if step % 50 == 0 and not pending:
            expected = digest(alloc)
            assert alloc.check() == []
            for rank in ranks:
                assert rank.ask("digest") == [expected, []], step
    expected = digest(alloc)
    for rank in ranks:
        assert rank.ask("digest") == [expected, []]
        rank.close()
    usual = {"create", "destroy", "map", "unmap", "copy", "fence", "open", "close", "length", "commit"}
    assert kinds >= usual | ({"bind", "unbind"} if backend == "virtual" else {"block", "acquire", "drop"})
    assert kinds >= ({"front"} if name == "mixed" else set())


def test_contents_follow_through_sharing_and_copies(backend: str) -> None:
    """What a rank wrote stays with its tokens when the scheduler forks, truncates and frees."""
    alloc = make("plain", backend, "meta", PAGES["plain"], record_ops=True)
    rank = Rank("plain", backend, PAGES["plain"])
    parent = alloc.sequence()
    parent.extend(150)
    rank.tell("ops", alloc.take_ops())
    for position in range(150):
        rank.tell("write", parent.id, position, position)
    parent.commit(count=150)
    child = parent.fork()
    child.truncate(70)
    child.extend(50)
    rank.tell("ops", alloc.take_ops())
    for position in range(70, 120):
        rank.tell("write", child.id, position, 1000 + position)
    assert rank.ask("read", parent.id) == list(range(150))
    assert rank.ask("read", child.id) == [*range(70), *range(1070, 1120)]
    parent.free()
    rank.tell("ops", alloc.take_ops())
    assert rank.ask("read", child.id) == [*range(70), *range(1070, 1120)]
    assert rank.ask("digest") == [digest(alloc), []]
    rank.close()


# --- what must not be believed ---


def recorded(name: str, backend: str, seed: int) -> Iterator[list[Any]]:
    """One list a step for ever, as they come out of msgpack."""
    alloc = make(name, backend, "meta", PAGES[name], record_ops=True)
    world, rng = World(alloc), random.Random(seed)
    while True:
        world.run(world.choose(rng))
        yield msgpack.unpackb(msgpack.packb(alloc.take_ops()))


WAYS = ("number", "huge", "negative", "kind", "arity", "type", "twice", "lost", "swapped", "short")


def spoilt(rng: random.Random, ops: list[list[Any]]) -> tuple[str, list[Any]]:
    """A list that was damaged: by one number, one record, an order, or its end."""
    ops = [list(op) for op in ops]
    at = rng.randrange(len(ops))
    way = rng.choice(WAYS)
    if way == "number":
        ops[at][rng.randrange(1, 6)] += rng.choice([-1, 1, 7, 64])
    elif way in ("huge", "negative"):
        values = [2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1]
        ops[at][rng.randrange(1, 6)] = rng.choice(values) * (1 if way == "huge" else -1)
    elif way == "kind":
        ops[at][0] = rng.choice([*KINDS, "launch", ""])
    elif way == "arity":
        ops[at] = rng.choice([ops[at][:5], [*ops[at], 0], []])
    elif way == "type":
        ops[at][rng.randrange(1, 6)] = rng.choice([None, "1", 1.5, [1]])
    elif way == "twice":
        ops.insert(at, list(ops[at]))
    elif way == "lost":
        del ops[at]
    elif way == "swapped":
        other = rng.randrange(len(ops))
        ops[at], ops[other] = ops[other], ops[at]
    else:
        ops = ops[:at]
    return way, ops


@pytest.mark.parametrize("name", ["plain", "mixed"])
def test_a_damaged_list_is_refused_whole_or_leaves_a_sound_allocator(name: str, backend: str, seed: int) -> None:
    """SpecError and nothing changed, or (a list may be damaged into another true one) an allocator that check() finds sound.

    The driver is a checked one, which would notice a call that CUDA forbids; numbers far out of range would crash.
    """
    rng = random.Random(seed)
    refused: set[str] = set()
    lists: list[list[Any]] = []
    source = recorded(name, backend, seed)
    follower = make(name, backend, "cpu", PAGES[name], driver=checked())
    loop = Steps(400 if LONG else 130)
    while loop.next(refused == set(WAYS)):
        lists.append(ops := next(source))
        for _ in range(6 if ops else 0):
            way, damaged = spoilt(rng, ops)
            if damaged == ops or not damaged:
                continue
            before = digest(follower)
            try:
                follower.apply(damaged)
            except kvmem.SpecError:
                refused.add(way)
                assert digest(follower) == before, (way, damaged)
                assert follower.check() == [], way
                continue
            assert follower.check() == [], (way, ops, damaged)
            follower = replayed(name, backend, lists[:-1])  # it has gone another way: one that has not
        follower.apply(ops)
        assert follower.check() == []


def replayed(name: str, backend: str, lists: list[list[Any]]) -> kvmem.Allocator:
    follower = make(name, backend, "cpu", PAGES[name], driver=checked())
    for ops in lists:
        follower.apply(ops)
    return follower


def test_ops_of_another_shape_are_refused(backend: str) -> None:
    other = "paged" if backend == "virtual" else "virtual"
    for ops in (
        [op for part in islice(recorded("mixed", backend, 3), 60) for op in part],
        [op for part in islice(recorded("plain", other, 3), 60) for op in part],
    ):
        follower = make("plain", backend, "cpu", PAGES["plain"])
        before = digest(follower)
        with pytest.raises(kvmem.SpecError):
            follower.apply(ops)
        assert digest(follower) == before and follower.check() == []


def test_messages_of_refused_ops() -> None:
    follower = make("plain", "virtual", "cpu", 4)
    for ops, words in [
        ([["launch", 0, 0, 0, 0, 0]], "launch.*not one of"),
        ([["open", 0, 0]], "five integers"),
        (["open"], "five integers"),
        ([["create", 0, 0, 5, 0, 0]], "5 pages.*budget is 4"),
        ([["map", 0, 0, 3, 1, 0]], "page 3 was never created"),
        ([["map", 9, 0, 0, 1, 0]], "no such slots: arena 9"),
        ([["length", 0, 77, 5, 0, 0]], "77 is not live"),
        ([["create", 0, 0, 1, 0, 0], ["destroy", 0, 0, 2, 0, 0]], "destroy"),
    ]:
        with pytest.raises(kvmem.SpecError, match=words):
            follower.apply([HEADER, *ops] if ops != ["open"] else ops)
        assert follower.stats().created_bytes == 0 and follower.core.handles() == []


@pytest.mark.parametrize("name", ["plain", "mixed"])
def test_a_driver_failure_amid_apply_changes_nothing(name: str, backend: str, seed: int) -> None:
    driver = checked()
    follower = make(name, backend, "cpu", PAGES[name], driver=driver)
    failures = 0
    for ops in islice(recorded(name, backend, seed), 150):
        before, nth = digest(follower), 1
        while True:
            driver.fail("", nth, (2, 719, 999)[nth % 3])
            try:
                follower.apply(ops)
            except (kvmem.OutOfMemory, kvmem.DeviceError) as error:
                assert isinstance(error, kvmem.OutOfMemory) == (nth % 3 == 0)
                assert digest(follower) == before and follower.check() == []
                failures, nth = failures + 1, nth + 1
                continue
            driver.clear_failures()
            break
        assert follower.check() == []
    assert failures > 50
    del follower
    assert held(driver) == NOTHING


def test_taking_ops_needs_recording_and_shared_pools_refuse_it() -> None:
    alloc = make("plain", "virtual", "meta", 4)
    with pytest.raises(kvmem.SpecError, match="record_ops=True"):
        alloc.take_ops()
    pool = kvmem.PagePool(device="meta", memory=4 * PAGE, page_bytes=PAGE)
    with pytest.raises(kvmem.SpecError, match="several allocators"):
        kvmem.Allocator(alloc.spec, pool=pool, max_sequences=1, max_tokens=16, record_ops=True)
