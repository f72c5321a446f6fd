"""A small world around one allocator and its reference model: random calls that may fail, a tag in every token that is
committed, and what must be true of all of it. A page handed to two users, a lost copy or a wrong table shows as a wrong tag.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from agreement import Agreement, model_of
from contents import Tags
from reference import Tokens

import kvmem
from kvmem import CacheSpec, Component, Group, _core

PAGE = 4096


def plain_spec(layers: int = 2) -> CacheSpec:
    """64 bytes a token and layer: a page of 4,096 bytes holds 64 tokens of one layer."""
    return CacheSpec.kv(num_layers=layers, num_kv_heads=1, head_dim=16, dtype=torch.float16, block_size=16)


def mixed_spec() -> CacheSpec:
    """Every kind of group: full attention, a sliding window, cross attention and a recurrent state."""

    def kv(prefix: str = "", **kinds: Any) -> tuple[Component, Component]:
        return tuple(Component(prefix + n, heads=1, width=24, dtype=torch.float16, **kinds) for n in "kv")

    state = Component("state", heads=2, width=80, dtype=torch.float32, growth="fixed")
    return CacheSpec(
        (
            Group("full", kv(), (0, 1)),
            Group("window", kv(), (2, 3), window_tokens=40),
            Group("cross", kv("cross_", growth="prefill"), (0, 2), max_tokens=100),
            Group("state", (state,), (1,)),
        ),
        block_size=16,
    )


SPECS = {"plain": plain_spec, "mixed": mixed_spec}


class Digest:
    """What the core knew at a moment; unequal to what it knew at another, unless a driver failed in between: when
    memory had been written (what was cached there is given up then), or in the mapper."""

    def __init__(self, core: _core.Allocator) -> None:
        self.value, self.disturbed = core.digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Digest) and (self.disturbed != other.disturbed or self.value == other.value)

    __hash__ = None  # type: ignore[assignment]


#: A call: its name, what it does to the allocator, and what it then does to the model.
Step = tuple[str, Callable[[], Any], Callable[[Any], object]]


class World(Agreement):
    """One allocator and the model of what it must hold; calls are made in two parts, so that they can fail in between.
    ``writers``: for worlds whose sequences share an allocator, whose memory none of them knows then."""

    def __init__(self, alloc: kvmem.Allocator, writers: count[int] | None = None) -> None:
        super().__init__(alloc, model_of(alloc))
        self.core, self.groups, self.tags = alloc.core, alloc.spec.groups, Tags(alloc)
        self.token_groups = [g for g, group in enumerate(self.groups) if group.growth == "token"]
        self._writers = count(1) if writers is None else writers
        self.alone = writers is None  # else another world may be writing by a table that compact() would change

    @property
    def sequences(self) -> dict[int, list[Tokens]]:
        return self.model.sequences

    def _write(self, handle: int, g: int, first: int, n: int) -> None:
        self.tags.write(g, 0, first, n, writer := next(self._writers))
        self.model.write(handle, g, first, n, writer)

    def verify(self, handles: list[int] | None = None) -> None:
        """Every token that was written and is still held reads as it was written."""
        handles = sorted(self.sequences) if handles is None else handles
        if not handles:
            return
        self.tags.fill(handles)
        for row, handle in enumerate(handles):
            for g, held in enumerate(self.sequences[handle]):
                wrong = self.tags.wrong(g, row, int(self.tags.firsts[g][row]), held.writers)
                assert not wrong, f"group {g}, sequence {handle}: tokens {wrong[:8]} read otherwise than written"

    # --- what can be seen ---

    def observe(self) -> tuple[Any, ...]:
        """All that a caller can see, apart from parked memory and counters, and the digest of all the core knows: a
        failed call must leave it as it was."""
        handles = sorted(self.core.handles())
        stats = self.alloc.stats()
        seen: list[Any] = [handles, stats.used_bytes, stats.num_sequences, stats.shared_bytes, stats.budget_bytes]
        if handles:
            self.tags.fill(handles)
        for g in range(len(self.groups)):
            lengths = [
                (self.core.tokens(h, g), self.core.committed(h, g), self.core.first_token(h, g)) for h in handles
            ]
            seen += [lengths, self.tags.tables[g][: len(handles)].tobytes()]
        return (*seen, Digest(self.core))

    def healthy(self) -> None:
        assert self.alloc.check() == []
        self.lengths_agree()
        if self.alone:
            self.memory_agrees(shared_pool=True)
        self.verify()

    # --- calls ---

    def open(self) -> Step:
        return "open", lambda: self.core.open(), self.model.open

    def extend(self, handle: int, n: int) -> Step:
        def then(_: Any) -> None:
            self.model.extend(handle, n)
            for g, group in enumerate(self.groups):
                if group.growth == "fixed" and self.sequences[handle][g].writers == [0]:
                    self.tags.fill([handle])
                    self._write(handle, g, 0, 1)  # a state is written as soon as it is there

        return f"extend {handle} by {n}", lambda: self.core.extend(handle, n, -1), then

    def prefill(self, handle: int, g: int, n: int) -> Step:
        return (
            f"prefill {handle} with {n}", lambda: self.core.extend(handle, n, g), lambda _: self.model.extend(handle, n, g)
        )  # fmt: skip

    def commit(self, handle: int, n: int, groups: list[int], group: int = -1) -> Step:
        def call() -> None:
            self.tags.fill([handle])
            for g in groups:
                self._write(handle, g, self.sequences[handle][g].committed, n)
            self.core.commit(handle, n, group)

        return (
            f"commit {n} of {handle}, group {group}", call,
            lambda _: self.model.commit(handle, n, None if group < 0 else group),
        )  # fmt: skip

    def truncate(self, handle: int, n: int) -> Step:
        then = partial(self.model.truncate, handle, n)
        return f"truncate {handle} to {n}", lambda: self.core.truncate(handle, n), lambda _: then()

    def fork(self, handle: int) -> Step:
        return f"fork {handle}", lambda: self.core.fork(handle), partial(self.model.fork, handle)

    def free(self, handles: list[int]) -> Step:
        def then(_: Any) -> None:
            for handle in handles:
                self.model.free(handle)

        return f"free {handles}", lambda: self.core.free_batch(np.array(handles, np.int32)), then

    def trim(self, size: int | None) -> Step:
        return f"trim {size}", lambda: self.alloc.trim(size), lambda _: None

    def compact(self, size: int | None) -> Step:
        return f"compact {size}", lambda: self.alloc.compact(size), lambda _: None

    def set_memory(self, size: int) -> Step:
        return f"set_memory {size}", lambda: self.alloc.set_memory(size), lambda _: None

    def pad(self) -> Step:
        """A batch with a padding row: the padding and null blocks of every group are backed."""
        handles = np.array(sorted(self.sequences)[:2], np.int32)
        return (
            "pad", lambda: self.alloc.fill(handles, self.tags.batch, pad_to=len(handles) + 1),
            lambda _: self.model.trash.update(range(len(self.groups))),
        )  # fmt: skip

    def grow(self, handle: int, n: int) -> None:
        """Room for ``n`` tokens, which are written and committed."""
        assert self.run(self.extend(handle, n)) and self.run(self.commit(handle, n, self.token_groups))

    def start(self, n: int) -> int:
        """A new sequence of ``n`` tokens."""
        assert self.run(self.open())
        handle = next(reversed(self.sequences))
        self.grow(handle, n)
        return handle

    def fill_memory(self) -> None:
        """New sequences instead of the old ones, which share nothing and grow until memory runs out, as it must."""
        assert self.run(self.free(sorted(self.sequences)))
        for _ in range(self.alloc.max_sequences):
            if not self.run(self.open()):
                return
            handle = max(self.sequences)
            while room := self.alloc.max_tokens - self.sequences[handle][self.model.main].tokens:
                n = min(room, 50)
                if not self.run(self.extend(handle, n)):
                    return
                assert self.run(self.commit(handle, n, self.token_groups))
        raise AssertionError("all sequences fit into memory at their greatest lengths: the test asks nothing")

    # --- a random life ---

    def choose(self, rng: random.Random, memory: tuple[int, int] | None = None) -> Step:
        """A random call that the model allows (memory may still run out)."""
        live = sorted(self.sequences)
        if not live or (len(live) < self.alloc.max_sequences and rng.random() < 0.12):
            return self.open()
        handle = rng.choice(live)
        tokens, main = self.sequences[handle], self.sequences[handle][self.model.main]
        room, pending = self.alloc.max_tokens - main.tokens, main.tokens - main.committed
        kind = rng.random()
        if pending and kind < 0.75:
            return self.commit(handle, rng.choice([pending, rng.randint(1, pending)]), self.token_groups)
        for g, group in enumerate(self.groups):
            if group.growth != "prefill":
                continue
            if tokens[g].tokens == 0 and kind < 0.3:
                return self.prefill(handle, g, rng.randint(1, group.max_tokens or 50))
            if tokens[g].tokens > tokens[g].committed:
                return self.commit(handle, tokens[g].tokens - tokens[g].committed, [g], g)
        if kind < 0.45 and room:
            return self.extend(handle, rng.randint(1, min(room, rng.choice([1, 20, 150]))))
        if kind < 0.6:
            least = min(self.model.least_tokens(handle), main.tokens)
            return self.truncate(handle, rng.randint(least, main.tokens))
        if kind < 0.78 and len(live) < self.alloc.max_sequences:
            return self.fork(handle)
        if kind < 0.9:
            return self.free(rng.sample(live, min(len(live), rng.choice([1, 1, 2]))))
        if kind < 0.95:
            return self.trim(rng.choice([None, PAGE, 5 * PAGE]))
        if kind < 0.97 and memory is not None:
            return self.set_memory(rng.randint(*memory) * PAGE)
        if kind < 0.985 and self.alone:
            return self.compact(rng.choice([None, PAGE, 3 * PAGE]))
        return self.pad()

    def run(self, step: Step) -> bool:
        """Makes the call; False when memory ran out, and then nothing has changed."""
        _, call, then = step
        try:
            result = call()
        except kvmem.OutOfMemory:
            return False
        then(result)
        return True


VERBS = ("reserve", "release", "create", "destroy", "map", "set_access", "unmap", "zero", "copy", "record", "wait")


def calls_made(driver: _core.CheckedDriver) -> int:
    made = driver.counters()
    return sum(getattr(made, verb) for verb in VERBS)


def checked() -> _core.CheckedDriver:
    return _core.CheckedDriver(_core.host_driver())


def held(driver: _core.CheckedDriver) -> dict[str, int]:
    live = driver.live()
    return {name: getattr(live, name) for name in ("reservations", "pages", "mappings", "events")}


NOTHING = {"reservations": 0, "pages": 0, "mappings": 0, "events": 0}


def assert_all_returned(driver: _core.CheckedDriver) -> None:
    """Nothing is held any more. The collector runs only where a traceback made a cycle: it takes longer than most tests."""
    if held(driver) != NOTHING:
        gc.collect()
    assert held(driver) == NOTHING
