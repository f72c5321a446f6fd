"""A replica that knows nothing but the events: for each prefix of everything that was ever committed it foretells what
`match()` finds, under windows of every size, states, pins and memory that is short."""

from __future__ import annotations

import contextlib
import random

import pytest
from event_world import Router
from support import make_allocator

import kvmem
from kvmem import Component, Group
from kvmem.events.digests import block_digests

pytestmark = pytest.mark.core
BLOCK, GUARD = 4, (0, 3)
PAIR = tuple(Component(name, width=64, dtype="float32") for name in "kv")  # 2 KiB a block
STATE = (Component("state", width=40, dtype="float32", growth="fixed"),)


def spec_of(*windows: int | None, state: bool = False) -> kvmem.CacheSpec:
    """A layer for each window, None for full attention; then one with a state."""
    groups = [Group(f"g{i}", PAIR, (i,), window_tokens=window) for i, window in enumerate(windows)]
    if state:
        groups.append(Group("state", STATE, (len(groups),)))
    return kvmem.CacheSpec(tuple(groups), block_size=BLOCK)


SPECS = {
    "full": spec_of(None),
    "window of 1": spec_of(None, 1),
    "window of half a block": spec_of(None, 2),
    "window of 5 blocks": spec_of(None, 20),
    "two windows": spec_of(None, 3, 17),
    "all sliding": spec_of(9),
    "all sliding, two": spec_of(5, 14),
    "all sliding, 1 token": spec_of(1),
    "state": spec_of(None, state=True),
    "state and window": spec_of(None, 9, state=True),
    "state and windows only": spec_of(7, state=True),
}


class Replica(Router):
    """Foretells matches from what it was told."""

    def __init__(self, spec: kvmem.CacheSpec, guard: int) -> None:
        super().__init__()
        self.spec, self.guard = spec, guard

    def promised(self, tokens: list[int]) -> int:
        """How many of ``tokens``, in whole blocks, a request that begins with them is promised."""
        digests = block_digests(self.spec, tokens)
        return max((n for n in range(1, len(digests) + 1) if self._holds(digests[:n])), default=0) * BLOCK

    def _holds(self, digests: list[bytes]) -> bool:
        def told(group: int, some: list[bytes]) -> bool:
            return all((group, "GPU", d) in self.held for d in some)

        n = len(digests)
        for i, group in enumerate(self.spec.groups):
            first = 0
            if group.growth == "fixed":
                first = n - 1
            elif group.window_tokens:
                first = max(0, n * BLOCK - group.window_tokens + 1 - self.guard) // BLOCK
            if not told(i, digests[first:]):
                return False
        return True


class Program:
    """Random calls on one allocator; ``texts`` is everything that was ever committed."""

    def __init__(self, alloc: kvmem.Allocator, rng: random.Random) -> None:
        self.alloc, self.rng = alloc, rng
        self.texts: list[list[int]] = [[]]
        self.live: list[tuple[kvmem.Sequence, list[int]]] = []
        self.pins: list[tuple[kvmem.Pin, list[int]]] = []

    def step(self) -> None:
        self.rng.choice([self.open, self.open, self.grow, self.grow, self.grow, self.end, self.end, self.turn_back,
                         self.fork, self.pin, self.squeeze])()  # fmt: skip

    def draw(self, most: int) -> list[int]:
        return [self.rng.randrange(2) for _ in range(self.rng.randint(1, most))]

    def open(self) -> None:
        if len(self.live) == 5:
            self.end()
        text = self.rng.choice(self.texts)
        text = text[: self.rng.randint(0, len(text))] + self.draw(12)
        seq = self.alloc.sequence(text)
        self.live.append((seq, text[: seq.num_cached_tokens]))
        self.append(len(self.live) - 1, text[seq.num_cached_tokens :])

    def append(self, index: int, tokens: list[int]) -> None:
        seq, text = self.live[index]
        if len(text) + len(tokens) > 90 or not seq.try_extend(len(tokens)):
            return
        seq.commit(tokens)
        text += tokens
        self.texts = [*self.texts[-60:], list(text)]
        if any(g.growth == "fixed" for g in self.alloc.spec.groups) and len(text) % BLOCK == 0:
            with contextlib.suppress(kvmem.SpecError, kvmem.OutOfMemory):
                seq.snapshot()

    def grow(self) -> None:
        if self.live:
            self.append(self.rng.randrange(len(self.live)), self.draw(9))

    def end(self) -> None:
        if self.live:
            self.live.pop(self.rng.randrange(len(self.live)))[0].free()

    def turn_back(self) -> None:
        if not self.live:
            return
        seq, text = self.rng.choice(self.live)
        tokens = self.rng.randint(max(0, len(text) - 10), len(text))
        try:
            seq.truncate(tokens)
        except kvmem.SpecError:  # what was cut is pinned, or a window has dropped what would be needed
            return
        del text[tokens:]

    def fork(self) -> None:
        if self.live and len(self.live) < 5:
            seq, text = self.rng.choice(self.live)
            with contextlib.suppress(kvmem.OutOfMemory):
                self.live.append((seq.fork(), list(text)))

    def pin(self) -> None:
        if self.pins and self.rng.random() < 0.5:
            self.pins.pop(self.rng.randrange(len(self.pins)))[0].unpin()
            return
        try:
            if self.live and self.rng.random() < 0.5:
                seq, text = self.rng.choice(self.live)
                pin = seq.pin()
            else:
                text = self.rng.choice(self.texts)
                pin = self.alloc.pin(text)
            self.pins.append((pin, text[: pin.num_tokens]))
        except kvmem.SpecError:
            pass

    def squeeze(self) -> None:
        chance = self.rng.random()
        if chance < 0.1:
            self.alloc.clear_cache()
        elif chance < 0.7:
            self.alloc.trim(4096 * self.rng.randint(1, 6))
        else:
            with contextlib.suppress(kvmem.OutOfMemory):
                self.alloc.set_memory(4096 * self.rng.randint(20, 60))


@pytest.mark.parametrize("guard", GUARD)
@pytest.mark.parametrize("name", SPECS)
def test_what_events_promise_is_what_is_found(backend: str, name: str, guard: int, rng: random.Random) -> None:
    alloc = make_allocator(
        SPECS[name], backend, memory=4096 * 60, page_bytes=4096, max_sequences=5, max_tokens=100, events=100_000,
        partial_reuse=False, tail_guard_tokens=guard, device="meta", policy=rng.choice(["lru", "density"]),
    )  # fmt: skip
    program, replica = Program(alloc, rng), Replica(SPECS[name], alloc.tail_guard_tokens)
    for _ in range(150):
        program.step()
        replica.follow(alloc.events())
        text = rng.choice(program.texts)
        wrong = []
        for end in range(BLOCK, len(text) + 1, BLOCK):
            promised, found = replica.promised(text[:end]), alloc.match([*text[:end], 9]).num_tokens
            # Of what needs no memory (a window of one token at a block's end) only the allocator knows.
            if found != promised and (name != "all sliding, 1 token" or found > promised):
                wrong.append((end, promised, found))
        assert not wrong, wrong
        assert [pin.num_tokens for pin in alloc.pins()] == [pin.num_tokens for pin, _ in program.pins]
        for pin, kept in program.pins:
            assert alloc.match([*kept, 9]).num_tokens == len(kept) == pin.num_tokens
        stats = alloc.stats()
        assert stats.cached_bytes <= stats.mapped_bytes
        assert alloc.check() == []
    assert any(program.texts)
