"""Cache events for a router outside of the process: blocks stored, blocks removed, all blocks cleared.

The native module makes records of small integers (``csrc/index/events.h``). This module names blocks by digests that
are equal in every process: of the block, of all blocks before it, and of the cache's identity. ``docs/events.md``
describes the wire format.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias, cast

import numpy as np

from kvmem import _core
from kvmem.arguments import check_size
from kvmem.errors import DeviceError, KVMemError, SpecError
from kvmem.events.digests import DIGEST_BYTES, ChainDigest, Key, keys_in
from kvmem.spec import CacheSpec, Group

if TYPE_CHECKING:
    import numpy.typing as npt

    _Digests: TypeAlias = npt.NDArray[np.void]

__all__ = [
    "AllBlocksCleared",
    "BlockRemoved",
    "BlockStored",
    "Event",
    "EventBatch",
    "EventStream",
    "group_kind",
    "to_wire",
]

MEDIA: Final = ("GPU", "CPU")  # routers' names of tier 0, 1, ...; tier 0 is the device, even if that is a CPU
_STORED, _REMOVED, _CLEARED = 0, 1, 2  # EventKind in csrc/index/events.h
_CHUNK: Final = 1024  # records fetched at once when the caller wants few events
_DEFAULTED: Final = ("extra_keys", "group_idx", "kv_cache_spec_kind", "kv_cache_spec_sliding_window")
_UNKNOWN: Final = bytes(DIGEST_BYTES)
_DIGEST: Final = np.dtype(f"V{DIGEST_BYTES}")


@dataclass(frozen=True)
class BlockStored:
    """One group now has a run of consecutive blocks of one chain.

    block_hashes: one digest of 32 bytes for each block.
    parent_block_hash: the digest of the block before the run; None if the run begins its chain.
    token_ids: ``block_size`` ids for each block, in order.
    block_size: tokens of a block; with groups of different block sizes, their common sharing unit.
    medium: ``"GPU"`` for the device's own memory, ``"CPU"`` for host memory behind it.
    group: the index in ``spec.groups``. group_kind: see :func:`group_kind`.
    window_tokens: the group's sliding window, None for full attention.
    extra_keys: for each block the keys that begin in it, or None; None if no block has any.
    ordinal: the number of blocks before the run.
    adapter: that of the sequence. Its salt is part of the digests but not of the event.
    """

    block_hashes: tuple[bytes, ...]
    parent_block_hash: bytes | None
    token_ids: tuple[int, ...]
    block_size: int
    medium: str
    group: int
    group_kind: str
    window_tokens: int | None
    extra_keys: tuple[tuple[Key, ...] | None, ...] | None
    ordinal: int
    adapter: str | None = None


@dataclass(frozen=True)
class BlockRemoved:
    """One group no longer has these blocks, which are in no particular order. Other groups may still have them."""

    block_hashes: tuple[bytes, ...]
    medium: str
    group: int


@dataclass(frozen=True)
class AllBlocksCleared:
    """No group has any block. Events that follow may store blocks again, which is how a stream recovers from a loss."""


Event: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared


def group_kind(group: Group) -> str:
    """Return the name of this kind of group in vLLM's events. Routers ignore groups of other kinds."""
    if group.growth == "fixed":
        return "mamba"
    if group.growth == "prefill":
        return "cross_attention"
    latent = any(c.name == "ckv" for c in group.components)
    if group.window_tokens is not None:
        return "sliding_window_mla" if latent else "sliding_window"
    return "mla_attention" if latent else "full_attention"


class EventBatch(NamedTuple):
    """The records that the native module returned from one call. It returns them again until it hears ``number`` back.

    roots: the (salt, extra_key) of each root that the records name, by number.
    """

    number: int
    records: _core.EventRecords
    roots: Mapping[int, tuple[Key, Key]]


