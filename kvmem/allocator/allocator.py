"""The allocator: the one place that knows spec, layout, backend, device and pool."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from collections.abc import Sequence as List
from functools import partial
from types import NoneType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from kvmem import _core
from kvmem.allocator.batch import INT32_MAX, Batch, new_batch
from kvmem.allocator.closed import Closed
from kvmem.allocator.ops import Op
from kvmem.allocator.prefix import Pin, PrefixMatch, Reason, Tokens, encode_keys, token_ids, with_ids
from kvmem.allocator.sequence import NOBODY, LiveSequence, Sequence
from kvmem.allocator.sequence_views import CopiedTokens, WatchedTokens
from kvmem.allocator.stats import Stats
from kvmem.arguments import (
    as_int32,
    check_bool,
    check_choice,
    check_count,
    check_group,
    check_size,
    is_fraction,
    parse_bytes,
)
from kvmem.errors import KVMemError, OutOfMemory, SpecError, StaleHandle
from kvmem.events import Event, EventBatch, EventStream
from kvmem.events.digests import ExtraKey, decode_key
from kvmem.layouts.base import Sizes, require_supported
from kvmem.layouts.geometry import BACKENDS, lay_out
from kvmem.layouts.page_size import choose_page_bytes
from kvmem.layouts.plain import GroupLayout, resolve_interleave
from kvmem.layouts.views import CacheTensor, block_view, plain, row_view, token_view
from kvmem.memory.device import Device, in_debug_mode
from kvmem.memory.pool import PagePool, pool_for
from kvmem.spec import CacheSpec

__all__ = ["Allocator"]

#: The books of each take some hundred bytes of host memory, needed or not.
MAX_SEQUENCES = 2**20

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvmem.arguments import Handles

    Order = npt.NDArray[np.int64]
    Ints = List[int] | Handles | torch.Tensor
    Ids = List[Sequence | int] | Handles | torch.Tensor


class Allocator:
    """Manages the KV cache of many sequences on one device. A context manager that closes it.

    spec: what a token stores.
    backend: ``"virtual"`` (vAttention: each sequence has contiguous addresses, and pages are mapped under it as it
        grows) or ``"paged"`` (PagedAttention: a sequence is a list of blocks). Both give the same answers and the same
        tensors.
    device: ``"cpu"``, ``"cuda:N"``, or ``"meta"``: the books of a device of any size, without one.
    memory: physical budget, an int in bytes or a text such as ``"20GiB"``; never exceeded. A float, ``0.9``: that part
        of what a CUDA device has free now; ``"auto"``: all of it, less a margin; see ``PagePool``. With ``pool``, how
        much of the pool this allocator may map, also as a part of it (None or ``"auto"``: all of it).
    max_sequences, max_tokens: how many sequences at a time, and how long. They cost addresses, not memory. Up to 2**20
        and 2**31 - 1. In all there are 2**32 - 3 sequences in the life of an allocator, since a handle is an int32 and
        is never given out again: five years of 25 a second. After that ``SpecError``: make another allocator.
    page_bytes: size of a physical page. Default: CPU 64 KiB (more above 2 GiB of memory); CUDA and meta what the driver
        recommends, 2 MiB. The virtual backend takes larger pages where sequences are long, because the driver is called
        for each page: ``kvmem.layouts.page_size.choose_page_bytes``. Llama 3 8B with 128 Ki tokens and 65 GiB: 16 MiB.
    interleave: how many layers lie side by side in a page, or ``"all"`` (default), or ``"none"``: not even K and V of a
        layer do, each has a range of its own, as dense as a contiguous tensor. More means less waste and fewer driver
        calls; less is read faster by a CPU. A row wastes half a page in each range: of Llama 3 8B in 2 MiB pages 8
        tokens' worth with ``"all"`` (1 range), 256 with ``1`` (32), 512 with ``"none"`` (64).
    map_ahead_tokens: how far ahead of a sequence's growth a background thread maps (virtual), where pages are free.
        Above 0, a call that has to map pages itself also maps one more for each 128 that the row has, 3 at most, and
        those go after what is cached when memory is short. 0: nothing is mapped ahead. Default: CUDA 64, others 0.
    tail_guard_tokens: how far past its length a sequence's memory can be loaded and is finite, for kernels that load
        whole tiles and mask afterwards (0 * NaN is NaN). Virtual: so many tokens behind it in its row; paged: the rest
        of its last block, behind which the table names block 0, which is zero. Above 0, memory is zeroed when a
        sequence gets it, with any ``zero``, so reserved tokens are finite before they are written; what the sequence
        wrote and has cut off is zeroed when it next grows or is in a batch, or, where another sequence reads it too,
        when it grows. Not behind states of fixed size, nor padding rows of a batch. Default: CUDA 256, others 0.
    zero: ``"fresh"`` (default) zeroes a page that this allocator has not owned before; ``"always"`` also zeroes memory
        each time a sequence gets it, so that none sees another's; ``"never"``.
    prefix_cache: share the memory of tokens that sequences begin with alike, and keep it when they end, until memory is
        needed. Takes what ``sequence(tokens)`` and ``commit(tokens)`` are told of token ids.
    partial_reuse: where a cached block is only partly equal, copy the equal part.
    policy: which cached blocks go first: ``docs/eviction.md``.
    cached_rows: rows that keep what finished sequences held (virtual); they cost addresses, not memory. Default: three
        times ``max_sequences``, 16 at least, fewer where addresses are short; the same without ``prefix_cache``. Where
        all rows have 2**31 tokens or more, ``row_starts`` is int64 and kernels that take int32 refuse it.
    events: how many events about cached blocks wait for ``events()``; 0: none are made.
    event_key: secret, up to 64 bytes, that the block hashes of events are made with. Without it, who sees hashes and
        tokens can try out salts.
    pool: a ``PagePool`` to share with other allocators; excludes ``device`` and ``page_bytes``.
    record_ops: keep what was decided for ``take_ops()``.
    debug: run ``check()`` after each call that changes something; default from the environment variable
        ``KVMEM_DEBUG``.
    driver: replaces the device's own driver; for tests.

    Thread-safe: calls are serialised, and none that waits for another keeps Python's lock. After a ``fork()`` of the
    process, the child's calls raise ``DeviceError``. An exception that a signal handler raises in the middle of a call
    leaves no sequence, pin or event behind that nobody has.
    """

    def __init__(
        self,
        spec: CacheSpec,
        *,
        backend: Literal["virtual", "paged"] = "virtual",
        device: str | torch.device | None = None,
        memory: int | float | str | None = None,
        max_sequences: int,
        max_tokens: int,
        page_bytes: int | None = None,
        interleave: int | Literal["all", "none"] | None = None,
        map_ahead_tokens: int | None = None,
        tail_guard_tokens: int | None = None,
        zero: Literal["never", "fresh", "always"] = "fresh",
        prefix_cache: bool = True,
        partial_reuse: bool = True,
        policy: str = "density",
        cached_rows: int | None = None,
        events: int = 0,
        event_key: bytes = b"",
        pool: PagePool | None = None,
        record_ops: bool = False,
        debug: bool | None = None,
        driver: _core.Driver | None = None,
    ) -> None:
        if not isinstance(spec, CacheSpec):
            raise SpecError(f"spec: got {type(spec).__name__}; must be a CacheSpec, see CacheSpec.from_config()")
        for group in spec.groups:
            require_supported(group)
        check_choice("backend", backend, tuple(BACKENDS))
        check_choice("zero", zero, ("never", "fresh", "always"))
        check_choice("policy", policy, tuple(_core.eviction_policy_names()))
        self.spec, self.backend = spec, backend
        self.max_sequences = check_size("max_sequences", max_sequences, most=MAX_SEQUENCES)
        self.max_tokens = check_size("max_tokens", max_tokens, most=INT32_MAX)
        self._shares_pool = pool is not None
        self._recording = check_bool("record_ops", record_ops)
        self._debug = in_debug_mode() if debug is None else check_bool("debug", debug)
        self.pool = pool_for(
            pool, device, memory, page_bytes, driver, record_ops, partial(self._choose_page, interleave)
        )
        home = self.pool.device
        self.device = home.torch_device
        self.interleave = resolve_interleave(_default(interleave, "all"), spec.num_layers)
        guard, ahead = (
            _default(tail_guard_tokens, home.info.default_guard_tokens),
            _default(map_ahead_tokens, home.info.default_ahead_tokens),
        )
        self.tail_guard_tokens = check_size("tail_guard_tokens", guard, 0, INT32_MAX)
        self.map_ahead_tokens = check_size("map_ahead_tokens", ahead, 0, INT32_MAX)
        limit = self._limit_bytes(memory)
        self._layouts = [GroupLayout(group, self.interleave) for group in spec.groups]
        rows = None
        if cached_rows is not None:
            rows = check_size("cached_rows", cached_rows, 0, 4 * MAX_SEQUENCES)
        if backend != "virtual":  # with or without prefix_cache: a replica has the rows of the allocator it follows
            rows = 0
        sizes = Sizes(
            page_bytes=self.pool.page_bytes,
            max_sequences=self.max_sequences,
            cached_rows=max(16, 3 * self.max_sequences) if rows is None else rows,
            max_tokens=self.max_tokens,
            tail_guard_tokens=self.tail_guard_tokens,
            memory_bytes=limit,
            capacity_bytes=max(limit, home.total_bytes or 4 * limit),
        )
        self.cached_rows, self._geometry = lay_out(BACKENDS[backend], self._layouts, sizes, fewer_rows=rows is None)
        self._main = next((i for i, g in enumerate(spec.groups) if g.growth == "token"), 0)
        self._arenas: dict[tuple[int, int], torch.Tensor] = {}
        self._labels: dict[int, str] = {}  # of live sequences, and of some that were freed since the last listing
        self._over: weakref.WeakSet[Any] = weakref.WeakSet()  # what has a `_core` of its own, which close() takes away
        self.core = _core.Allocator(
            geometry=_core.Geometry(
                page_bytes=self.pool.page_bytes,
                max_sequences=self.max_sequences,
                rows=1 + self.max_sequences + self.cached_rows,
                tail_guard_tokens=self.tail_guard_tokens,
                map_ahead_tokens=self.map_ahead_tokens,
                zero=getattr(_core.Zero, zero),
                debug=self._debug,
                groups=self._geometry,
            ),
            pool=self.pool.core,
            paged=BACKENDS[backend].paged,
            limit_pages=PagePool.pages("memory", limit, self.pool.page_bytes),
            owns_pool=not self._shares_pool,
            prefix=_core.PrefixOptions(
                on=check_bool("prefix_cache", prefix_cache),
                partial=check_bool("partial_reuse", partial_reuse),
                policy=policy,
                hash_bits=int(os.environ.get("KVMEM_HASH_BITS", "64")),  # fewer, to test that collisions are misses
                event_capacity=check_size("events", events, 0, INT32_MAX),
            ),
        )
        self._events = EventStream(spec, self._drain_events, key=event_key) if events else None
        if record_ops:
            self.core.record()
            self.pool.is_recorded = True

    def _limit_bytes(self, memory: int | float | str | None) -> int:
        budget = self.pool.budget_bytes
        if memory in (None, "auto"):
            return budget
        if is_fraction("memory", memory):  # without a shared pool the budget is that part already
            return int(float(memory) * budget) if self._shares_pool else budget
        return parse_bytes("memory", memory)  # type: ignore[arg-type]  # no float

    def _choose_page(self, interleave: int | str | None, home: Device, memory_bytes: int) -> int:
        least = home.default_page_bytes(memory_bytes)
        if self.backend != "virtual" or home.info.maps_cheaply:  # few calls, or cheap ones
            return least
        together = resolve_interleave(_default(interleave, "all"), self.spec.num_layers)
        layouts = [GroupLayout(group, together) for group in self.spec.groups]
        return choose_page_bytes(layouts, max_tokens=self.max_tokens, memory_bytes=memory_bytes, least=least)

    # --- sequences ---

    def sequence(
        self,
        tokens: Tokens | None = None,
        *,
        salt: str | bytes | None = None,
        extra_key: ExtraKey = None,
        adapter: str | None = None,
        label: str | None = None,
    ) -> Sequence:
        """A new sequence that starts with as much of ``tokens``, the prompt, as is cached; at least one token is left.

        salt: only sequences with the same salt share (a tenant). adapter: the name of what changes the KV of every
        token, a LoRA say; only sequences with the same one share, and events name it. extra_key: what else the KV
        depends on, from some token on: pairs ``(position, key)``, the digest of each image at its first placeholder, or
        one key that names what placeholder ids stand for. Such a key counts from the first id that stands twice in a
        row, as placeholders of an image do, or in a prompt without one from the first token on; what comes before is
        shared with everybody. So **give positions where an input takes a single id**, which no run shows. Compute
        what comes after ``num_cached_tokens``, then ``commit`` its ids. label: what ``sequences()`` calls it.
        ``SpecError`` for a prompt of more than ``max_tokens``; ``OutOfMemory`` only when all ``max_sequences`` are in
        use: short of memory it starts with fewer tokens. Costs a comparison a block, and what mapping and the copy of
        the cut page or block cost.
        """
        salted, keyed = encode_keys(salt, extra_key, adapter)
        if not isinstance(label, (str, NoneType)):
            raise SpecError(f"label: got {label!r}; must be a text, or None")
        sequence = Sequence(self, NOBODY)
        try:
            if tokens is None:
                self.core.admit([], salted, keyed, sequence)
            else:
                with_ids(tokens, lambda ids: self.core.admit(ids, salted, keyed, sequence))
            if label is not None:
                self._label(sequence._id, label)
            return sequence
        except BaseException:  # a signal handler's, too: who never gets the sequence cannot free it
            sequence._give_up()
            raise

    def sequences(self) -> list[LiveSequence]:
        """The live sequences, the oldest first, however they were opened: what is long here, or old, may have been
        forgotten. Cost: linear in them.
        """
        core = self.core
        # Handles count the sequences, over the negative numbers too.
        ids = np.array(sorted(core.handles(), key=lambda handle: handle % 2**32), np.int32)
        tokens, committed = np.empty(len(ids), np.int64), np.empty(len(ids), np.int64)
        try:
            core.lengths(ids, self._main, tokens, committed)
            ages = [core.age_seconds(handle) for handle in ids.tolist()]
        except StaleHandle:  # another thread has freed one meanwhile
            return self.sequences()
        self._forget_labels()
        rows = zip(ids.tolist(), tokens.tolist(), committed.tolist(), ages, strict=True)
        return [LiveSequence(i, n, done, age, self._labels.get(i)) for i, n, done, age in rows]

    def _label(self, handle: int, text: str) -> None:
        if len(self._labels) > 2 * self.max_sequences:  # most of them were freed
            self._forget_labels()
        self._labels[handle] = text

    def _forget_labels(self) -> None:
        for handle in list(self._labels):  # other threads add to it meanwhile
            if not self.core.is_live(handle):
                self._labels.pop(handle, None)

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
        try:
            n = 1 if counts is None else len(counts)
        except TypeError as error:
            raise SpecError(f"counts: got {counts!r}; must be one int32 for each prompt, its length") from error
        handles, cached = np.empty(n, np.int32), np.empty(n, np.int32)
        salted, keyed = encode_keys(salt, extra_key, adapter)
        handles.fill(NOBODY)
        try:
            done = self.core.admit_batch(tokens, counts, salted, keyed, handles, cached)  # type: ignore[arg-type]
            return (handles, cached) if done == n else (handles[:done], cached[:done])
        except TypeError:  # ids, or counts, of another type
            ids, lengths = token_ids(tokens), None if counts is None else as_int32("counts", counts)
        except BaseException:
            self._give_up(handles)
            raise
        return self.admit_batch(ids, lengths, salt=salt, extra_key=extra_key, adapter=adapter)

    def _give_up(self, handles: Handles) -> None:
        """Frees what a call has made for a caller that gets an exception instead."""
        for handle in handles[handles != NOBODY].tolist():
            if self.core.is_live(handle):
                self.core.free(handle)

    def match(
        self,
        tokens: Tokens,
        *,
        salt: str | bytes | None = None,
        extra_key: ExtraKey = None,
        adapter: str | None = None,
    ) -> PrefixMatch:
        """How much of ``tokens`` is cached, and why not more. Changes nothing, not even what is forgotten next."""
        salted, keyed = encode_keys(salt, extra_key, adapter)
        found, reason = with_ids(tokens, lambda ids: self.core.match(ids, salted, keyed))
        return PrefixMatch(found, cast(Reason, reason))

    def pin(
        self,
        tokens: Tokens,
        *,
        salt: str | bytes | None = None,
        extra_key: ExtraKey = None,
        adapter: str | None = None,
    ) -> Pin:
        """Keeps the whole blocks of ``tokens`` (a system prompt) cached until ``unpin()``: whatever happens, a prompt
        that begins with them finds them. ``SpecError`` when one of them is not cached now, or they fill no block.
        """
        salted, keyed = encode_keys(salt, extra_key, adapter)
        pin = Pin(self.core, 0, 0)
        try:
            with_ids(tokens, lambda ids: self.core.pin_tokens(ids, salted, keyed, pin))
            return pin
        except BaseException:
            pin._give_up()
            raise

    def pins(self) -> list[Pin]:
        """The pins that keep something, in the order in which they were made: also those whose ``Pin`` is lost."""
        return [Pin(self.core, pin, num_tokens) for pin, num_tokens in self.core.pins()]

    def clear_cache(self) -> int:
        """Forgets all cached content that nobody uses or pins; returns how many blocks. Their memory stays parked.

        What the sliding windows of live sequences have passed goes too.

        Other threads' calls are let in after each 1,024 blocks, as by ``trim()`` and ``set_memory()``: what they cache
        meanwhile is forgotten too. After an error, what was forgotten before it stays so.
        """
        return self.core.clear_cache()

    def events(self, max_events: int | None = None, *, restart: bool = False) -> list[Event]:
        """What was cached and given up since the last call (``docs/events.md``); empty unless made with ``events=``."""
        self.core.check_usable()
        return [] if self._events is None else self._events.poll(max_events, restart=restart)

    def _drain_events(self, taken: int, most: int, restart: bool) -> EventBatch:
        number, records, roots = self.core.drain_events(taken, most, restart)
        return EventBatch(number, records, {root: (decode_key(s), decode_key(e)) for root, (s, e) in roots.items()})

    def open_batch(self, n: int) -> Handles:
        """Handles of ``n`` new sequences, int32 [n]: all of them or ``OutOfMemory``."""
        if check_size("n", n, 0) > self.max_sequences:
            raise OutOfMemory(f"asked to open {n} sequences; max_sequences is {self.max_sequences}")
        handles = np.full(n, NOBODY, np.int32)
        try:
            self.core.open_batch(handles)
            return handles
        except BaseException:
            self._give_up(handles)
            raise

    def extend_batch(self, ids: Ids, counts: Ints) -> None:
        """Makes room for ``counts[i]`` more tokens of each sequence: for all, or ``OutOfMemory`` and nothing has
        changed.

        ids, counts: [n] each, lists or arrays on the CPU; no sequence twice. Contiguous int32 is not copied over; a
            list may hold the sequences themselves, which costs more. One call a step; it makes no driver call while the
            rows or blocks at hand suffice.
        """
        try:
            self.core.extend_batch(ids, counts)  # type: ignore[arg-type]  # it looks for itself
            return
        except TypeError:
            pass
        self.core.extend_batch(self._ids("ids", ids), as_int32("counts", counts))

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
        try:
            if tokens is None:
                self.core.commit_batch(ids, counts)  # type: ignore[arg-type]  # it looks for itself
            else:
                self.core.commit_tokens_batch(ids, counts, tokens)  # type: ignore[arg-type]
            return
        except TypeError:
            pass
        ids, counts = self._ids("ids", ids), as_int32("counts", counts)
        if tokens is None:
            self.core.commit_batch(ids, counts)
        else:
            self.core.commit_tokens_batch(ids, counts, token_ids(tokens))

    def free_batch(self, ids: Ids) -> None:
        """Frees every sequence of ``ids``, a list or an array, or raises ``StaleHandle`` and frees none."""
        try:
            self.core.free_batch(ids)  # type: ignore[arg-type]  # it looks for itself
            return
        except TypeError:
            pass
        self.core.free_batch(self._ids("ids", ids))

    # --- metadata ---

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
        ids = self._handles(sequences)
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
        rows = check_size("max_sequences", _default(max_sequences, self.max_sequences), 0)
        longest = check_size("max_tokens", _default(max_tokens, self.max_tokens), 0)
        fresh, groups = check_size("max_new_tokens", max_new_tokens, 0), len(self.spec.groups)
        return self._new_batch(rows, [fresh] * groups, [longest] * groups, None)

    def fill(self, ids: Ids, batch: Batch, *, new_tokens: Ints | None = None, pad_to: int | None = None) -> None:
        """Refills ``batch`` in place for the sequences ``ids``, a list or an array; arguments as for ``batch``."""
        counts = None if new_tokens is None else as_int32("new_tokens", new_tokens)
        rows = -1 if pad_to is None else check_size("pad_to", pad_to, 0)
        _check_batch(batch)
        self.pool.streams.follow()
        batch.begin()
        try:
            try:
                self.core.fill(ids, counts, self._main, rows, batch.buffers, batch.begin_others())  # type: ignore[arg-type]
                done = True
            except TypeError:
                done = False
            if not done:
                self.core.fill(self._ids("ids", ids), counts, self._main, rows, batch.buffers, batch.begin_others())
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
        rows = -1 if pad_to is None else check_size("pad_to", pad_to, 0)
        _check_batch(batch)
        self.pool.streams.follow()
        batch.begin()
        try:
            try:
                self.core.step(ids, counts, tokens, rows, batch.buffers, batch.begin_others())  # type: ignore[arg-type]
                done = True
            except TypeError:
                done = False
            if not done:
                ids, counts = self._ids("ids", ids), None if counts is None else as_int32("counts", counts)
                known = None if tokens is None else token_ids(tokens)
                self.core.step(ids, counts, known, rows, batch.buffers, batch.begin_others())
            self._update(batch)
        except BaseException:
            batch.forget()
            raise

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
        ids = self._handles(sequences)
        order = np.empty(len(ids), np.int64)
        index = -1 if group is None else check_group("group", group, len(self.spec.groups))
        self.core.cascade_order(ids, index, order)
        return order

    def _handle(self, field: str, sequence: Sequence | int) -> int:
        if not isinstance(sequence, Sequence):
            return check_count(field, sequence)
        if sequence.allocator is not self:
            raise SpecError(f"{sequence!r} belongs to another allocator")
        return sequence.id

    def _ids(self, field: str, given: Ids) -> Handles:
        """Handles, or sequences for theirs, as int32 [n]. Where all are integers, none is looked at by itself."""
        if isinstance(given, Sequence):
            raise SpecError(f"{field}: got {given!r}; must be several of them: [seq] for one")
        return as_int32(field, given, self._handle)

    def _handles(self, sequences: Iterable[Sequence | int] | Handles) -> Handles:
        if isinstance(sequences, (Sequence, int, np.integer)) or not isinstance(sequences, (Iterable, torch.Tensor)):
            raise SpecError(f"sequences: got {sequences!r}; must be several of them: [seq] for one, as batch([seq])")
        listed = sequences if isinstance(sequences, (list, tuple, np.ndarray, torch.Tensor)) else list(sequences)
        return self._ids("sequences", listed)

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
        num_rows = 1 + self.max_sequences + self.cached_rows
        all_rows = [num_rows * geometry.row_tokens for geometry in self._geometry]
        return new_batch(self.spec.groups, self._main, self.device, all_rows, rows, fresh, longest, blocks)

    # --- tensors ---

    def kv(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer for kernels, each ``[num_blocks, block_size, heads, width]``, with equal shape and
        strides.

        They end at the last mapped block; the address never changes. Blocks that no sequence holds may be unmapped, so
        index by a batch's block table. They are ``CacheTensor``: what names its blocks, views and kernels work, what
        would read, copy or write all of it is a ``SpecError``. An unmapped block that is named all the same reads as
        zeros on a CPU, where writing to it ends the process; on a GPU both end the context. ``plain()`` of
        ``kvmem.kernels.checks``, or ``as_subclass(torch.Tensor)``, takes the checks away.
        """
        k, v = self.tensor(layer, "k"), self.tensor(layer, "v")
        blocks = min(len(plain(k)), len(plain(v)))
        if len(plain(k)) != len(plain(v)):  # in ranges of their own (interleave="none"): one gave up parked pages
            return CacheTensor.over(plain(k)[:blocks]), CacheTensor.over(plain(v)[:blocks])
        return k, v

    def tensor(self, layer: int, component: str) -> torch.Tensor:
        """As ``kv``, for one component by name."""
        index = self.spec.group_of(layer, component)
        layout, group = self._layouts[index], self.spec.groups[index]
        where = layout.slice(layer, component)
        token_bytes = layout.token_bytes[where.arena]
        mapped = self.core.mapped_extent_bytes(index, where.arena)
        # The last one may be mapped in part; behind the last of all, a page may go on.
        blocks = min(self._geometry[index].max_blocks, -(-mapped // (token_bytes * group.block_size)))
        view = block_view(self._arena(index, where.arena), where, token_bytes, group.block_size, blocks)
        return CacheTensor.over(view)

    def rows(self, layer: int, component: str = "k") -> torch.Tensor:
        """The full rows, by name: ``[1 + max_sequences + cached_rows, row_tokens, heads, width]``, for kernels that
        take contiguous sequences (``cache_batch_idx``, ``seqused_k``). Row r is ``batch.rows[i]``; only the tokens that
        it holds are mapped. A ``CacheTensor``, see ``kv``. ``SpecError`` on the paged backend, which has no rows.
        """
        index = self.spec.group_of(layer, component)
        geometry, layout = self._geometry[index], self._layouts[index]
        if not geometry.row_tokens:
            raise SpecError('the paged backend has no rows; use kv(), or backend="virtual"')
        where = layout.slice(layer, component)
        arena, num_rows = self._arena(index, where.arena), 1 + self.max_sequences + self.cached_rows
        view = row_view(arena, where, layout.token_bytes[where.arena], geometry.row_tokens, num_rows)
        return CacheTensor.over(view)

    def sequence_tensor(self, sequence: Sequence | int, layer: int, component: str) -> torch.Tensor:
        """``[tokens held, heads, width]`` of one sequence, in order, for reading; it can be saved, pickled and copied.

        Virtual: a view of what is mapped for these tokens, so it shows what is written later. Paged: a gathered copy,
        to which a write is lost (``UserWarning``). So write with ``kernels.write.write_kv`` or
        ``kernels.blocks.scatter``, which do the same on both. With a sliding window it starts at the first token still
        held (``core.first_token``).

        The view is valid while the sequence holds these tokens. Once it is freed or cut, the memory is another's or
        nobody's: reads give other bytes or zeros, writes spoil them or end the process. With ``debug``, such a use is a
        ``StaleHandle``.
        """
        handle = self._handle("sequence", sequence)
        index = self.spec.group_of(layer, component)
        first, end = self.core.first_token(handle, index), self.core.tokens(handle, index)
        if self._geometry[index].row_tokens:
            return self._tokens_in_place(handle, index, layer, component, first, end)
        batch = self.batch([handle])
        size = self.spec.groups[index].block_size
        blocks = batch.group(index).block_table[0, first // size : -(-end // size)].long()
        found = self.tensor(layer, component)[blocks].flatten(0, 1)[first % size : first % size + end - first]
        return CopiedTokens.over(found, [])

    def _tokens_in_place(
        self, handle: int, index: int, layer: int, component: str, first: int, end: int
    ) -> torch.Tensor:
        layout = self._layouts[index]
        where = layout.slice(layer, component)
        if first == end:
            device = self._arena(index, where.arena).device  # DeviceError on "meta"
            return torch.empty((0, where.heads, where.width), dtype=where.dtype, device=device)
        token_bytes = layout.token_bytes[where.arena]
        start = self.core.row(handle, index) * self._geometry[index].row_tokens + first
        span = (end - first - 1) * token_bytes + where.heads * where.width * where.dtype.itemsize
        memory = self._part(index, where.arena, start * token_bytes + where.offset_bytes, span)
        found = token_view(memory, where, token_bytes, end - first)
        return WatchedTokens.of(found, self.core, handle, index, first, end) if self._debug else found

    def _arena(self, group: int, arena: int) -> torch.Tensor:
        self.core.check_usable()
        self.pool.streams.follow()
        if (group, arena) not in self._arenas:
            # A tensor made in inference mode could never be written outside of it.
            with torch.inference_mode(False):
                self._arenas[group, arena] = from_dlpack(self.core.arena_bytes(group, arena))
        return self._arenas[group, arena]

    def _part(self, group: int, arena: int, begin: int, bytes: int) -> torch.Tensor:
        """Bytes of an arena in a storage of their own."""
        self.pool.streams.follow()
        with torch.inference_mode(False):
            return from_dlpack(self.core.arena_bytes(group, arena, begin, bytes))

    # --- memory ---

    def set_memory(self, memory: int | float | str) -> None:
        """Grows or shrinks what this allocator may map, and the budget of a pool of its own; parked pages go first.
        ``memory``: as when it was made.

        ``OutOfMemory``, and nothing changed, when live sequences hold more than that; ``compact()`` may help. What is
        parked goes in pieces, as by ``trim()``, unless pins keep some of it: then all at once, or not at all. Growing
        what creates its pages ahead (CUDA) is one piece too. Threads that take memory meanwhile may get it refused;
        then parked pages are gone.
        """
        if self._shares_pool and (memory == "auto" or is_fraction("memory", memory)):
            memory = self._limit_bytes(memory)
        self.core.set_memory(self.pool.parse_pages(memory))

    def trim(self, bytes: int | str | None = None) -> int:
        """Gives parked and free pages back to the system: at least ``bytes`` of them if there are as many, or all, also
        those of cached blocks. Returns bytes. In pieces of a millisecond, each all or nothing, between which other
        threads' calls are let in.
        """
        return self.core.trim(-1 if bytes is None else parse_bytes("bytes", bytes))

    def compact(self, bytes: int | str | None = None) -> int:
        """Moves blocks of live sequences and of the cache out of the emptiest pages, until ``bytes`` more (None: all
        that can be) hold nothing, as whole pages. Returns how many bytes do: ``trim()``, this allocator or a neighbour
        in the pool may take them. All or nothing.

        Paged backend; a page of the virtual one belongs to a row, so there it does nothing and returns 0. A block goes
        only into room in a page that stays in use. Addresses stay, contents too; block ids change, so **batches filled
        before are stale**: call it between steps and ``fill()`` again. A captured graph reads the tables by address
        and needs only that. On the device: one copy of each moved block and arena, on the allocator's stream, waiting
        for nothing. On the host: a look at each page, free block and table entry (0.04 s for 60 GiB in 64 KiB each).
        Nothing calls it by itself.
        """
        return self.core.compact(-1 if bytes is None else parse_bytes("bytes", bytes))

    def set_stream(self, stream: Any) -> None:
        """The stream that kernels use this memory on, for all allocators of the pool: ``PagePool.set_stream``."""
        self.pool.set_stream(stream)

    def stats(self) -> Stats:
        """What is held now. Cost grows with live sequences, not with memory."""
        s = self.core.stats()
        torch_allocated, torch_reserved = self.pool.device.torch_bytes()
        return Stats.of(
            s,
            reserved_bytes=sum(sum(g.arena_slots) for g in self._geometry) * self.pool.page_bytes,
            wasted_bytes=s.mapped_bytes - s.used_bytes - s.parked_bytes - s.cached_beside_bytes,
            max_sequences=self.max_sequences,
            device_free_bytes=self.pool.device.free_bytes(),
            torch_allocated_bytes=torch_allocated,
            torch_reserved_bytes=torch_reserved,
        )

    def free_tokens(self) -> int:
        """How many tokens there is memory for beside what live sequences hold; what is cached or parked counts as free,
        as all of it can be given up. At most: what whole pages and blocks round up to comes on top, so ``can_fit``
        decides. In a shared pool, beside what others' live sequences hold. Cost: as ``stats()``.
        """
        s, each = self.core.stats(), self.spec.bytes_per_token
        left = s.limit_bytes - s.held_bytes - self.spec.fixed_bytes
        return max(0, left) // each if each > 0 else INT32_MAX

    def can_fit(self, n: int) -> bool:
        """Whether ``sequence().try_extend(n)`` would succeed now: there is a place for one more sequence, it may be so
        long, and there is memory, with all given up for it that is only cached. Exact, on both backends.

        Changes nothing: it is decided and taken back. Costs as much as that extension, without the driver's calls:
        some 100 ns for each block that would have to be given up.
        """
        return self.core.can_fit(check_size("n", n, 0, INT32_MAX))

    def check(self) -> list[str]:
        """Every violated invariant as a sentence; empty when healthy. Cost grows with everything: for tests and idle
        times.
        """
        return self.core.check()

    # --- the end ---

    def close(self) -> None:
        """Frees its sequences and lets go of its memory; every later call is a ``StaleHandle``. Twice is no error.

        The memory goes when nobody looks at it any more: a tensor, a batch, a pin or a ``Sequence`` object of this
        allocator keeps it. A pool that was given stays as it is.
        """
        if self.closed:
            return
        core = self.core
        if core.close():  # a thread that has it in hand opens no more
            _free_all(core)
        self.core, self.pool = cast(_core.Allocator, Closed()), cast(PagePool, Closed())
        for one in self._over:
            one._core = self.core
        self._arenas.clear()
        self._labels.clear()

    @property
    def closed(self) -> bool:
        """Whether ``close()`` was called."""
        return isinstance(self.core, Closed)

    def __enter__(self) -> Allocator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.close()
        except KVMemError:
            if kind is None:  # else the body's own is what is raised
                raise

    # --- deciding here, acting elsewhere ---

    def take_ops(self) -> list[Op]:
        """What was decided since the last call (``kvmem.allocator.ops``), behind the version of its form; empty where
        nothing was. ``SpecError`` unless the allocator was made with ``record_ops=True``.
        """
        self.core.check_usable()
        if not self._recording:
            raise SpecError("take_ops: nothing was recorded; make the allocator with record_ops=True")
        return self.core.take_ops()

    def apply(self, ops: Iterable[Op | list[str | int]]) -> None:
        """Follows what another allocator decided: all of ``ops``, or an error and nothing has changed.

        Both are made with the same spec, backend, sizes (``memory`` too, and ``set_memory()`` is called on both),
        ``interleave``, ``zero``, guard and ``cached_rows``; prefix_cache may differ, since this one commits no ids.

        ``SpecError`` when the list is of another version (``ops.HEADER``), does not follow from this allocator's state,
        names a slot of a tier (``load``, ``store``), which no allocator has yet, or does not explain what it does to
        memory (``csrc/table/follow.h``): a write to memory that somebody has, a live sequence that would lose a token
        or the memory under it, ids that do not exist. A ``DeviceError`` leaves the books as they were; but a list of
        several calls may have written by then to memory that a sequence had before them, so make the follower anew.

        Besides ``apply()`` a follower fills batches, padded ones once its leader has padded one. To open, grow or trim
        by itself means to go on alone: it may, and then no further list follows from its state.

        What cannot be told from a true list: one that lacks a ``zero``; one that says consistently another number of
        tokens; a ``copy`` that is missing, or from another place, for a sequence that the same list opens; other memory
        for a new sequence to begin with; and, paged, another block of the same place for one whose tokens are said to
        be equal. Lists that come through something that may damage them need a checksum. Cost: linear in the list, some
        microseconds a record.
        """
        if not isinstance(ops, Iterable):
            raise SpecError(f"ops: got {type(ops).__name__}; must be records, as take_ops() gives them")
        self.core.apply(list(ops))

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise SpecError(
            f"{self!r}: an allocator is memory of this process, and is not pickled or copied; make one there from the "
            "same spec and arguments, and let it follow this one's take_ops() with apply()"
        )

    def __repr__(self) -> str:
        # Nothing that asks the core: it answers with a DeviceError in a forked child, and repr() must not raise.
        sizes = f"max_sequences={self.max_sequences}, max_tokens={self.max_tokens}"
        return f"Allocator(backend={self.backend!r}, device={str(self.device)!r}, {sizes}{', closed' * self.closed})"


def _check_batch(batch: object) -> None:
    if not isinstance(batch, Batch):
        raise SpecError(f"batch: got {batch!r:.200}; must be a batch to refill: alloc.batch(...) or make_batch(...)")


def _free_all(core: _core.Allocator) -> None:
    while handles := core.handles():
        try:
            core.free_batch(np.array(handles, np.int32))
        except StaleHandle:  # another thread has freed one of them meanwhile
            continue


def _default(value: Any, default: Any) -> Any:
    return default if value is None else value
