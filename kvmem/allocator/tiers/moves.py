"""Reads the core's queue of moves: which blocks the index has, and which host slots have got which of them."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np

from kvmem import _core
from kvmem.allocator.tiers.events import Facts, TierEvents
from kvmem.allocator.tiers.loads import Block
from kvmem.events.digests import Key, decode_key
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
        # A call's moves are read behind its copies, when little is in the processor's caches: each step counts.
        rows, tags, row = records.rows(), records.tags, 0
        batch = Batch(number, {}, deque(), any(kind == _CLEARED for kind, *_ in rows))
        tokens = np.ascontiguousarray(records.tokens, "<i4").data.cast("B") if tags else memoryview(b"")
        size = len(tokens) // max(1, len(tags))
        for kind, node, parent, root, group, ordinal in rows:
            if kind == _STORED:
                before = None if parent < 0 else batch.nodes.get(parent) or self._known[parent]
                names = _names(roots[root]) if before is None or events is not None else (None, None)
                digest, tag = self._keys.root(*names) if before is None else before.digest, tags[row] or b""
                block, facts = tokens[row * size : (row + 1) * size], None
                if events is not None:
                    facts = events.facts(before and before.facts, names, ordinal, bytes(block), tag)
                batch.nodes[node] = Node(self._keys.block(digest, block, tag), facts)
                row += 1
            elif kind == _KEPT:
                known = batch.nodes.get(node) or self._known[node]
                batch.kept.append((Block(group, known.digest, (ordinal, parent)), known.facts))
        return batch

    def learn(self, batch: Batch) -> None:
        """Nodes of later batches may follow those of this one."""
        self._known.update(batch.nodes)


def _names(root: tuple[bytes, bytes]) -> tuple[Key, Key]:
    """Salt and adapter."""
    return decode_key(root[0]), decode_key(root[1])
