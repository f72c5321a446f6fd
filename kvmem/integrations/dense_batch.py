"""A batch whose rows all have one length, read as one rectangle ``[batch, heads, tokens, width]``, which models expect.

Each row is a sequence of an allocator. Where rows of the virtual backend lie at equal distances, the rectangle is a
strided view of the cache and nothing is copied; otherwise, and on the paged backend, reading gathers.
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
from kvmem.integrations.dense_tail import copy_tail

__all__ = ["EVERY", "BlockPlace", "DenseBatch", "RowPlace"]

#: In place of a group's index: every group that grows with the tokens, as for the allocator's own calls.
EVERY = -1

#: A layer's number, and the first component that it writes there.
LayerKey = tuple[int, str]


class RowPlace:
    """Where one group's tokens lie on the virtual backend. ``memory`` is ``Allocator.rows()``, which never changes."""

    num_blocks = 0

    def __init__(self, batch: GroupBatch, rows: list[int]) -> None:
        self.slots = _by_row(batch.slot_mapping, len(rows))
        self._rows = rows
        step = rows[1] - rows[0] if len(rows) > 1 else 1
        even = step > 0 and all(b - a == step for a, b in pairwise(rows))
        self._slice = slice(rows[0], rows[-1] + 1, step) if even else None

    def read(self, memory: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """Tokens ``[first, end)`` of every row, ``[B, end - first, heads, width]``.

        A view where rows lie at equal distances, else a copy. Touches nothing else: it may be unmapped.
        """
        if self._slice is not None:
            return memory[self._slice, first:end]
        # Not memory[rows]: torch walks a strided source element by element there, and is an order of magnitude slower.
        return torch.stack([memory[row, first:end] for row in self._rows])


class BlockPlace:
    """Where they lie on the paged backend. ``memory`` is ``Allocator.tensor()``, of at least ``num_blocks`` blocks."""

    def __init__(self, batch: GroupBatch, num_rows: int) -> None:
        self.slots = _by_row(batch.slot_mapping, num_rows)
        self._blocks = batch.block_table.long()
        self._block_size = batch.block_size
        self.num_blocks = int(batch.kv_indices_cpu.max()) + 1 if batch.num_indices else 0

    def read(self, memory: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """As for ``RowPlace``; always a copy."""
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
    ``max_rows`` bounds B. The sequences are freed with this object.
    """

    def __init__(self, alloc: Allocator, max_rows: int | None = None) -> None:
        self.alloc = alloc
        self.max_rows = alloc.max_sequences if max_rows is None else max_rows
        #: While set, nothing that a sliding window may drop is committed before ``commit()``, so that ``truncate`` can
        #: take it back.
        self.recording = False
        self._has_windows = any(g.window_tokens is not None for g in alloc.spec.groups)
        #: Whether what is read must be dense, for a model that reshapes it without a copy.
        self.dense = False
        #: Ids that stand for images and the like, by the config's name for them.
        self.placeholders: dict[str, int] = {}
        #: Whether the KV of every token depends on inputs that no id stands for.
        self.more_than_ids = False
        #: How many tokens each layer has written. Kept here, so that what removes tokens removes them for all layers.
        self.written: dict[LayerKey, int] = {}
        self._layers: dict[int, list[LayerKey]] = {}  # by the tokens that they write
        self._ids: list[int] = []
        self._tokens: dict[int, int] = {}
        self._committed: dict[int, int] = {}
        self._known: np.ndarray | None = None  # the ids of the first tokens of each row, int32 [B, n]
        self._places: list[RowPlace | BlockPlace] | None = None
        weakref.finalize(self, _free, alloc, self._ids).atexit = False

    def add_layer(self, group: int, key: LayerKey) -> None:
        """Tokens of ``group`` are complete only when this layer, too, has written them."""
        self._layers.setdefault(group, []).append(key)
        self.written.setdefault(key, 0)

    @property
    def num_rows(self) -> int:
        return len(self._ids)

    def num_tokens(self, group: int = EVERY) -> int:
        """Tokens of each row, those reserved last included."""
        return self._tokens.get(group, 0)

    def num_complete(self, group: int = EVERY) -> int:
        """Tokens that every layer has written."""
        return min((self.written[key] for key in self._layers.get(group, ())), default=self.num_tokens(group))

    def begin(self, ids: np.ndarray, padding: list[int], salt: str | bytes | None) -> int:
        """Opens a row for each of ``ids``, int32 [B, tokens], that starts with as many cached tokens as all rows have
        cached; returns how many. The ids are committed with the tokens. ``padding``: how many ids a row begins with
        that stand for nothing; the KV of what follows depends on it. Changes nothing where it raises.
        """
        if self._ids:
            raise SpecError(f"begin: the cache holds {self.num_tokens()} tokens of {self.num_rows} rows; reset() it")
        self._check_rows(len(ids))
        keys = [[(0, f"{count} tokens of padding")] if count else None for count in padding]
        prompts = list(zip(ids, keys, strict=True))
        found = min(self.alloc.match(row, salt=salt, extra_key=key).num_tokens for row, key in prompts)
        found = min(found, ids.shape[1] - 1)
        while True:
            opened = self._open(found, prompts, salt)
            least = min(sequence.num_cached_tokens for sequence in opened)
            if all(sequence.num_cached_tokens == least for sequence in opened):
                break
            # A shorter prefix may end where a window has gone. Not truncated: what is cut off would be forgotten.
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
            for row, key in prompts:  # one token more, since one is always left
                opened.append(self.alloc.sequence(row[: found + 1], salt=salt, extra_key=key))
        except BaseException:
            self.alloc.free_batch(np.array([sequence.id for sequence in opened], np.int32))
            raise
        return opened

    def extend(self, group: int, num_rows: int, count: int) -> None:
        """Makes room for ``count`` more tokens in each row; the first call opens ``num_rows`` of them.

        ``OutOfMemory`` or ``SpecError``, and no token has changed, where that does not fit.
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
        """Room first: when there is none, the last step can still be taken back, windows included."""
        handles, counts = self._handles(), self._counts(count)
        try:
            self.alloc.core.extend_batch(handles, counts, group)
        except OutOfMemory:
            if not self._commit(group, due):
                raise
            self.alloc.core.extend_batch(handles, counts, group)  # in what the windows have passed
        self._tokens[group] = self.num_tokens(group) + count
        self._places = None

    def take_back(self, group: int, num_tokens: int) -> None:
        """Undoes an ``extend`` whose tokens no layer has written. Room in a group that is fixed after prefill stays."""
        if not any(self.written.values()) and self._known is None:
            self.free()
        elif group == EVERY and self.num_tokens() > num_tokens:
            self._cut(num_tokens)

    def place(self, group: int) -> RowPlace | BlockPlace:
        """Where the tokens of group number ``group`` lie, until they next change.

        ``slots``, int64 [B, n], are the flat slots of the n tokens that are not committed.
        """
        if self._places is None:
            batch = self.alloc.batch(self._handles())
            self._places = [self._place(b) for b in batch.groups]
        return self._places[group]

    def _place(self, batch: GroupBatch) -> RowPlace | BlockPlace:
        if batch.rows_cpu is None:
            return BlockPlace(batch, len(self._ids))
        return RowPlace(batch, batch.rows_cpu.tolist())

    def commit(self, *, recorded: bool = True) -> None:
        """Commits what every layer has written; ``recorded=False`` leaves what is held back while recording."""
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
        """The ids of the tokens that are to be committed, as far as they are known."""
        if self._known is None or group != EVERY:
            return None
        ids = self._known[:, self._committed.get(EVERY, 0) : num_tokens]
        return ids if ids.size else None

    def truncate(self, num_tokens: int) -> None:
        """Keeps the first ``num_tokens`` tokens of each row, and commits those that every layer has written. Rows that
        hold nothing are freed.

        ``SpecError``, and nothing has changed, where a sliding window has dropped tokens that would be seen again.
        """
        if num_tokens < self.num_tokens():
            self._cut(num_tokens)
            if self._known is not None:
                self._known = self._known[:, :num_tokens]  # what comes now may be other tokens
            for key in self._layers.get(EVERY, ()):
                self.written[key] = min(self.written[key], num_tokens)
        if any(self._tokens.values()):
            self.commit()
        else:
            self.free()

    def _cut(self, num_tokens: int) -> None:
        for handle in self._ids:  # equal rows: if one is refused, so is the first
            self.alloc.core.truncate(handle, num_tokens)
        self._tokens[EVERY] = num_tokens
        self._committed[EVERY] = min(self._committed.get(EVERY, 0), num_tokens)
        self._places = None

    def rearrange(self, parents: list[int]) -> None:
        """Row i becomes a copy of what row ``parents[i]`` is now; of no rows, the cache is as new.

        The first child of a row takes its place and further ones are forks, which share all but the last page or block:
        no row is ever copied whole, but for what ``recording`` holds back, which forks get a copy of. They need memory
        and sequences before what is dropped gives them back. ``OutOfMemory``, and nothing has changed, where there is
        none; ``SpecError`` while a step is half done.
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
        """The same tokens in as many new sequences, shared page by page or block by block. ``OutOfMemory``, and nothing
        has changed; ``SpecError`` while a step is half done.
        """
        self.check_complete()
        copy = DenseBatch(self.alloc, self.max_rows)
        copy._ids.extend(self._fork(self._ids))
        copy.recording, copy.dense, copy.placeholders = self.recording, self.dense, self.placeholders
        copy.more_than_ids = self.more_than_ids
        copy._known = self._known
        copy.written.update(self.written)
        copy._tokens.update(self._tokens)
        copy._committed.update(self._committed)
        return copy

    def _fork(self, parents: list[int]) -> list[int]:
        """A fork of each of ``parents``, with all its tokens, and whatever is recorded stays so."""
        self.commit(recorded=False)
        forked: list[int] = []
        try:
            for parent in parents:
                forked.append(self.alloc.core.fork(parent))
            held_back = self.num_tokens() - self._committed.get(EVERY, 0)
            if forked and held_back:
                copy_tail(self.alloc, parents, forked, held_back, EVERY)
        except BaseException:  # torch's own, while a tail is copied, too
            _free(self.alloc, forked)
            raise
        return forked

    def check_complete(self, group: int | None = None) -> None:
        """``SpecError`` if some layers have tokens of ``group``, or of any (None), that others lack."""
        for each in list(self._tokens) if group is None else [group]:
            held, complete = self.num_tokens(each), self.num_complete(each)
            if complete != held:
                way = f"crop({complete - held}) takes that back, " if each == EVERY else ""
                raise SpecError(
                    f"a step stopped half-way: some layers hold {held} tokens, others {complete}; {way}reset() empties "
                    "the cache. Tokens that are not a model's go to every layer before more of them go to any"
                )

    def free(self) -> None:
        """Frees the sequences: no layer holds anything, and the next ``extend`` opens new ones."""
        _free(self.alloc, self._ids)
        self.written.update(dict.fromkeys(self.written, 0))
        self._tokens.clear()
        self._committed.clear()
        self._known = None
        self._places = None

    def trim(self) -> None:
        """Parked memory goes back to the system."""
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
    if ids and not alloc.closed:  # close() has freed them, and what is garbage has nobody to tell
        alloc.free_batch(np.array(ids, np.int32))
    ids.clear()
