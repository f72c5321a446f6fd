"""A signal handler that raises, or polls for events, in the middle of any public call: nothing is lost, no lock stays closed.

Python runs such a handler between two instructions: when a function begins, and after a call to C. Here a trace function
does so in every such place of every call, one after the other, and at every line besides.
"""

from __future__ import annotations

import dis
import gc
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from support_drivers import assert_runs

import kvmem
from kvmem.allocator.scheduler import SchedulerCache
from kvmem.events import AllBlocksCleared, BlockStored, Event

pytestmark = pytest.mark.core

OURS = str(Path(kvmem.__file__).parent) + os.sep


class Interrupt(BaseException):
    pass


class Interrupter:
    """Calls ``then`` in the ``nth`` place where it could come between."""

    def __init__(self, nth: int, then: Callable[[], None]) -> None:
        self.nth, self.then, self.seen, self.done = nth, then, 0, False
        self.after_call: FrameType | None = None  # which has just made a call that no Python function answered

    def __call__(self, frame: FrameType, event: str, _: object) -> Any:
        self.after_call = None
        if self.done or not frame.f_code.co_filename.startswith(OURS):
            return None
        frame.f_trace_opcodes = True
        return self.within

    def within(self, frame: FrameType, event: str, _: object) -> Any:
        if event == "opcode":
            here = self.after_call is frame
            name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            self.after_call = frame if name.startswith("CALL") else None
        else:
            here = event == "line"
        if here and not self.done:
            self.seen += 1
            if self.seen == self.nth:
                self.done = True
                sys.settrace(None)
                self.then()
        return self.within


def interrupted(nth: int, call: Callable[[], object], then: Callable[[], None]) -> bool:
    """False when the call has fewer places."""
    interrupter = Interrupter(nth, then)
    sys.settrace(interrupter)
    try:
        call()
    except Interrupt:
        pass
    finally:
        sys.settrace(None)
    return interrupter.done


def stop() -> None:
    raise Interrupt


def spec() -> kvmem.CacheSpec:
    return kvmem.CacheSpec.kv(num_layers=1, num_kv_heads=1, head_dim=4, dtype="float32", block_size=4)


def make(backend: str, **more: Any) -> kvmem.Allocator:
    return kvmem.Allocator(
        spec(), backend=backend, memory="1MiB", page_bytes=4096, max_sequences=8, max_tokens=64, **more
    )  # fmt: skip


PROMPT = list(range(1, 22))
SHORT = PROMPT[:9]


def cached(alloc: kvmem.Allocator) -> None:
    with alloc.sequence(PROMPT) as seq:
        rest = PROMPT[seq.num_cached_tokens :]
        seq.extend(len(rest)), seq.commit(rest)


def with_statement(alloc: kvmem.Allocator) -> None:
    with alloc.sequence(PROMPT) as seq:
        seq.extend(2)


def prompts(alloc: kvmem.Allocator) -> object:
    return alloc.admit_batch(np.array(PROMPT + PROMPT, np.int32), np.array([21, 21], np.int32))


def other_types(alloc: kvmem.Allocator) -> object:
    return alloc.sequence(np.array(PROMPT, np.int64))


OPENING: dict[str, Callable[[kvmem.Allocator], object]] = {
    "sequence": lambda alloc: alloc.sequence(),
    "prompt": lambda alloc: alloc.sequence(PROMPT, salt="a"),
    "cached prompt": lambda alloc: alloc.sequence(PROMPT),
    "prompt of another type": other_types,
    "with": with_statement,
    "open_batch": lambda alloc: alloc.open_batch(3),
    "admit_batch": prompts,
    "pin": lambda alloc: alloc.pin(PROMPT[:16]),
}


@pytest.mark.parametrize("name", OPENING)
def test_what_nobody_gets_is_given_back(name: str, backend: str) -> None:
    alloc = make(backend)
    cached(alloc)
    places = 0
    while interrupted(places + 1, lambda: OPENING[name](alloc), stop):
        places += 1
        assert alloc.core.handles() == [] and alloc.stats().pinned_blocks == 0, f"left after place {places}"
        assert alloc.check() == []
    assert places > 3, "the trace function saw none of it"


