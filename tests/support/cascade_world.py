"""Sequences that fork, with what every token was given in every layer kept aside, and attention over it by hand."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from kernel_oracle import attend, pack

import kvmem
from kvmem.kernels.write import write_component

Seqs = list[kvmem.Sequence]
EVERYTHING = {"max_levels": 99, "min_tokens": 1}

#: One group in which pages and blocks of 16 tokens meet, so that both backends share the same whole blocks.
TOKENS_PER_BLOCK = 16


def kv_spec(dtype: torch.dtype = torch.float64, **shape: int) -> kvmem.CacheSpec:
    shape = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 8, "block_size": TOKENS_PER_BLOCK} | shape
    return kvmem.CacheSpec.kv(dtype=dtype, **shape)


def mla_spec(dtype: torch.dtype = torch.float64, ckv: int = 48, kpe: int = 16) -> kvmem.CacheSpec:
    parts = [kvmem.Component("ckv", width=ckv, dtype=dtype), kvmem.Component("kpe", width=kpe, dtype=dtype)]
    return kvmem.CacheSpec(components=parts, num_layers=2, block_size=TOKENS_PER_BLOCK)


@dataclass
class World:
    """``written[sequence][group, layer, component]``: ``[tokens, heads, width]``, committed or not."""

    alloc: kvmem.Allocator
    draw: torch.Generator
    written: dict[kvmem.Sequence, dict[tuple[int, int, str], torch.Tensor]] = field(default_factory=dict)

    def open(self, tokens: int = 0) -> kvmem.Sequence:
        seq = self.alloc.sequence()
        self.written[seq] = {}
        return self.grow(seq, tokens)

    def grow(self, seq: kvmem.Sequence, tokens: int) -> kvmem.Sequence:
        self.reserve(seq, tokens)
        seq.commit(count=tokens)
        return seq

    def reserve(self, seq: kvmem.Sequence, tokens: int, group: int | None = None) -> kvmem.Sequence:
        """Room for tokens, and random numbers written there."""
        seq.extend(tokens, group=group)
        batch = self.alloc.batch([seq])
        for index, spec in enumerate(self.alloc.spec.groups):
            if (group is None and spec.growth != "token") or group not in (None, index):
                continue
            for layer in spec.layers:
                for part in spec.components:
                    blocks = self.alloc.tensor(layer, part.name)
                    shape = (batch.group(index).num_new_tokens, *blocks.shape[2:])
                    new = torch.randn(shape, generator=self.draw, dtype=torch.float64).to(blocks.dtype)
                    write_component(blocks, batch.group(index), new.to(blocks.device))
                    kept, key = self.written[seq], (index, layer, part.name)
                    old = kept.get(key, new[:0])
                    kept[key] = torch.cat([old[: old.shape[0] + tokens - shape[0]], new])  # all that is not committed
        return seq

    def fork(self, seq: kvmem.Sequence, tokens: int = 0) -> kvmem.Sequence:
        child = seq.fork()
        done = [self.alloc.core.committed(seq.id, group) for group in range(len(self.alloc.spec.groups))]
        self.written[child] = {key: kept[: done[key[0]]] for key, kept in self.written[seq].items()}
        return self.grow(child, tokens)

    def truncate(self, seq: kvmem.Sequence, tokens: int) -> None:
        seq.truncate(tokens)
        self.written[seq] = {key: kept[:tokens] for key, kept in self.written[seq].items()}

    def free(self, seq: kvmem.Sequence) -> None:
        seq.free()
        del self.written[seq]

    def queries(
        self, batch: kvmem.allocator.batch.GroupBatch, heads: int, width: int, dtype: torch.dtype
    ) -> torch.Tensor:
        q = torch.randn(batch.num_new_tokens, heads, width, generator=self.draw, dtype=torch.float64)
        return q.to(dtype).to(self.alloc.device)

    def expected(
        self, q: torch.Tensor, seqs: list[kvmem.Sequence], news: list[int], layer: int, *, group: int = 0,
        names: tuple[str, str] = ("k", "v"), left: int = -1, scale: float | None = None, causal: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """``(out, lse)`` from the numbers kept aside. Queries past those of ``seqs`` are of padding rows: over one
        token that is zero."""
        parts, begin = [], 0
        for seq, new in zip(seqs, news, strict=True):
            k, v = (self.written[seq][group, layer, name] for name in names)
            if names[0] == "ckv":
                k, v = torch.cat([k, self.written[seq][group, layer, "kpe"]], -1), k
            parts.append(attend(q[begin : begin + new], k, v, causal=causal, left=left, scale=scale))
            begin += new
            zero = k.new_zeros(1, *k.shape[1:]), v.new_zeros(1, *v.shape[1:])
        parts += [attend(q[i : i + 1], *zero, scale=scale) for i in range(begin, q.shape[0])]
        return pack(parts)


def make_world(spec: kvmem.CacheSpec, backend: str, seed: int, device: str = "cpu", **options: object) -> World:
    options = {"memory": "16MiB", "max_sequences": 24, "max_tokens": 512} | options
    if device == "cpu":
        options = {"page_bytes": 4096, "debug": True} | options
    alloc = kvmem.Allocator(spec, backend=backend, device=device, **options)  # type: ignore[arg-type]
    return World(alloc, torch.Generator().manual_seed(seed))


def lone(world: World) -> Seqs:
    return [world.open(37)]


def nothing_shared(world: World) -> Seqs:
    return [world.open(n) for n in (37, 0, 64, 1)]


def all_equal(world: World) -> Seqs:
    root = world.open(80)
    return [root, *(world.fork(root) for _ in range(4))]


def depths(world: World) -> Seqs:
    """Forks of one trunk at several depths: each group within the one before."""
    trunk = world.open(20)
    seqs = [world.fork(trunk, 3)]
    for _ in range(3):
        world.grow(trunk, 30)
        seqs.append(world.fork(trunk, 9))
    return [*seqs, trunk]


def nested(world: World) -> Seqs:
    """A system prompt, two documents after it, questions after each; and strangers around."""
    seqs = [world.open(50)]
    system = world.open(70)
    for length in (40, 100):
        document = world.fork(system, length)
        seqs += [world.fork(document, n) for n in (0, 5, 33)]
    return [*seqs, world.fork(system, 1), world.open(16)]


SCENES = [lone, nothing_shared, all_equal, depths, nested]


def step(world: World, seqs: Seqs, news: list[int], pad_to: int | None = None) -> kvmem.Batch:
    for seq, new in zip(seqs, news, strict=True):
        world.reserve(seq, new)
    return world.alloc.batch(seqs, pad_to=pad_to)


def random_scene(world: World, rng: random.Random) -> Seqs:
    """Opened, grown, forked, truncated, freed at random; multiples of a block now and then."""
    seqs: Seqs = []
    for _ in range(rng.randrange(4, 40)):
        what = rng.choice(["open", "fork", "fork", "fork", "grow", "truncate", "free"])
        length = rng.choice([0, 1, 16, 32, rng.randrange(70)])
        if not seqs or (what == "open" and len(seqs) < 20):
            seqs.append(world.open(length))
        elif what == "fork" and len(seqs) < 20:
            seqs.append(world.fork(rng.choice(seqs), length))
        elif what == "grow":
            seq = rng.choice(seqs)
            world.grow(seq, min(length, 400 - seq.num_tokens))
        elif what == "truncate":
            seq = rng.choice(seqs)
            world.truncate(seq, rng.randrange(seq.num_tokens + 1))
        elif what == "free" and len(seqs) > 1:
            world.free(seqs.pop(rng.randrange(len(seqs))))
    rng.shuffle(seqs)
    return seqs


def lists(level: kvmem.allocator.cascade.CascadeLevel) -> tuple[list[int], list[int], list[int]]:
    pages = level.kv_indptr.diff()
    last = level.kv_last_page_len
    assert torch.equal(level.kv_lens, (pages - 1).clamp(min=0) * TOKENS_PER_BLOCK + last)
    assert level.kv_indices.shape == (level.kv_indptr[-1],)
    return level.qo_indptr.tolist(), pages.tolist(), last.tolist()
