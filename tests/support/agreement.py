"""An allocator and the reference model of what must be true of it: whether the two agree, in lengths and in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from reference import Model
from support import i32

import kvmem


def model_of(alloc: kvmem.Allocator, kind: type[Model] = Model, **options: Any) -> Any:
    """The reference model of an allocator of these sizes."""
    return kind(
        alloc.spec, virtual=alloc.backend == "virtual", page_bytes=alloc.pool.page_bytes, interleave=alloc.interleave,
        max_sequences=alloc.max_sequences, max_tokens=alloc.max_tokens, guard_tokens=alloc.tail_guard_tokens, **options,
    )  # fmt: skip


class Agreement:
    """What lockstep.py and support_world.py make their calls on."""

    def __init__(self, alloc: kvmem.Allocator, model: Model) -> None:
        self.alloc, self.model, self.virtual = alloc, model, alloc.backend == "virtual"

    @property
    def handles(self) -> list[int]:
        return list(self.model.sequences)

    def lengths_agree(self) -> None:
        handles = self.handles
        assert sorted(handles) == sorted(self.alloc.core.handles())
        tokens, committed = np.empty(len(handles), np.int64), np.empty(len(handles), np.int64)
        for g in range(len(self.model.groups)):
            self.alloc.core.lengths(i32(*handles), g, tokens, committed)
            mine = [self.model.sequences[h][g] for h in handles]
            assert tokens.tolist() == [held.tokens for held in mine]
            assert committed.tolist() == [held.committed for held in mine]
            if self.model.groups[g].window_tokens:
                assert [self.alloc.core.first_token(h, g) for h in handles] == [held.first for held in mine]

    def memory_agrees(self, *, shared_pool: bool = False) -> None:
        stats, page = self.alloc.stats(), self.alloc.pool.page_bytes
        used = stats.used_bytes + stats.cached_beside_bytes
        assert stats.mapped_bytes == used + stats.wasted_bytes + stats.parked_bytes
        assert min(stats.used_bytes, stats.wasted_bytes, stats.parked_bytes, stats.free_bytes) >= 0
        assert stats.used_bytes <= stats.held_bytes <= stats.mapped_bytes - stats.parked_bytes
        if not shared_pool:
            assert stats.created_bytes == stats.mapped_bytes + stats.free_bytes <= stats.budget_bytes  # invariant 1
        assert stats.used_bytes == self.model.used_bytes()
        assert stats.shared_bytes == self.model.shared_bytes()
        assert stats.num_sequences == len(self.model.sequences)
        if self.virtual and self.alloc.map_ahead_tokens == 0:  # else the mapper has mapped more
            assert stats.mapped_bytes - stats.parked_bytes == self.model.needed_pages() * page