class _State(NamedTuple):
    """The position of a stream, replaced as a whole: an interrupted poll leaves either the old or the new one."""

    taken: int  # the number of the last batch that was turned into events
    ready: list[Event]
    given: int  # how many of ``ready`` were returned already


class EventStream:
    """Turns the native module's records into events, in order. Any thread may poll; each event is returned once.

    drain: called with (number of the last batch received, most records or -1 for all, restart); returns the next batch.
        See csrc/allocator/event_batches.h.
    key: a secret of up to 64 bytes. Without one, a reader who knows digests and token ids can test guesses of a salt.
        With one, only readers who have it can compute the digests of a prompt.
    media: the names of the tiers.

    Python may interrupt a poll anywhere, to run a signal handler or a finaliser. If that polls too, it gets the next
    events, and the interrupted poll those that follow. If it raises, no event is lost: the next poll returns them.

    Memory: 32 bytes for each node id of the index, whatever the number of events.
    """

    def __init__(
        self,
        spec: CacheSpec,
        drain: Callable[[int, int, bool], EventBatch],
        *,
        key: bytes = b"",
        media: Sequence[str] = MEDIA,
    ) -> None:
        self._drain = drain
        self.digest = ChainDigest(spec.fingerprint, key)
        self._groups = [(group_kind(group), group.window_tokens) for group in spec.groups]
        self._media = tuple(media)
        self._digests = np.zeros(0, _DIGEST)  # by node; zero means never stored
        self._state = _State(0, [], 0)
        self._lock = threading.RLock()
        self._process = os.getpid()

    def poll(self, max_events: int | None = None, *, restart: bool = False) -> list[Event]:
        """Return the events since the last call, oldest first: ``max_events`` at most, or all with None.

        If records were lost since then, because the ring was full, ``AllBlocksCleared`` replaces them, followed by
        ``BlockStored`` for all blocks that are cached now. ``restart`` requests the same, for a consumer that starts
        late or has lost events itself.

        Raises ``SpecError`` unless ``max_events`` is an integer of at least 0, and ``DeviceError`` in a forked child.
        Costs about 4 us for each block, in the caller's thread; the allocator's lock is held only while records are
        copied.
        """
        if max_events is not None:
            max_events = check_size("max_events", max_events, 0)
        if os.getpid() != self._process:  # a thread of the parent may hold the lock, and nobody here would release it
            raise DeviceError(
                "the events belong to the process that fork() was called in; make an allocator here", "fork"
            )
        with self._lock:
            if restart:
                self._receive(-1, restart=True)
            if max_events is None:
                self._receive(0)  # the batch that an interrupted poll had not received
                self._receive(-1)
            else:
                while len(self._state.ready) - self._state.given < max_events and self._receive(_CHUNK):
                    pass
            self._drain(self._state.taken, 0, False)  # acknowledges the batch, so that it can be freed
        while True:
            state = self._state
            end = len(state.ready) if max_events is None else min(state.given + max_events, len(state.ready))
            some, after = state.ready[state.given : end], _shortened(state.taken, state.ready, end)
            # One line, so that no other thread and no signal handler runs between the comparison and the return.
            if self._state is state: self._state = after; return some  # fmt: skip  # noqa: E701, E702

    def _receive(self, most: int, *, restart: bool = False) -> bool:
        """Turn one more batch into events; False if there is none. An interrupting poll may have done it instead."""
        state = self._state
        batch = self._drain(state.taken, most, restart)
        if not len(batch.records):
            return False
        made = _Made(batch, self._digests)
        events = list(self._events(made))
        after = _State(batch.number, [*([] if restart else state.ready[state.given :]), *events], 0)
        digests, nodes, values = made.changes()
        # One line, for the same reason as in poll().
        if self._state is state: self._digests, digests[nodes], self._state = digests, values, after  # fmt: skip  # noqa: E701
        return True

    def _events(self, made: _Made) -> Iterator[Event]:
        """Yield the events of a batch.

        Within a stretch of records of one kind, the records of each group are merged: none depends on another group's.
        """
        records = made.batch.records
        kinds = records.kinds
        cuts = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(records)]
        stored = 0
        for begin, end in pairwise(cuts):
            if kinds[begin] == _STORED:
                yield from self._stored(made, begin, end, stored)
                stored += end - begin
            elif kinds[begin] == _REMOVED:
                yield from self._removed(made, begin, end)
            else:
                made.clear()
                yield AllBlocksCleared()

    def _stored(self, made: _Made, begin: int, end: int, first_row: int) -> Iterator[Event]:
        records = made.batch.records
        rows = np.ascontiguousarray(records.tokens[first_row : first_row + end - begin], "<i4")
        content, width = rows.data.cast("B"), rows.shape[1] * rows.itemsize
        fields = (records.nodes, records.parents, records.roots, records.groups, records.tiers, records.ordinals)
        tags = records.tags
        runs: list[_Run] = []
        growing: dict[tuple[int, int], _Run] = {}
        for row, (node, parent, root, group, tier, ordinal) in enumerate(
            zip(*(field[begin:end].tolist() for field in fields), strict=True)
        ):
            before = self.digest.root(*made.batch.roots[root]) if parent < 0 else made.digest_of(parent)
            tag = tags[first_row + row] or b""
            digest = self.digest.block(before, content[row * width : (row + 1) * width], tag)
            made.digests[node] = digest
            if group < 0:  # no group has the block: it only provides the digest for the blocks after it
                continue
            run = growing.get((group, tier))
            if run is None or run.digests[-1] != before:
                adapter = made.batch.roots[root][1]
                run = _Run(None if parent < 0 else before, adapter, group, tier, ordinal, [], [], [])
                growing[group, tier] = run
                runs.append(run)
            run.digests.append(digest)
            run.rows.append(row)
            run.keys.append(keys_in(tag) or None)
        for run in runs:
            yield self._stored_event(run, rows)

    def _stored_event(self, run: _Run, rows: np.ndarray[Any, np.dtype[np.int32]]) -> BlockStored:
        kind, window = self._groups[run.group]
        return BlockStored(
            block_hashes=tuple(run.digests),
            parent_block_hash=run.before,
            token_ids=tuple(rows[run.rows].ravel().tolist()),
            block_size=rows.shape[1],
            medium=self._media[run.tier],
            group=run.group,
            group_kind=kind,
            window_tokens=window,
            extra_keys=tuple(run.keys) if any(run.keys) else None,
            ordinal=run.ordinal,
            adapter=cast("str | None", run.adapter),
        )

    def _removed(self, made: _Made, begin: int, end: int) -> Iterator[Event]:
        records = made.batch.records
        found: dict[tuple[int, int], list[bytes]] = {}
        columns = (field[begin:end].tolist() for field in (records.groups, records.tiers, records.nodes))
        for group, tier, node in zip(*columns, strict=True):
            found.setdefault((group, tier), []).append(made.digest_of(node))
        for (group, tier), digests in found.items():
            yield BlockRemoved(tuple(digests), self._media[tier], group)


