"""The allocator: opening sequences, closing it, and ops. Its other calls are in the modules that it derives from."""

from __future__ import annotations

from collections.abc import Iterable
from types import NoneType, TracebackType
from typing import Any, NoReturn, cast

import numpy as np

from kvmem import _core
from kvmem.allocator.memory_calls import MemoryCalls
from kvmem.allocator.opening import Closed
from kvmem.allocator.ops import Op
from kvmem.allocator.prefetch.calls import PrefetchCalls
from kvmem.allocator.prefix import ContentCalls, Salt, Tokens, encode_keys
from kvmem.allocator.sequence import NO_HANDLE, LiveSequence, Sequence
from kvmem.allocator.tiers.calls import LoadFrom
from kvmem.errors import KVMemError, SpecError, StaleHandle
from kvmem.events.digests import ExtraKey
from kvmem.memory.pool import PagePool

__all__ = ["Allocator"]


class Allocator(PrefetchCalls, ContentCalls, MemoryCalls):
    """Manages the KV cache of many sequences on one device. A context manager that closes it.

    spec: what a token stores.
    backend: ``"virtual"`` (vAttention, arXiv:2405.04437: each sequence has contiguous addresses, and pages are mapped
        under it as it grows) or ``"paged"`` (PagedAttention, arXiv:2309.06180: a sequence is a list of blocks). Both
        give the same answers and the same tensors.
    device: ``"cpu"``, ``"cuda:N"``, or ``"meta"``, which makes every decision for a device of any size without one.
    memory: the physical budget, an int in bytes or a text such as ``"20GiB"``; never exceeded. A float, ``0.9``, is a
        fraction of what a CUDA device has free now; ``"auto"`` is all of it, less a margin; see ``PagePool``. With
        ``pool``: how much of the pool this allocator may map, also as a fraction (None or ``"auto"``: all of it).
    max_sequences, max_tokens: the most live sequences, up to 2**20, and the most tokens of a sequence, up to 2**31 - 1.
        They cost addresses, not memory. An allocator can open 2**32 - 3 sequences in its life, since a handle is an
        int32 and is never used twice: five years of 25 a second. After that ``SpecError``: make another allocator.
    page_bytes: bytes of a physical page. Default: CPU 64 KiB (more above 2 GiB of memory); CUDA and meta what the
        driver recommends, 2 MiB. The virtual backend takes larger pages for long sequences, because it calls the driver
        for each page: ``kvmem.geometry.page_size.choose_page_bytes``. Llama 3 8B, 128 Ki tokens and 65 GiB: 16 MiB.
    interleave: how many layers lie side by side in a page; or ``"all"`` (default); or ``"none"``: K and V of a layer
        are apart too, so each has an address range of its own, as dense as a contiguous tensor. More layers mean less
        waste and fewer driver calls; fewer are read faster by a CPU. A row wastes half a page in each range: for Llama
        3 8B in 2 MiB pages the bytes of 8 tokens with ``"all"`` (1 range), of 256 with ``1`` (32 ranges), of 512 with
        ``"none"`` (64 ranges).
    map_ahead_tokens: how many tokens ahead of a sequence's growth a background thread maps free pages (virtual). Above
        0, a call that must map pages itself also maps one more for each 128 that the row has, at most 3; those are
        reclaimed after cached content. 0: nothing is mapped ahead. Default: CUDA 64, others 0.
    tail_guard_tokens: how many tokens past its end a sequence's memory can be loaded and is finite, for kernels that
        load whole tiles and mask afterwards (0 * NaN is NaN). Virtual: that many tokens in its row; paged: the rest of
        its last block, after which the table names the null block, which is zero. Above 0, memory is zeroed when a
        sequence gets it, whatever ``zero`` says, so reserved tokens are finite before they are written. Tokens that the
        sequence has cut off are zeroed when it next grows or is in a batch; if another sequence reads them too, when
        it grows. There is no guard behind states of fixed size and padding rows of a batch. Default: CUDA 256, others
        0.
    zero: ``"fresh"`` (default) zeroes a page that this allocator has not owned before; ``"always"`` also zeroes memory
        each time a sequence gets it, so that no sequence reads another's data; ``"never"``.
    prefix_cache: share the memory of equal prefixes, and keep it cached after a sequence ends, until memory is needed.
        Uses the token ids that ``sequence(tokens)`` and ``commit(tokens)`` are given.
    partial_reuse: if a cached block is equal only in part, copy the equal part. Without effect if a group of the spec
        has another ``block_order`` than ``"tokens"``: matches end at block edges then.
    append_only: no entry of a block table ever becomes another block, for engines that append to tables of their own
        and never read an entry again; a window still drops entries (0). Paged: tokens that were cached already while a
        sequence computed them stay in its own blocks, which others find once no sequence reads the first ones;
        ``compact()`` moves nothing. A row of the virtual backend never changes anyhow. On both, matches end at a block
        (``partial_reuse`` is off), and ``truncate()`` into a committed block is refused.
    policy: which cached blocks are evicted first: ``docs/eviction.md``.
    cached_rows: rows that keep the tokens of sequences that have ended (virtual); they cost addresses, not memory.
        Default: three times ``max_sequences``, at least 16, fewer if there are not enough addresses; the same without
        ``prefix_cache``. If all rows together have 2**31 tokens or more, ``row_starts`` is int64, and kernels that take
        int32 refuse it.
    events: how many events about cached blocks are kept for ``events()``; 0: none are made.
    event_key: a secret of up to 64 bytes for the block hashes of events. Without it, a reader of hashes and tokens can
        guess salts by trial.
    tiers: ``kvmem.tiers.Tiers(host="8GiB", lower=[...])``: blocks that the device evicts stay in host memory, on disk
        and in remote stores, and come back when a prompt begins with them (docs/tiers.md).
    pool: a ``PagePool`` to share with other allocators; excludes ``device`` and ``page_bytes``.
    record_ops: record every decision for ``take_ops()``.
    debug: run ``check()`` after each call that changes something; default: the environment variable ``KVMEM_DEBUG``.
    driver: replaces the device's own driver; for tests.

    Public attributes, read-only: ``spec``, ``backend``, ``device`` (a ``torch.device``), ``pool``, ``interleave``,
    ``max_sequences``, ``max_tokens``, ``cached_rows``, ``map_ahead_tokens``, ``tail_guard_tokens``, as settled.

    Thread-safe: calls are serialised, and a call that waits for another releases the GIL. After a ``fork()`` of the
    process, calls in the child raise ``DeviceError``; tensors of the cache are not mapped there, and reading one ends
    the child. If a signal handler raises in the middle of a call, no sequence, pin or event is left that the caller
    cannot reach.
    """

    # --- sequences ---

    def sequence(
        self,
        tokens: Tokens | None = None,
        *,
        salt: Salt = None,
        extra_key: ExtraKey = None,
        adapter: str | None = None,
        label: str | None = None,
        load: LoadFrom = "host",
    ) -> Sequence:
        """Return a new sequence that starts with the longest cached prefix of ``tokens``, the prompt.

        At least one token is left to compute. Compute what comes after ``num_cached_tokens``, then ``commit`` its ids.

        salt: only sequences with the same salt share (a tenant).
        adapter: the name of what changes the KV of every token, such as a LoRA; only sequences with the same one share,
            and events name it.
        extra_key: what else the KV depends on, from some token on: pairs ``(position, key)``, such as the digest of
            each image at its first placeholder; or one key for what the placeholder ids stand for. One key counts from
            the first id that stands twice in a row, as placeholders of an image do; in a prompt without such a run,
            from the first token. Tokens before it are shared with all sequences. So **give positions if an input takes
            a single id**, which makes no run.
        label: the name of the sequence in ``sequences()``.
        load: with ``tiers=``, how far to look for cached blocks. ``"device"``; ``"host"``: blocks in host memory are
            copied to the device first, in this call; ``"all"``: if lower tiers have more, the sequence is *pending*:
            empty, and refused by every call but ``free()`` (``NotReady``), until ``ready()`` names it or
            ``Sequence.wait()`` returns.

        ``SpecError`` for a prompt of more than ``max_tokens``. ``OutOfMemory`` only if all ``max_sequences`` are in
        use: if memory is short, the sequence starts with fewer tokens. Cost: one comparison a block, plus the mapping
        and the copy of the block or page that matches in part.
        """
        salted, keyed = encode_keys(salt, extra_key, adapter)
        if not isinstance(label, (str, NoneType)):
            raise SpecError(f"label: got {label!r}; must be a text, or None")
        sequence, started = Sequence(self, NO_HANDLE), None
        if self._tiering is not None and tokens is not None:
            tokens, started = self._bring(tokens, salt, extra_key, adapter, load)
        try:
            if started is not None:
                self._begin_pending(sequence, started, tokens, (salted, keyed))  # type: ignore[arg-type]
            else:
                self.core.admit([] if tokens is None else tokens, salted, keyed, sequence)
            if label is not None:
                self._label(sequence._id, label)
            return sequence
        except BaseException:  # also from a signal handler: the caller does not get the sequence, so cannot free it
            sequence._discard()
            raise

    def sequences(self) -> list[LiveSequence]:
        """Return the live sequences, the oldest first, however they were opened: to find sequences that nothing frees.

        Cost: linear in them.
        """
        core = self.core
        # Handles are given out in ascending order, modulo 2**32.
        ids = np.array(sorted(core.handles(), key=lambda handle: handle % 2**32), np.int32)
        tokens, committed = np.empty(len(ids), np.int64), np.empty(len(ids), np.int64)
        try:
            core.lengths(ids, self._main, tokens, committed)
            ages = [core.age_seconds(handle) for handle in ids.tolist()]
        except StaleHandle:  # another thread has freed one in between
            return self.sequences()
        self._drop_labels()
        rows = zip(ids.tolist(), tokens.tolist(), committed.tolist(), ages, strict=True)
        return [LiveSequence(i, n, done, age, self._labels.get(i)) for i, n, done, age in rows]

    def _label(self, handle: int, text: str) -> None:
        if len(self._labels) > 2 * self.max_sequences:  # most of them were freed
            self._drop_labels()
        self._labels[handle] = text

    def _drop_labels(self) -> None:
        for handle in list(self._labels):  # a copy, since other threads may add to it
            if not self.core.is_live(handle):
                self._labels.pop(handle, None)

    # --- the end ---

    def close(self) -> None:
        """Free all sequences and release the memory. Later calls raise ``StaleHandle``; closing twice is no error.

        The memory goes back to the system when no tensor, batch, pin or ``Sequence`` object of this allocator is left.
        A pool that was given stays open.
        """
        if self.closed:
            return
        self._end_prefetches()
        self._end_tiers()
        core = self.core
        if core.close():  # from here on, no thread can open a sequence
            _free_all(core)
        self.core, self.pool = cast(_core.Allocator, Closed()), cast(PagePool, Closed())
        for one in self._holders:
            one._core = self.core
        self._arenas.clear()
        self._labels.clear()

    @property
    def closed(self) -> bool:
        """True after ``close()``."""
        return isinstance(self.core, Closed)

    def __enter__(self) -> Allocator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.close()
        except KVMemError:
            if kind is None:  # an exception of the body takes precedence
                raise

    # --- ops: decide in one process, act in another ---

    def take_ops(self) -> list[Op]:
        """Return the ops since the last call (``kvmem.allocator.ops``): the version header, then the records; an empty
        list if nothing was decided. ``SpecError`` unless the allocator was made with ``record_ops=True``.
        """
        self.core.check_usable()
        if not self._recording:
            raise SpecError("take_ops: nothing was recorded; make the allocator with record_ops=True")
        return self.core.take_ops()

    def apply(self, ops: Iterable[Op | list[str | int]]) -> None:
        """Apply the ops of another allocator, the leader: all of them, or an error and nothing has changed.

        REQUIRES: leader and follower are made with the same spec, backend, sizes (``memory`` too, and ``set_memory()``
        is called on both), ``interleave``, ``zero``, guard and ``cached_rows``. ``prefix_cache`` may differ, since the
        follower commits no ids. Lists are applied in order, without gaps.

        ``SpecError`` if the list is of another version (``ops.HEADER``), does not follow from this allocator's state,
        names a slot of a tier (``load``, ``store``), which no allocator has yet, or changes memory in a way that the
        list does not account for (``csrc/table/follow.h``): a write to memory in use, a live sequence that would lose a
        token or its memory, ids that do not exist. After a ``DeviceError`` the metadata is unchanged; but if the list
        covers several calls, memory that a sequence had before may be overwritten, so make a new follower.

        A follower also fills batches, padded ones once the leader has padded one. It may open, grow and trim sequences
        by itself, but then no later list follows from its state.

        Damage that is not detected: a missing ``zero``; another number of tokens, if the list is consistent; a ``copy``
        that is missing, or from another source, for a sequence that the same list opens; other memory for the start of
        a new sequence; and (paged) another block in the same place for a sequence whose tokens are declared equal. Use
        a checksum if lists may be damaged on the way. Cost: linear in the list, some microseconds a record.
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
        # Calls nothing of the core, which raises DeviceError in a forked child: repr() must not raise.
        sizes = f"max_sequences={self.max_sequences}, max_tokens={self.max_tokens}"
        return f"Allocator(backend={self.backend!r}, device={str(self.device)!r}, {sizes}{', closed' * self.closed})"


def _free_all(core: _core.Allocator) -> None:
    while handles := core.handles():
        try:
            core.free_batch(np.array(handles, np.int32))
        except StaleHandle:  # another thread has freed one of them in between
            continue
