"""The allocator as a scheduler sees it: requests by its own ids, verbs that answer None when memory is short.

The verbs are those that vLLM's scheduler uses of its ``KVCacheManager``, so that a framework can swap kvmem in:

=====================================  =======================================================
vLLM                                   here
=====================================  =======================================================
``get_computed_blocks(request)``       ``matched_tokens(tokens)``
``allocate_slots(request, n, ...)``    ``allocate(request, n, tokens=prompt)``, ``allocate_step``; of a request that
                                       decodes, with what it caches: ``step(request, n, tokens)``
``get_block_ids(id)``                  ``block_ids(request)``
``cache_blocks(request, n)``           ``publish(request, tokens)``, ``publish_step``
``free(request)``                      ``free(request)``, ``free_all``
``take_events()``                      ``take_events()``
``usage``                              ``usage``
``get_num_common_prefix_blocks(id)``   ``common_prefix_blocks()``
keeps recurrent states by itself       ``snapshot(request)``
``reset_prefix_cache()``               ``clear_cache()``
=====================================  =======================================================
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from kvmem._core import TableChanges
from kvmem.allocator.allocator import Allocator
from kvmem.allocator.prefix import Tokens, committed_count, encode_keys
from kvmem.allocator.sequence import NOBODY, Sequence
from kvmem.arguments import check_count, check_group, check_size
from kvmem.errors import KVMemError, OutOfMemory, SpecError, StaleHandle
from kvmem.events import Event
from kvmem.events.digests import ExtraKey

if TYPE_CHECKING:
    from kvmem.allocator.batch_calls import Ids, Ints
    from kvmem.arguments import Handles

__all__ = ["SchedulerCache", "TableChanges"]


_NOTHING = TableChanges()  # what most calls return


class SchedulerCache:
    """Requests over an ``Allocator``, which stays usable beside it (``batch``, ``fill``, ``kv``, ``stats`` ...).

    allocator: of either backend, on any device; ``device="meta"`` where the scheduler is a process of its own.
    Requests are named by any hashable id. Block ids are those of the first group that grows with the tokens unless
    ``group`` says otherwise. As with the allocator, what is cached and unused is given up before an answer is None.

    Whoever keeps block tables of its own (a worker) needs the ``TableChanges`` that these calls return, and no more:
    written in order, in every group (``changes.group(g)``), they make its tables equal to ``block_ids`` as far as the
    requests are long. What is done through ``sequence()`` or the allocator is not told: ask for ``tables()`` then.
    ``StaleHandle`` for a request that is not here. Not for several threads at once; the allocator below it is.
    """

    def __init__(self, allocator: Allocator) -> None:
        if not isinstance(allocator, Allocator):
            raise SpecError(f"allocator: got {type(allocator).__name__}; must be an Allocator")
        self.allocator = allocator
        groups = allocator.spec.groups
        self._main = next((i for i, group in enumerate(groups) if group.growth == "token"), 0)
        self._block_size = groups[self._main].block_size
        self._requests: dict[Hashable, Sequence] = {}
        self._handles: dict[Hashable, int] = {}  # of the same requests: saves the calls below an attribute each
        allocator.core.check_usable()  # not of one that is closed
        self._core = allocator.core
        allocator._over.add(self)

    # --- one request at a time ---

    def matched_tokens(
        self,
        tokens: Tokens,
        *,
        salt: str | bytes | None = None,
        extra_key: ExtraKey = None,
        adapter: str | None = None,
    ) -> int:
        """How many of ``tokens`` (a prompt) ``allocate`` would find cached now; at least one is left to compute.
        Changes nothing.
        """
        return self.allocator.match(tokens, salt=salt, extra_key=extra_key, adapter=adapter).num_tokens

    def allocate(
        self,
        request: Hashable,
        count: int | None = None,
        *,
        tokens: Tokens | None = None,
        salt: str | bytes | None = None,
        extra_key: ExtraKey = None,
        adapter: str | None = None,
    ) -> TableChanges | None:
        """Room for ``count`` more tokens; what this wrote to the request's block tables, nothing for most tokens. None
        when memory, or a place for one more request, is short: nothing has changed then, but for what was cached.

        A request that is not here yet begins. tokens: its prompt, whose cached start it takes over: those blocks are
        added too, and ``num_cached_tokens(request)`` says how many tokens they hold. count: how many tokens beyond that
        (a chunk of the prompt, lookahead); default the rest of the prompt. salt, extra_key, adapter: as
        ``Allocator.sequence``. ``SpecError`` for any of these, or a prompt, of a request that has begun.
        """
        try:
            handle = self._handles[request]
        except KeyError:
            return self._begin(request, count, tokens, salt, extra_key, adapter)
        except TypeError:
            raise self._no_request(request) from None
        if tokens is not None or salt is not None or extra_key is not None or adapter is not None:
            raise SpecError(
                f"request {request!r} has begun: prompt, salt, extra key and adapter are given as it begins"
            )
        if count is None:
            raise SpecError(f"count: missing; request {request!r} has begun, say how many more tokens")
        try:
            written = self._core.extend(handle, count, -1, True)
            return _NOTHING if written is None else written
        except OutOfMemory:
            return None

    def _begin(
        self,
        request: Hashable,
        count: int | None,
        tokens: Tokens | None,
        salt: str | bytes | None,
        extra_key: ExtraKey,
        adapter: str | None,
    ) -> TableChanges | None:
        if count is None and tokens is None:
            raise SpecError(f"count: missing; a new request ({request!r}) needs a prompt, or a count of tokens")
        wanted = -1 if count is None else check_count("count", check_size("count", count, 0))
        salted, keyed = encode_keys(salt, extra_key, adapter)
        sequence = Sequence(self.allocator, NOBODY)
        try:
            self._core.begin([] if tokens is None else tokens, salted, keyed, wanted, sequence)
            self._requests[request], self._handles[request] = sequence, sequence.id
            return self._core.table(sequence.id, -1) or _NOTHING
        except BaseException as error:
            self._forget(request)
            sequence._give_up()
            if isinstance(error, OutOfMemory):  # also when all max_sequences are in use
                return None
            raise

    def publish(self, request: Hashable, tokens: Tokens | None = None, *, count: int | None = None) -> TableChanges:
        """The KV of the request's next ``tokens`` is computed: whole blocks of them can be found from now on.
        ``SpecError`` for more than there is room for.

        tokens: their ids. count: instead of ids that nobody knows, how many; neither these nor later ones can be found.

        Returns table entries that changed, mostly none: where the same block was cached already, the request now reads
        that one, and its own is given up (paged); blocks that a sliding window has passed are 0. Who keeps a copy of
        the tables writes them there before its next step.
        """
        try:
            handle = self._handles[request]
        except (KeyError, TypeError):
            raise self._stale(request) from None
        if count is not None:
            tokens, count = None, committed_count("publish", tokens, count)
        written = self._core.commit(handle, count, -1, tokens, True)
        return _NOTHING if written is None else written

    def step(self, request: Hashable, count: int = 1, tokens: Tokens | None = None) -> TableChanges | None:
        """A decode step of one request in one call: the KV of all that it has room for is computed, and there is room
        for ``count`` more tokens. What that wrote to its block tables, nothing for most tokens. None when memory is
        short: nothing has changed then, nor been published, but for what was cached.

        tokens: the ids of what is computed, a list or an array, all of those that were not published before: of the
        first step the prompt, unless ``publish`` had it. ``SpecError`` for more or fewer. Without them neither these
        nor later ones can be found. Cut off rejected drafts first: ``truncate``. As ``Sequence.step``; costs half of
        ``publish`` and ``allocate``.
        """
        try:
            handle = self._handles[request]
        except (KeyError, TypeError):
            raise self._stale(request) from None
        try:
            written = self._core.step(handle, count, tokens, True)
            return _NOTHING if written is None else written
        except OutOfMemory:
            return None

    def truncate(self, request: Hashable, num_tokens: int) -> None:
        """Keeps the first ``num_tokens`` tokens, as when draft tokens are rejected. See ``Sequence.truncate``. Its
        tables end earlier then; what is left of them stays as it was, so there is nothing to tell.
        """
        self._sequence(request).truncate(num_tokens)

    def snapshot(self, request: Hashable) -> bool:
        """Keeps a copy of the request's recurrent state, at the end of a chunk of its prompt say, so that others that
        begin with the same tokens start here. False when there is no memory for the copy: nothing has changed then.

        All its tokens must be published by their ids, at a multiple of the block size: ``SpecError`` otherwise, see
        ``Sequence.snapshot``. Without snapshots a spec with a state shares nothing.
        """
        try:
            self._sequence(request).snapshot()
        except OutOfMemory:
            return False
        return True

    def free(self, request: Hashable) -> None:
        """The request ends, or is preempted. What it has published stays cached until memory is needed."""
        self._end([request], self._sequence(request).free)

    # --- a whole step in one call ---

    def handles(self, requests: Iterable[Hashable]) -> Handles:
        """Handles for the calls below and for ``Allocator.fill``, int32 [n]: each its request's until that ends."""
        handles, asked = self._handles, self._several(requests)
        try:
            return np.array([handles[request] for request in asked], np.int32)
        except (KeyError, TypeError):
            raise self._stale(next(request for request in asked if not self._is_here(request))) from None

    def allocate_step(self, handles: Ids, counts: Ints) -> TableChanges | None:
        """``allocate`` for many requests that have begun: for all of them, or None and nothing has changed.

        handles, counts: [n], as ids and counts of ``Allocator.extend_batch``. Cost: linear in n and in what is written.
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

    # --- what is there ---

    def tables(self, handles: Ids) -> TableChanges:
        """Every entry of the requests' block tables, of all groups, as if they had just been written: for a worker that
        begins late, and after ``Allocator.compact()`` or calls on a request's ``sequence()``, which tell nothing.

        handles: [n]; entries of its i-th stand in row i.
        """
        return self._core.tables(handles) or _NOTHING

    def block_ids(self, request: Hashable, *, group: int | None = None) -> Handles:
        """The request's whole block table, int32 [blocks], a copy. Blocks that a sliding window has dropped are 0."""
        index = self._main if group is None else check_group("group", group, len(self.allocator.spec.groups))
        return (self._core.table(self._sequence(request).id, index) or _NOTHING).blocks

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
        """The part of the memory that requests hold, 0 to 1: ``Stats.held_bytes`` of what this allocator may have. That
        is its ``memory``, or in a shared pool what others' live sequences leave of it. What is only cached counts as
        free, as all of it can be given up: the rest is what one more request could have. Costs a look at every request.
        """
        stats = self._core.stats()
        return stats.held_bytes / stats.limit_bytes if stats.limit_bytes > 0 else 1.0

    def take_events(self, max_events: int | None = None) -> list[Event]:
        """What was cached and given up since the last call: ``Allocator.events``."""
        return self.allocator.events(max_events)

    def clear_cache(self) -> int:
        """Forgets every cached block that no request uses; returns how many."""
        return self.allocator.clear_cache()

    def __contains__(self, request: Hashable) -> bool:
        return self._is_here(request)

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
        """The request's sequence, for what has no verb here (``pin``, ``retain``, ``fork``). Do not free it."""
        return self._sequence(request)

    def _sequence(self, request: Hashable) -> Sequence:
        try:
            return self._requests[request]
        except (KeyError, TypeError):
            raise self._stale(request) from None

    @staticmethod
    def _several(requests: Iterable[Hashable]) -> list[Hashable]:
        if isinstance(requests, (str, bytes)) or not isinstance(requests, Iterable):
            raise SpecError(f"requests: got {requests!r}; must be several request ids: [{requests!r}] for one")
        return list(requests)

    def _is_here(self, request: Hashable) -> bool:
        try:
            return request in self._requests
        except TypeError:
            raise self._no_request(request) from None

    def _stale(self, request: Hashable) -> KVMemError:
        """The error for what is no request, or none that is here."""
        try:
            hash(request)
        except TypeError:
            return self._no_request(request)
        return StaleHandle(f"request {request!r} is not here: it has ended, or allocate() never began it")

    @staticmethod
    def _no_request(request: object) -> SpecError:
        return SpecError(
            f"request: got {request!r}, a {type(request).__name__}, which cannot be hashed; a request id is a str, an "
            "int, a tuple of them: one request at a time"
        )

    def _end(self, requests: list[Hashable], free: Callable[[], None]) -> None:
        """Forgets those that ``free`` has freed, also when an exception comes between."""
        try:
            free()
            for request in requests:
                self._forget(request)
        except BaseException:
            for request in requests:
                if request in self._handles and not self._core.is_live(self._handles[request]):
                    self._forget(request)
            raise

    def _forget(self, request: Hashable) -> None:
        self._requests.pop(request, None)
        self._handles.pop(request, None)