def _shortened(taken: int, ready: list[Event], given: int) -> _State:
    """Return the state without the events that were given, unless they are few: many small polls stay linear."""
    return _State(taken, ready[given:], 0) if 2 * given >= len(ready) else _State(taken, ready, given)


class _Made:
    """The digests of a stream while the events of one batch are made. The stream's own change once all are made."""

    def __init__(self, batch: EventBatch, before: _Digests) -> None:
        self.batch = batch
        self.digests: dict[int, bytes] = {}  # by node; the changes of this batch
        self._before = before

    def clear(self) -> None:
        self.digests.clear()
        self._before = np.zeros(len(self._before), _DIGEST)

    def digest_of(self, node: int) -> bytes:
        digest = self.digests.get(node)
        if digest is None:
            digest = self._before[node].tobytes() if node < len(self._before) else _UNKNOWN
        if digest == _UNKNOWN:
            raise KVMemError(f"a record of the cache names node {node}, which was never stored: an error in kvmem")
        return digest

    def changes(self) -> tuple[_Digests, npt.NDArray[np.int64], _Digests]:
        """Return an array with room for all nodes, the nodes whose digests change, and their new digests."""
        nodes = np.fromiter(self.digests, np.int64, len(self.digests))
        values = np.frombuffer(b"".join(self.digests.values()), _DIGEST)
        digests, room = self._before, int(nodes.max(initial=-1)) + 1
        if room > len(digests):
            digests = np.zeros(max(room, 2 * len(digests)), _DIGEST)
            digests[: len(self._before)] = self._before
        return digests, nodes, values


