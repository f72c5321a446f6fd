"""A batch whose rows all have the same length, read as one dense tensor, as models expect it.

Each row is a sequence of an allocator. If the rows lie at equal distances (virtual backend), the tensor is a strided
view of the cache; otherwise, and on the paged backend, reading copies.
"""

from __future__ import annotations

import weakref
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from kvmem.allocator import Allocator
from kvmem.allocator.batch import GroupBatch
from kvmem.allocator.sequence import Sequence
from kvmem.errors import KVMemError, OutOfMemory, SpecError
from kvmem.geometry.views import plain

__all__ = ["EVERY", "BlockPlace", "DenseBatch", "RowPlace", "memory_of"]

#: In place of a group's index: all groups that grow with the tokens, as in the core.
EVERY = -1

#: A layer's number, and the first component that it writes there.
LayerKey = tuple[int, str]


def memory_of(alloc: Allocator, layer: int, component: str) -> torch.Tensor:
    """Return one component of a layer as ``RowPlace`` or ``BlockPlace`` reads it: its rows, or its blocks."""
    return plain(alloc.rows(layer, component) if alloc.backend == "virtual" else alloc.tensor(layer, component))


class RowPlace:
    """Where one group's tokens lie on the virtual backend. ``memory`` is ``Allocator.rows()``.

    slots: int64 [B, n], the flat slots of the n tokens of each row that are not committed.
    num_blocks: the least number of blocks that ``memory`` must have; 0, as rows have a fixed size. batch: the metadata.
    step: what an integration keeps as long as the place is valid.
    """

    num_blocks = 0
    step: Any = None

    def __init__(self, batch: GroupBatch, rows: list[int]) -> None:
        self.slots, self.batch = _by_row(batch.slot_mapping, len(rows)), batch
        self._rows = rows
        step = rows[1] - rows[0] if len(rows) > 1 else 1
        even = step > 0 and all(b - a == step for a, b in pairwise(rows))
        self._slice = slice(rows[0], rows[-1] + 1, step) if even else None

    def read(self, memory: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """Return tokens ``[first, end)`` of every row, ``[B, end - first, heads, width]``.

        A view if the rows lie at equal distances, else a copy. Other tokens may be unmapped, and are not read.
        """
        if self._slice is not None:
            return memory[self._slice, first:end]
        # memory[rows] is ten times slower, since torch walks a strided source element by element.
        return torch.stack([memory[row, first:end] for row in self._rows])


class BlockPlace:
    """Where they lie on the paged backend, as ``RowPlace``. ``memory`` is ``Allocator.tensor()``."""

    step: Any = None

    def __init__(self, batch: GroupBatch, num_rows: int) -> None:
        self.slots, self.batch = _by_row(batch.slot_mapping, num_rows), batch
        self._blocks = batch.block_table.long()
        self._block_size = batch.block_size
        self.num_blocks = int(batch.kv_indices_cpu.max()) + 1 if batch.num_indices else 0

    def read(self, memory: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """Return the same as ``RowPlace.read``; always a copy."""
        size = self._block_size
        blocks = self._blocks[:, first // size : -(-end // size)]
        found = memory.index_select(0, blocks.flatten())
        tokens = found.view(blocks.shape[0], -1, *memory.shape[2:])
        return tokens[:, first % size : first % size + end - first]


def _by_row(slots: torch.Tensor, num_rows: int) -> torch.Tensor:
    return slots.view(num_rows, slots.numel() // num_rows)


class DenseBatch:
    """``B`` sequences of ``alloc`` that are extended, truncated and forked together, and what each layer has written.

    A group's index, or ``EVERY``, says which tokens a call is about: a group that is fixed after prefill has a length
    of its own. Tokens are committed when every layer has written them: by the next ``extend``, or by ``commit``.
    The sequences are freed when this object is collected.

    max_rows: the largest B; default the allocator's ``max_sequences``.
    """

    def __init__(self, alloc: Allocator, max_rows: int | None = None) -> None:
        self.alloc = alloc
        self.max_rows = alloc.max_sequences if max_rows is None else max_rows
        #: While True, tokens of sliding windows are committed only by ``commit()``, so ``truncate`` can remove them.
        self.recording = False
        self._has_windows = any(g.window_tokens is not None for g in alloc.spec.groups)
        self.dense = False  # True if what is read must be contiguous, for a model that calls ``view`` on it
        self.config: Any = None  # the model's, which names its attention, if it is known
        self.placeholders: dict[str, int] = {}  # ids that stand for images, audio or video, by name in the config
        self.more_than_ids = False  # True if the KV of every token depends on inputs without ids
        #: How many tokens each layer has written. Kept here, so that removing tokens removes them for all layers.
        self.written: dict[LayerKey, int] = {}
        self._layers: dict[int, list[LayerKey]] = {}  # by group
        self._ids: list[int] = []
        self._tokens, self._committed = dict[int, int](), dict[int, int]()
        self._known: np.ndarray | None = None  # the ids of the first tokens of each row, int32 [B, n]
        self._places: list[RowPlace | BlockPlace] | None = None
        weakref.finalize(self, _free, alloc, self._ids).atexit = False

    def add_layer(self, group: int, key: LayerKey) -> None:
        """Declare that tokens of ``group`` are complete only when this layer, too, has written them."""
        self._layers.setdefault(group, []).append(key)
        self.written.setdefault(key, 0)

    @property
    def num_rows(self) -> int:
        """B, the number of open sequences; 0 while the cache is empty."""
        return len(self._ids)

    def num_tokens(self, group: int = EVERY) -> int:
        """Return the tokens of each row, reserved ones included."""
        return self._tokens.get(group, 0)

    def num_complete(self, group: int = EVERY) -> int:
        """Return how many tokens every layer has written."""
        return min((self.written[key] for key in self._layers.get(group, ())), default=self.num_tokens(group))

    def begin(self, ids: np.ndarray, padding: list[int], salt: str | bytes | None, load: str = "host") -> int:
        """Open a row for each of ``ids``, int32 [B, tokens]; return how many cached tokens all of them start with.

        The ids are committed with the tokens. padding: for each row, how many ids at its start are padding, on which
        the KV of later tokens depends. load: ``"all"`` waits for lower tiers. An error changes nothing.
        """
        if self._ids:
            raise SpecError(f"begin: the cache holds {self.num_tokens()} tokens of {self.num_rows} rows; reset() it")
        self._check_rows(len(ids))
        keys = [[(0, f"{count} tokens of padding")] if count else None for count in padding]
        prompts = list(zip(ids, keys, strict=True))
        if load == "all":
            for load_of_row in [self.alloc.prefetch(row, salt=salt, extra_key=key) for row, key in prompts]:
                load_of_row.wait()
        found = min(self.alloc.match(row, salt=salt, extra_key=key).num_tokens for row, key in prompts)
        found = min(found, ids.shape[1] - 1)
        while True:
            opened = self._open(found, prompts, salt)
            least = min(sequence.num_cached_tokens for sequence in opened)
            if all(sequence.num_cached_tokens == least for sequence in opened):
                break
            # A shorter prefix may be out of window. Rows are opened again, because truncate() would evict the rest.
            self.alloc.free_batch(np.array([sequence.id for sequence in opened], np.int32))
            found = least
        self._ids.extend(sequence.detach() for sequence in opened)
        self._known = ids
        if least:
            self._tokens[EVERY] = self._committed[EVERY] = least
            self.written.update(dict.fromkeys(self._layers.get(EVERY, ()), least))
        return least

    def _open(self, found: int, prompts: list[tuple[np.ndarray, Any]], salt: str | bytes | None) -> list[Sequence]:
        opened: list[Sequence] = []
        try:
            for row, key in prompts:  # one token more, since one is always left to compute
                opened.append(self.alloc.sequence(row[: found + 1], salt=salt, extra_key=key))
        except BaseException:
            self.alloc.free_batch(np.array([sequence.id for sequence in opened], np.int32))
            raise
        return opened

    def extend(self, group: int, num_rows: int, count: int) -> None:
        """Make room for ``count`` more tokens in each row; the first call opens ``num_rows`` rows.

        ``OutOfMemory`` or ``SpecError``, and no token has changed, if that does not fit.
        """
        opened = not self._ids
        if opened:
            self._check_rows(num_rows)
            self._ids.extend(self.alloc.open_batch(num_rows).tolist())
        elif num_rows != len(self._ids):
            raise SpecError(
                f"got a batch of {num_rows}; the cache holds tokens of a batch of {len(self._ids)}: reset() it, or "
                "change its rows with batch_repeat_interleave() or batch_select_indices()"
            )
        due = 0 if self._holds_back(group) else self.num_complete(group)
        try:
            self._reserve(group, count, due)
        except KVMemError:
            if opened:
                self.free()
            raise
        self._commit(group, due)

    def _reserve(self, group: int, count: int, due: int) -> None:
        """Reserve before committing: if there is no room, the last step can still be removed, windows included."""
        handles, counts = self._handles(), self._counts(count)
        try:
            self.alloc.core.extend_batch(handles, counts, group)
        except OutOfMemory:
            if not self._commit(group, due):
                raise
            self.alloc.core.extend_batch(handles, counts, group)  # in blocks that are out of window now
        self._tokens[group] = self.num_tokens(group) + count
        self._places = None

    def take_back(self, group: int, num_tokens: int) -> None:
        """Undo an ``extend`` whose tokens no layer has written. Room in a group that is fixed after prefill stays."""
        if not any(self.written.values()) and self._known is None:
            self.free()
        elif group == EVERY and self.num_tokens() > num_tokens:
            self._cut(num_tokens)

    def place(self, group: int) -> RowPlace | BlockPlace:
        """Return where the tokens of group number ``group`` lie, valid until they next change."""
        if self._places is None:
            self._places = [
                BlockPlace(each, len(self._ids)) if each.rows_cpu is None else RowPlace(each, each.rows_cpu.tolist())
                for each in self.alloc.batch(self._handles()).groups
            ]
        return self._places[group]

    def commit(self, *, recorded: bool = True) -> None:
        """Commit what every layer has written; with ``recorded=False`` except what is held back while recording."""
        for group in self._tokens:
            if recorded or not self._holds_back(group):
                self._commit(group, self.num_complete(group))

    def _holds_back(self, group: int) -> bool:
        return self.recording and self._has_windows and group == EVERY

    def _commit(self, group: int, num_tokens: int) -> bool:
        count = num_tokens - self._committed.get(group, 0)
        if count <= 0:
            return False
        known = self._known_until(group, num_tokens)
        if known is not None:
            self.alloc.commit_batch(self._handles(), self._counts(known.shape[1]), known.flatten())
            count -= known.shape[1]
        if count:
            self.alloc.core.commit_batch(self._handles(), self._counts(count), group)
        self._committed[group] = num_tokens
        self._places = None
        return True

    def _known_until(self, group: int, num_tokens: int) -> np.ndarray | None:
        """Return the known ids of the tokens that are to be committed, or None."""
        if self._known is None or group != EVERY:
            return None
        ids = self._known[:, self._committed.get(EVERY, 0) : num_tokens]
        return ids if ids.size else None

    def truncate(self, num_tokens: int) -> None:
        """Keep the first ``num_tokens`` tokens of each row, and commit those that every layer has written. Rows that
        then hold nothing are freed.

        ``SpecError``, and nothing has changed, if a query would need tokens that are out of window.
        """
        if num_tokens < self.num_tokens():
            self._cut(num_tokens)
            if self._known is not None:
                self._known = self._known[:, :num_tokens]  # later tokens may differ
            for key in self._layers.get(EVERY, ()):
                self.written[key] = min(self.written[key], num_tokens)
        if any(self._tokens.values()):
            self.commit()
        else:
            self.free()

    def _cut(self, num_tokens: int) -> None:
        for handle in self._ids:  # rows are alike: if any is refused, the first one is
            self.alloc.core.truncate(handle, num_tokens)
        self._tokens[EVERY] = num_tokens
        self._committed[EVERY] = min(self._committed.get(EVERY, 0), num_tokens)
        self._places = None

    def rearrange(self, parents: list[int]) -> None:
        """Make row i a copy of what row ``parents[i]`` is now; with no parents, free all rows.

        The first child of a row keeps its sequence, and further ones are forks, which share all but the last page or
        block, and copy what ``recording`` holds back. Forks need memory and sequences before dropped rows are freed:
        ``OutOfMemory``, and nothing has changed, if there is none. ``SpecError`` if a step is half done.
        """
        if parents == list(range(len(self._ids))):
            return
        if not parents:
            self.free()
            return
        self._check_rows(len(parents))
        self.check_complete()
        first = {parent: row for row, parent in reversed(list(enumerate(parents)))}
        forked = iter(self._fork([self._ids[parent] for row, parent in enumerate(parents) if first[parent] != row]))
        children = [self._ids[p] if first[p] == row else next(forked) for row, p in enumerate(parents)]
        _free(self.alloc, [handle for row, handle in enumerate(self._ids) if row not in first])
        self._ids[:] = children
        if self._known is not None:
            self._known = self._known[parents]
        self._places = None

    def fork(self) -> DenseBatch:
        """Return the same tokens in as many new sequences, which share pages or blocks. ``OutOfMemory``, and nothing
        has changed, if there is no room; ``SpecError`` if a step is half done.
        """
        self.check_complete()
        copy = DenseBatch(self.alloc, self.max_rows)
        copy._ids.extend(self._fork(self._ids))
        copy.recording, copy.dense, copy.placeholders = self.recording, self.dense, self.placeholders
        copy.more_than_ids, copy.config = self.more_than_ids, self.config
        copy._known = self._known
        copy.written.update(self.written)
        copy._tokens.update(self._tokens)
        copy._committed.update(self._committed)
        return copy

    def _fork(self, parents: list[int]) -> list[int]:
        """Return a fork of each of ``parents``, with all its tokens, also those that are held back."""
        self.commit(recorded=False)
        forked: list[int] = []
        try:
            for parent in parents:
                forked.append(self.alloc.core.fork(parent))
            held_back = self.num_tokens() - self._committed.get(EVERY, 0)
            if forked and held_back:
                self._copy_tail(parents, forked, held_back)
        except BaseException:  # also torch's, from the copy
            _free(self.alloc, forked)
            raise
        return forked

    def _copy_tail(self, parents: list[int], children: list[int], count: int) -> None:
        """Copy the last ``count`` tokens of each parent, which are not committed, to its child, a fork without them.

        ``OutOfMemory``, and no child has grown, if there is no room. Costs a gather and a scatter for each component of
        each layer.
        """
        alloc, sources = self.alloc, list(dict.fromkeys(parents))
        alloc.core.extend_batch(np.array(children, np.int32), np.full(len(children), count, np.int32), EVERY)
        batch = alloc.batch([*sources, *children])
        for index, group in enumerate(alloc.spec.groups):
            if group.growth != "token":
                continue
            slots = batch.groups[index].slot_mapping.view(len(sources) + len(children), count)
            old = slots[[sources.index(parent) for parent in parents]].flatten()
            new = slots[len(sources) :].flatten()
            for component in group.components:
                for layer in group.layers[:1] if component.scope == "shared" else group.layers:
                    memory = memory_of(alloc, layer, component.name)
                    tokens = memory.view(-1, *memory.shape[2:])
                    tokens[new] = tokens[old]

    def check_complete(self, group: int | None = None) -> None:
        """Raise ``SpecError`` if some layers have tokens of ``group``, or of any group (None), that others lack."""
        for each in list(self._tokens) if group is None else [group]:
            held, complete = self.num_tokens(each), self.num_complete(each)
            if complete != held:
                way = f"crop({complete - held}) takes that back, " if each == EVERY else ""
                raise SpecError(
                    f"a step stopped half-way: some layers hold {held} tokens, others {complete}; {way}reset() empties "
                    "the cache. A caller that writes tokens itself gives them to every layer before the next tokens"
                )

    def free(self) -> None:
        """Free the sequences: no layer holds anything, and the next ``extend`` opens new ones."""
        _free(self.alloc, self._ids)
        self.written.update(dict.fromkeys(self.written, 0))
        self._tokens.clear()
        self._committed.clear()
        self._known = None
        self._places = None

    def trim(self) -> None:
        """Return parked memory to the system."""
        if not self.alloc.closed:
            self.alloc.trim()

    def _check_rows(self, num_rows: int) -> None:
        if num_rows < 1:
            raise SpecError("got a batch of 0 rows; a cache stores 1 or more: leave out the call when no row is left")
        if num_rows > self.max_rows:
            raise SpecError(
                f"got a batch of {num_rows}, beams and returned sequences included; the cache was made for "
                f"{self.max_rows}: use a smaller batch or fewer beams, or raise max_batch"
            )

    def _handles(self) -> np.ndarray:
        return np.array(self._ids, np.int32)

    def _counts(self, count: int) -> np.ndarray:
        return np.full(len(self._ids), count, np.int32)


def _free(alloc: Allocator, ids: list[int]) -> None:
    if ids and not alloc.closed:  # close() has freed them
        alloc.free_batch(np.array(ids, np.int32))
    ids.clear()
