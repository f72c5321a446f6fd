"""What attention of a layer will read: which bytes, in which order, and whether they are still there later."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from kvmem.allocator.batch import GroupBatch
from kvmem.allocator.ids import several
from kvmem.allocator.prefetch.ranges import ADDRESS, COUNT, STRIDE, Ranges, expand, first_seen
from kvmem.allocator.sequence import Sequence
from kvmem.allocator.tensors import TensorCalls
from kvmem.errors import SpecError, StaleHandle

if TYPE_CHECKING:
    from kvmem import _core
    from kvmem.allocator.prefetch.ranges import Int64s
    from kvmem.arguments import Handles

__all__ = ["ReadCalls", "ReadSet"]

GROUP, HANDLE, SLOT = range(3)
_ROUNDS = 4  # after which other threads change too much for a hint
_SLOTS = 1 << 43  # more than the token slots of any group: 100 TiB of addresses, 16 bytes a token


class ReadSet(Ranges):
    """The bytes that attention of a layer reads, as ``Allocator.read_set()`` returns them. Rows have a piece a token.

    where: int64 [n, 3], for each row: the group, the handle of the sequence that reads it (the first in order, where
        several do), and the slot of its first token (``block * block_size + offset``).
    changes: the number of the allocator's changes when this was true.
    """

    def __init__(self, rows: Int64s, where: Int64s, core: _core.Allocator, changes: int) -> None:
        super().__init__(rows)
        self.where, self.core, self.changes = where, core, changes

    def _part(self, source: Int64s, rows: Int64s) -> ReadSet:
        where = self.where[source]
        where[:, SLOT] += (rows[:, ADDRESS] - self.rows[source, ADDRESS]) // self.rows[source, STRIDE]
        return ReadSet(rows, where, self.core, self.changes)


class ReadCalls(TensorCalls):
    """The calls of an allocator about what attention reads."""

    def read_set(
        self,
        layer: int,
        sequences: GroupBatch | Iterable[Sequence | int] | Handles,
        *,
        components: Iterable[str] | None = None,
    ) -> ReadSet:
        """Return the bytes that the next step's attention of ``layer`` reads, in the order in which kernels do: one
        sequence after the other, K of a run of tokens before its V; to prefetch them (``kvmem.plan.prefetch``).

        sequences: in the order of the batch, or the batch. components: default all that the layer stores.

        These are the committed tokens, since the step's own are written just before they are read. Tokens that are out
        of window are left out. Memory that several sequences share is there once, for the first of them; on the virtual
        backend to whole blocks of a prefix, and not in groups with a window, where pages tell nothing.

        A snapshot: ``prefetch`` finds what is gone by then. ``StaleHandle`` for a freed sequence; ``DeviceError`` on
        "meta", which has no addresses. Cost: linear in runs of tokens (virtual) or blocks (paged).
        """
        self.core.check_usable()
        if isinstance(sequences, GroupBatch):
            sequences = np.array(sequences.buffers.handles, np.int32)
        ids = several(sequences, self.core)
        ids = ids[np.sort(np.unique(ids, return_index=True)[1])]  # one that is named twice is read once
        changes = self.core.changes  # before the tables are read, which another thread may change meanwhile
        parts = [self._rows(group, ids, np.array(places)) for group, places in self._places(layer, components).items()]
        rows, where = (np.concatenate(p) for p in zip(*parts, strict=True))
        return ReadSet(rows, where, self.core, changes)

    def _places(self, layer: int, components: Iterable[str] | None) -> dict[int, list[list[int]]]:
        """Return of each group of the layer, in order: for each place of adjacent components the address of slot 0, the
        bytes of a token, and the bytes from one token to the next.
        """
        names = [c.name for c in self.spec.layer_components(layer)] if components is None else list(components)
        if not names:
            raise SpecError(f"layer: got {layer}, which stores nothing that could be read")
        found = defaultdict[int, list[list[int]]](list)
        for name in names:
            group = self.spec.group_of(layer, name)
            layout = self._layouts[group]
            if self.spec.groups[group].block_order != "tokens":
                raise SpecError(f"layer: got {layer}; a read set is ranges of tokens, and its blocks are head-major")
            where = layout.slice(layer, name)
            base = self._arena(group, where.arena).data_ptr() + where.offset_bytes
            size, places = where.heads * where.width * where.dtype.itemsize, found[group]
            stride = layout.token_bytes[where.arena]
            if places and sum(places[-1][:2]) == base and stride > places[-1][1]:
                places[-1][1] += size
            else:
                places.append([base, size, stride])
        return found

    def _rows(self, group: int, ids: Handles, places: Int64s) -> tuple[Int64s, Int64s]:
        owner, spans = self._spans(group, ids)
        if self._geometry[group].row_tokens:
            shared = self._shared_tokens(group, ids)
            spans[:, 0] = np.minimum(spans[:, 0] + shared[owner], spans[:, 1])
        else:
            source, spans = first_seen(spans)
            owner = owner[source]
        owner, spans = _runs(owner, spans)
        n, m = len(spans), len(places)
        begin, tokens = np.repeat(spans[:, 0], m), np.repeat(spans[:, 1] - spans[:, 0], m)
        base, size, stride = np.tile(places, (n, 1)).T
        rows = np.stack([base + begin * stride, size, tokens, stride], 1)
        return rows, np.stack([np.full_like(begin, group), np.repeat(ids[owner].astype(np.int64), m), begin], 1)

    def _spans(self, group: int, ids: Handles) -> tuple[Int64s, Int64s]:
        """Return the slots [begin, end) of what the next step reads of each sequence, and its position in ``ids``."""
        core, spec = self.core, self.spec.groups[group]
        tokens, committed = np.empty(len(ids), np.int64), np.empty(len(ids), np.int64)
        core.lengths(ids, group, tokens, committed)
        end, first = tokens if spec.growth == "fixed" else committed, np.zeros(len(ids), np.int64)
        if spec.window_tokens is not None:
            held = np.array([core.first_token(i, group) for i in ids.tolist()], np.int64)
            first = np.minimum(np.maximum(held, end - spec.window_tokens + 1), end)
        owner = np.arange(len(ids))
        if size := self._geometry[group].row_tokens:
            start = np.array([core.row(i, group) for i in ids.tolist()], np.int64) * size
            spans = np.stack([start + first, start + end], 1)
        else:
            tables, size = core.tables(ids), spec.block_size
            if tables is None:
                return np.empty(0, np.int64), np.empty((0, 2), np.int64)
            entries = tables.group(group)
            owner, column, block = (x.astype(np.int64) for x in (entries.rows, entries.columns, entries.blocks))
            begin = np.maximum(first[owner], column * size)
            last = np.minimum(end[owner], (column + 1) * size)
            spans = np.stack([begin, np.maximum(begin, last)], 1) + ((block - column) * size)[:, None]
        full = spans[:, 1] > spans[:, 0]
        return owner[full], spans[full]

    def _shared_tokens(self, group: int, ids: Handles) -> Int64s:
        """Return how many leading tokens of each sequence are the same pages as those of one before it in ``ids``."""
        shared = np.zeros(len(ids), np.int64)
        spec = self.spec.groups[group]
        if len(ids) < 2 or spec.window_tokens is not None or spec.growth == "fixed":
            return shared
        order, common = np.empty(len(ids), np.int64), np.empty(len(ids) - 1, np.int64)
        self.core.cascade_order(ids, group, order)
        self.core.common_blocks(ids[order], group, common)
        # In this order, what two sequences share is the least of what neighbours between them do. So of those before it
        # in `ids`, the nearest on either side shares most with a sequence.
        for step in (1, -1):
            open_: list[tuple[int, int]] = []  # position in ids, and blocks shared with the one looked at
            for member, blocks in zip(order[::step].tolist(), [0, *common[::step].tolist()], strict=True):
                least = blocks
                while open_ and open_[-1][0] > member:
                    least = min(least, open_.pop()[1])
                if open_:
                    shared[member] = max(shared[member], least)
                open_.append((member, least))
        return shared * spec.block_size

    def _still_there(self, planned: ReadSet) -> ReadSet:
        """Return what of ``planned`` its sequences still hold at the same addresses and would read now."""
        core = self.core
        if planned.core is not core:
            raise SpecError("prefetch: the read set is of another allocator, or of one that was closed")
        for _ in range(_ROUNDS):
            if planned.changes == (changes := core.changes):
                return planned
            try:
                found = [self._intersection(planned, group) for group in np.unique(planned.where[:, GROUP]).tolist()]
            except StaleHandle:  # another thread has freed a sequence in between
                continue
            source, rows = (np.concatenate(p) for p in zip(*found, strict=True)) if found else ((), planned.rows)
            part = planned._part(np.asarray(source, np.int64), rows)
            planned = ReadSet(part.rows, part.where, core, changes)
        return planned if planned.changes == core.changes else planned.cut(0)  # type: ignore[return-value]

    def _intersection(self, planned: ReadSet, group: int) -> tuple[Int64s, Int64s]:
        at = np.flatnonzero(planned.where[:, GROUP] == group)
        handles = np.unique(planned.where[at, HANDLE])
        handles = handles[[self.core.is_live(handle) for handle in handles.tolist()]]
        if not len(handles):
            return np.empty(0, np.int64), np.empty((0, 4), np.int64)
        at = at[np.isin(planned.where[at, HANDLE], handles)]
        owner, now = self._spans(group, handles.astype(np.int32))
        now = now + owner[:, None] * _SLOTS  # slots of different sequences are different, even if they are the same
        now = now[np.argsort(now[:, 0])]
        rows = planned.rows[at]
        begin = planned.where[at, SLOT] + np.searchsorted(handles, planned.where[at, HANDLE]) * _SLOTS
        end = begin + rows[:, COUNT]
        first, last = np.searchsorted(now[:, 1], begin, "right"), np.searchsorted(now[:, 0], end, "left")
        source, k = expand(np.maximum(last - first, 0))
        now, begin = now[first[source] + k], begin[source]
        start, rows = np.maximum(now[:, 0], begin), rows[source].copy()
        rows[:, ADDRESS] += (start - begin) * rows[:, STRIDE]
        rows[:, COUNT] = np.minimum(now[:, 1], end[source]) - start
        return at[source], rows


def _runs(owner: Int64s, spans: Int64s) -> tuple[Int64s, Int64s]:
    """Join spans of a sequence that follow each other in memory, and drop empty ones."""
    full = spans[:, 1] > spans[:, 0]
    owner, spans = owner[full], spans[full]
    follows = (owner[1:] == owner[:-1]) & (spans[1:, 0] == spans[:-1, 1])
    starts = np.flatnonzero(np.r_[True, ~follows][: len(spans)])
    ends = np.r_[starts[1:], len(spans)][: len(starts)] - 1
    return owner[starts], np.stack([spans[starts, 0], spans[ends, 1]], 1)
