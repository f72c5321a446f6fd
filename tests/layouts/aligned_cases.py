"""AlignedKV as cases of the suite, and what its own tests share: a sequence in a cache, and bits that were not read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layout_case import Case, hidden_states

from kvmem import Allocator, Batch, CacheSpec, Sequence
from kvmem.layouts import LayoutCache, TokenReader, aligned
from kvmem.layouts.aligned import AlignedKV

__all__ = ["Held", "cases", "flip_unread", "record", "spec"]

Seen = dict[str, torch.Tensor]


def spec(heads: int, width: int, dtype: torch.dtype = torch.float16, **options: Any) -> CacheSpec:
    options = {"num_layers": 1, "block_size": 64} | options
    return CacheSpec.kv(num_kv_heads=heads, head_dim=width, dtype=dtype, **options)


def cases() -> list[Case]:
    return [
        _case(torch.float16, 2, 32, 1, 5e-3),
        _case(torch.float16, 4, 16, 3, 2e-3),
        _case(torch.bfloat16, 1, 64, 1, 4e-2),
    ]


def _case(dtype: torch.dtype, heads: int, width: int, guard: int, tolerance: float) -> Case:
    def values(layer: int, ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        both = hidden_states(ids, positions, 2 * heads * width, layer=layer).view(-1, 2, heads, width)
        large = torch.ones(width).double()
        large[:3] = 16  # outliers, beside which the other channels of K need fewer bits
        return both[:, 0] * large, both[:, 1]

    def plain(layer: int, ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = values(layer, ids, positions)
        return k.to(dtype).double(), v.to(dtype).double()

    layout = AlignedKV(spec(heads, width, dtype), guard=guard)
    each = 2 * heads * width * dtype.itemsize
    name = f"aligned {str(dtype)[6:]} guard {guard}"
    return Case(name, layout, 4, width, values, plain, tolerance, each, 128 / 129, blockwise=True)


class Held:
    """One sequence that grows, beside what was written of it."""

    def __init__(self, layout: AlignedKV, backend: str = "paged", **options: Any) -> None:
        sizes = {"memory": "64MiB", "max_sequences": 4, "max_tokens": 4096}
        self.alloc = Allocator(layout.spec, backend=backend, device="cpu", **(sizes | options))
        self.layout, self.cache = layout, LayoutCache(layout, self.alloc)
        self.seq: Sequence = self.alloc.sequence()
        group = layout.spec.groups[0]
        shape = (0, group.heads("k", 0), group.widths("k", 0)[0])
        self.k, self.v = (torch.zeros(shape, dtype=layout.dtype) for _ in "kv")
        self.batch: Batch | None = None

    def add(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write these tokens as one chunk; the batch of the step stays for ``attend``."""
        self.commit()
        self.seq.extend(len(k))
        self.batch = self.alloc.batch([self.seq])
        self.cache.write(0, self.batch, k, v)
        self.k, self.v = torch.cat((self.k, k.to(self.k.dtype))), torch.cat((self.v, v.to(self.v.dtype)))

    def commit(self) -> None:
        self.seq.commit(list(range(self.seq.num_committed_tokens, len(self.k))))

    def reader(self) -> TokenReader:
        assert self.batch is not None
        return self.cache.readers(0, self.batch)[0]

    def reads(self) -> dict[str, int]:
        return {name: bytes for (name, _), bytes in self.alloc.ledger.read.items() if bytes}


def record(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What ``attend`` reads from now on: the levels of ``"key"`` and ``"value"``, and the exponents they follow from."""
    seen: Seen = {}
    rules = {"key": aligned.key_levels, "value": aligned.value_levels}
    for name in rules:

        def watched(*args: Any, name: str = name) -> torch.Tensor:
            seen[name], seen[f"{name} exponents"] = rules[name](*args), args[-3]
            return seen[name]

        monkeypatch.setattr(aligned, f"{name}_levels", watched)
    return seen


def flip_unread(held: Held, seen: Seen) -> int:
    """Flip every bit of the sequence that no level asks for, and return the bytes of K and V that levels ask for."""
    kept = torch.tensor((0xFF00 - 0x10000, 0xFFF0 - 0x10000, -1), dtype=torch.int16)
    shape, token, complete = held.k.shape, torch.arange(len(held.k)), len(held.k) // 64 * 64
    v = kept[seen["value"].long()].view(held.k.dtype).unsqueeze(2).expand(shape)
    v = held.layout.encode(0, v, v, positions=token)["v"]
    k = kept[seen["key"].long()].view(held.k.dtype).expand(complete // 64 + 1, 64, *shape[1:])
    k = held.layout.encode_blocks(0, {"k_tail": k, "v": v.new_zeros(len(k), 64, *v.shape[1:])})["k"]
    read = {"k": k.flatten(0, 1)[: len(token)], "v": v}
    read["k"][complete:] = 0
    read["max_exponent"] = (token < complete).to(torch.uint8).view(-1, 1, 1) * 255
    for name, bits in read.items():
        blocks, ids = held.reader().blocks(name, 0, -(-len(token) // 64))
        blocks[ids[token // 64], token % 64] ^= ~bits
    return int(read["k"].count_nonzero() + read["v"].count_nonzero())
