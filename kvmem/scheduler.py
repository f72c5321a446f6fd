"""The allocator as a scheduler sees it: requests by its own ids, verbs that answer None when memory is short.

The verbs are those that vLLM's scheduler uses of its ``KVCacheManager``, so that a framework can swap kvmem in:

=====================================  =======================================================
vLLM                                   here
=====================================  =======================================================
``get_computed_blocks(request)``       ``matched_tokens(tokens)``
``allocate_slots(request, n, ...)``    ``allocate(request, n, tokens=prompt)``, ``allocate_step``
``get_block_ids(id)``                  ``block_ids(request)``
``cache_blocks(request, n)``           ``publish(request, tokens)``, ``publish_step``
``free(request)``                      ``free(request)``, ``free_all``
``take_events()``                      ``take_events()``
``usage``                              ``usage``
``get_num_common_prefix_blocks(id)``   ``common_prefix_blocks()``
``reset_prefix_cache()``               ``clear_cache()``
=====================================  =======================================================
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvmem import _core
from kvmem.allocator import Allocator
from kvmem.arrays import at_least_zero, not_int32
from kvmem.digests import Key
from kvmem.errors import KVMemError, OutOfMemory, SpecError, StaleHandle
from kvmem.events import Event
from kvmem.prefix import Tokens, token_ids
from kvmem.sequence import Sequence
from kvmem.spec import Group

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvmem.arrays import Handles

    Lengths = npt.NDArray[np.int64]

__all__ = ["SchedulerCache", "TableChanges"]


@dataclass(frozen=True)
class TableChanges:
    """What a call wrote to block tables: entry ``columns[k]`` of row ``rows[k]`` is ``blocks[k]`` now.

    int32 [k] each, by row, then by column. rows: positions in the ``handles`` of the call, 0 where it had one request.
    """

    rows: Handles
    columns: Handles
    blocks: Handles

    def __len__(self) -> int:
        return len(self.rows)


_NOTHING = TableChanges(*[np.empty(0, np.int32)] * 3)  # what most calls return: made once
_INT32_END = 2**31


def _table_buffers(n: int, blocks: int) -> tuple[_core.BatchBuffers, Handles, Handles]:
    """For ``fill`` to write the tables of ``n`` sequences, ``blocks`` in all; where each begins, and all of them."""
    starts, entries = np.zeros(n + 1, np.int32), np.zeros(blocks, np.int32)
    sizes = {"max_sequences": n, "max_new_tokens": 2**62, "max_blocks": blocks, "max_indices": blocks}
    return _core.BatchBuffers(**sizes, kv_indptr=starts, kv_indices=entries), starts, entries


class SchedulerCache:
    """Requests over an ``Allocator``, which stays usable beside it (``batch``, ``fill``, ``kv``, ``stats`` ...).

    allocator: of either backend, on any device; ``device="meta"`` where the scheduler is a process of its own.
    Requests are named by any hashable id. Block ids are those of the first group that grows with the tokens unless
    ``group`` says otherwise. As with the allocator, what is cached and unused is given up before an answer is None.
    ``StaleHandle`` for a request that is not here. Not for several threads at once; the allocator below it is.
    """

    def __init__(self, allocator: Allocator) -> None:
        if not isinstance(allocator, Allocator):
            raise SpecError(f"allocator: got {type(allocator).__name__}; must be an Allocator")
        self.allocator = allocator
        groups = allocator.spec.groups
        self._main = next((i for i, group in enumerate(groups) if group.growth == "token"), 0)
        self._merges = allocator.backend == "paged"
        self._block_size = groups[self._main].block_size
        self._requests: dict[Hashable, Sequence] = {}
        self._handles: dict[Hashable, int] = {}  # of the same requests: saves the calls below an attribute each
        self._core = allocator.core
        self._lists = [self._one_table(group) for group in groups]
        self._shared_tails: set[int] = set()  # handles whose last block may be another's too
        self._one = np.empty(1, np.int32)
        self._starts, self._all_entries = np.empty(0, np.int32), np.empty(0, np.int32)

    # --- one request at a time ---

    def matched_tokens(self, tokens: Tokens, *, salt: str | bytes | None = None, extra_key: Key = None) -> int:
        """How many of ``tokens`` (a prompt) ``allocate`` would find cached now; at least one is left to compute.
        Changes nothing.
        """
        return self.allocator.match(tokens, salt=salt, extra_key=extra_key).num_tokens

    def allocate(
        self,
        request: Hashable,
        count: int | None = None,
        *,
        tokens: Tokens | None = None,
        salt: str | bytes | None = None,
        extra_key: Key = None,
    ) -> TableChanges | None:
        """Room for ``count`` more tokens; what this wrote to the request's block table, nothing for most tokens. None
        when memory, or a place for one more request, is short: nothing has changed then, but for what was cached.

        A request that is not here yet begins. tokens: its prompt, whose cached start it takes over: those blocks are
        added too, and ``num_cached_tokens(request)`` says how many tokens they hold. count: how many tokens beyond that
        (a chunk of the prompt, lookahead); default the rest of the prompt. salt, extra_key: as ``Allocator.sequence``.
        ``SpecError`` for a prompt, salt or extra key of a request that has begun.
        """
        handle = self._handles.get(request)
        if handle is None:
            return self._begin(request, count, tokens, salt, extra_key)
        if tokens is not None or salt is not None or extra_key is not None:
            raise SpecError(f"request {request!r} has begun: a prompt, salt or extra key is given when it begins")
        if count is None:
            raise SpecError(f"count: missing; request {request!r} has begun, say for how many more tokens")
        before = self._core.tokens(handle, self._main)
        if type(count) is int and 0 <= count < _INT32_END:  # without the calls between here and the core
            try:
                self._core.extend(handle, count)
            except OutOfMemory:
                return None
        elif not self._requests[request].try_extend(count):
            return None
        if count <= -before % self._block_size and handle not in self._shared_tails:  # there is room in the last block
            return _NOTHING
        return self._grown_one(handle, before)

    def _begin(
        self, request: Hashable, count: int | None, tokens: Tokens | None, salt: str | bytes | None, extra_key: Key
    ) -> TableChanges | None:
        prompt = None if tokens is None else token_ids(tokens)
        if count is None and prompt is None:
            raise SpecError(f"count: missing; a new request ({request!r}) needs a prompt, or a count of tokens")
        wanted = None if count is None else at_least_zero("count", count)
        try:
            sequence = self.allocator.sequence(prompt, salt=salt, extra_key=extra_key)
        except OutOfMemory:  # all max_sequences are in use
            return None
        try:
            found = sequence.num_cached_tokens
            fits = sequence.try_extend((0 if prompt is None else len(prompt) - found) if wanted is None else wanted)
        except KVMemError:
            sequence.free()
            raise
        if not fits:
            sequence.free()
            return None
        self._requests[request], self._handles[request] = sequence, sequence.id
        grown = self._grown_one(sequence.id, 0)
        if sequence.num_tokens == found:
            self._shared_tails.add(sequence.id)
        return grown

    def publish(self, request: Hashable, tokens: int | Tokens) -> TableChanges:
        """The KV of the request's next ``tokens`` is computed: their ids, and whole blocks of them can be found from
        now on; or how many, and neither these nor later ones can. ``SpecError`` for more than there is room for.

        Returns table entries that changed, mostly none: where the same block was cached already, the request now reads
        that one, and its own is given up (paged). Who keeps a copy of the table writes them there before its next step.
        """
        handle = self._handles.get(request)
        if handle is None:
            raise self._stale(request)
        if type(tokens) is int and 0 <= tokens < _INT32_END:  # without the calls between here and the core
            self._core.commit(handle, tokens)
            return _NOTHING
        if isinstance(tokens, int):
            self._requests[request].commit(tokens)
            return _NOTHING
        ids = token_ids(tokens)
        done = self._core.committed(handle, self._main)
        first, last = done // self._block_size, (done + len(ids)) // self._block_size
        if first == last or not self._merges:
            self._core.commit_tokens(handle, ids)
            return _NOTHING
        before = self._entries(handle, first, last)
        self._core.commit_tokens(handle, ids)
        after = self._entries(handle, first, last)
        if before.tobytes() == after.tobytes():  # a third of what a comparison by numpy takes of a block
            return _NOTHING
        changed = np.flatnonzero(before != after)
        return TableChanges(np.zeros(len(changed), np.int32), (first + changed).astype(np.int32), after[changed])

    def truncate(self, request: Hashable, num_tokens: int) -> None:
        """Keeps the first ``num_tokens`` tokens, as when draft tokens are rejected. See ``Sequence.truncate``."""
        sequence = self._sequence(request)
        sequence.truncate(num_tokens)
        self._shared_tails.add(sequence.id)

    def free(self, request: Hashable) -> None:
        """The request ends, or is preempted. What it has published stays cached until memory is needed."""
        sequence = self._sequence(request)
        sequence.free()
        self._forget(request)

    # --- a whole step in one call ---

    def handles(self, requests: Iterable[Hashable]) -> Handles:
        """Handles for the calls below and for ``Allocator.fill``, int32 [n]: each its request's until that ends."""
        handles, asked = self._handles, list(requests)
        try:
            return np.array([handles[request] for request in asked], np.int32)
        except KeyError:
            raise self._stale(next(request for request in asked if request not in handles)) from None

    def allocate_step(self, handles: Handles, counts: Handles) -> TableChanges | None:
        """``allocate`` for many requests that have begun: for all of them, or None and nothing has changed.

        handles, counts: int32 [n], as for ``Allocator.extend_batch``. Cost: linear in n, and in the length of tables
        that got a block.
        """
        try:
            before, _ = self._lengths(handles)
        except TypeError as error:
            raise not_int32(handles, counts) from error
        if not self.allocator.try_extend_batch(handles, counts):
            return None
        return self._grown(handles, before)

    def publish_step(self, handles: Handles, counts: Handles, tokens: Handles | None = None) -> TableChanges:
        """``publish`` for many requests; arguments as for ``Allocator.commit_batch``."""
        if tokens is None or not self._merges:
            self.allocator.commit_batch(handles, counts, tokens)
            return _NOTHING
        return self._merging(handles, counts, lambda: self.allocator.commit_batch(handles, counts, tokens))

    def _merging(self, handles: Handles, counts: Handles, commit: Callable[[], None]) -> TableChanges:
        """Calls ``commit``, and finds out what it did to the blocks that it completes."""
        tokens, done = self._lengths(handles)
        if len(counts) != len(done):  # commit says so
            commit()
            return _NOTHING
        first, last = done // self._block_size, np.minimum(done + counts, tokens) // self._block_size
        before = self._written(handles, tokens, first, last)
        commit()
        after = self._written(handles, tokens, first, last)
        changed = before.blocks != after.blocks
        return TableChanges(after.rows[changed], after.columns[changed], after.blocks[changed])

    def free_all(self, requests: Iterable[Hashable]) -> None:
        """``free`` for many requests: all of them, or ``StaleHandle`` and none."""
        ending = list(requests)
        self.allocator.free_batch(self.handles(ending))
        for request in ending:
            self._forget(request)

    # --- what is there ---

    def block_ids(self, request: Hashable, *, group: int | None = None) -> Handles:
        """The request's whole block table, int32 [blocks], a copy. Blocks that a sliding window has dropped are 0."""
        index = self._main if group is None else at_least_zero("group", group)
        if index >= len(self.allocator.spec.groups):
            raise SpecError(f"group: got {index}; the spec has {len(self.allocator.spec.groups)}")
        return np.array(self._table(self._sequence(request).id, index))

    def num_cached_tokens(self, request: Hashable) -> int:
        """How many tokens the request took over from the cache when it began."""
        return self._sequence(request).num_cached_tokens

    def num_tokens(self, request: Hashable) -> int:
        """Tokens that the request has room for."""
        return self._sequence(request).num_tokens

    def common_prefix_blocks(self, requests: Iterable[Hashable] | None = None) -> int:
        """Leading whole blocks that all of ``requests`` (default: all that are here) share as memory."""
        handles = self.handles(self._requests if requests is None else requests)
        if len(handles) == 0:
            return 0
        if len(handles) == 1:
            return int(self.allocator.core.committed(int(handles[0]), self._main)) // self._block_size
        common = np.empty(len(handles) - 1, np.int64)
        self.allocator.core.common_blocks(handles, self._main, common)
        return int(common.min())

    @property
    def usage(self) -> float:
        """The part of the memory that requests hold, 0 to 1. What is only cached counts as free, as all of it can be
        given up. Costs a look at every request.
        """
        stats = self.allocator.stats()
        return (stats.mapped_bytes - stats.parked_bytes) / stats.budget_bytes

    def take_events(self, max_events: int | None = None) -> list[Event]:
        """What was cached and given up since the last call: ``Allocator.events``."""
        return self.allocator.events(max_events)

    def clear_cache(self) -> int:
        """Forgets every cached block that no request uses; returns how many."""
        return self.allocator.clear_cache()

    def __contains__(self, request: Hashable) -> bool:
        return request in self._requests

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._requests)

    def sequence(self, request: Hashable) -> Sequence:
        """The request's sequence, for what has no verb here (``pin``, ``retain``, ``snapshot``). Do not free it."""
        return self._sequence(request)

    def _sequence(self, request: Hashable) -> Sequence:
        sequence = self._requests.get(request)
        if sequence is None:
            raise self._stale(request)
        return sequence

    @staticmethod
    def _stale(request: Hashable) -> StaleHandle:
        return StaleHandle(f"request {request!r} is not here: it has ended, or allocate() never began it")

    def _forget(self, request: Hashable) -> None:
        del self._requests[request]
        self._shared_tails.discard(self._handles.pop(request))

    def _lengths(self, handles: Handles) -> tuple[Lengths, Lengths]:
        """Tokens there is room for, and those whose KV is computed."""
        tokens, committed = np.empty(len(handles), np.int64), np.empty(len(handles), np.int64)
        self.allocator.core.lengths(handles, self._main, tokens, committed)
        return tokens, committed

    def _grown_one(self, handle: int, before: int) -> TableChanges:
        """The entries that growth of one request from ``before`` tokens has written."""
        after = self._core.tokens(handle, self._main)
        first, last = -(-before // self._block_size), -(-after // self._block_size)
        if handle in self._shared_tails:  # a tail that others read has been copied, even for no tokens
            self._shared_tails.discard(handle)
            first = before // self._block_size
        if first >= last:
            return _NOTHING
        blocks = self._entries(handle, first, last)
        return TableChanges(np.zeros(last - first, np.int32), np.arange(first, last, dtype=np.int32), blocks)

    def _grown(self, handles: Handles, before: Lengths) -> TableChanges:
        """``_grown_one`` for many."""
        after, _ = self._lengths(handles)
        first, last = -(-before // self._block_size), -(-after // self._block_size)
        if self._shared_tails:
            copied = np.isin(handles, list(self._shared_tails))
            first[copied] = before[copied] // self._block_size
            self._shared_tails.difference_update(handles.tolist())
        return self._written(handles, after, first, last)

    def _written(self, handles: Handles, tokens: Lengths, first: Lengths, last: Lengths) -> TableChanges:
        """Entries ``[first[i], last[i])`` of the table of ``handles[i]``, which has room for ``tokens[i]``."""
        rows = np.flatnonzero(last > first)
        if not len(rows):
            return _NOTHING
        starts, entries = self._tables(handles[rows], tokens[rows])
        counts = (last - first)[rows]
        ends = np.cumsum(counts)
        columns = np.arange(ends[-1]) + np.repeat(first[rows] - ends + counts, counts)
        blocks = entries[np.repeat(starts, counts) + columns]
        return TableChanges(np.repeat(rows, counts).astype(np.int32), columns.astype(np.int32), blocks)

    def _tables(self, handles: Handles, tokens: Lengths) -> tuple[Handles, Handles]:
        """Where the table of each begins in all of them, one after the other. Valid until the next call."""
        n, need = len(handles), int((-(-tokens // self._block_size)).sum())
        if n >= len(self._starts) or need > len(self._all_entries):
            n, need = max(n, 2 * len(self._starts)), max(need, 2 * len(self._all_entries))
            self._many, self._starts, self._all_entries = _table_buffers(n, need)
        self._core.fill(handles, None, self._main, 0, self._many)
        return self._starts[: len(handles)], self._all_entries

    def _entries(self, handle: int, first: int, last: int) -> Handles:
        """``[first, last)`` of a request's table, a copy."""
        buffers, _, entries = self._lists[self._main]
        self._one[0] = handle
        self._core.fill(self._one, None, self._main, 0, buffers)
        part: Handles = entries[first:last].copy()
        return part

    def _table(self, handle: int, group: int) -> Handles:
        """The table of one sequence, valid until the next call."""
        buffers, _, entries = self._lists[group]
        self._one[0] = handle
        self._core.fill(self._one, None, group, 0, buffers)
        return entries[: buffers.num_indices]

    def _one_table(self, group: Group) -> tuple[_core.BatchBuffers, Handles, Handles]:
        longest = max(self.allocator.max_tokens, group.max_tokens or 0)
        return _table_buffers(1, -(-longest // group.block_size))
