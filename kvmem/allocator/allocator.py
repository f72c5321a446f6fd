"""The allocator: the one place that knows spec, layout, backend, device and pool."""

from __future__ import annotations

from collections.abc import Iterable
from types import NoneType, TracebackType
from typing import Any, NoReturn, cast

import numpy as np

from kvmem import _core
from kvmem.allocator.content import ContentCalls
from kvmem.allocator.memory_calls import MemoryCalls
from kvmem.allocator.opening import Closed
from kvmem.allocator.ops import Op
from kvmem.allocator.prefix import Tokens, encode_keys
from kvmem.allocator.sequence import NO_HANDLE, LiveSequence, Sequence
from kvmem.allocator.tensors import TensorCalls
from kvmem.errors import KVMemError, SpecError, StaleHandle
from kvmem.events.digests import ExtraKey
from kvmem.memory.pool import PagePool

__all__ = ["Allocator"]


class Allocator(TensorCalls, ContentCalls, MemoryCalls):
    """Manages the KV cache of many sequences on one device. A context manager that closes it.

    spec: what a token stores.
    backend: ``"virtual"`` (vAttention: each sequence has contiguous addresses, and pages are mapped under it as it
        grows) or ``"paged"`` (PagedAttention: a sequence is a list of blocks). Both give the same answers and the same
        tensors.
    device: ``"cpu"``, ``"cuda:N"``, or ``"meta"``: every decision for a device of any size, without one.
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
        sequence = Sequence(self, NO_HANDLE)
        try:
            self.core.admit([] if tokens is None else tokens, salted, keyed, sequence)
            if label is not None:
                self._label(sequence._id, label)
            return sequence
        except BaseException:  # a signal handler's, too: who never gets the sequence cannot free it
            sequence._discard()
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
        for one in self._holders:
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
        or the memory under it, ids that do not exist. A ``DeviceError`` leaves the metadata as it was; but a list of
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


def _free_all(core: _core.Allocator) -> None:
    while handles := core.handles():
        try:
            core.free_batch(np.array(handles, np.int32))
        except StaleHandle:  # another thread has freed one of them meanwhile
            continue
