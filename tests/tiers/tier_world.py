"""A world of prompts over an allocator with tiers. Every token holds bytes that follow from all tokens before it, in every
group, layer and component, so that a byte of another block, salt or model is seen wherever it comes from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Literal

import dict_tier
import numpy as np
import torch
from contents import by_sequence, expected, write_slots

import kvmem
from kvmem import CacheSpec, Component, Group
from kvmem.tiers import Capacity, Identity, Result, Status, Tier, Tiers
from kvmem.tiers.base import Buffer

PAGE = 4096
MEMORY = {"virtual": 24 * PAGE, "paged": 10 * PAGE}  # so little that prompts evict each other


def _kv(width: int, heads: int = 1) -> tuple[Component, Component]:
    k, v = (Component(n, heads=heads, width=width, dtype=torch.float32) for n in "kv")
    return k, v


def full_spec() -> CacheSpec:
    """Two layers, two arenas, rows padded to 16 bytes."""
    return CacheSpec.kv(num_layers=2, num_kv_heads=1, head_dim=25, dtype=torch.float16, block_size=4)


def window_spec() -> CacheSpec:
    return CacheSpec((Group("full", _kv(24), (0, 2)), Group("window", _kv(16), (1, 3), window_tokens=9)), block_size=4)


def windows_only_spec() -> CacheSpec:
    return CacheSpec((Group("window", _kv(16), (0, 1), window_tokens=9),), block_size=4)


def state_spec() -> CacheSpec:
    state = Component("state", heads=2, width=600, dtype=torch.float32, growth="fixed")
    return CacheSpec((Group("full", _kv(32), (0,)), Group("state", (state,), (1,))), block_size=4)


def sizes_spec() -> CacheSpec:
    """Groups of different block sizes: an index block is several blocks of one group."""
    return CacheSpec((Group("a", _kv(16), (0,), block_size=4), Group("b", _kv(8), (1,), block_size=8)), block_size=4)


def latent_spec() -> CacheSpec:
    return CacheSpec(
        (Group("mla", (Component("ckv", heads=1, width=72, dtype=torch.bfloat16),), (0, 1, 2)),), block_size=8
    )


def by_head(order: Literal["heads", "joined"]) -> CacheSpec:
    """Head-major blocks, whose rows the device pads to 16 bytes."""
    return CacheSpec((Group("a", _kv(5, heads=3), (0, 1)),), block_size=4).with_blocks(order)


SPECS = {
    "full": full_spec,
    "window": window_spec,
    "windows only": windows_only_spec,
    "state": state_spec,
    "sizes": sizes_spec,
    "latent": latent_spec,
}
MORE = {"heads": lambda: by_head("heads"), "joined": lambda: by_head("joined")}  # for single tests


class DictTier(dict_tier.DictTier):
    """One that is full where the other evicts, and that fails when it is told to."""

    def __init__(self, most: int = 10_000) -> None:
        super().__init__(most, 1 << 30)
        self.most, self.fails = most, False

    def get(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        found = super().get(keys, buffers)
        return [Result(Status.FAILED, 0, "asked to fail")] * len(found) if self.fails else found

    def _put(self, key: bytes, data: bytes) -> Result:
        full = self.fails or len(self.data) >= self.most
        return Result(Status.FULL, 0, "full") if full else super()._put(key, data)

    def capacity(self) -> Capacity:
        return super().capacity()._replace(total_bytes=None)


def make(
    name: str, backend: str, *, host_blocks: int = 8, lower: Sequence[Tier] = (), **options: Any
) -> kvmem.Allocator:
    spec = (SPECS | MORE)[name]()
    sizes = {
        "memory": MEMORY[backend],
        "page_bytes": PAGE,
        "interleave": 1,
        "max_sequences": 4,
        "max_tokens": 96,
        "debug": True,
    }
    if "pool" in options:  # which has the memory
        del sizes["memory"], sizes["page_bytes"]
    tiers = {k: options.pop(k) for k in ("write", "admit", "policy", "deadline_seconds") if k in options}
    model = options.pop("model", "toy")
    probe = kvmem.Allocator(
        spec, backend=backend, **{**sizes, **options, "debug": False} | ({} if "pool" in options else {"driver": None})
    )
    block = sum(
        probe.core.slot_bytes(g) * (0.25 if spec.groups[g].growth == "fixed" else 1) for g in range(len(spec.groups))
    )
    probe.close()
    where = Tiers(host=int(block * host_blocks) + 1, lower=list(lower), identity=Identity(model), **tiers)
    return kvmem.Allocator(spec, backend=backend, tiers=where, **{**sizes, **options})


def tags(tokens: Sequence[int], salt: str | None = None) -> np.ndarray[Any, np.dtype[np.int64]]:
    """A number for each token that follows from all tokens up to it."""
    found, state = [], hash(("tags", salt)) & 0xFFFF
    for token in tokens:
        state = (state * 1_000_003 + token + 1) % 2_147_483_647
        found.append(state)
    return np.array(found, np.int64)


class World:
    """Runs prompts to their end, and checks every byte of every token that a sequence has."""

    def __init__(self, alloc: kvmem.Allocator) -> None:
        self.alloc, self.spec = alloc, alloc.spec
        self.fixed = [g for g, group in enumerate(self.spec.groups) if group.growth == "fixed"]
        self.hits = self.tokens = 0
        self.memories = [alloc]

    def hand_over(self) -> None:
        """Before memory is written or read; replicas follow then."""

    def check(self, seq: kvmem.Sequence, tokens: Sequence[int], salt: str | None = None) -> None:
        """The sequence's committed tokens hold what ``tokens`` made them hold."""
        self.hand_over()
        n = seq.num_committed_tokens
        by = tags(tokens[:n], salt)
        for g in range(len(self.spec.groups)):
            if g in self.fixed:
                writers, positions, first = by[n - 1 : n], np.zeros(min(n, 1), np.int64), 0
            else:
                first = self.alloc.core.first_token(seq.id, g)
                writers, positions = by[first:], np.arange(first, n)
            if n == 0:
                continue
            wanted = list(expected(self.spec, g, writers, positions))
            for memory in self.memories:
                for got, want in zip(by_sequence(memory, [seq.id], g), wanted, strict=True):
                    assert torch.equal(got[: len(want)], want), f"group {g}: tokens {tokens[:n]}, salt {salt!r}"

    def write(self, seq: kvmem.Sequence, tokens: Sequence[int], salt: str | None = None) -> None:
        """Writes what is reserved and not committed, and the state behind it."""
        self.hand_over()
        by, batch = tags(tokens, salt), self.alloc.batch([seq])
        for g in range(len(self.spec.groups)):
            fields = batch.group(g)
            if g in self.fixed:
                assert fields.block_table is not None
                slots, writers, positions = fields.block_table[:1, 0].long(), by[-1:], np.zeros(1, np.int64)
            else:
                assert fields.slot_mapping is not None and fields.positions is not None
                positions = fields.positions.numpy().astype(np.int64)
                slots, writers = fields.slot_mapping, by[positions]
            for memory in self.memories:
                write_slots(memory, g, slots, writers, positions)

    def go_on(self, seq: kvmem.Sequence, tokens: Sequence[int], salt: str | None = None) -> None:
        """Computes ``tokens`` behind what is cached, with a snapshot at the last whole block."""
        size = self.alloc.tiering.block_size
        for end in (len(tokens) // size * size, len(tokens)) if self.fixed else (len(tokens),):
            done = seq.num_committed_tokens
            if end <= done:
                continue
            seq.extend(end - done)
            self.write(seq, tokens[:end], salt)
            seq.commit(list(tokens[done:end]))
            if self.fixed and end % size == 0:
                seq.snapshot()

    def run(self, tokens: Sequence[int], *, salt: str | None = None, load: Any = "host", free: bool = True) -> int:
        """One request; returns how many tokens were cached."""
        seq = self.alloc.sequence(list(tokens), salt=salt, load=load)
        try:
            if load == "all":
                assert seq.wait(30)
            self.check(seq, tokens, salt)
            self.hits += seq.num_cached_tokens
            self.tokens += len(tokens)
            try:
                self.go_on(seq, tokens, salt)
            except kvmem.OutOfMemory:
                return seq.num_cached_tokens
            self.check(seq, tokens, salt)
            return seq.num_cached_tokens
        finally:
            if free:
                seq.free()


class Ranks(World):
    """A leader and a replica that follows its ops: both have host slots, and hold the same bytes."""

    def __init__(self, name: str, backend: str, **options: Any) -> None:
        super().__init__(make(name, backend, record_ops=True, **options))
        self.memories.append(make(name, backend, **options))
        self.kinds: set[str] = set()

    def hand_over(self) -> None:
        ops = self.alloc.take_ops()
        self.kinds |= {str(op[0]) for op in ops}
        self.memories[1].apply(ops)


class Prompts:
    """Prompts that come again, each set of them for 60 steps: no run depends on the luck of one set."""

    def __init__(self, rng: random.Random, count: int) -> None:
        self.rng, self.count, self.step = rng, count, 0
        self.texts: list[list[int]] = []

    def next(self) -> list[int]:
        if self.step % 60 == 0:
            self.texts = prompts(self.rng, self.count)
        self.step += 1
        return self.rng.choice(self.texts)


def prompts(rng: random.Random, count: int, *, most: int = 60) -> list[list[int]]:
    """Prompts that share prefixes: few ids, and each begins like an earlier one or anew."""
    found: list[list[int]] = []
    for _ in range(count):
        start = rng.choice(found)[: rng.randrange(40)] if found and rng.random() < 0.6 else []
        found.append([*start, *(rng.randrange(4) for _ in range(rng.randrange(6, most - len(start))))])
    return found
