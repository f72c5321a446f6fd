"""Calls about tiers that an exception ends at any line, as Ctrl-C does, and calls from several threads at a time."""

from __future__ import annotations

import linecache
import random
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
from tier_world import SPECS, DictTier, World, make, prompts

import kvmem
from kvmem.allocator.tiers import calls, engine, events, held, loads, moves, transfers

pytestmark = pytest.mark.core
FILES = {module.__file__ for module in (calls, engine, events, held, loads, moves, transfers)}


class Stop(BaseException):
    """As KeyboardInterrupt, but nobody's."""


def in_finalizer(frame: FrameType | None) -> bool:
    """Whether ``__del__`` is running: Python reports what is raised there, and goes on."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


@contextmanager
def stopped_at(line: int) -> Iterator[None]:
    """This thread's ``line``-th line in the files about tiers raises ``Stop``."""
    left = line

    def trace(frame: Any, event: str, arg: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in FILES or in_finalizer(frame):
            return None
        # The end of a with-statement counts as its line, before what it holds is released.
        if event == "line" and not linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith(
            "with"
        ):
            left -= 1
            if left == 0:
                raise Stop
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    except Stop:
        pass
    finally:
        sys.settrace(before)


def check_nothing_is_held(alloc: kvmem.Allocator) -> None:
    """When all has ended, all slots can be taken."""
    engine = alloc.tiering
    alloc.free_batch([live.id for live in alloc.sequences()])
    while alloc._pending:
        alloc.ready()
    assert alloc.flush(60)
    engine.transfers.close()
    alloc.clear_cache()
    taken = [[engine.core.take_slot(g, 0, 0) for _ in range(count)] for g, count in enumerate(engine.counts)]
    assert all(name[0] >= 0 for names in taken for name in names), taken
    for names in taken:
        engine.core.drop_slots(names)
        engine.core.release_slots(names)
    assert not engine.leaving and alloc.check() == []


@pytest.mark.parametrize("write", ["through", "back"])
@pytest.mark.parametrize("name", ["full", "window", "state"])
def test_an_exception_at_any_line(name: str, write: str, backend: str, seed: int) -> None:
    rng = random.Random(f"{seed} {name} {write} {backend}")
    world = World(make(name, backend, host_blocks=5, lower=[DictTier()], write=write, events=64))
    texts = prompts(rng, 8)
    for _ in range(60):
        text, load = rng.choice(texts), rng.choice(["host", "all"])
        with stopped_at(rng.choice([rng.randrange(1, 60), rng.randrange(1, 2000)])):
            what = rng.randrange(6)
            if what == 0:
                world.alloc.store(text)
            elif what == 1:
                world.alloc.prefetch(text, to=rng.choice(["device", "host"])).wait(60)
            elif what == 2:
                world.alloc.events()
            elif what == 3:
                with world.alloc.hold(text):
                    pass
            else:
                world.run(text, load=load)
        world.alloc.free_batch([live.id for live in world.alloc.sequences()])
        world.run(rng.choice(texts), load="all")
        assert world.alloc.check() == []
    check_nothing_is_held(world.alloc)
    world.alloc.close()


@pytest.mark.parametrize("name", sorted(SPECS))
def test_threads_at_once(name: str, backend: str, seed: int) -> None:
    """Each thread opens, loads and frees; what it finds is right. Device and host memory are short for all."""
    tier, errors = DictTier(), list[BaseException]()
    alloc = make(name, backend, host_blocks=6, lower=[tier], max_sequences=8, events=4096, debug=False)

    def work(number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        texts = prompts(random.Random(seed), 8)
        world = World(alloc)
        try:
            for _ in range(12):
                try:
                    with alloc.sequence(rng.choice(texts), load=rng.choice(["host", "all"])) as seq:
                        assert seq.wait(60)
                        assert seq.num_committed_tokens == seq.num_cached_tokens
                    what = rng.randrange(4)
                    if what == 0:
                        alloc.store(rng.choice(texts))
                    elif what == 1:
                        alloc.prefetch(rng.choice(texts)).wait(60)
                    elif what == 2:
                        alloc.ready()
                        alloc.events()
                    else:
                        world.run(rng.choice(texts))
                except kvmem.OutOfMemory:
                    pass
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors, errors
    assert alloc.check() == []
    texts = prompts(random.Random(seed), 8)
    for text in texts:
        World(alloc).run(text, load="all")
    check_nothing_is_held(alloc)
    alloc.close()
