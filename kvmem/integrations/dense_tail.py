"""Copies of tokens that are reserved and written but not committed, which a fork leaves with its parent."""

from __future__ import annotations

import numpy as np

from kvmem.allocator import Allocator
from kvmem.layouts.views import plain

__all__ = ["copy_tail"]


def copy_tail(alloc: Allocator, parents: list[int], children: list[int], count: int, group: int) -> None:
    """Each child, a fork of its parent, gets the parent's last ``count`` tokens too, which none of them has committed.

    group: what to extend, as ``extend_batch`` of the core takes it. ``OutOfMemory``, and no child has grown, when there
    is no room. Costs a gather and a scatter for each component of each layer.
    """
    alloc.core.extend_batch(np.array(children, np.int32), np.full(len(children), count, np.int32), group)
    sources = list(dict.fromkeys(parents))
    batch = alloc.batch([*sources, *children])
    for index, described in enumerate(alloc.spec.groups):
        if described.growth != "token":
            continue
        slots = batch.groups[index].slot_mapping.view(len(sources) + len(children), count)
        old = slots[[sources.index(parent) for parent in parents]].flatten()
        new = slots[len(sources) :].flatten()
        for component in described.components:
            for layer in described.layers[:1] if component.scope == "shared" else described.layers:
                rows = alloc.backend == "virtual"
                memory = plain(alloc.rows(layer, component.name) if rows else alloc.tensor(layer, component.name))
                tokens = memory.view(-1, *memory.shape[2:])
                tokens[new] = tokens[old]
