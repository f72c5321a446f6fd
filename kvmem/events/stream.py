"""What the cache holds, as events for a router outside: blocks stored, removed, all cleared.

The core makes records of small integers (``csrc/index/events.h``); here they get the names that mean the same in every
process: a digest of the block, of all before it, and of whose cache it is. ``docs/events.md`` has the wire format.
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

MEDIA: Final = ("GPU", "CPU")  # of tier 0, 1, ... in the words of routers; tier 0 is the device, whatever it is
_STORED, _REMOVED, _CLEARED = 0, 1, 2  # EventKind in csrc/index/events.h
_CHUNK: Final = 1024  # records taken out at once when the caller wants few events
_DEFAULTED: Final = ("extra_keys", "group_idx", "kv_cache_spec_kind", "kv_cache_spec_sliding_window")
_UNKNOWN: Final = bytes(DIGEST_BYTES)
_DIGEST: Final = np.dtype(f"V{DIGEST_BYTES}")


@dataclass(frozen=True)
class BlockStored:
    """A run of blocks of one chain is held by one group now, each block continuing the one before it.

    block_hashes: one 32-byte digest a block. token_ids: ``block_size`` for each, in order.
    parent_block_hash: of the block before the run; None if the run begins its chain. ordinal: how many come before.
    medium: "GPU" for the device's own memory, "CPU" for host memory behind it.
    group, group_kind, window_tokens: which group of the spec, as :func:`group_kind`, and the tokens its queries see.
    extra_keys: for each block the keys that begin in it, None for none; None if no block has any.
    adapter: what the sequence was opened with. Its salt is part of the digests and not told.
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
    """One group holds these blocks no more, in no order. Others may."""

    block_hashes: tuple[bytes, ...]
    medium: str
    group: int


@dataclass(frozen=True)
class AllBlocksCleared:
    """Nothing is held. What follows may store again what was known before: that is how a lost stream recovers."""


Event: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared


def group_kind(group: Group) -> str:
    """What routers call this kind of group: those they do not know by one of these names they ignore."""
    if group.growth == "fixed":
        return "mamba"
    if group.growth == "prefill":
        return "cross_attention"
    latent = any(c.name == "ckv" for c in group.components)
    if group.window_tokens is not None:
        return "sliding_window_mla" if latent else "sliding_window"
    return "mla_attention" if latent else "full_attention"


class EventBatch(NamedTuple):
    """What the core has told at once. It tells the same again until it hears that ``number`` was taken.

    roots: the (salt, extra_key) of each root that the records name.
    """

    number: int
    records: _core.EventRecords
    roots: Mapping[int, tuple[Key, Key]]


class _State(NamedTuple):
    """Where a stream stands: replaced whole, so that whoever is interrupted leaves the one before or the one after."""

    taken: int  # the last batch whose events were made
    ready: list[Event]
    given: int  # how many of them were given out


