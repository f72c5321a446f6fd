"""Random programs of an allocator without memory, with prompts that share prefixes, and a replica that follows its ops and
holds a tag in every live token. A tag says which tokens lead up to it, so equal prefixes hold equal bytes.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from support_world import PAGE

import kvmem
from kvmem import CacheSpec, Component, Group


def full_spec() -> CacheSpec:
    """Two arenas of 192 bytes a token, so that tokens straddle pages."""
    return CacheSpec.kv(num_layers=2, num_kv_heads=1, head_dim=24, dtype=torch.float32, block_size=4)


def hybrid_spec() -> CacheSpec:
    """Full attention, a sliding window, and a state of more than a page."""

    def kv(width: int) -> tuple[Component, Component]:
        return tuple(Component(n, heads=1, width=width, dtype=torch.float32) for n in "kv")

    state = Component("state", heads=2, width=600, dtype=torch.float32, growth="fixed")
    return CacheSpec(
        (Group("full", kv(64), (0,)), Group("window", kv(16), (1,), window_tokens=10), Group("state", (state,), (2,))),
        block_size=4,
    )


SPECS = {"full": full_spec, "hybrid": hybrid_spec}
PROMPTS = [list(range(start, start + 60)) for start in (0, 100, 200)]


def make(name: str, backend: str, **options: Any) -> kvmem.Allocator:
    sizes = {"memory": 60 * PAGE, "page_bytes": PAGE, "interleave": 1, "max_sequences": 6, "max_tokens": 100}
    return kvmem.Allocator(SPECS[name](), backend=backend, **{**sizes, **options})


class Leader:
    """Decides; ``ids`` holds the token ids of each live sequence, reserved ones included."""

    def __init__(self, name: str, backend: str, *, record_ops: bool = True, **options: Any) -> None:
        self.alloc = make(name, backend, record_ops=record_ops, **{"device": "meta", **options})
        self.record_ops = record_ops
        self.ids: dict[int, list[int]] = {}
        self.sequences: dict[int, kvmem.Sequence] = {}
        self.written: dict[int, int] = {}  # how many tokens of each hold what they should
        self.state_at: dict[int, int] = {}  # and how many its state has seen, 0 where it is to be written
        self.ahead: set[int] = set()  # whose state may have seen tokens that were cut off
        self.has_state = name == "hybrid"

    def step(self, rng: random.Random) -> list[list[Any]]:
        """One call, or one that ran out of memory; what it decided, where that is recorded."""
        verbs = ["open", "open", "extend", "extend", "commit", "commit", "fork", "truncate", "free", "trim", "compact",
                 "snapshot"]  # fmt: skip
        try:
            getattr(self, "_" + rng.choice(verbs))(rng)
        except kvmem.OutOfMemory:
            if self.sequences:
                self._free(rng)
        return [list(op) for op in self.alloc.take_ops()] if self.record_ops else []

    def _pick(self, rng: random.Random) -> kvmem.Sequence | None:
        return self.sequences[rng.choice(sorted(self.sequences))] if self.sequences else None

    def _open(self, rng: random.Random) -> None:
        if len(self.sequences) == self.alloc.max_sequences:
            return self._free(rng)
        prompt = [*rng.choice(PROMPTS)[: rng.randrange(2, 60)], rng.randrange(300, 303)]
        sequence = self.alloc.sequence(prompt)
        self.sequences[sequence.id] = sequence
        self.ids[sequence.id] = prompt[: sequence.num_cached_tokens]
        self.written[sequence.id] = self.state_at[sequence.id] = sequence.num_cached_tokens
        sequence.extend(len(prompt) - sequence.num_cached_tokens)
        self.ids[sequence.id] = prompt

    def _extend(self, rng: random.Random) -> None:
        if (sequence := self._pick(rng)) and len(self.ids[sequence.id]) < 80:
            more = [rng.randrange(300, 310) for _ in range(rng.choice([1, 1, 3, 15]))]
            sequence.extend(len(more))
            self.ids[sequence.id] = self.ids[sequence.id] + more

    def _commit(self, rng: random.Random) -> None:
        if sequence := self._pick(rng):
            first, end = sequence.num_committed_tokens, sequence.num_tokens
            sequence.commit(self.ids[sequence.id][first : rng.choice([end, end, rng.randint(first, end)])])
            if sequence.num_committed_tokens > first:
                self.ahead.discard(sequence.id)

    def _fork(self, rng: random.Random) -> None:
        sequence = self._pick(rng)
        if sequence and len(self.sequences) < self.alloc.max_sequences:
            if sequence.num_committed_tokens < sequence.num_tokens:  # a state would be ahead of what the child has
                return
            child = sequence.fork()
            self.sequences[child.id], self.ids[child.id] = child, list(self.ids[sequence.id])
            self.written[child.id] = min(self.written[sequence.id], child.num_tokens)
            self.state_at[child.id] = self.state_at[sequence.id]
            self.ahead |= {child.id} if sequence.id in self.ahead else set()

    def _truncate(self, rng: random.Random) -> None:
        if sequence := self._pick(rng):
            least = self.alloc.core.first_token(sequence.id, 1) + 9 if self.has_state else 0
            if sequence.num_tokens > least:
                keep = rng.randint(max(least, sequence.num_tokens - rng.choice([1, 5, 30])), sequence.num_tokens)
                sequence.truncate(keep)
                self.ids[sequence.id] = self.ids[sequence.id][:keep]
                self.written[sequence.id] = min(self.written[sequence.id], keep)
                self.state_at[sequence.id] = 0
                self.ahead.add(sequence.id)

    def _free(self, rng: random.Random) -> None:
        if sequence := self._pick(rng):
            del self.sequences[sequence.id], self.ids[sequence.id]
            sequence.free()

    def _trim(self, rng: random.Random) -> None:
        self.alloc.trim(rng.randrange(8) * PAGE)

    def _compact(self, rng: random.Random) -> None:
        self.alloc.compact()

    def _snapshot(self, rng: random.Random) -> None:
        sequence = self._pick(rng)
        if not self.has_state or sequence is None or self.state_at[sequence.id] == 0 or sequence.id in self.ahead:
            return
        if sequence.num_committed_tokens == sequence.num_tokens and sequence.num_tokens % 4 == 0:
            sequence.snapshot()


def tag_of(ids: list[int]) -> float:
    return float(hash(tuple(ids)) % 1_000_003)


class Replica:
    """Follows, and holds tags where the model would have written KV."""

    def __init__(self, name: str, backend: str, **options: Any) -> None:
        self.alloc = make(name, backend, **options)
        self.spec = self.alloc.spec

    def places(self, handle: int, group: int, first: int, end: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of each layer and component of the group: the tensor, and the slots of these tokens."""
        part, size = self.alloc.batch([handle]).group(group), self.spec.groups[group].block_size
        positions = torch.arange(first, end)
        slots = part.block_table[0].long()[positions // size] * size + positions % size
        found = []
        for layer in self.spec.groups[group].layers:
            for component in self.spec.groups[group].components:
                found.append((self.alloc.tensor(layer, component.name).as_subclass(torch.Tensor), slots))
        return found

    def write(self, handle: int, ids: list[int], written: int) -> None:
        """What the model would: KV of the tokens from ``written`` on, and the state of those that are committed."""
        for g, group in enumerate(self.spec.groups):
            first, end = self.alloc.core.first_token(handle, g), self.alloc.core.tokens(handle, g)
            if group.growth == "fixed":
                if end:
                    self._put(handle, g, 0, [tag_of(ids[: self.alloc.core.committed(handle, 0)])])
                continue
            first = max(first, written)
            self._put(handle, g, first, [tag_of(ids[: i + 1]) for i in range(first, end)])

    def _put(self, handle: int, group: int, first: int, tags: list[float]) -> None:
        values = torch.tensor(tags, dtype=torch.float32).view(-1, 1, 1)
        for tensor, slots in self.places(handle, group, first, first + len(tags)):
            size = tensor.shape[1]
            tensor[slots // size, slots % size] = values.expand(-1, *tensor.shape[2:])

    def held(self, handle: int, group: int) -> dict[int, list[float]]:
        """What each token of the group holds: the values that stand in it, by position."""
        first, end = self.alloc.core.first_token(handle, group), self.alloc.core.tokens(handle, group)
        found: dict[int, list[float]] = {position: [] for position in range(first, end)}
        if not found:
            return found
        for tensor, slots in self.places(handle, group, first, end):
            flat = tensor[slots // tensor.shape[1], slots % tensor.shape[1]].flatten(1)
            for position, low, high in zip(found, flat.amin(1).tolist(), flat.amax(1).tolist(), strict=True):
                found[position] += [low, high]
        return found

    def all_held(self) -> dict[tuple[int, int], dict[int, list[float]]]:
        groups = range(len(self.spec.groups))
        return {(handle, g): self.held(handle, g) for handle in self.alloc.core.handles() for g in groups}
