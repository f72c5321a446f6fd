"""The allocator for a scheduler: requests under the scheduler's own ids, and None instead of ``OutOfMemory``.

The methods correspond to those that vLLM's scheduler calls on its ``KVCacheManager``, so that a framework can use kvmem
in its place:

=====================================  =======================================================
vLLM                                   here
=====================================  =======================================================
``get_computed_blocks(request)``       ``matched_tokens(tokens)``
``allocate_slots(request, n, ...)``    ``allocate(request, n, tokens=prompt)``, ``allocate_step``; for a request that
                                       decodes, together with caching: ``step(request, n, tokens)``
``get_block_ids(id)``                  ``block_ids(request)``
``cache_blocks(request, n)``           ``publish(request, tokens)``, ``publish_step``
``free(request)``                      ``free(request)``, ``free_all``
``take_events()``                      ``take_events()``
``usage``                              ``usage``
``get_num_common_prefix_blocks(id)``   ``common_prefix_blocks()``
(it stores recurrent states itself)    ``snapshot(request)``
``reset_prefix_cache()``               ``clear_cache()``
=====================================  =======================================================
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from kvmem._core import TableChanges
from kvmem.allocator.allocator import Allocator
from kvmem.allocator.prefix import Salt, Tokens, committed_count, encode_keys
from kvmem.allocator.sequence import NO_HANDLE, Sequence
from kvmem.arguments import check_count, check_group, check_size
from kvmem.errors import OutOfMemory, SpecError, StaleHandle
from kvmem.events import Event
from kvmem.events.digests import ExtraKey

if TYPE_CHECKING:
    from kvmem.allocator.batch_calls import Ids, Ints
    from kvmem.allocator.tiers.transfers import Load
    from kvmem.arguments import Handles

__all__ = ["SchedulerCache", "TableChanges"]


_NOTHING = TableChanges()  # what most calls return


class SchedulerCache:
    """Requests over an ``Allocator``, which stays usable beside it (``batch``, ``fill``, ``kv``, ``stats`` ...).

    allocator: of either backend, on any device; ``device="meta"`` if the scheduler is a process of its own.
    A request is named by any hashable id. Block ids are those of the first group that grows with the tokens unless
    ``group`` says otherwise. Cached blocks that no request uses are evicted before a call returns None.

    A worker that keeps block tables of its own needs only the ``TableChanges`` that these calls return: applied in
    order, in every group (``changes.group(g)``), they make its tables equal to ``block_ids``, up to the length of each
    request. Calls on a request's ``sequence()`` or on the allocator return no changes: call ``tables()`` after them.
    Engines whose workers only append to their tables need an allocator with ``append_only=True``: then the changes of a
    request are new entries, and 0 for those that a window drops.
    ``StaleHandle`` for a request that is not here. Not thread-safe; the allocator below it is.
    """

    def __init__(self, allocator: Allocator) -> None:
        if not isinstance(allocator, Allocator):
            raise SpecError(f"allocator: got {type(allocator).__name__}; must be an Allocator")
        allocator.core.check_usable()  # StaleHandle if it is closed
        self.allocator = allocator
        self._core = allocator.core
        #: Calls for single tokens look a request up here; what they do not find goes to ``_find``, which raises.
        self._requests: dict[Hashable, Sequence] = {}
        allocator._holders.add(self)

    # --- one request at a time ---

    def matched_tokens(
        self, tokens: Tokens, *, salt: Salt = None, extra_key: ExtraKey = None, adapter: str | None = None
    ) -> int:
        """Return how many of ``tokens`` (a prompt) ``allocate`` would find cached now; at least one is left to compute.

        Changes nothing, not even the order of eviction.
        """
        return self.allocator.match(tokens, salt=salt, extra_key=extra_key, adapter=adapter).num_tokens

    def load(
        self, tokens: Tokens, *, salt: Salt = None, extra_key: ExtraKey = None, adapter: str | None = None
    ) -> Load | None:
        """Start to load from lower tiers (``tiers=``) what device and host memory do not have of a prompt.

        Return None if there is nothing to wait for. Never waits.

        Keep the request waiting until ``load.done()``, which is polled once a step and moves what has arrived; then
        ``allocate`` finds it. ``load.cancel()`` if the request is aborted.
        """
        allocator = self.allocator
        return None if allocator._tiering is None else allocator._bring(tokens, salt, extra_key, adapter, "all")[1]

    def allocate(
        self,
        request: Hashable,
        count: int | None = None,
        *,
        tokens: Tokens | None = None,
        salt: Salt = None,
        extra_key: ExtraKey = None,
        adapter: str | None = None,
    ) -> TableChanges | None:
        """Make room for ``count`` more tokens. Return the changes of the request's block tables, empty for most tokens.

        None if memory is short or ``max_sequences`` requests are here: then nothing has changed, except that cached
        blocks may have been evicted.

        A request that is not here begins. tokens: its prompt. The request reuses the cached start of it, whose blocks
        are in the changes too; ``num_cached_tokens(request)`` says how many tokens they hold. count: how many tokens
        beyond those (a chunk of the prompt, lookahead); default the rest of the prompt. salt, extra_key, adapter: as
        for ``Allocator.sequence``. ``SpecError`` if any of these, or a prompt, is given for a request that has begun.
        """
        try:
            handle = self._requests[request]._id
        except (KeyError, TypeError):
            self._find(request)  # raises for what cannot be a request id
            return self._begin(request, count, tokens, (salt, extra_key, adapter))
        if tokens is not None or salt is not None or extra_key is not None or adapter is not None:
            raise SpecError(
                f"request {request!r} has begun: prompt, salt, extra key and adapter are given when it begins"
            )
        if count is None:
            raise SpecError(f"count: missing; request {request!r} has begun, say how many more tokens")
        try:
            return self._core.extend(handle, count, -1, True) or _NOTHING
        except OutOfMemory:
            return None

    def _begin(
        self,
        request: Hashable,
        count: int | None,
        tokens: Tokens | None,
        names: tuple[Salt, ExtraKey, str | None],
    ) -> TableChanges | None:
        if count is None and tokens is None:
            raise SpecError(f"count: missing; a new request ({request!r}) needs a prompt, or a count of tokens")
        wanted = -1 if count is None else check_count("count", check_size("count", count, 0))
        sequence = Sequence(self.allocator, NO_HANDLE)
        if self.allocator._tiering is not None and tokens is not None:
            self.allocator._bring(tokens, *names, "host")
        try:
            self._core.begin([] if tokens is None else tokens, *encode_keys(*names), wanted, sequence)
            self._requests[request] = sequence
            return self._core.table(sequence.id, -1) or _NOTHING
        except BaseException as error:
            self._requests.pop(request, None)
            sequence._discard()
            if isinstance(error, OutOfMemory):  # also when all max_sequences are in use
                return None
            raise

    def publish(self, request: Hashable, tokens: Tokens | None = None, *, count: int | None = None) -> TableChanges:
        """Commit the request's next tokens: their KV is computed, and whole blocks of them can be found from now on.

        Return the table entries that changed, mostly none. If an equal block was cached already, the request now reads
        that block, and its own becomes free (paged, unless ``append_only``); entries of blocks that are out of window
        become 0. Apply the changes to copies of the tables before the next step. ``SpecError`` for more tokens than
        there is room for.

        tokens: the ids. count: how many tokens, if their ids are unknown; then neither these nor later ones of this
        request can be found.
        """
        try:
            handle = self._requests[request]._id
        except (KeyError, TypeError):
            handle = self.sequence(request).id  # raises
        if count is not None:
            tokens, count = None, committed_count("publish", tokens, count)
        return self._core.commit(handle, count, -1, tokens, True) or _NOTHING

    def step(self, request: Hashable, count: int = 1, tokens: Tokens | None = None) -> TableChanges | None:
        """Do a decode step of one request in one call: commit all tokens that it has room for, then make room for
        ``count`` more.

        Return the changes of its block tables, empty for most tokens. None if memory is short: then nothing has
        changed or been published, except that cached blocks may have been evicted.

        tokens: the ids of all tokens that were not published before, a list or an array; in the first step those of the
        prompt, unless ``publish`` had them. ``SpecError`` for more or fewer. Without ids neither these nor later tokens
        can be found. Cut off rejected draft tokens first: ``truncate``. As ``Sequence.step``; costs half as much as
        ``publish`` and ``allocate``.
        """
        try:
            handle = self._requests[request]._id
        except (KeyError, TypeError):
            handle = self.sequence(request).id  # raises
        try:
            return self._core.step(handle, count, tokens, True) or _NOTHING
        except OutOfMemory:
            return None

    def truncate(self, request: Hashable, num_tokens: int) -> None:
        """Keep the first ``num_tokens`` tokens, as when draft tokens are rejected. See ``Sequence.truncate``.

        Entries of the block tables past the new end are no longer used, and none changes: there is nothing to return.
        """
        self.sequence(request).truncate(num_tokens)

    def snapshot(self, request: Hashable) -> bool:
        """Copy the request's recurrent state, so that requests that begin with the same tokens can start from here.

        Return False if there is no memory for the copy: then nothing has changed. Take snapshots at the ends of chunks
        of a prompt, for example: without them a spec with a state shares nothing. ``SpecError`` unless all tokens are
        published by their ids, at a multiple of the block size; see ``Sequence.snapshot``.
        """
        try:
            self.sequence(request).snapshot()
        except OutOfMemory:
            return False
        return True

    def free(self, request: Hashable) -> None:
        """End the request, or preempt it. What it has published stays cached until memory is needed."""
        self._end([request], self.sequence(request).free)

    # --- a whole step in one call ---

    def handles(self, requests: Iterable[Hashable]) -> Handles:
        """Return handles for the calls below and for ``Allocator.fill``, int32 [n], valid until each request ends."""
        return np.array([self.sequence(request).id for request in self._several(requests)], np.int32)

    def allocate_step(self, handles: Ids, counts: Ints) -> TableChanges | None:
        """``allocate`` for many requests that have begun: for all of them, or None and nothing has changed.

        handles, counts: [n], as ids and counts of ``Allocator.extend_batch``. Cost: linear in n and in the changes.
        """
        try:
            return self._core.extend_batch(handles, counts, -1, True) or _NOTHING
        except OutOfMemory:
            return None

    def publish_step(self, handles: Ids, counts: Ints, tokens: Tokens | None = None) -> TableChanges:
        """``publish`` for many requests; arguments as for ``Allocator.commit_batch``."""
        return self._core.commit_batch(handles, counts, -1, tokens, True) or _NOTHING

    def free_all(self, requests: Iterable[Hashable]) -> None:
        """``free`` for many requests: all of them, or ``StaleHandle`` and none."""
        ending = self._several(requests)
        handles = self.handles(ending)
        self._end(ending, lambda: self.allocator.free_batch(handles))

    # --- state ---

    def tables(self, handles: Ids) -> TableChanges:
        """Return every entry of the requests' block tables, of all groups, as changes.

        For a worker that begins late, and after ``Allocator.compact()`` or calls on a request's ``sequence()``, which
        return no changes. handles: [n]; the entries of the i-th are those of row i.
        """
        return self._core.tables(handles) or _NOTHING

    def block_ids(self, request: Hashable, *, group: int | None = None) -> Handles:
        """Return the request's whole block table, int32 [blocks], a copy. Blocks that are out of window are 0."""
        allocator = self.allocator
        index = allocator._main if group is None else check_group("group", group, len(allocator.spec.groups))
        return (self._core.table(self.sequence(request).id, index) or _NOTHING).blocks

    def num_cached_tokens(self, request: Hashable) -> int:
        """Return how many cached tokens the request began with."""
        return self.sequence(request).num_cached_tokens

    def num_tokens(self, request: Hashable) -> int:
        """Return how many tokens the request has room for."""
        return self.sequence(request).num_tokens

    def common_prefix_blocks(self, requests: Iterable[Hashable] | None = None) -> int:
        """Return how many leading whole blocks all of ``requests`` (default: all that are here) share as memory."""
        handles, main = self.handles(self._requests if requests is None else requests), self.allocator._main
        if len(handles) == 0:
            return 0
        if len(handles) == 1:
            return int(self._core.committed(int(handles[0]), main)) // self.allocator.spec.groups[main].block_size
        common = np.empty(len(handles) - 1, np.int64)
        self._core.common_blocks(handles, main, common)
        return int(common.min())

    @property
    def usage(self) -> float:
        """The part of the memory that requests hold, 0 to 1: ``Stats.held_bytes`` of what this allocator may map.

        The allocator may map its ``memory``, or in a shared pool what live sequences of others leave of it. Cached
        content that no request uses counts as free, since all of it can be evicted: one more request could have the
        rest. Cost: linear in the requests.
        """
        stats = self._core.stats()
        return stats.held_bytes / stats.limit_bytes if stats.limit_bytes > 0 else 1.0

    def take_events(self, max_events: int | None = None) -> list[Event]:
        """Return the events about cached blocks since the last call: ``Allocator.events``."""
        return self.allocator.events(max_events)

    def clear_cache(self) -> int:
        """Evict every cached block that no request uses; return how many."""
        return self.allocator.clear_cache()

    def __contains__(self, request: Hashable) -> bool:
        return self._find(request) is not None

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise SpecError(
            f"{self!r}: its requests are memory of this process, and are not pickled or copied; send the TableChanges "
            "that its calls return"
        )

    def __repr__(self) -> str:
        return f"SchedulerCache({len(self)} requests, {self.allocator!r})"

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._requests)

    def sequence(self, request: Hashable) -> Sequence:
        """Return the request's sequence, for ``pin``, ``retain`` and ``fork``. Do not free it."""
        found = self._find(request)
        if found is None:
            raise StaleHandle(f"request {request!r} is not here: it has ended, or allocate() never began it")
        return found

    def _find(self, request: Hashable) -> Sequence | None:
        try:
            return self._requests.get(request)
        except TypeError:  # only hashing tells: isinstance(request, Hashable) accepts a tuple that holds a list
            raise SpecError(
                f"request: got {request!r}, a {type(request).__name__}, which cannot be hashed; a request id is a str, "
                "an int, a tuple of them: one request at a time"
            ) from None

    @staticmethod
    def _several(requests: Iterable[Hashable]) -> list[Hashable]:
        if isinstance(requests, (str, bytes)) or not isinstance(requests, Iterable):
            raise SpecError(f"requests: got {requests!r}; must be several request ids: [{requests!r}] for one")
        return list(requests)

    def _end(self, requests: list[Hashable], free: Callable[[], None]) -> None:
        """Remove the requests that ``free`` has freed, also if an exception comes in between."""
        try:
            free()
            for request in requests:
                self._requests.pop(request, None)
        except BaseException:  # a KeyboardInterrupt can come behind free(), too
            for request in requests:
                sequence = self._requests.get(request)
                if sequence is not None and not self._core.is_live(sequence.id):
                    del self._requests[request]
            raise
