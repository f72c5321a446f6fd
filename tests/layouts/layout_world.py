"""Sequences in an allocator that a layout writes and reads, beside their token ids: the model of the suite."""

from __future__ import annotations

import torch
from layout_case import Case

from kvmem import Allocator, Sequence
from kvmem.layouts import LayoutCache
from kvmem.layouts.attention import attend_tile

__all__ = ["World"]


class World:
    """An allocator, its layout, and the ids of each sequence. Every attention is checked when it is computed."""

    def __init__(self, case: Case, backend: str, seed: int, **options: object) -> None:
        sizes: dict[str, object] = {"memory": "8MiB", "max_sequences": 16, "max_tokens": 512, "page_bytes": 4096}
        self.case = case
        sizes |= case.extra.get("sizes", {})
        self.alloc = Allocator(case.layout.spec, backend=backend, device="cpu", **(sizes | options))  # type: ignore[arg-type]
        self.cache = LayoutCache(case.layout, self.alloc)
        self.random = torch.Generator().manual_seed(seed)
        self.ids: dict[Sequence, list[int]] = {}
        self.block = max(g.block_size for g in case.layout.spec.groups)
        self.layers = [n for n in range(case.layout.spec.num_layers) if case.layout.spec.layer_components(n)]

    def number(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=self.random))

    def some(self, count: int) -> list[int]:
        return torch.randint(0, 1000, (count,), generator=self.random).tolist()

    def open(self, prompt: list[int]) -> Sequence:
        """A sequence with the whole prompt written; what was cached is not written again."""
        seq = self.alloc.sequence(prompt)
        self.ids[seq] = prompt[: seq.num_cached_tokens]
        self.grow([seq], [prompt[seq.num_cached_tokens :]])
        return seq

    def grow(self, sequences: list[Sequence], new: list[list[int]], keep: int | None = None) -> None:
        """Extend by these ids, write them in every layer, attend, and commit.

        keep: how many of each are accepted; the rest are draft tokens that are taken back before the commit.
        """
        counts = [len(ids) for ids in new]
        self.alloc.extend_batch([seq.id for seq in sequences], counts)
        self.write(self.alloc, self.cache, sequences, new)
        for seq, ids in zip(sequences, new, strict=True):
            self.ids[seq] = self.ids[seq] + ids
        self.attend(sequences, counts)
        for seq, ids in zip(sequences, new, strict=True):
            accepted = ids[:keep]
            self.ids[seq] = self.ids[seq][: len(self.ids[seq]) - len(ids) + len(accepted)]
            if len(accepted) < len(ids):
                seq.truncate(len(self.ids[seq]))
            seq.commit(accepted)

    def write(self, alloc: Allocator, cache: LayoutCache, sequences: list[Sequence], new: list[list[int]]) -> None:
        batch = alloc.batch([seq.id for seq in sequences], new_tokens=[len(ids) for ids in new])
        flat = torch.tensor([i for ids in new for i in ids])
        for layer in self.layers:
            cache.write(layer, batch, *self.case.values(layer, flat, batch.positions.long()))

    def attend(self, sequences: list[Sequence], counts: list[int]) -> None:
        """A step's attention equals the reference over the model's plain K and V."""
        batch = self.alloc.batch([seq.id for seq in sequences], new_tokens=counts)
        q = self.queries(sum(counts))
        for layer in self.layers:
            out, _ = self.cache.attend(q, layer, batch)
            begin = 0
            for seq, count in zip(sequences, counts, strict=True):
                self._compare(layer, self.ids[seq], q[begin : begin + count], out[begin : begin + count])
                begin += count

    def check(self, sequences: list[Sequence]) -> None:
        self.check_in(self.alloc, self.cache, sequences)

    def check_in(self, alloc: Allocator, cache: LayoutCache, sequences: list[Sequence]) -> None:
        """The attention of the last token of each sequence, between steps."""
        batch = alloc.batch([seq.id for seq in sequences], new_tokens=[0] * len(sequences))
        q = self.queries(1)
        for layer in self.layers:
            for seq, reader in zip(sequences, cache.readers(layer, batch), strict=True):
                out, _ = self.case.layout.attend(q, reader)
                # The token's own window may begin before the first token that the next one sees.
                self._compare(layer, self.ids[seq], q, out, reader.first)

    def queries(self, count: int) -> torch.Tensor:
        return torch.randn(count, self.case.query_heads, self.case.head_dim, generator=self.random, dtype=torch.float64)

    def _compare(self, layer: int, ids: list[int], q: torch.Tensor, out: torch.Tensor, held: int = 0) -> None:
        out = self.case.finish(layer, out)
        k, v = self.case.plain(layer, torch.tensor(ids), torch.arange(len(ids)))
        window = self.case.layout.spec.groups[0].window_tokens if len(self.case.layout.spec.groups) == 1 else None
        for n in range(len(q)):
            end = len(ids) - len(q) + n + 1
            first = 0 if window is None else max(held, end - window)
            wanted, _ = attend_tile(q[n : n + 1], k[first:end], v[first:end], first=first, length=end)
            error = (out[n].double() - wanted[0]).abs().max() / wanted.abs().max()
            assert error <= self.case.tolerance, f"layer {layer}, token {end - 1} of {len(ids)}: {error:.2e}"
