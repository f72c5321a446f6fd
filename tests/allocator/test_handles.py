"""A handle is given out once, and an undo leaves no trace of it."""

from __future__ import annotations

import random

import pytest

import kvmem
from kvmem import _core


def test_no_handle_comes_again_whatever_is_live(seed: int) -> None:
    """Also where all places but one are taken for good, and where counting leaves the positive int32."""
    rng = random.Random(seed)
    for first in (1, 2**31 - 500, 2**32 - 3000):
        table = _core.Sequences(max_sequences=5, first=first)
        live, given = [table.open() for _ in range(4)], set()
        given |= set(live)
        for _ in range(2000):
            handle = table.open()
            assert handle not in given and handle not in (0, -1) and -(2**31) <= handle < 2**31
            given.add(handle)
            if rng.random() < 0.02:
                live.append(handle)
                handle = live.pop(rng.randrange(4))
            table.close(handle)
            assert [table.index(h) for h in live] and len({table.index(h) for h in live}) == 4
            for stale in rng.sample(sorted(given - set(live)), min(3, len(given) - 4)):
                with pytest.raises(kvmem.StaleHandle):
                    table.index(stale)


def test_the_last_handle_is_the_last() -> None:
    table = _core.Sequences(max_sequences=2, first=2**32 - 3)
    handles = [table.open(), table.open()]
    assert handles == [-3, -2]
    with pytest.raises(kvmem.OutOfMemory, match="all 2 are in use"):
        table.open()
    table.close(handles[0])
    with pytest.raises(kvmem.SpecError, match="all int32 handles"):
        table.open()
    for nobody in (-1, 0, -3, 1):
        with pytest.raises(kvmem.StaleHandle):
            table.index(nobody)
    assert table.index(-2) == 1


def test_what_is_taken_back_leaves_no_trace(seed: int) -> None:
    """Two tables with the same calls, one of which also begins others and takes them back: the same handles and places."""
    rng = random.Random(seed)
    plain, other = (_core.Sequences(max_sequences=6, first=2**31 - 60) for _ in range(2))
    live: list[int] = []
    for _ in range(600):
        mine, undo = list(live), []
        for _ in range(rng.randrange(6)):
            if mine and (len(mine) == 6 or rng.random() < 0.5):
                handle = mine.pop(rng.randrange(len(mine)))
                other.close(handle)
                undo.append((other.undo_close, handle))
            else:
                mine.append(other.open())
                undo.append((other.undo_open, mine[-1]))
        for take_back, handle in reversed(undo):
            take_back(handle)
        if live and (len(live) == 6 or rng.random() < 0.5):
            handle = live.pop(rng.randrange(len(live)))
            plain.close(handle), other.close(handle)
        else:
            live.append(plain.open())
            assert other.open() == live[-1]
        assert [plain.index(h) for h in live] == [other.index(h) for h in live]
        if len(live) < 6:
            assert plain.next_handle() == other.next_handle()
