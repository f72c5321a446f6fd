"""AlignedKV as cases of the suite, and what its own tests share: a sequence in a cache, and bits that were not read."""

from __future__ import annotations

from itertools import count, islice
from typing import Any

import pytest
import torch
from layout_case import Case, hidden_states

from kvmem import Allocator, CacheSpec
from kvmem.layouts import LayoutCache, TokenReader, aligned
from kvmem.layouts.aligned import AlignedKV

__all__ = ["Held", "cases", "flip_unread", "record", "spec"]

HALF = torch.float16
Seen = dict[str, torch.Tensor]


def spec(heads: int, width: int, dtype: torch.dtype = torch.float16, **options: Any) -> CacheSpec:
    return CacheSpec.kv(num_layers=1, num_kv_heads=heads, head_dim=width, dtype=dtype, **({"block_size": 64} | options))


def cases() -> list[Case]:
    """``extra["sizes"]``: of the allocator; a page of the virtual backend has to hold blocks of 64 tokens whole."""
    return [_case(*each) for each in ((HALF, 2, 32, 1, 1e-2), (HALF, 4, 16, 3, 3e-3), (torch.bfloat16, 1, 64, 1, 8e-2))]


def _case(dtype: torch.dtype, heads: int, width: int, guard: int, tolerance: float) -> Case:
    def values(layer: int, ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        both = hidden_states(ids, positions, 2 * heads * width, layer=layer).view(-1, 2, heads, width)
        both[:, 0, :, :3] *= 16  # outliers, beside which the other channels of K need fewer bits
        return both[:, 0], both[:, 1]

    def plain(layer: int, ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = values(layer, ids, positions)
        return k.to(dtype).double(), v.to(dtype).double()

    layout = AlignedKV(spec(heads, width, dtype), guard=guard)
    each = 2 * heads * width * dtype.itemsize
    name, sizes = f"aligned {str(dtype)[6:]} guard {guard}", {"page_bytes": 16384, "max_tokens": 2048}
    return Case(
        name, layout, 4, width, values, plain, tolerance, each, 128 / 129, blockwise=True, extra={"sizes": sizes}
    )


class Held:
    """One sequence that grows, beside what was written of it."""

    def __init__(self, layout: AlignedKV, backend: str = "paged", **options: Any) -> None:
        sizes = {"memory": "64MiB", "max_sequences": 4, "max_tokens": 4096}
        self.alloc = Allocator(layout.spec, backend=backend, device="cpu", **(sizes | options))
        self.layout, self.cache = layout, LayoutCache(layout, self.alloc)
        self.seq, self.ids = self.alloc.sequence(), count()  # a fork has other tokens, so it has other ids
        k = layout.spec.groups[0].component("k")
        self.k, self.v = torch.zeros(2, 0, k.heads_at(0), k.widths_at(0)[0], dtype=layout.dtype)

    def add(self, k: torch.Tensor, v: torch.Tensor, drafts: int = 0) -> None:
        """Write these tokens as one chunk; the last ``drafts`` are taken back."""
        self.seq.extend(len(k))
        self.cache.write(0, self.alloc.batch([self.seq]), k, v)
        k, v = k[: len(k) - drafts], v[: len(v) - drafts]
        self.seq.truncate(len(self.k) + len(k))
        self.seq.commit(list(islice(self.ids, len(k))))
        self.k, self.v = torch.cat((self.k, k.to(self.k.dtype))), torch.cat((self.v, v.to(self.v.dtype)))

    def reader(self) -> TokenReader:
        return self.cache.readers(0, self.alloc.batch([self.seq], new_tokens=[0]))[0]

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
