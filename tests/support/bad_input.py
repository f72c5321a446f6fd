"""A world of two sequences, and what a refused call must leave as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support_world import PAGE, World, mixed_spec

import kvmem

FULL, WINDOW, CROSS, STATE = range(4)


def make(backend: str = "virtual", pages: int = 60, **options: Any) -> kvmem.Allocator:
    sizes = dict(device="cpu", memory=pages * PAGE, page_bytes=PAGE, interleave=1, max_sequences=4, max_tokens=300)
    return kvmem.Allocator(mixed_spec(), backend=backend, **(sizes | options))


@pytest.fixture
def world(backend: str) -> World:
    """Two sequences: the first with 100 committed tokens and 5 reserved, the second with a state only."""
    world = World(make(backend))
    for count in (100, 0):
        world.run(world.open())
        handle = max(world.sequences)
        world.grow(handle, count)
    world.run(world.extend(min(world.sequences), 5))
    return world


def refused(world: World, error: type[Exception], words: str, call: Callable[[], object]) -> None:
    before, parked = world.observe(), world.alloc.stats()
    with pytest.raises(error, match=words):
        call()
    assert world.observe() == before and world.alloc.stats() == parked
    world.healthy()
