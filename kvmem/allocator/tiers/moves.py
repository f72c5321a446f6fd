"""Reads the core's queue of moves: which blocks the index has, and which host slots have got which of them."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np

from kvmem import _core
from kvmem.allocator.tiers.events import Facts, TierEvents
from kvmem.allocator.tiers.loads import Block
from kvmem.events.digests import decode_key
from kvmem.tiers.keys import BlockKeys

__all__ = ["Batch", "Moves", "Node"]

_STORED, _CLEARED, _KEPT = 0, 2, 3  # EventKind in csrc/index/events.h


class Node(NamedTuple):
    """What is known of a node of the core's index. facts: None without events."""

    digest: bytes
    facts: Facts | None


class Batch(NamedTuple):
    """A batch of moves that is read. Applying it again does no harm, so a signal may end a call at any line."""

    number: int
    nodes: dict[int, Node]
    kept: deque[tuple[Block, Facts | None]]
    lossy: bool  # moves before it were lost


class Moves:
    """Names the nodes of the core's index by the keys of their blocks. Not thread-safe: its owner holds a lock."""

    def __init__(self, keys: BlockKeys) -> None:
        self._keys, self._known = keys, dict[int, Node]()

    def read(
        self,
        number: int,
        records: _core.EventRecords,
        roots: dict[int, tuple[bytes, bytes]],
        events: TierEvents | None,
    ) -> Batch:
        """Return what a batch of ``core.drain_moves()`` says. Changes nothing: ``learn()`` does."""
        batch = Batch(number, {}, deque(), _CLEARED in records.kinds)
        tokens, tags, row = np.ascontiguousarray(records.tokens, "<i4"), records.tags, 0
        keys = {number: (decode_key(salt), decode_key(adapter)) for number, (salt, adapter) in roots.items()}
        starts = {number: self._keys.root(*names) for number, names in keys.items()}
        columns = (records.kinds, records.nodes, records.parents, records.roots, records.groups, records.ordinals)
        for kind, node, parent, root, group, ordinal in zip(*(c.tolist() for c in columns), strict=True):
            if kind == _STORED:
                before = None if parent < 0 else batch.nodes.get(parent) or self._known[parent]
                digest, tag = starts[root] if before is None else before.digest, tags[row] or b""
                facts = None
                if events is not None:
                    facts = events.facts(before and before.facts, keys[root], ordinal, tokens[row].tobytes(), tag)
                batch.nodes[node] = Node(self._keys.block(digest, tokens[row].data, tag), facts)
                row += 1
            elif kind == _KEPT:
                known = batch.nodes.get(node) or self._known[node]
                batch.kept.append((Block(group, known.digest, (ordinal, parent)), known.facts))
        return batch

    def learn(self, batch: Batch) -> None:
        """Nodes of later batches may follow those of this one."""
        self._known.update(batch.nodes)
