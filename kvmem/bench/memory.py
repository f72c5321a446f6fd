"""How the benchmark builds allocators: one place that knows their arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvmem.bench.model import Model
from kvmem.bench.pools import AllocatorPool

if TYPE_CHECKING:
    from kvmem import Allocator

__all__ = ["BACKENDS", "Backend", "Budget", "open_allocator", "open_pool"]

#: As on CUDA, which the books of "meta" stand for.
MAP_AHEAD_TOKENS = 64

Backend = Literal["virtual", "paged"]
BACKENDS: tuple[Backend, ...] = ("virtual", "paged")


@dataclass(frozen=True)
class Budget:
    """What a pool may take: bytes for KV, sequences at once, tokens in the longest one, bytes a physical page."""

    memory_bytes: int
    max_sequences: int
    max_tokens: int
    page_bytes: int


def open_pool(model: Model, backend: Backend, device: str, budget: Budget) -> AllocatorPool:
    """An allocator with all layers of a token side by side: 16 tokens of an 8B model fill a stock 2 MiB page."""
    return AllocatorPool(open_allocator(model, backend, device, budget), backend, budget.max_tokens)


def open_allocator(model: Model, backend: Backend, device: str, budget: Budget) -> Allocator:
    from kvmem import Allocator

    return Allocator(
        model.spec,
        backend=backend,
        device=device,
        memory=budget.memory_bytes,
        max_sequences=budget.max_sequences,
        max_tokens=budget.max_tokens,
        page_bytes=budget.page_bytes,
        interleave="all",
        map_ahead_tokens=MAP_AHEAD_TOKENS if device == "meta" else 0,
        tail_guard_tokens=0,
    )
