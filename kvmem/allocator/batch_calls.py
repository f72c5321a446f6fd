"""The batched calls: many sequences at a time, by their handles, and the metadata of a step over them.

Arguments that several calls have in common:

- ids, counts: [n] each, lists or arrays on the CPU, with no sequence twice. A contiguous int32 array is read without a
  copy. A list may hold ``Sequence`` objects, which costs more.
- tokens: token ids, one sequence's after the other's.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as List
from types import NoneType
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvmem.allocator.batch import Batch, new_batch
from kvmem.allocator.ids import several
from kvmem.allocator.opening import OpenedCore, default
from kvmem.allocator.prefix import Salt, Tokens, encode_keys, token_ids
from kvmem.allocator.sequence import NO_HANDLE, Sequence
from kvmem.arguments import INT32_MAX, as_int32, check_group, check_size
from kvmem.errors import OutOfMemory, SpecError
from kvmem.events.digests import ExtraKey

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvmem.arguments import Handles

    Order = npt.NDArray[np.int64]
    Ints = List[int] | Handles | torch.Tensor
    Ids = List[Sequence | int] | Handles | torch.Tensor

__all__ = ["BatchCalls"]


class BatchCalls(OpenedCore):
    """The calls of an allocator that a scheduler or a model runner makes once a step."""

    def admit_batch(
        self,
        tokens: Tokens,
        counts: Ints | None = None,
        *,
        salt: Salt = None,
        extra_key: ExtraKey = None,
        adapter: str | None = None,
    ) -> tuple[Handles, Handles]:
        """Open a sequence for each of many prompts as ``sequence()`` does, with room for all its tokens, in one call.

        Return handles and cached, int32 [m] each: handles for ``step()`` and the other batched calls, and how many
        tokens of each prompt are cached. Prompts get memory in their order; m is less than n if memory, or a sequence,
        is missing for the next one, for which nothing is then held or evicted. An error admits none.

        tokens: the ids of the prompts, one after the other. counts: [n], the length of each; default one prompt. salt,
            extra_key, adapter: the same for all; a key without a position is placed in each prompt separately.
        """
        lengths = None if counts is None else as_int32("counts", counts)
        n = 1 if lengths is None else len(lengths)
        handles, cached = np.full(n, NO_HANDLE, np.int32), np.empty(n, np.int32)
        salted, keyed = encode_keys(salt, extra_key, adapter)
        if self._tiering is not None:
            tokens = token_ids(tokens)
            for ids in [tokens] if lengths is None else np.split(tokens, np.cumsum(lengths)[:-1]):
                self._tiering.promote(self._tiering.prompt(ids, (salted, keyed), salt, extra_key, adapter, 1))
        try:
            done = self.core.admit_batch(tokens, lengths, salted, keyed, handles, cached)
            return (handles, cached) if done == n else (handles[:done], cached[:done])
        except BaseException:
            self._discard(handles)
            raise

    def _discard(self, handles: Handles) -> None:
        """Free what a failed call has opened, since its caller gets an exception instead of the handles."""
        for handle in handles[handles != NO_HANDLE].tolist():
            if self.core.is_live(handle):
                self.core.free(handle)

    def open_batch(self, n: int) -> Handles:
        """Return the handles of ``n`` new, empty sequences, int32 [n]: all of them, or ``OutOfMemory`` and none."""
        if check_size("n", n, 0) > self.max_sequences:
            raise OutOfMemory(f"asked to open {n} sequences; max_sequences is {self.max_sequences}")
        handles = np.full(n, NO_HANDLE, np.int32)
        try:
            self.core.open_batch(handles)
            return handles
        except BaseException:
            self._discard(handles)
            raise

    def extend_batch(self, ids: Ids, counts: Ints) -> None:
        """Make room for ``counts[i]`` more tokens of each sequence; if not all fit, ``OutOfMemory``, and nothing has
        changed.

        Makes no driver call while parked rows or free blocks suffice.
        """
        self.core.extend_batch(ids, counts)

    def try_extend_batch(self, ids: Ids, counts: Ints) -> bool:
        """Return True after ``extend_batch``, and False where it raises ``OutOfMemory``."""
        try:
            self.extend_batch(ids, counts)
        except OutOfMemory:
            return False
        return True

    def commit_batch(self, ids: Ids, counts: Ints, tokens: Tokens | None = None) -> None:
        """Declare the KV of the next ``counts[i]`` tokens of each sequence as written. See ``Sequence.commit``.

        tokens: their ids, [sum of counts]; without them the blocks cannot be shared.
        """
        self.core.commit_batch(ids, counts, -1, tokens)

    def free_batch(self, ids: Ids) -> None:
        """Free every sequence of ``ids``; or raise ``StaleHandle`` and free none."""
        self.core.free_batch(ids)

    def batch(
        self,
        sequences: Iterable[Sequence | int] | Handles,
        *,
        new_tokens: Ints | None = None,
        out: Batch | None = None,
        pad_to: int | None = None,
    ) -> Batch:
        """Return the metadata of a step over ``sequences``. Valid until the batch is refilled, or until one of its
        sequences is freed, cut or moved, which ``Batch.check_current()`` finds.

        new_tokens: for each sequence, how many of its reserved tokens this step computes; default all that are not
            committed.
        out: a batch from ``make_batch`` or an earlier call, refilled in place; ``SpecError`` if it is too small.
        pad_to: rows of the batch, at least as many as sequences, for captured graphs. The rows past the sequences read
            the null block and write to the padding block.
        """
        ids = several(sequences, self.core)
        new_tokens = None if new_tokens is None else as_int32("new_tokens", new_tokens)
        if not isinstance(out, (Batch, NoneType)):
            raise SpecError(f"out: got {type(out).__name__}; must be a Batch")
        if out is None:
            out = self._fitting_batch(ids, new_tokens, len(ids) if pad_to is None else check_size("pad_to", pad_to, 0))
        self.fill(ids, out, new_tokens=new_tokens, pad_to=pad_to)
        return out

    def make_batch(
        self, *, max_sequences: int | None = None, max_new_tokens: int, max_tokens: int | None = None
    ) -> Batch:
        """Return empty buffers for ``out=``, ``fill`` and ``step``. Their addresses never change.

        max_sequences: the most rows; default the allocator's. max_new_tokens: the most new tokens of all rows together;
        the buffers hold max_sequences * max_tokens at most. max_tokens: the most tokens of a sequence; default the
        allocator's.
        """
        self.core.check_usable()
        rows = check_size("max_sequences", default(max_sequences, self.max_sequences), 0)
        longest = check_size("max_tokens", default(max_tokens, self.max_tokens), 0)
        fresh, groups = check_size("max_new_tokens", max_new_tokens, 0, INT32_MAX), len(self.spec.groups)
        fresh = min(fresh, rows * max(longest, 1))
        return self._new_batch(rows, [fresh] * groups, [longest] * groups, None)

    def fill(self, ids: Ids, batch: Batch, *, new_tokens: Ints | None = None, pad_to: int | None = None) -> None:
        """Refill ``batch`` in place for the sequences ``ids``. new_tokens, pad_to: as for ``batch()``."""
        rows = self._begin(batch, pad_to)
        try:
            self.core.fill(ids, new_tokens, self._main, rows, batch.buffers, batch.begin_others())
            self._update(batch)
        except BaseException:
            batch.forget()
            raise

    def step(
        self,
        ids: Ids,
        batch: Batch,
        *,
        counts: Ints | None = None,
        tokens: Tokens | None = None,
        pad_to: int | None = None,
    ) -> None:
        """Do all that a decode loop needs between two runs of the model, in one call: commit every reserved token, make
        room for ``counts[i]`` more tokens of each sequence, and refill ``batch`` for these.

        counts: [n], default 1 each. tokens: the ids of the committed tokens, [how many were reserved]; without them
        their blocks cannot be shared.

        Same effect as ``commit_batch``, ``extend_batch`` and ``fill``, with two differences: an error changes nothing,
        and room is made before sliding windows move on. Only entries that differ from the batch's last fill are written
        and uploaded; see ``Batch.table_deltas``.
        """
        rows = self._begin(batch, pad_to)
        try:
            self.core.step_batch(ids, counts, tokens, rows, batch.buffers, batch.begin_others())
            self._update(batch)
        except BaseException:
            batch.forget()
            raise

    def _begin(self, batch: Batch, pad_to: int | None) -> int:
        """Prepare a fill; return how many rows the batch is to have, or -1 for as many as sequences."""
        rows = -1 if pad_to is None else check_size("pad_to", pad_to, 0)
        if not isinstance(batch, Batch):
            raise SpecError(
                f"batch: got {batch!r:.200}; must be a batch to refill: alloc.batch(...) or make_batch(...)"
            )
        self.pool.streams.follow()
        batch.begin()
        return rows

    def _update(self, batch: Batch) -> None:
        batch.update(self.core, self._main)
        for index, group in batch.others.items():
            group.update(self.core, index)

    def cascade_order(self, sequences: Iterable[Sequence | int] | Handles, *, group: int | None = None) -> Order:
        """Return an order of ``sequences`` for ``Batch.cascade()``: int64 [n], a permutation of 0 to n - 1 that puts
        sequences that share memory side by side, nested groups within the outer ones.

        Stable: a group stands where its first member stood, and sequences that share nothing keep their order.
        group: of the spec, default the first that grows with the tokens. Cost: comparisons of neighbours; 0.2 ms for
        256 sequences that share 1,300 pages, or for 1,024 that share nothing.
        """
        ids = several(sequences, self.core)
        order = np.empty(len(ids), np.int64)
        index = -1 if group is None else check_group("group", group, len(self.spec.groups))
        self.core.cascade_order(ids, index, order)
        return order

    def _fitting_batch(self, ids: Handles, new_tokens: Ints | None, rows: int) -> Batch:
        lengths, fresh, blocks = [], [], []
        for index, group in enumerate(self.spec.groups):
            tokens, committed = np.empty(len(ids), np.int64), np.empty(len(ids), np.int64)
            self.core.lengths(ids, index, tokens, committed)
            pad = max(0, rows - len(ids))
            lengths.append(int(max(tokens.max(initial=0), group.block_size)))
            count = int((tokens - committed).sum())  # other groups than "token" write all they reserved
            if new_tokens is not None and group.growth == "token":
                # fill() refuses counts that are negative or more than is reserved: allocate nothing for them.
                count = max(0, min(int(np.sum(new_tokens)), count))
            fresh.append(count + pad)
            blocks.append(int((-(-tokens // group.block_size)).sum()) + pad)
        return self._new_batch(max(rows, len(ids)), fresh, lengths, blocks)

    def _new_batch(self, rows: int, fresh: list[int], longest: list[int], blocks: list[int] | None) -> Batch:
        all_rows = [self._num_rows * geometry.row_tokens for geometry in self._geometry]
        return new_batch(self.spec.groups, self._main, self.device, all_rows, rows, fresh, longest, blocks)
