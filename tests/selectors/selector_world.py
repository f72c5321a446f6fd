"""Sequences whose keys follow from their token ids, written through an allocator with summaries: the model of the suite."""

from __future__ import annotations

import random
from typing import Any

import torch

from kvmem import Allocator, CacheSpec, Sequence
from kvmem.kernels.write import write_kv
from kvmem.selectors import Chooser, Selector

BLOCK, HEADS, WIDTH, LAYERS = 8, 2, 16, 2
SPEC = CacheSpec.kv(num_layers=LAYERS, num_kv_heads=HEADS, head_dim=WIDTH, dtype=torch.float32, block_size=BLOCK)


class World:
    """``tokens``: the ids of each live sequence. Every write is followed by an update and a commit."""

    def __init__(self, selector: Selector, backend: str, seed: int = 0, **options: Any) -> None:
        sizes: dict[str, Any] = {
            "memory": "2MiB",
            "max_sequences": 8,
            "max_tokens": 512,
            "page_bytes": 4096,
            "interleave": "none",
        }
        self.alloc = Allocator(
            selector.extend(SPEC), backend=backend, device="cpu", **(sizes | options)  # type: ignore[arg-type]
        )  # fmt: skip
        self.chooser = Chooser(selector, self.alloc)
        draw = torch.Generator().manual_seed(seed)
        self.table = torch.randn(2, LAYERS, 50, HEADS, WIDTH, generator=draw)
        self.shift = torch.randn(512, 1, 1, generator=draw)
        self.tokens: dict[Sequence, list[int]] = {}

    def kv(self, layer: int, ids: list[int], first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of these ids from position ``first`` on: ``[n, HEADS, WIDTH]``."""
        k, v = self.table[:, layer, torch.tensor(ids, dtype=torch.long)]
        return k + self.shift[first : first + len(ids)], v

    def open(self, prompt: list[int]) -> Sequence:
        sequence = self.alloc.sequence(prompt)
        self.tokens[sequence] = prompt[: sequence.num_cached_tokens]
        self.grow({sequence: prompt[sequence.num_cached_tokens :]})
        return sequence

    def grow(self, new: dict[Sequence, list[int]], commit: bool = True) -> Any:
        """Return the batch of the step."""
        sequences = list(new)
        self.alloc.extend_batch([s.id for s in sequences], [len(ids) for ids in new.values()])
        batch = self.alloc.batch(sequences)
        for layer in range(LAYERS):
            parts = [self.kv(layer, ids, len(self.tokens[s])) for s, ids in new.items()]
            write_kv(self.alloc.kv(layer), batch, *(torch.cat(part) for part in zip(*parts, strict=True)))
            self.chooser.update(layer, batch)
        for sequence, ids in new.items():
            self.tokens[sequence] = self.tokens[sequence] + ids
            if commit:
                sequence.commit(ids)
        return batch

    def fork(self, sequence: Sequence) -> Sequence:
        child = sequence.fork()
        self.tokens[child] = list(self.tokens[sequence])
        return child

    def truncate(self, sequence: Sequence, length: int) -> None:
        sequence.truncate(length)
        self.tokens[sequence] = self.tokens[sequence][:length]

    def free(self, sequence: Sequence) -> None:
        sequence.free()
        del self.tokens[sequence]

    def summary(self, sequence: Sequence, layer: int, component: str) -> torch.Tensor:
        """The numbers of its complete blocks, ``[m, n]``."""
        batch = self.alloc.batch([sequence], new_tokens=[0])
        ids = batch.block_table[0, : len(self.tokens[sequence]) // BLOCK].long()
        return self.alloc.tensor(layer, component)[ids].flatten(1)

    def keys(self, sequence: Sequence, layer: int) -> torch.Tensor:
        """Of its complete blocks, ``[m, BLOCK, HEADS, WIDTH]``."""
        ids = self.tokens[sequence]
        return self.kv(layer, ids[: len(ids) // BLOCK * BLOCK])[0].view(-1, BLOCK, HEADS, WIDTH)

    def random_step(self, rng: random.Random) -> None:
        """Open, grow, cut, fork or free; where memory is short, what is cached is evicted."""
        live = list(self.tokens)
        kind = rng.choice(("open", "grow", "grow", "grow", "cut", "fork", "free")) if live else "open"
        room = self.alloc.max_sequences - len(live)
        if kind in ("open", "fork") and not room:
            kind = "free"
        if kind == "open":
            start = rng.choice(list(self.tokens.values()) or [[]])
            prompt = start[: rng.randrange(len(start) + 1)] + [rng.randrange(50) for _ in range(rng.randint(1, 60))]
            self.open(prompt)
        elif kind == "grow":
            chosen = rng.sample(live, rng.randint(1, len(live)))
            self.grow({s: [rng.randrange(50) for _ in range(rng.choice((1, 1, 2, 9, 30)))] for s in chosen})
        elif kind == "cut":
            self.truncate(one := rng.choice(live), rng.randint(0, len(self.tokens[one])))
        elif kind == "fork":
            self.fork(rng.choice(live))
        else:
            self.free(rng.choice(live))
        for one in [s for s, ids in self.tokens.items() if len(ids) > 400]:
            self.free(one)
