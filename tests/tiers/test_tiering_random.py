"""Random calls of an allocator with tiers of a few slots, several sequences and loads at a time: every byte that a sequence has
is compared with what its tokens say, and no slot stays held."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
from dict_tier import DictTier
from support import LONG
from tier_world import MEMORY, SPECS, World, make

import kvmem
from kvmem.tiers import Tier

pytestmark = pytest.mark.core

STEPS = 84_000 if LONG else 300  # of each of the 12 worlds: the long form is more than a million calls
ERRORS = (kvmem.OutOfMemory, kvmem.SpecError)


@dataclass
class Text:
    """A prompt. named: its tokens for ``World``, which tell of the extra keys, too."""

    ids: list[int]
    options: dict[str, Any]

    @property
    def named(self) -> list[int]:
        found, key = list(self.ids), self.options.get("extra_key")
        if key is None:
            return found
        if isinstance(key, list):
            marks = key
        else:  # the key counts from the first id that stands twice in a row
            marks = [(next((i for i in range(len(found) - 1) if found[i] == found[i + 1]), 0), key)]
        for at, name in marks:
            if at < len(found):
                found[at] += 1000 * (1 + sum(map(ord, name)))
        return found

    @property
    def salt(self) -> Any:
        return self.options.get("salt"), self.options.get("adapter")


@dataclass
class Live:
    seq: kvmem.Sequence
    text: Text


class Campaign(World):
    def __init__(self, alloc: kvmem.Allocator, rng: random.Random) -> None:
        super().__init__(alloc)
        self.rng, self.live, self.loads, self.pins = rng, list[Live](), list[Any](), list[kvmem.Pin]()
        self.texts: list[Text] = []
        self.done: set[str] = set()

    def text(self) -> Text:
        """One of a few texts, some of which begin alike, under names of which few agree."""
        rng = self.rng
        if len(self.texts) >= 10:
            return rng.choice(self.texts)
        model = rng.choice(self.texts) if self.texts and rng.random() < 0.7 else Text([], {})
        old = model.ids[: rng.randrange(60)]
        ids = [*old, *(rng.randrange(9) for _ in range(rng.randrange(2, 75 - len(old))))]
        options = dict(model.options)
        if rng.random() < 0.3:
            options["salt"] = rng.choice(["a", "b"])
        if rng.random() < 0.2:
            options["adapter"] = rng.choice(["a", "b"])
        if rng.random() < 0.4:
            at = sorted(rng.sample(range(30), rng.randrange(1, 3)))
            options["extra_key"] = rng.choice([[(i, rng.choice("xy")) for i in at], "x", "y"])
        self.texts.append(Text(ids, options))
        return self.texts[-1]

    # --- one step each ---

    def open(self) -> None:
        if len(self.live) == 4:
            return self.free()
        text = self.text()
        match = self.alloc.match(text.ids, **text.options)
        load = self.rng.choice(["device", "host", "all"])
        seq = self.alloc.sequence(text.ids, load=load, **text.options)
        self.live.append(Live(seq, text))
        if seq.pending:
            return self.done.add("pending")
        if load == "device" or (load == "host" and not self.loads):
            # Behind what host slots bring, a part of a block on the device may match, too.
            assert seq.num_cached_tokens < match.num_tokens + self.alloc.tiering.block_size, (match, text)
        return self.compare(self.live[-1])

    def compare(self, one: Live) -> None:
        if not one.seq.pending:
            self.hits += one.seq.num_cached_tokens
            self.check(one.seq, one.text.named, one.text.salt)

    def ready_one(self) -> Live | None:
        ready = [one for one in self.live if not one.seq.pending]
        return self.rng.choice(ready) if ready else None

    def compute(self) -> None:
        one = self.ready_one()
        if one is not None and one.seq.num_tokens == one.seq.num_committed_tokens:
            try:
                end = self.rng.randrange(len(one.text.ids)) + 1 if self.rng.random() < 0.2 else len(one.text.ids)
                self.run_on(one, end)
            finally:
                self.compare(one)

    def run_on(self, one: Live, end: int) -> None:
        """As ``World.go_on``, with drafts that are taken back."""
        seq, size = one.seq, self.alloc.tiering.block_size
        for stop in (end // size * size, end) if self.fixed else (end,):
            done = seq.num_committed_tokens
            if stop <= done:
                continue
            draft = 0 if self.fixed else self.rng.choice([0, 0, 3])
            seq.extend(stop - done + draft)
            try:
                self.write(seq, [*one.text.named[:stop], *[7] * draft], one.text.salt)
                seq.commit(one.text.ids[done:stop])
            finally:
                if draft:
                    seq.truncate(seq.num_committed_tokens)
            if self.fixed and stop % size == 0:
                seq.snapshot()

    def free(self) -> None:
        if self.live:
            one = self.live.pop(self.rng.randrange(len(self.live)))
            if one.seq.pending:
                self.done.add("free while pending")
            one.seq.free()

    def fork(self) -> None:
        one = self.ready_one()
        if one is not None and len(self.live) < 4 and one.seq.num_tokens == one.seq.num_committed_tokens:
            self.live.append(Live(one.seq.fork(), one.text))
            self.compare(self.live[-1])

    def truncate(self) -> None:
        one = self.ready_one()
        if one is not None and not self.fixed:
            one.seq.truncate(self.rng.randrange(one.seq.num_committed_tokens + 1))
            self.compare(one)

    def keep(self) -> None:
        one = self.ready_one()
        if self.pins:
            self.pins.pop().unpin()
        elif one is not None:
            one.seq.retain(priority=self.rng.choice([10, 90]))
            self.pins.append(one.seq.pin())

    def poll(self) -> None:
        self.alloc.ready()
        for one in self.live:
            self.compare(one)
        for load in list(self.loads):
            if self.rng.random() < 0.3:
                load.cancel()
            if load.done():
                self.loads.remove(load)

    def move(self) -> None:
        text, what = self.text(), self.rng.randrange(4)
        if what == 0:
            self.alloc.store(text.ids, **text.options)
        elif what == 1 and len(self.loads) < 3:
            self.loads.append(self.alloc.prefetch(text.ids, to=self.rng.choice(["host", "device"]), **text.options))
        elif what == 2 and self.loads:
            self.loads.pop()  # nobody asks for it any more
        elif what == 3:
            assert self.alloc.flush(60)

    def shrink(self) -> None:
        memory = MEMORY[self.alloc.backend]
        self.rng.choice(
            [
                self.alloc.clear_cache,
                self.alloc.trim,
                self.alloc.compact,
                lambda: self.alloc.set_memory(self.rng.choice([memory, memory, memory // 2])),
            ]
        )()

    def step(self) -> None:
        calls = [
            self.open,
            self.compute,
            self.free,
            self.fork,
            self.truncate,
            self.keep,
            self.poll,
            self.move,
            self.shrink,
        ]
        call = self.rng.choices(calls, [8, 10, 5, 0.5, 0.5, 0.4, 4, 4, 0.3])[0]
        try:
            call()
        except ERRORS:
            self.done.add(f"{call.__name__} refused")

    def end(self) -> None:
        """Nothing is held when all has ended."""
        for one in self.live:
            one.seq.free()
        for pin in self.pins:
            pin.unpin()
        self.live, self.pins, self.loads = [], [], []
        while self.alloc._pending:
            self.alloc.ready()
        tiering = self.alloc.tiering
        assert self.alloc.flush(60)
        tiering.transfers.close()  # also loads that nobody asked for have ended
        self.alloc.clear_cache()
        tiering.settle()
        assert [tiering.core.free_slots(g) for g in range(len(tiering.counts))] == tiering.counts
        assert not tiering.leaving and self.alloc.check() == []


@pytest.mark.parametrize("name", sorted(SPECS))
def test_random_calls_find_the_right_bytes(
    name: str, backend: str, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(f"{seed} {name} {backend}")
    lower: list[Tier] = [DictTier(9, 1 << 30), DictTier(30, 1 << 30)]
    options = {"write": rng.choice(["through", "back"]), "admit": rng.choice(["always", "second_use"])}
    alloc = make(
        name,
        backend,
        host_blocks=rng.choice([1, 2, 3, 12]),
        lower=lower,
        policy=rng.choice(["lru", "density"]),
        events=256,
        **options,
    )
    world = Campaign(alloc, rng)
    for step in range(STEPS):
        world.step()
        if step % 16 == 0:
            assert alloc.check() == []
    world.end()
    alloc.close()
    assert "failed" not in caplog.text  # an exception in a thread of the engine is logged, and counts as a miss