class EventStream:
    """Turns the core's records into events, in order. Any thread may poll; each event is given out once.

    drain: (number of the last batch taken, most records or -1, restart) -> the next batch, as
    csrc/allocator/event_batches.h has it.
    key: secret, up to 64 bytes. Without it, who sees digests and tokens can try out salts; with it, that is hopeless,
    and only who has it can compute the digests of a prompt.

    Python may interrupt a poll anywhere, to run a signal handler or a finaliser. If that polls too, it gets the events
    that come next, and the poll that it interrupted those after them. If it raises, no event is lost: the next poll
    gives out what this one would have.

    It keeps 32 bytes for every node id, whatever the number of events.
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
        self._digest = ChainDigest(spec.fingerprint, key)
        self._groups = [(group_kind(group), group.window_tokens) for group in spec.groups]
        self._media = tuple(media)
        self._digests = np.zeros(0, _DIGEST)  # by node; zero: never stored
        self._state = _State(0, [], 0)
        self._lock = threading.RLock()
        self._process = os.getpid()

    def poll(self, max_events: int | None = None, *, restart: bool = False) -> list[Event]:
        """The events since the last call, oldest first, ``max_events`` at most; None for all there are now.

        Where the ring ran over since then, ``AllBlocksCleared`` comes in place of what was lost, and after it
        ``BlockStored`` for all that is held. ``restart`` asks for just that: for a consumer that begins late, or lost
        events by itself. Costs about 4 us a block, in the caller's thread, and no lock of the allocator but
        while records are copied.
        """
        if max_events is not None and (isinstance(max_events, bool) or not max_events >= 0):
            raise SpecError(f"max_events: got {max_events!r}; must be an int, 0 or more, or None")
        if os.getpid() != self._process:  # the lock may be closed for ever, by a thread that is not here
            raise DeviceError(
                "the events belong to the process that fork() was called in; make an allocator here", "fork"
            )
        with self._lock:
            if restart:
                self._receive(-1, restart=True)
            if max_events is None:
                self._receive(0)  # what a poll that was interrupted had not taken
                self._receive(-1)
            else:
                while len(self._state.ready) - self._state.given < max_events and self._receive(_CHUNK):
                    pass
            self._drain(self._state.taken, 0, False)  # it need not keep them any more
        while True:
            state = self._state
            end = len(state.ready) if max_events is None else min(state.given + max_events, len(state.ready))
            some, after = state.ready[state.given : end], _shortened(state.taken, state.ready, end)
            # One line: nothing comes between the look and the return, no other thread and no signal handler.
            if self._state is state: self._state = after; return some  # fmt: skip  # noqa: E701, E702

    def _receive(self, most: int, *, restart: bool = False) -> bool:
        """Makes the events of one more batch; False when there is none. A poll that came between has made them."""
        state = self._state
        batch = self._drain(state.taken, most, restart)
        if not len(batch.records):
            return False
        made = _Made(batch, self._digests)
        events = list(self._events(made))
        after = _State(batch.number, [*([] if restart else state.ready[state.given :]), *events], 0)
        digests, nodes, values = made.changes()
        # One line, as in poll().
        if self._state is state: self._digests, digests[nodes], self._state = digests, values, after  # fmt: skip  # noqa: E701
        return True

    def _events(self, made: _Made) -> Iterator[Event]:
        """Joins what it may within stretches of one kind: no event there depends on one of another group."""
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
            before = self._digest.root(*made.batch.roots[root]) if parent < 0 else made.digest_of(parent)
            tag = tags[first_row + row] or b""
            digest = self._digest.block(before, content[row * width : (row + 1) * width], tag)
            made.digests[node] = digest
            if group < 0:  # nobody holds it: it only names what comes after
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
    """Without the events given out, where those are many: a poll for a few of many copies none of the others."""
    return _State(taken, ready[given:], 0) if 2 * given >= len(ready) else _State(taken, ready, given)


class _Made:
    """What becomes of a stream's digests as the events of a batch are made; the stream's own change when all are."""

    def __init__(self, batch: EventBatch, before: _Digests) -> None:
        self.batch = batch
        self.digests: dict[int, bytes] = {}  # by node
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
        """An array with room for all nodes, and which of its entries become what."""
        nodes = np.fromiter(self.digests, np.int64, len(self.digests))
        values = np.frombuffer(b"".join(self.digests.values()), _DIGEST)
        digests, room = self._before, int(nodes.max(initial=-1)) + 1
        if room > len(digests):
            digests = np.zeros(max(room, 2 * len(digests)), _DIGEST)
            digests[: len(self._before)] = self._before
        return digests, nodes, values


@dataclass
class _Run:
    """Stored blocks that will be one event."""

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
    """One batch of events as plain lists, for ``msgpack.packb``; the schema is in ``docs/events.md``.

    ts: seconds since the epoch. dp_rank: which replica of the model this cache belongs to.
    hashes: "int" for the last 64 bits of a digest, which every router takes, or "bytes" for all 256.
    form: "map" for events as dicts, which vLLM's and SGLang's own classes read today, and Dynamo; or "array" for events
    as lists, which AIBrix, llm-d, Dynamo and older engines read. No form is read by all.
    """
    if hashes not in ("int", "bytes") or form not in ("array", "map"):
        raise SpecError(f"got hashes={hashes!r}, form={form!r}; must be 'int' or 'bytes', and 'array' or 'map'")
    as_hash: Callable[[bytes], int | bytes] = _hash64 if hashes == "int" else bytes
    fields = [_wire_fields(event, as_hash) for event in events]
    return [float(ts), [list(f.values()) if form == "array" else _as_map(f) for f in fields], int(dp_rank)]


def _hash64(digest: bytes) -> int:
    return int.from_bytes(digest[-8:], "big")


def _wire_fields(event: Event, as_hash: Callable[[bytes], int | bytes]) -> dict[str, Any]:
    """In the order of the array form, ``type`` first."""
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
    """Without what is None and None by default, as the engines' encoder leaves it out of maps, but not of lists."""
    return {name: value for name, value in fields.items() if value is not None or name not in _DEFAULTED}
