"""Allocators, sequences and addresses for tests of prefetching."""

from __future__ import annotations

import random
from typing import Any

import kvmem
from kvmem import CacheSpec
from kvmem.allocator.prefetch import Ranges

HEADS, WIDTH, BLOCK, LAYERS = 2, 4, 4, 2
LAYOUTS = ["all", "none", 1]


def make(
    backend: str, interleave: Any = "all", window: int | None = None, layers: int = LAYERS, **fields: Any
) -> kvmem.Allocator:
    spec = CacheSpec.kv(
        num_layers=layers, num_kv_heads=HEADS, head_dim=WIDTH, dtype="float32", block_size=BLOCK, window_tokens=window
    )
    settings = dict(device="cpu", memory=4 << 20, max_sequences=12, max_tokens=512, page_bytes=4096) | fields
    return kvmem.Allocator(spec, backend=backend, interleave=interleave, **settings)


def grow(sequence: kvmem.Sequence, n: int, rng: random.Random) -> None:
    sequence.extend(n)
    sequence.commit([rng.randrange(1000) for _ in range(n)])


def bytes_in_order(ranges: Ranges) -> list[int]:
    return [at for begin, end in ranges.pieces().tolist() for at in range(begin, end)]