def test_a_fork_and_a_pin_of_a_sequence(backend: str) -> None:
    alloc = make(backend)
    cached(alloc)
    parent = alloc.sequence(PROMPT)
    for call in (parent.fork, parent.pin):
        places = 0
        while interrupted(places + 1, call, stop):
            places += 1
            assert alloc.core.handles() == [parent.id] and alloc.stats().pinned_blocks == 0, places
        assert places > 2
        for handle in set(alloc.core.handles()) - {parent.id}:  # of the call that went through
            alloc.core.free(handle)


def test_requests_of_a_scheduler(backend: str) -> None:
    alloc = make(backend)
    requests = SchedulerCache(alloc)
    nth = 0
    while True:
        nth += 1
        more = interrupted(nth, lambda: requests.allocate("r", tokens=PROMPT), stop)
        assert len(alloc.core.handles()) == len(requests) == ("r" in requests), f"allocate(), place {nth}"
        if not more:
            break
        if "r" in requests:
            requests.free("r")
    assert list(requests) == ["r"]
    for end in (lambda: requests.free("r"), lambda: requests.free_all(["r"])):
        nth = 0
        while True:
            nth += 1
            if "r" not in requests:
                requests.allocate("r", tokens=PROMPT)
            more = interrupted(nth, end, stop)
            assert len(alloc.core.handles()) == len(requests), f"free(), place {nth}"
            if not more:
                break
    assert alloc.check() == []


CALLS: dict[str, Callable[[kvmem.Allocator, kvmem.Sequence, kvmem.Batch], object]] = {
    "extend": lambda alloc, seq, batch: seq.extend(1),
    "step": lambda alloc, seq, batch: seq.step(1),
    "batch": lambda alloc, seq, batch: alloc.batch([seq], out=batch),
    "step_batch": lambda alloc, seq, batch: alloc.step(np.array([seq.id], np.int32), batch),
    "kv": lambda alloc, seq, batch: seq.kv(0),
    "match": lambda alloc, seq, batch: alloc.match(PROMPT, salt="s"),
    "stats": lambda alloc, seq, batch: alloc.stats(),
    "clear_cache": lambda alloc, seq, batch: alloc.clear_cache(),
    "trim": lambda alloc, seq, batch: alloc.trim(),
    "set_memory": lambda alloc, seq, batch: alloc.set_memory("1MiB"),
    "retain": lambda alloc, seq, batch: seq.retain(priority=80, ttl=3.0),
    "truncate": lambda alloc, seq, batch: seq.truncate(seq.num_tokens),
}


def assert_answers(alloc: kvmem.Allocator) -> None:
    """Another thread is let in."""
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.extend([alloc.stats(), alloc.match(PROMPT)]), daemon=True)
    thread.start()
    thread.join(20)
    assert len(answers) == 2, "a lock stayed closed"


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_is_interrupted_leaves_what_can_go_on(name: str, backend: str) -> None:
    alloc = make(backend)
    cached(alloc)
    seq, batch = alloc.sequence(PROMPT), alloc.make_batch(max_new_tokens=64)
    nth = 0
    while interrupted(nth := nth + 1, lambda: CALLS[name](alloc, seq, batch), stop):
        assert alloc.check() == [] and alloc.core.handles() == [seq.id], f"place {nth}"
        seq.truncate(seq.num_committed_tokens)
        seq.extend(2)
        other = alloc.batch([seq], out=batch), alloc.batch([seq])
        for field in ("seq_lens", "block_table", "slot_mapping"):
            ours, fresh = (getattr(b, field)[..., : other[1].block_table.shape[-1]] for b in other)
            assert ours.equal(fresh), f"{field} after place {nth}"
        seq.truncate(seq.num_committed_tokens)
        assert_answers(alloc)
    assert nth > 1


