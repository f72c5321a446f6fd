"""SchedulerCache.step(), which publishes and allocates for a request in one call, and what it tells: TableChanges."""

from __future__ import annotations

import pickle
from array import array
from typing import Any

import numpy as np
import pytest
import torch
from support_scheduler import SIZE, open_allocator, prompt

from kvmem import SchedulerCache, SpecError, StaleHandle, TableChanges

pytestmark = [pytest.mark.core, pytest.mark.parametrize("backend", ["paged", "virtual"])]


def test_a_step_is_publish_then_allocate(backend: str) -> None:
    """Over three blocks, in every form of ids; the first step publishes the prompt."""
    ids = prompt(1, 2, 3, 4).tolist()
    forms: list[Any] = [list, tuple, np.array, torch.tensor, lambda part: np.array(part, np.int32),
                        lambda part: array("i", part)]  # fmt: skip
    for form in forms:
        one, two = (SchedulerCache(open_allocator(backend)) for _ in range(2))
        for cache in (one, two):
            cache.allocate("a", tokens=ids[: SIZE + 1])
        table = np.zeros((1, 32), np.int32)
        table[0, :2] = one.block_ids("a")
        due = ids[: SIZE + 1]
        for token in ids[SIZE + 1 :]:
            written = one.step("a", tokens=form(due))
            assert written is not None and two.publish("a", form(due)) is not None
            grown = two.allocate("a", 1)
            assert grown is not None and written.blocks.tolist() == grown.blocks.tolist()
            if written:
                written.write(table)
            assert table[0, : len(one.block_ids("a"))].tolist() == one.block_ids("a").tolist()
            due = [token]
        assert one.num_tokens("a") == two.num_tokens("a") == 4 * SIZE
        assert one.matched_tokens(ids) == two.matched_tokens(ids) == 3 * SIZE
        assert one.block_ids("a").tolist() == two.block_ids("a").tolist()
        assert one.step("a", np.int32(0), form([ids[-1]])) is not None  # type: ignore[arg-type]
        assert one.matched_tokens([*ids, 1]) == 4 * SIZE


def test_a_step_without_ids_keeps_what_follows_unknown(backend: str) -> None:
    cache = SchedulerCache(open_allocator(backend))
    cache.allocate("a", tokens=prompt(1))
    cache.step("a", SIZE, prompt(1))
    assert cache.step("a") is not None
    assert cache.step("a", 1, [5]) is not None
    assert cache.sequence("a").num_committed_tokens == 2 * SIZE + 1
    assert cache.matched_tokens(prompt(1, 2, 3)) == SIZE


def test_a_step_tells_the_block_taken_over_and_the_new_one(backend: str) -> None:
    """The block that "b" completes is cached already: on the paged backend "b" reads that one from now on."""
    cache = SchedulerCache(open_allocator(backend))
    cache.allocate("a", tokens=prompt(1, 2))
    cache.publish("a", prompt(1, 2))
    cache.allocate("b", SIZE)
    own = cache.block_ids("b").tolist()
    written = cache.step("b", SIZE + 1, prompt(1))
    assert written is not None and written.rows.tolist() == [0] * len(written)
    if backend == "paged":
        assert written.columns.tolist() == [0, 1, 2] and written.blocks[0] == cache.block_ids("a")[0] != own[0]
    else:
        assert written.columns.tolist() == [1, 2]
    assert cache.block_ids("b").tolist()[-len(written) :] == written.blocks.tolist()


def test_a_step_that_is_refused_changes_nothing(backend: str) -> None:
    """Short of memory: None, and nothing is published either. Else typed errors."""
    cache = SchedulerCache(open_allocator(backend, blocks=4))
    cache.allocate("a", tokens=prompt(1, 2))

    def state() -> Any:
        sequence = cache.sequence("a")
        return (sequence.num_committed_tokens, sequence.num_tokens, cache.block_ids("a").tolist(),
                cache.matched_tokens(prompt(1, 2, 3)))  # fmt: skip

    before = state()
    assert before[0] == before[3] == 0
    assert cache.step("a", 9 * SIZE, prompt(1, 2)) is None and state() == before
    ids = prompt(1, 2).tolist()
    for bad in ([], array("i"), np.empty(0, np.int32), ids[:-1], [*ids, 1], [-1, *ids[1:]], -prompt(1, 2), 5, "ab", b"ab",
                [True, *ids[1:]], [2**31, *ids[1:]], [1.5, *ids[1:]], np.zeros((2, SIZE), np.int32), 2.5):  # fmt: skip
        with pytest.raises(SpecError):
            cache.step("a", 1, bad)  # type: ignore[arg-type]
        assert state() == before, bad
    for count in (-1, True, 1.5, "1", None, 2**31, 10**6):
        with pytest.raises(SpecError):
            cache.step("a", count, prompt(1, 2))  # type: ignore[arg-type]
        assert state() == before, count
    with pytest.raises(StaleHandle, match="not here"):
        cache.step("b")
    assert cache.step("a", SIZE, prompt(1, 2)) is not None and state()[3] == 2 * SIZE
    cache.free("a")
    with pytest.raises(StaleHandle, match="not here"):
        cache.step("a")
    assert cache.allocator.check() == []


def test_changes_are_false_when_empty_and_survive_a_pickle(backend: str) -> None:
    cache = SchedulerCache(open_allocator(backend))
    began, nothing = cache.allocate("a", SIZE + 1), cache.allocate("a", 1)
    assert began and nothing is not None and not nothing and (len(began), len(nothing)) == (2, 0)
    with pytest.raises(TypeError):
        len(TableChanges.__new__(TableChanges))
    for changes in (began, nothing, TableChanges()):
        again = pickle.loads(pickle.dumps(changes))
        assert repr(again) == repr(changes) and len(again) == len(changes)
        for part in ("rows", "columns", "blocks"):
            values = getattr(again, part)
            assert values.dtype == np.int32 and values.tolist() == getattr(changes, part).tolist()
    assert repr(began) == f"TableChanges([0, 0]: {began.blocks[0]}, [0, 1]: {began.blocks[1]})"


def test_a_table_that_cannot_take_the_changes_is_refused_whole(backend: str) -> None:
    changes = SchedulerCache(open_allocator(backend)).allocate("a", 2 * SIZE)
    assert changes is not None
    wide = np.zeros((4, 6), np.int32)
    changes.write(wide[::2, ::-2], 1)  # strides of any size
    assert wide[2].tolist() == [0, 0, 0, changes.blocks[1], 0, changes.blocks[0]] and wide[[0, 1, 3]].sum() == 0
    table = np.zeros((2, 1), np.int32)
    for row in (0, 1, 2, -1):
        with pytest.raises(SpecError, match=r"table: entry \[.*\[2, 1\]"):
            changes.write(table, row)
        assert table.sum() == 0
    frozen = np.zeros((2, 2), np.int32)
    frozen.flags.writeable = False
    for bad in (frozen, np.zeros((2, 2), np.int64), np.zeros(4, np.int32), [[0, 0]], None):
        with pytest.raises(SpecError, match="table: must be"):
            changes.write(bad)  # type: ignore[arg-type]