@dataclass
class _Run:
    """Consecutive stored blocks that become one event."""

    before: bytes | None
    adapter: Key
    group: int
    tier: int
    ordinal: int
    digests: list[bytes]
    rows: list[int]
    keys: list[tuple[Key, ...] | None]


def to_wire(
    events: Iterable[Event],
    ts: float,
    dp_rank: int = 0,
    *,
    hashes: Literal["int", "bytes"] = "int",
    form: Literal["array", "map"] = "map",
) -> list[Any]:
    """Return a batch of events as plain lists for ``msgpack.packb``: ``[ts, events, dp_rank]``.

    ``docs/events.md`` describes the format.

    ts: seconds since the epoch. dp_rank: the replica of the model to which this cache belongs.
    hashes: ``"int"``: the last 64 bits of a digest, which every router accepts; ``"bytes"``: all 256.
    form: ``"map"``: events as dicts, which the classes of vLLM and SGLang read today, and Dynamo; ``"array"``: events
        as lists, which AIBrix, llm-d, Dynamo and older engines read. No form is read by all.

    Raises ``SpecError`` for another ``hashes`` or ``form``.
    """
    if hashes not in ("int", "bytes") or form not in ("array", "map"):
        raise SpecError(f"got hashes={hashes!r}, form={form!r}; must be 'int' or 'bytes', and 'array' or 'map'")
    as_hash: Callable[[bytes], int | bytes] = _hash64 if hashes == "int" else bytes
    fields = [_wire_fields(event, as_hash) for event in events]
    return [float(ts), [list(f.values()) if form == "array" else _as_map(f) for f in fields], int(dp_rank)]


def _hash64(digest: bytes) -> int:
    return int.from_bytes(digest[-8:], "big")


def _wire_fields(event: Event, as_hash: Callable[[bytes], int | bytes]) -> dict[str, Any]:
    """Return the fields in the order of the array form, ``type`` first."""
    if isinstance(event, AllBlocksCleared):
        return {"type": "AllBlocksCleared"}
    found = [as_hash(digest) for digest in event.block_hashes]
    if isinstance(event, BlockRemoved):
        return {"type": "BlockRemoved", "block_hashes": found, "medium": event.medium, "group_idx": event.group}
    parent, extra = event.parent_block_hash, event.extra_keys
    return {
        "type": "BlockStored",
        "block_hashes": found,
        "parent_block_hash": None if parent is None else as_hash(parent),
        "token_ids": list(event.token_ids),
        "block_size": event.block_size,
        "lora_id": None,
        "medium": event.medium,
        "lora_name": event.adapter,
        "extra_keys": None if extra is None else [None if keys is None else list(keys) for keys in extra],
        "group_idx": event.group,
        "kv_cache_spec_kind": event.group_kind,
        "kv_cache_spec_sliding_window": event.window_tokens,
    }


def _as_map(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields without optional ones that are None: the engines' encoders omit these in maps, not in lists."""
    return {name: value for name, value in fields.items() if value is not None or name not in _DEFAULTED}