def hashes(events: list[Event]) -> list[bytes]:
    return [digest for event in events if isinstance(event, BlockStored) for digest in event.block_hashes]


FORMS: dict[str, Callable[[kvmem.Allocator], list[Event]]] = {
    "all": lambda alloc: alloc.events(),
    "two": lambda alloc: alloc.events(2),
    "restart": lambda alloc: alloc.events(restart=True),
}


def wanted_hashes() -> list[bytes]:
    reference = make("paged", events=64)
    for salt in "abc":
        with reference.sequence(SHORT, salt=salt) as seq:
            seq.extend(9), seq.commit(SHORT)
    return hashes(reference.events())


HOW: dict[str, Callable[[kvmem.Allocator], list[Event]]] = {
    "polls": lambda alloc: alloc.events(),
    "polls in part": lambda alloc: alloc.events(1),
    "polls anew": lambda alloc: alloc.events(restart=True),
}


def told_in_all(form: str, how: str, nth: int) -> tuple[list[Event], bool]:
    """All events that come when a poll is interrupted in its ``nth`` place, in the order in which they do."""
    alloc = make("paged", events=64)
    for salt in "abc":
        with alloc.sequence(SHORT, salt=salt) as seq:
            seq.extend(9), seq.commit(SHORT)
    came: list[Event] = []
    within = stop if how == "raises" else lambda: came.extend(HOW[how](alloc))
    more = interrupted(nth, lambda: came.extend(FORMS[form](alloc)), within)
    return came + alloc.events(), more


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", ["raises", *HOW])
def test_no_event_is_lost_or_told_twice(form: str, how: str) -> None:
    wanted, nth, more = wanted_hashes(), 0, True
    while more:
        nth += 1
        came, more = told_in_all(form, how, nth)
        # What came before the last "cleared" counts no more.
        clears = [i for i, event in enumerate(came) if isinstance(event, AllBlocksCleared)]
        told = hashes(came[clears[-1] :] if clears else came)
        assert told == wanted or (clears and sorted(told) == sorted(wanted)), f"place {nth}"
    assert nth > 10


def test_a_finaliser_that_polls_in_the_middle_of_a_poll() -> None:
    wanted = wanted_hashes()
    alloc = make("paged", events=64)
    for salt in "abc":
        with alloc.sequence(SHORT, salt=salt) as seq:
            seq.extend(9), seq.commit(SHORT)
    came: list[list[Event]] = []

    class Late:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            came.append(alloc.events())

    gc.collect()
    threshold = gc.get_threshold()
    try:
        Late()
        gc.set_threshold(1)
        last = alloc.events()
    finally:
        gc.set_threshold(*threshold)
    came.append(last)
    assert hashes([event for events in came for event in events]) == wanted


def test_handlers_that_raise_at_random_while_threads_work() -> None:
    """The real thing: a timer's signals in the main thread."""
    assert_runs(
        """
import random, signal, sys, threading
sys.path[:0] = ["tests/support", "tests/threads"]
import kvmem
from test_interrupts import PROMPT, make
class Stop(Exception): pass
armed = False
def handler(*_):
    global armed
    if armed:
        armed = False
        raise Stop
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.0007, 0.0007)
alloc = make("paged", events=64)
done = threading.Event()
def poll():
    while not done.is_set(): alloc.events(), alloc.stats()
thread = threading.Thread(target=poll, daemon=True); thread.start()
stops = 0
for i in range(3000):
    try:
        armed = True
        with alloc.sequence(PROMPT, salt=str(i % 5)) as seq:
            seq.extend(5), alloc.events(), seq.commit(count=3), alloc.batch([seq])
        armed = False
    except Stop:
        stops += 1
signal.setitimer(signal.ITIMER_REAL, 0)
done.set(); thread.join(20)
assert not thread.is_alive()
assert stops > 10, stops
assert alloc.core.handles() == [] and alloc.check() == []
""",
        timeout=120,
    )
