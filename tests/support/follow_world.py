"""A leader without memory and a replica that follows its ops: the lockstep of prefix sharing, whose tokens are written
to the replica and read there. What is written follows from the tokens before it, so equal prefixes hold equal bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from contents import by_table, write_slots
from lockstep_prefix import PrefixLockstep
from support_world import PAGE

import kvmem
from kvmem import CacheSpec, Component, Group
from kvmem.allocator.ops import Op


def full_spec() -> CacheSpec:
    """Two arenas of 192 bytes a token, so that tokens straddle pages."""
    return CacheSpec.kv(num_layers=2, num_kv_heads=1, head_dim=24, dtype=torch.float32, block_size=4)


def hybrid_spec() -> CacheSpec:
    """Full attention, a sliding window, and a state of more than a page."""

    def kv(width: int) -> tuple[Component, Component]:
        return tuple(Component(n, heads=1, width=width, dtype=torch.float32) for n in "kv")

    state = Component("state", heads=2, width=600, dtype=torch.float32, growth="fixed")
    return CacheSpec(
        (Group("full", kv(64), (0,)), Group("window", kv(16), (1,), window_tokens=10), Group("state", (state,), (2,))),
        block_size=4,
    )


SPECS = {"full": full_spec, "hybrid": hybrid_spec}


def make(name: str, backend: str, **options: Any) -> kvmem.Allocator:
    sizes = {"memory": 60 * PAGE, "page_bytes": PAGE, "interleave": 1, "max_sequences": 6, "max_tokens": 100}
    return kvmem.Allocator(SPECS[name](), backend=backend, **{**sizes, **options})


def make_leader(name: str, backend: str, **options: Any) -> kvmem.Allocator:
    return make(name, backend, device="meta", record_ops=True, **options)


class Following(PrefixLockstep):
    """Ops are handed over before anything is written or read, so in lists of one call and of several. ``journal``: all that
    a replica has been given, to bring another one to the same state."""

    def __init__(self, name: str, backend: str, *, shares: bool = True, **options: Any) -> None:
        super().__init__(make_leader(name, backend, prefix_cache=shares, **options))
        if not shares:
            self.model.stop_sharing()
        self._make = lambda: make(name, backend, **options)
        self.memory = self._make()
        self.journal: list[tuple[Any, ...]] = []
        self._unseen: list[Op] = []
        if self.pages is not None:
            self.pages.take = self._take

    def _take(self) -> list[Op]:
        self.hand_over()
        taken, self._unseen = self._unseen, []
        return taken

    def hand_over(self) -> None:
        ops = self.alloc.take_ops()
        self._unseen += ops
        if ops:
            self.deliver([list(op) for op in ops])

    def deliver(self, ops: list[list[Any]]) -> None:
        self.memory.apply(ops)
        self.journal.append((ops,))

    def put(self, *written: Any) -> None:
        super().put(*written)
        self.journal.append(written)

    def start_replica_again(self) -> None:
        self.memory = self._make()
        for entry in self.journal:
            if len(entry) == 1:
                self.memory.apply(entry[0])
            else:
                write_slots(self.memory, *entry)


def all_held(alloc: kvmem.Allocator) -> dict[tuple[int, int], dict[int, bytes]]:
    """The bytes of each live token, by sequence and group, and position."""
    found: dict[tuple[int, int], dict[int, bytes]] = {}
    for handle in alloc.core.handles():
        for g in range(len(alloc.spec.groups)):
            first, end = alloc.core.first_token(handle, g), alloc.core.tokens(handle, g)
            rows = torch.cat(list(by_table(alloc, [handle], g)), 1).numpy() if end > first else []
            found[handle, g] = {first + i: row.tobytes() for i, row in enumerate(rows)}
    return found


def write_all(alloc: kvmem.Allocator, handle: int, writer: int = 1) -> None:
    """Patterns in all that a sequence holds."""
    batch = alloc.batch([handle])
    for g, group in enumerate(alloc.spec.groups):
        positions = torch.arange(alloc.core.first_token(handle, g), alloc.core.tokens(handle, g))
        slots = slots_of(batch.group(g).block_table[0], positions, group.block_size)
        write_slots(alloc, g, slots, np.full(len(positions), writer), positions.numpy())


def slots_of(table: torch.Tensor, positions: torch.Tensor, size: int) -> torch.Tensor:
    return table.long()[positions // size] * size + positions % size
