"""Batched calls take sequences for their ids: with the same effect, and what is neither is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support import make_allocator, plain

import kvmem
from kvmem import Sequence, SpecError
from kvmem.allocator.scheduler import SchedulerCache

pytestmark = pytest.mark.core


class World:
    """Two requests of 5 and 6 tokens, of which all but the last two are committed."""

    def __init__(self, backend: str) -> None:
        self.alloc = make_allocator(plain(16), backend, max_sequences=4, page_bytes=4096)
        self.cache = SchedulerCache(self.alloc)
        for name, tokens in (("a", 5), ("b", 6)):
            self.cache.allocate(name, 0, tokens=list(range(tokens)))
            self.cache.allocate(name, tokens - self.cache.num_tokens(name))
            self.cache.publish(name, list(range(tokens - 2)))
        self.sequences = [self.cache.sequence(name) for name in "ab"]
        self.buffers = self.alloc.make_batch(max_new_tokens=16)

    def seen(self) -> Any:
        lengths = [(s.num_tokens, s.num_committed_tokens) for s in self.sequences if s.id in self.alloc.core.handles()]
        return lengths, self.alloc.stats().held_bytes


def _filled(batch: kvmem.Batch) -> Any:
    return batch.seq_lens_cpu.tolist(), batch.block_table.tolist()


def _fill(world: World, ids: Any) -> Any:
    world.alloc.fill(ids, world.buffers)
    return _filled(world.buffers)


def _step(world: World, ids: Any) -> Any:
    world.alloc.step(ids, world.buffers, counts=[1, 2])
    return _filled(world.buffers)


def _written(changes: Any) -> Any:
    return changes.blocks.tolist()


CALLS: dict[str, Callable[[World, Any], Any]] = {
    "extend_batch": lambda world, ids: world.alloc.extend_batch(ids, [1, 2]),
    "try_extend_batch": lambda world, ids: world.alloc.try_extend_batch(ids, [30, 2]),
    "commit_batch": lambda world, ids: world.alloc.commit_batch(ids, [1, 2]),
    "commit_batch of ids": lambda world, ids: world.alloc.commit_batch(ids, [1, 2], [7, 8, 9]),
    "free_batch": lambda world, ids: world.alloc.free_batch(ids),
    "fill": _fill,
    "step": _step,
    "batch": lambda world, ids: _filled(world.alloc.batch(ids)),
    "cascade_order": lambda world, ids: world.alloc.cascade_order(ids).tolist(),
    "allocate_step": lambda world, ids: _written(world.cache.allocate_step(ids, [30, 2])),
    "publish_step": lambda world, ids: _written(world.cache.publish_step(ids, [1, 2], [7, 8, 9])),
    "tables": lambda world, ids: _written(world.cache.tables(ids)),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_sequences_and_their_ids_do_the_same(call: str, backend: str) -> None:
    answers = []
    forms: list[Callable[[list[Sequence]], Any]] = [
        lambda them: np.array([one.id for one in them], np.int32),
        lambda them: [one.id for one in them],
        list,
        tuple,
        lambda them: [them[0].id, them[1]],
    ]
    for form in forms:
        world = World(backend)
        answers.append((CALLS[call](world, form(world.sequences)), world.seen()))
        assert world.alloc.check() == []
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_sequence_of_this_allocator_is_refused(call: str) -> None:
    world, other = World("paged"), World("paged")
    a, b = world.sequences
    c = world.alloc.sequence()
    c.free()
    before = world.seen()
    for given, error, words in [
        ([a, other.sequences[1]], SpecError, "belongs to another allocator"),
        (a, SpecError, r"^(ids|handles|sequences): got Sequence\(.*\[seq\] for one"),
        ([a, "b"], SpecError, "^(ids|handles|sequences): got 'b'; must be an integer"),
        ([a, True], SpecError, "^(ids|handles|sequences): got True; must be an integer"),
        ([a, c], kvmem.StaleHandle, str(c.id)),
    ]:
        with pytest.raises(error, match=words):
            CALLS[call](world, given)
        assert world.seen() == before and world.alloc.check() == []
    CALLS[call](world, [a, b])
