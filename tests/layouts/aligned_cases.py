"""AlignedKV as cases of the suite, and what its own tests share: a sequence in a cache, and bits that were not read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from layout_case import Case, hidden_states

from kvmem import Allocator, Batch, CacheSpec, Sequence
from kvmem.layouts import LayoutCache, TokenReader, aligned
from kvmem.layouts.aligned import AlignedKV

__all__ = ["Held", "Seen", "cases", "flip_unread", "record", "spec"]


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


class Seen:
    """The levels that ``attend`` chose, and the statistics that it chose them by."""

    key: torch.Tensor
    value: torch.Tensor
    largest: dict[str, torch.Tensor]


def record(monkeypatch: pytest.MonkeyPatch) -> Seen:
    seen = Seen()
    seen.largest = {}

    def watch(name: str, largest_at: int) -> Callable[..., torch.Tensor]:
        rule = getattr(aligned, f"{name}_levels")

        def watched(*args: Any) -> torch.Tensor:
            levels: torch.Tensor = rule(*args)
            setattr(seen, name, levels)
            seen.largest[name] = args[largest_at]
            return levels

        return watched

    monkeypatch.setattr(aligned, "key_levels", watch("key", 1))
    monkeypatch.setattr(aligned, "value_levels", watch("value", 2))
    return seen


def flip_unread(held: Held, seen: Seen) -> int:
    """Flip every bit of the sequence's blocks that no level asks for; return the bytes of K and V that were asked for.

    The addresses are counted out byte by byte, independently of the layout.
    """
    heads, width = seen.key.shape
    length, tokens = held.reader().length, 64
    complete, channels = length // tokens, heads * width
    ids = held.reader().blocks("k", 0, -(-length // tokens))[1]
    read = torch.zeros(len(ids), tokens, 4, channels // 2, dtype=torch.bool)  # halves of the high plane, mid, low
    bytes_of_plane = {0: (0, 2 * (channels // 2)), 1: (channels, channels // 2), 2: (channels * 3 // 2, channels // 2)}
    read_k, read_v = read.view(len(ids), tokens, -1).clone(), read.view(len(ids), tokens, -1).clone()
    for plane, (start, row) in bytes_of_plane.items():
        burst = tokens if plane == 0 else tokens // 2
        for channel in range(channels):
            if seen.key.flatten()[channel] >= plane:
                at, offset = divmod(channel * burst, row)
                read_k[:complete, at, start + offset : start + offset + burst] = True
        size = width if plane == 0 else width // 2
        for head in range(heads):
            begin = start + head * size
            asked = torch.zeros(len(ids) * tokens, dtype=torch.bool)
            asked[:length] = seen.value[:, head] >= plane
            read_v[:, :, begin : begin + size] |= asked.view(len(ids), tokens, 1)
    for name, asked in (("k", read_k), ("v", read_v)):
        cells, here = held.reader().blocks(name, 0, len(ids))
        cells[here] ^= (~asked).to(torch.uint8).unsqueeze(2) * 255
    statistics, here = held.reader().blocks("max_exponent", complete, len(ids))
    statistics[here] ^= 255
    return int(read_k.sum() + read_v.sum())
