"""Sequences that fork, with what every token was given in every layer kept aside, and attention over it by hand."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from kernel_oracle import attend, pack

import kvmem
from kvmem.kernels.write import write_component

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
        seq.commit(tokens)
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

    def queries(self, batch: kvmem.batch.GroupBatch, heads: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        q = torch.randn(batch.num_new_tokens, heads, width, generator=self.draw, dtype=torch.float64)
        return q.to(dtype).to(self.alloc.device)

    def expected(
        self, q: torch.Tensor, seqs: list[kvmem.Sequence], news: list[int], layer: int, *, group: int = 0,
        names: tuple[str, str] = ("k", "v"), left: int = -1, scale: float | None = None, causal: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """``(out, lse)`` from the numbers kept aside. Queries past those of ``seqs`` are of padding rows: over one
        token that is zero.
        """
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
