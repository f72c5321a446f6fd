"""The batched calls: many sequences at a time, by their handles, and the metadata of a step over them."""

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
from kvmem.allocator.prefix import Tokens, encode_keys
from kvmem.allocator.sequence import NO_HANDLE, Sequence
from kvmem.arguments import as_int32, check_group, check_size
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
    """What a scheduler and a model runner call once a step."""

    def admit_batch(
        self,
        tokens: Tokens,
        counts: Ints | None = None,
        *,
        salt: str | bytes | None = None,
        extra_key: ExtraKey = None,
        adapter: str | None = None,
    ) -> tuple[Handles, Handles]:
        """Opens a sequence for each of many prompts as ``sequence()`` does, with room for all tokens, in one call.

        tokens: their ids, one prompt after the other. counts: [n], the length of each; default one prompt. salt,
            extra_key, adapter: of all of them; a key without a position is placed in each by itself.

        Returns ids and cached, int32 [m] each: the handles for ``step()`` and the other batched calls, and how many
        tokens each prompt begins with that are cached. The prompts get memory in their order; m is less than n when
        there is no memory, or no place, for the next; nothing is held or given up for that one. Any error admits none.
        """
        lengths = None if counts is None else as_int32("counts", counts)
        n = 1 if lengths is None else len(lengths)
        handles, cached = np.full(n, NO_HANDLE, np.int32), np.empty(n, np.int32)
        salted, keyed = encode_keys(salt, extra_key, adapter)
        try:
            done = self.core.admit_batch(tokens, lengths, salted, keyed, handles, cached)
            return (handles, cached) if done == n else (handles[:done], cached[:done])
        except BaseException:
            self._discard(handles)
            raise

    def _discard(self, handles: Handles) -> None:
        """Frees what a call has made for a caller that gets an exception instead."""
        for handle in handles[handles != NO_HANDLE].tolist():
            if self.core.is_live(handle):
                self.core.free(handle)

    def open_batch(self, n: int) -> Handles:
        """Handles of ``n`` new sequences, int32 [n]: all of them or ``OutOfMemory``."""
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
        """Makes room for ``counts[i]`` more tokens of each sequence: for all, or ``OutOfMemory`` and nothing has
        changed.

        ids, counts: [n] each, lists or arrays on the CPU; no sequence twice. Contiguous int32 is not copied over; a
            list may hold the sequences themselves, which costs more. One call a step; it makes no driver call while the
            rows or blocks at hand suffice.
        """
        self.core.extend_batch(ids, counts)

    def try_extend_batch(self, ids: Ids, counts: Ints) -> bool:
        """As ``extend_batch``, but False instead of ``OutOfMemory``."""
        try:
            self.extend_batch(ids, counts)
        except OutOfMemory:
            return False
        return True

    def commit_batch(self, ids: Ids, counts: Ints, tokens: Tokens | None = None) -> None:
        """The KV of the next ``counts[i]`` tokens of each sequence is written. ids, counts: as for ``extend_batch``.

        tokens: their ids, one sequence's after the other's, [sum of counts]; without them the blocks cannot be shared.
        See ``Sequence.commit``.
        """
        self.core.commit_batch(ids, counts, -1, tokens)

    def free_batch(self, ids: Ids) -> None:
        """Frees every sequence of ``ids``, a list or an array, or raises ``StaleHandle`` and frees none."""
        self.core.free_batch(ids)

    def batch(
        self,
        sequences: Iterable[Sequence | int] | Handles,
        *,
        new_tokens: Ints | None = None,
        out: Batch | None = None,
        pad_to: int | None = None,
    ) -> Batch:
        """The metadata of a step over ``sequences``.

        new_tokens: per sequence, how many of the reserved tokens this step computes; default all that are not
            committed.
        out: a batch from ``make_batch`` or an earlier call, refilled in place; ``SpecError`` if it is too small.
        pad_to: rows of the batch, as many as sequences or more; rows past the sequences read zeroes and write where it
            does no harm (captured graphs).
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
        """Empty buffers for steps of up to ``max_sequences`` rows and ``max_new_tokens`` new tokens in all, sequences
        of up to ``max_tokens``; for ``out=`` and ``fill``. Their addresses never change.
        """
        self.core.check_usable()
        rows = check_size("max_sequences", default(max_sequences, self.max_sequences), 0)
        longest = check_size("max_tokens", default(max_tokens, self.max_tokens), 0)
        fresh, groups = check_size("max_new_tokens", max_new_tokens, 0), len(self.spec.groups)
        return self._new_batch(rows, [fresh] * groups, [longest] * groups, None)

    def fill(self, ids: Ids, batch: Batch, *, new_tokens: Ints | None = None, pad_to: int | None = None) -> None:
        """Refills ``batch`` in place for the sequences ``ids``, a list or an array; arguments as for ``batch``."""
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
        """All that a decode loop does between two runs of the model, in one call: what was reserved before is
        committed, room is made for ``counts[i]`` more tokens of each sequence, and ``batch`` is refilled for these.

        ids: [n]. counts: [n], default 1 each. tokens: the ids of the tokens committed, one sequence's after the
        other's, [how many were reserved]; without them their blocks cannot be shared. Lists or arrays on the CPU; int32
        costs least. Everything as by ``commit_batch``, ``extend_batch`` and ``fill``, but nothing has changed after an
        error; room is made before sliding windows move on. Only what differs from the batch's last fill is written and
        uploaded, see ``table_deltas``.
        """
        rows = self._begin(batch, pad_to)
        try:
            self.core.step_batch(ids, counts, tokens, rows, batch.buffers, batch.begin_others())
            self._update(batch)
        except BaseException:
            batch.forget()
            raise

    def _begin(self, batch: Batch, pad_to: int | None) -> int:
        """Before a fill: the rows that it is to have, -1 for as many as sequences."""
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
        """An order of ``sequences`` for ``Batch.cascade()``: int64 [n], a permutation of 0 to n - 1 that puts those
        which share memory side by side, nested groups within the outer ones.

        Stable: a group stands where its first member stood, and what shares nothing keeps its place among the others.
        group: of the spec, default the first that grows with the tokens. Cost: as of comparing neighbours; 0.2 ms for
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
            count = int((tokens - committed).sum())  # groups that do not grow with the tokens write all they reserved
            if new_tokens is not None and group.growth == "token":
                # Counts that are negative, or more than is reserved, are refused by fill: no buffers for them.
                count = max(0, min(int(np.sum(new_tokens)), count))
            fresh.append(count + pad)
            blocks.append(int((-(-tokens // group.block_size)).sum()) + pad)
        return self._new_batch(max(rows, len(ids)), fresh, lengths, blocks)

    def _new_batch(self, rows: int, fresh: list[int], longest: list[int], blocks: list[int] | None) -> Batch:
        all_rows = [self._num_rows * geometry.row_tokens for geometry in self._geometry]
        return new_batch(self.spec.groups, self._main, self.device, all_rows, rows, fresh, longest, blocks)
