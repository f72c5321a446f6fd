"""A small world around one allocator: random calls, a pattern in every live token, and what must be true of all of it.

Every committed token of every group carries a tag of its own, written over all its bytes and read back from where the
metadata of ``fill()`` says it lies. A page handed to two users, a lost copy or a wrong table shows as a wrong tag.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import torch

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
    """What the core knew at a moment; unequal to what it knew at another, unless a driver failed in between: when memory
    had been written (what was cached there is given up then), or in the mapper.
    """

    def __init__(self, core: _core.Cache) -> None:
        self.value, self.disturbed = core.digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Digest) and (self.disturbed != other.disturbed or self.value == other.value)

    __hash__ = None  # type: ignore[assignment]


@dataclass
class Tokens:
    """The model of one sequence: per group, how many tokens there are, and the tags of the committed ones."""

    lengths: list[int]
    tags: list[np.ndarray] = field(default_factory=list)

    def copy(self) -> Tokens:
        return Tokens([len(t) for t in self.tags], [t.copy() for t in self.tags])


#: A call: its name, what it does to the allocator, and what it then does to the model.
Step = tuple[str, Callable[[], Any], Callable[[Any], None]]


class World:
    """One allocator and the model of what it must hold."""

    def __init__(self, alloc: kvmem.Allocator, tags: count[int] | None = None) -> None:
        self.alloc, self.core = alloc, alloc.core
        self.sequences: dict[int, Tokens] = {}
        self.groups = alloc.spec.groups
        self.token_groups = [g for g, group in enumerate(self.groups) if group.growth == "token"]
        self._tags = count(1) if tags is None else tags
        self.alone = tags is None  # else another world may be writing by a table that compact() would change
        self._strided: list[list[np.ndarray]] | None = None
        self._new_batch()

    def _new_batch(self) -> None:
        self.batch = self.alloc.make_batch(max_new_tokens=self.alloc.max_sequences * self.alloc.max_tokens)
        parts = list(self.batch.groups)
        self._tables = [part.full("block_table").numpy() for part in parts]
        self._firsts = [part.full("first_tokens").numpy() for part in parts]

    # --- memory ---

    def _tokens(self, g: int) -> list[np.ndarray]:
        """Per arena of the group, its memory as [tokens, token_bytes / 8] of int64."""
        if self._strided is None:
            self._strided = []
            for index, layout in enumerate(self.alloc._layouts):
                views = []
                for arena, token_bytes in enumerate(layout.token_bytes):
                    flat = self.alloc._arena(index, arena).numpy().view(np.int64)
                    shape = (flat.nbytes // token_bytes, token_bytes // 8)
                    views.append(np.lib.stride_tricks.as_strided(flat, shape, (token_bytes, 8)))
                self._strided.append(views)
        return self._strided[g]

    def _slots(self, g: int, row: int, first: int, end: int) -> np.ndarray:
        size = self.groups[g].block_size
        positions = np.arange(first, end)
        return self._tables[g][row, positions // size].astype(np.int64) * size + positions % size

    def fill(self, handles: list[int]) -> None:
        self.alloc.fill(np.array(handles, np.int32), self.batch)

    def _write(self, handle: int, n: int, groups: list[int]) -> dict[int, np.ndarray]:
        """Tags of the next ``n`` tokens of these groups, written; the model takes them over when the commit succeeds."""
        written = {}
        self.fill([handle])
        for g in groups:
            done = len(self.sequences[handle].tags[g])
            written[g] = np.array([next(self._tags) for _ in range(n)], np.int64)
            for tokens in self._tokens(g):
                tokens[self._slots(g, 0, done, done + n)] = written[g][:, None]
        return written

    def verify(self, handles: list[int] | None = None) -> None:
        """Every committed token that is still held reads as it was written."""
        handles = sorted(self.sequences) if handles is None else handles
        if not handles:
            return
        self.fill(handles)
        for g in range(len(self.groups)):
            for row, handle in enumerate(handles):
                tags, first = self.sequences[handle].tags[g], int(self._firsts[g][row])
                if len(tags) <= first:
                    continue
                slots = self._slots(g, row, first, len(tags))
                for arena, tokens in enumerate(self._tokens(g)):
                    found = tokens[slots]
                    assert (found == tags[first:, None]).all(), (
                        f"group {g}, arena {arena}, sequence {handle}: tokens "
                        f"{(first + np.nonzero((found != tags[first:, None]).any(1))[0])[:8]} read otherwise than written"
                    )

    # --- what can be seen ---

    def observe(self) -> tuple[Any, ...]:
        """All that a caller can see, apart from parked memory and counters, and the digest of all the core knows: a failed
        call must leave it as it was.
        """
        handles = sorted(self.core.handles())
        stats = self.alloc.stats()
        seen: list[Any] = [handles, stats.used_bytes, stats.num_sequences, stats.shared_bytes, stats.budget_bytes]
        if handles:
            self.fill(handles)
        for g in range(len(self.groups)):
            lengths = [
                (self.core.tokens(h, g), self.core.committed(h, g), self.core.first_token(h, g)) for h in handles
            ]
            seen += [lengths, self._tables[g][: len(handles)].tobytes()]
        return (*seen, Digest(self.core))

    def agree(self) -> None:
        """The model and the allocator say the same."""
        assert sorted(self.core.handles()) == sorted(self.sequences)
        for handle, tokens in self.sequences.items():
            for g in range(len(self.groups)):
                assert self.core.tokens(handle, g) == tokens.lengths[g], (handle, g)
                assert self.core.committed(handle, g) == len(tokens.tags[g]), (handle, g)

    def healthy(self) -> None:
        assert self.alloc.check() == []
        self.agree()
        self.verify()

    # --- calls ---

    def open(self) -> Step:
        def then(handle: int) -> None:
            self.sequences[handle] = Tokens([0] * len(self.groups), [np.empty(0, np.int64) for _ in self.groups])

        return "open", lambda: self.core.open(), then

    def extend(self, handle: int, n: int) -> Step:
        def then(_: Any) -> None:
            tokens = self.sequences[handle]
            for g, group in enumerate(self.groups):
                if group.growth == "token":
                    tokens.lengths[g] += n
                elif group.growth == "fixed" and tokens.lengths[g] == 0:
                    tokens.lengths[g] = 1
                    self.fill([handle])
                    tokens.tags[g] = np.array([next(self._tags)], np.int64)  # a state is written as soon as it is there
                    for memory in self._tokens(g):
                        memory[self._slots(g, 0, 0, 1)] = tokens.tags[g][:, None]

        return f"extend {handle} by {n}", lambda: self.core.extend(handle, n, -1), then

    def prefill(self, handle: int, g: int, n: int) -> Step:
        def then(_: Any) -> None:
            self.sequences[handle].lengths[g] = n

        return f"prefill {handle} with {n}", lambda: self.core.extend(handle, n, g), then

    def commit(self, handle: int, n: int, groups: list[int], group: int = -1) -> Step:
        written: dict[int, np.ndarray] = {}

        def call() -> None:
            written.update(self._write(handle, n, groups))
            self.core.commit(handle, n, group)

        def then(_: Any) -> None:
            tags = self.sequences[handle].tags
            for g, new in written.items():
                tags[g] = np.concatenate([tags[g], new])

        return f"commit {n} of {handle}, group {group}", call, then

    def truncate(self, handle: int, n: int) -> Step:
        def then(_: Any) -> None:
            tokens = self.sequences[handle]
            for g in self.token_groups:
                tokens.lengths[g] = n
                tokens.tags[g] = tokens.tags[g][:n]

        return f"truncate {handle} to {n}", lambda: self.core.truncate(handle, n), then

    def fork(self, handle: int) -> Step:
        def then(child: int) -> None:
            self.sequences[child] = self.sequences[handle].copy()

        return f"fork {handle}", lambda: self.core.fork(handle), then

    def free(self, handles: list[int]) -> Step:
        def then(_: Any) -> None:
            for handle in handles:
                del self.sequences[handle]

        return f"free {handles}", lambda: self.core.free_batch(np.array(handles, np.int32)), then

    def trim(self, size: int | None) -> Step:
        return f"trim {size}", lambda: self.alloc.trim(size), lambda _: None

    def compact(self, size: int | None) -> Step:
        return f"compact {size}", lambda: self.alloc.compact(size), lambda _: None

    def set_memory(self, size: int) -> Step:
        return f"set_memory {size}", lambda: self.alloc.set_memory(size), lambda _: None

    def pad(self) -> Step:
        """A batch with a padding row: the trash blocks come to life."""
        handles = np.array(sorted(self.sequences)[:2], np.int32)
        return "pad", lambda: self.alloc.fill(handles, self.batch, pad_to=len(handles) + 1), lambda _: None

    # --- a random life ---

    def least_tokens(self, handle: int) -> int:
        """The shortest that truncate() accepts: a window cannot come back."""
        least = 0
        for g in self.token_groups:
            first = self.core.first_token(handle, g)
            if first > 0:
                least = max(least, first + self.groups[g].window_tokens - 1)
        return least

    def choose(self, rng: random.Random, memory: tuple[int, int] | None = None) -> Step:
        """A random call that the model allows (memory may still run out)."""
        live = sorted(self.sequences)
        if not live or (len(live) < self.alloc.max_sequences and rng.random() < 0.12):
            return self.open()
        handle = rng.choice(live)
        tokens = self.sequences[handle]
        main = self.token_groups[0]
        room = self.alloc.max_tokens - tokens.lengths[main]
        pending = tokens.lengths[main] - len(tokens.tags[main])
        kind = rng.random()
        if pending and kind < 0.75:
            return self.commit(handle, rng.choice([pending, rng.randint(1, pending)]), self.token_groups)
        for g, group in enumerate(self.groups):
            if group.growth != "prefill":
                continue
            if tokens.lengths[g] == 0 and kind < 0.3:
                return self.prefill(handle, g, rng.randint(1, group.max_tokens or 50))
            if tokens.lengths[g] > len(tokens.tags[g]):
                return self.commit(handle, tokens.lengths[g] - len(tokens.tags[g]), [g], g)
        if kind < 0.45 and room:
            return self.extend(handle, rng.randint(1, min(room, rng.choice([1, 20, 150]))))
        if kind < 0.6:
            return self.truncate(
                handle, rng.randint(min(self.least_tokens(handle), tokens.lengths[main]), tokens.lengths[main])
            )
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


def checked() -> _core.CheckedDriver:
    return _core.CheckedDriver(_core.host_driver())


def held(driver: _core.CheckedDriver) -> dict[str, int]:
    live = driver.live()
    return {name: getattr(live, name) for name in ("reservations", "pages", "mappings", "events")}


NOTHING = {"reservations": 0, "pages": 0, "mappings": 0, "events": 0}
