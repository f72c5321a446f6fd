"""The native half of kvmem: drivers, pages, rows, blocks, sequences."""

from collections.abc import Callable, Iterable, Sequence
import enum
from typing import Annotated

import numpy
from numpy.typing import NDArray


debug_build: bool = False

class DriverInfo:
    """What a driver is, and how a pool on it behaves. Sizes in bytes."""

    def __init__(self, *, name: str, granularity_bytes: int, recommended_bytes: int) -> None:
        """Of a device without a driver."""

    @property
    def name(self) -> str: ...

    @property
    def dlpack_device_type(self) -> int:
        """kDLCPU = 1, kDLCUDA = 2"""

    @property
    def device_index(self) -> int: ...

    @property
    def granularity_bytes(self) -> int: ...

    @property
    def recommended_bytes(self) -> int: ...

    @property
    def total_bytes(self) -> int: ...

    @property
    def fresh_pages_are_zero(self) -> bool: ...

    @property
    def shareable(self) -> bool: ...

    @property
    def rdma(self) -> bool: ...

    @property
    def creates_ahead(self) -> bool:
        """A pool creates its whole budget when it is made."""

    @property
    def maps_cheaply(self) -> bool:
        """Pages need not be larger to save calls."""

    @property
    def tells_free_bytes(self) -> bool:
        """create() can get what available_bytes() says."""

    @property
    def has_streams(self) -> bool:
        """Work may go on after a call has returned."""

    @property
    def captured_code(self) -> int:
        """
        DeviceError.code where a stream is being captured into a graph; 0: never.
        """

    @property
    def most_pages(self) -> int:
        """The default page size keeps a pool below so many; 0: any number."""

    @property
    def default_guard_tokens(self) -> int:
        """How far kernels of this device may load past a sequence's length."""

    @property
    def default_ahead_tokens(self) -> int:
        """How far ahead of a sequence's growth a pool maps."""

class DriverCounters:
    """How often each verb was called, whether it succeeded or not."""

    @property
    def reserve(self) -> int: ...

    @property
    def release(self) -> int: ...

    @property
    def create(self) -> int: ...

    @property
    def destroy(self) -> int: ...

    @property
    def map(self) -> int: ...

    @property
    def set_access(self) -> int: ...

    @property
    def unmap(self) -> int: ...

    @property
    def zero(self) -> int: ...

    @property
    def copy(self) -> int: ...

    @property
    def record(self) -> int: ...

    @property
    def wait(self) -> int: ...

    @property
    def total(self) -> int:
        """Calls that manage memory: all but zero, copy, record and wait."""

class Driver:
    """
    The verbs of a device. Addresses, page handles, streams and events are ints.
    """

    @property
    def info(self) -> DriverInfo: ...

    def counters(self) -> DriverCounters: ...

    def physical_bytes(self) -> int: ...

    def available_bytes(self) -> int: ...

    def reserve(self, bytes: int, alignment: int = 0) -> int: ...

    def release(self, base: int, bytes: int) -> None: ...

    def create(self, bytes: int) -> int: ...

    def destroy(self, page: int) -> None: ...

    def map(self, at: int, bytes: int, offset: int, page: int) -> None: ...

    def set_access(self, at: int, bytes: int) -> None: ...

    def unmap(self, at: int, bytes: int) -> None: ...

    def map_run(self, at: int, page_bytes: int, pages: Sequence[int]) -> None: ...

    def map_run_open(self, at: int, page_bytes: int, pages: Sequence[int]) -> bool: ...

    def unmap_run(self, at: int, page_bytes: int, count: int) -> None: ...

    def zero(self, at: int, bytes: int, stream: int = 0) -> None: ...

    def copy(self, to: int, source: int, bytes: int, stream: int = 0) -> None: ...

    def record(self, stream: int = 0) -> int: ...

    def done(self, event: int) -> bool: ...

    def wait(self, event: int) -> None: ...

    def forget(self, event: int) -> None: ...

    def check_stream(self, stream: int) -> None: ...

    def side_stream(self) -> int: ...

    def order(self, event: int, later: int) -> None: ...

    def undoing(self, begin: bool) -> None:
        """What follows takes back what was done before."""

class DriverCall:
    """One entry of CheckedDriver.log()."""

    @property
    def verb(self) -> str: ...

    @property
    def at(self) -> int:
        """0 where the verb has no address"""

    @property
    def bytes(self) -> int: ...

    @property
    def id(self) -> int:
        """The page or the event; 0 where the verb has none."""

    def __repr__(self) -> str: ...

class DriverLive:
    """What a CheckedDriver holds now: all zero when nothing leaks."""

    @property
    def reservations(self) -> int: ...

    @property
    def pages(self) -> int: ...

    @property
    def mappings(self) -> int: ...

    @property
    def events(self) -> int: ...

    @property
    def page_bytes(self) -> int: ...

class CheckedDriver(Driver):
    """
    Wraps a driver: refuses misuse, fails calls on request, holds events, counts.
    """

    def __init__(self, inner: Driver) -> None: ...

    def fail(self, verb: str, nth: int = 1, code: int = 2, undo_too: bool = False) -> None:
        """
        Fails the nth call from now of a verb ('' = any) once. Code 2 raises OutOfMemory, others DeviceError.
        """

    def clear_failures(self) -> None: ...

    def pending_failures(self) -> int: ...

    def hold_events(self, hold: bool) -> None:
        """
        While held, recorded events are not done; wait() completes its event and counts in held_waits().
        """

    def complete_events(self) -> None: ...

    def held_waits(self) -> int: ...

    def log(self) -> list[DriverCall]:
        """The last successful calls, oldest first."""

    def clear_log(self) -> None: ...

    def live(self) -> DriverLive: ...

    def touch(self, at: int, bytes: int) -> None:
        """DeviceError unless the range is mapped and accessible."""

def host_driver(holes_fault: bool = False) -> Driver:
    """
    The CPU device: memfd and mmap. Reading where nothing is mapped gives zeros, and faults with `holes_fault`.
    """

def cuda_driver(index: int = 0, library: str = '', shareable: bool = False, rdma: bool = False) -> Driver:
    """
    A CUDA device. `library` is a path to libcuda; empty is $KVMEM_CUDA_DRIVER, or else libcuda.so.1. `shareable` pages can be exported as file descriptors, `rdma` ones registered with an RDMA adapter.
    """

def read_bytes(at: int, bytes: int) -> bytes:
    """
    The host bytes at an address. DeviceError, never a signal, where they cannot be read.
    """

def write_bytes(at: int, data: bytes) -> None:
    """The reverse of read_bytes."""

def op_kinds() -> list[tuple[str, bool, str]]:
    """
    Of each kind of record that stands in a list: its name, whether a device executes it, what its numbers say.
    """

def ops_header() -> tuple[str, int, int, int, int, int]:
    """The record that every list begins with."""

class Growth(enum.Enum):
    token = 0

    prefill = 1

    fixed = 2

class Zero(enum.Enum):
    never = 0

    fresh = 1

    always = 2

class GroupGeometry:
    """Where one group's tokens lie; see kvmem.layouts."""

    def __init__(self, *, growth: Growth, block_tokens: int, window_tokens: int, max_tokens: int, row_tokens: int, max_blocks: int, token_bytes: Sequence[int], row_slots: Sequence[int], arena_slots: Sequence[int]) -> None: ...

    @property
    def row_tokens(self) -> int: ...

    @property
    def max_blocks(self) -> int: ...

    @property
    def arena_slots(self) -> list[int]: ...

class Geometry:
    def __init__(self, *, page_bytes: int, max_sequences: int, rows: int, tail_guard_tokens: int, map_ahead_tokens: int, zero: Zero, debug: bool, groups: Sequence[GroupGeometry]) -> None: ...

class PagePool:
    """Physical pages under one budget; see kvmem.PagePool."""

    def __init__(self, *, page_bytes: int, budget_pages: int, driver: Driver | None, create_ahead: bool) -> None: ...

    @property
    def page_bytes(self) -> int: ...

    @property
    def budget_pages(self) -> int: ...

    @property
    def present_pages(self) -> int: ...

    @property
    def mapped_pages(self) -> int: ...

    @property
    def driver_calls(self) -> int: ...

    def driver_counters(self) -> DriverCounters: ...

    def set_budget(self, pages: int) -> None: ...

    def set_stream(self, stream: int, only: bool = True) -> None:
        """
        Kernels use the memory on this stream from now on; unless it is the only one, also on those before.
        """

    def page_handle(self, page: int) -> int:
        """The driver's handle of a page; 0 where there is none."""

class AllocatorStats:
    @property
    def budget_bytes(self) -> int: ...

    @property
    def created_bytes(self) -> int: ...

    @property
    def free_bytes(self) -> int: ...

    @property
    def mapped_bytes(self) -> int: ...

    @property
    def used_bytes(self) -> int: ...

    @property
    def parked_bytes(self) -> int: ...

    @property
    def held_bytes(self) -> int: ...

    @property
    def limit_bytes(self) -> int: ...

    @property
    def cached_beside_bytes(self) -> int: ...

    @property
    def shared_bytes(self) -> int: ...

    @property
    def num_sequences(self) -> int: ...

    @property
    def driver_calls(self) -> int: ...

    @property
    def physical_bytes(self) -> int: ...

    @property
    def cached_bytes(self) -> int: ...

    @property
    def cached_blocks(self) -> int: ...

    @property
    def pinned_blocks(self) -> int: ...

    @property
    def evicted_blocks(self) -> int: ...

    @property
    def lookup_tokens(self) -> int: ...

    @property
    def hit_tokens(self) -> int: ...

class Sequences:
    """Handles, by themselves; see csrc/table/sequences.h."""

    def __init__(self, max_sequences: int, first: int = 1) -> None: ...

    def open(self) -> int: ...

    def close(self, handle: int) -> None: ...

    def undo_open(self, handle: int) -> None: ...

    def undo_close(self, handle: int) -> None: ...

    def index(self, handle: int) -> int: ...

    def next_handle(self) -> int: ...

class PrefixOptions:
    """What kvmem.Allocator says about prefix sharing."""

    def __init__(self, *, on: bool, partial: bool, policy: str, hash_bits: int = 64, event_capacity: int = 0) -> None: ...

class Allocator:
    """
    Sequences over one of the two page tables; kvmem.Allocator is its public face.
    """

    def __init__(self, *, geometry: Geometry, pool: PagePool, paged: bool, limit_pages: int, owns_pool: bool, prefix: PrefixOptions) -> None: ...

    def open(self) -> int: ...

    def open_batch(self, handles: NDArray[numpy.int32]) -> None: ...

    def truncate(self, handle: int, tokens: int) -> None: ...

    def fork(self, handle: int, sequence: object | None = None) -> int:
        """The new handle; also told to the object that stands for it."""

    def first_arena(self, group: int) -> int:
        """Its number, as ops name it."""

    def check_usable(self) -> None:
        """DeviceError in a forked child, and where the pool is poisoned."""

    def is_live(self, handle: int) -> bool: ...

    def tokens(self, handle: int, group: int = -1) -> int: ...

    def committed(self, handle: int, group: int = -1) -> int: ...

    def first_token(self, handle: int, group: int = -1) -> int: ...

    def close(self) -> bool:
        """False where the pool is poisoned, so that nothing can be freed."""

    def can_fit(self, tokens: int) -> bool: ...

    def age_seconds(self, handle: int) -> float: ...

    def lengths(self, handles: object | None, group: int, tokens: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu')], committed: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu')]) -> None: ...

    def row(self, handle: int, group: int = -1) -> int: ...

    def common_blocks(self, handles: object | None, group: int, blocks: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu')]) -> None: ...

    def cascade_order(self, handles: object | None, group: int, order: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu')]) -> None: ...

    def compact(self, bytes: int) -> int: ...

    def trim(self, bytes: int) -> int: ...

    def set_memory(self, pages: int) -> None: ...

    def stats(self) -> AllocatorStats: ...

    def check(self) -> list[str]: ...

    def digest(self) -> tuple[int, int]:
        """
        64 bits made of all that a later call could see, and how often a driver has failed when memory was written or in the mapper, or the eviction order has aged. A call that is refused leaves the first, unless the second has moved.
        """

    def record(self) -> None: ...

    def watch_lost(self) -> None:
        """For tests: take_lost() says what leaves the cache from now on."""

    def take_lost(self) -> list[tuple[int, int, tuple[int, ...]]]:
        """
        (group, ordinal, token ids) of each block that was lost since the last call, in order.
        """

    def take_ops(self) -> list[tuple[str, int, int, int, int, int]]: ...

    def apply(self, ops: Sequence[Sequence[str | int]]) -> None: ...

    def arena_bytes(self, group: int, arena: int, begin: int = 0, bytes: int = -1) -> NDArray[numpy.uint8]: ...

    def mapped_extent_bytes(self, group: int, arena: int) -> int: ...

    def handles(self) -> list[int]: ...

    def extend(self, handle: int, count: int, group: int = -1, tell: bool = False) -> TableChanges | None: ...

    def extend_batch(self, handles: object, counts: object, group: int = -1, tell: bool = False) -> TableChanges | None: ...

    def commit(self, handle: int, count: int | None, group: int = -1, tokens: object = None, tell: bool = False) -> TableChanges | None:
        """count None: as many as there are tokens."""

    def commit_batch(self, handles: object, counts: object, group: int = -1, tokens: object = None, tell: bool = False) -> TableChanges | None: ...

    def step(self, handle: int, count: int, tokens: object = None, tell: bool = False) -> TableChanges | None:
        """Commits what was reserved, and makes room for count more tokens."""

    def free(self, handle: int) -> None: ...

    def free_batch(self, handles: object) -> None: ...

    def check_current(self, group: int, batch: BatchBuffers) -> None:
        """StaleHandle if the tokens of the batch no longer lie where it says."""

    def fill(self, handles: object, new_tokens: object, group: int, rows: int, out: BatchBuffers, others: list[tuple[int, BatchBuffers]] | None = None) -> None:
        """Fills `out` for a group, and others for theirs."""

    def step_batch(self, handles: object, counts: object, tokens: object, rows: int, out: BatchBuffers, others: list[tuple[int, BatchBuffers]] | None = None) -> None:
        """
        counts None: one token each. `out`: of the first group that grows with the tokens; others: of other groups.
        """

    def admit(self, tokens: object | None, salt: bytes, extra_key: bytes, sequence: object | None = None) -> tuple[int, int]:
        """
        A new sequence: its handle, and how many tokens it has; also told to the object that stands for it.
        """

    def begin(self, tokens: object | None, salt: bytes, extra_key: bytes, count: int, sequence: object | None = None) -> tuple[int, int]:
        """
        admit() with room for `count` more tokens, or (-1) for the rest of them; else OutOfMemory.
        """

    def admit_batch(self, tokens: object | None, counts: object | None, salt: bytes, extra_key: bytes, handles: NDArray[numpy.int32], cached: NDArray[numpy.int32]) -> int:
        """How many prompts got room."""

    def match(self, tokens: object | None, salt: bytes, extra_key: bytes) -> tuple[int, str]:
        """How many tokens are cached, and why not more."""

    def pin(self, handle: int, tokens: int, pin: object | None = None) -> tuple[int, int]:
        """
        The first tokens of a sequence (-1: all known): a pin, and how many it keeps.
        """

    def pin_tokens(self, tokens: object | None, salt: bytes, extra_key: bytes, pin: object | None = None) -> tuple[int, int]: ...

    def pins(self) -> list[tuple[int, int]]:
        """
        Every pin that keeps something, and how many tokens it keeps; in the order in which they were made.
        """

    def unpin(self, pin: int) -> None: ...

    def snapshot(self, handle: int) -> None: ...

    def retain(self, handle: int, start: int, end: int, priority: int, seconds: float) -> None: ...

    def retained(self, handle: int) -> list[tuple[int, int, int, float]]:
        """
        What holds of which blocks: (first, end, priority, seconds), ascending, no block twice.
        """

    def clear_cache(self) -> int: ...

    def drain_events(self, taken: int, max: int, restart: bool) -> tuple[int, EventRecords, dict[int, tuple[bytes, bytes]]]:
        """
        The number of a batch, its records, and the (salt, extra key) of the roots that they name. The batch after number ``taken``: given again until a call says that it was taken.
        """

    def table(self, handle: int, group: int, /) -> TableChanges | None:
        """
        All entries of one table, or (-1) of those of all groups; those that are out of window are 0.
        """

    def tables(self, handles: object, /) -> TableChanges | None:
        """The same of many sequences, and of all groups."""

class BatchBuffers:
    """
    Where Allocator.fill() writes; one array per field of kvmem.Batch, or None.
    """

    def __init__(self, *, max_sequences: int, max_new_tokens: int, max_blocks: int, max_indices: int, block_table: object | None = None, seq_lens: object | None = None, first_tokens: object | None = None, slot_mapping: object | None = None, positions: object | None = None, batch_indices: object | None = None, cu_seqlens_q: object | None = None, cu_seqlens_k: object | None = None, kv_indptr: object | None = None, kv_indices: object | None = None, kv_last_page_len: object | None = None, rows: object | None = None, row_starts: object | None = None, delta_places: object | None = None, delta_blocks: object | None = None) -> None: ...

    @property
    def filled(self) -> bool:
        """False before the first fill, and if the last one failed."""

    def forget(self) -> None:
        """
        What it was filled with is not where it should be: the next fill writes, and tells, all of it.
        """

    @property
    def handles(self) -> list[int]:
        """The sequences of the last fill, without padding rows."""

    @property
    def num_rows(self) -> int: ...

    @property
    def num_new_tokens(self) -> int: ...

    @property
    def num_indices(self) -> int: ...

    @property
    def max_seqlen_q(self) -> int: ...

    @property
    def max_seqlen_k(self) -> int: ...

    @property
    def num_deltas(self) -> int:
        """Entries of the table that changed; -1: more than were noted."""

    @property
    def table_rows(self) -> tuple[int, int]:
        """The rows that hold them, as a range."""

    @property
    def indices_from(self) -> int:
        """Where kv_indices changed first."""

class TableChanges:
    """
    What a call wrote to block tables: entry ``columns[k]`` of row ``rows[k]`` is ``blocks[k]`` now, by row, then by column; 0 where a sliding window has passed the block. These are of the main group, the first that grows with the tokens; ``group(g)`` tells the same of group g. The length counts the entries of all groups: most changes are empty, and false.
    """

    def __init__(self) -> None: ...

    def __len__(self, /):
        """Return len(self)."""

    @property
    def rows(self) -> Annotated[NDArray[numpy.int32], dict(shape=(None,))]:
        """
        int32 [k], made when asked for: positions in the ``handles`` of the call, 0 where it had one request.
        """

    @property
    def columns(self) -> Annotated[NDArray[numpy.int32], dict(shape=(None,))]:
        """int32 [k]."""

    @property
    def blocks(self) -> Annotated[NDArray[numpy.int32], dict(shape=(None,))]:
        """int32 [k]."""

    @property
    def groups(self) -> tuple[int, ...]:
        """The groups that have entries here, ascending."""

    def group(self, group: int) -> TableChanges:
        """
        What was written to the tables of one group, as ``TableChanges`` of which it is the main one; empty if nothing was.
        """

    def write(self, table: NDArray[numpy.int32], row: int = 0) -> None:
        """
        Brings a copy of the main group's tables up to date: all of it, or ``SpecError`` where it is too small.

        table: int32 [requests, blocks of the longest], of any strides. row: the request's, or where row 0 of a step stands.
        """

    def __repr__(self) -> str: ...

    def __getstate__(self) -> tuple[int, bytes]: ...

    def __setstate__(self, arg: tuple[int, bytes], /) -> None: ...

def eviction_policy_names() -> list[str]:
    """What `policy=` of an allocator may be; the default first."""

class EvictionPolicy:
    """
    A policy without an allocator, for tests and simulations (csrc/eviction/policy.h says what each call means). Calls that break its rules raise SpecError.
    """

    def __init__(self, name: str) -> None: ...

    def reserve(self, ids: int) -> None: ...

    def insert(self, id: int, key: int, parent: int) -> None: ...

    def undo_insert(self, id: int) -> None: ...

    def hit(self, id: int) -> None: ...

    def use(self, id: int) -> None: ...

    def undo_use(self, id: int) -> None: ...

    def release(self, id: int) -> None: ...

    def undo_release(self, id: int) -> None: ...

    def victim(self) -> int: ...

    def evict(self, id: int) -> None: ...

    def restore(self, id: int) -> None: ...

    def digest(self) -> int:
        """Of the order in which blocks stand."""

class RetentionPolicy(EvictionPolicy):
    """Priorities and times to live over a policy."""

    def __init__(self, name: str, clock: Callable[[], float]) -> None: ...

    def retain(self, id: int, priority: int, ttl_seconds: float) -> None: ...

class EventRecords:
    """Records in order: numpy views, one entry a record, read-only."""

    def __len__(self) -> int: ...

    @property
    def kinds(self) -> Annotated[NDArray[numpy.int8], dict(shape=(None,), writable=False)]:
        """0 stored, 1 removed, 2 cleared; int8 [n]."""

    @property
    def nodes(self) -> Annotated[NDArray[numpy.int32], dict(shape=(None,), writable=False)]: ...

    @property
    def parents(self) -> Annotated[NDArray[numpy.int32], dict(shape=(None,), writable=False)]:
        """-1 for the first block of a chain."""

    @property
    def roots(self) -> Annotated[NDArray[numpy.int32], dict(shape=(None,), writable=False)]: ...

    @property
    def groups(self) -> Annotated[NDArray[numpy.int32], dict(shape=(None,), writable=False)]:
        """-1: no group holds the node; others continue it."""

    @property
    def ordinals(self) -> Annotated[NDArray[numpy.int32], dict(shape=(None,), writable=False)]: ...

    @property
    def tiers(self) -> Annotated[NDArray[numpy.int32], dict(shape=(None,), writable=False)]: ...

    @property
    def tokens(self) -> Annotated[NDArray[numpy.int32], dict(shape=(None, None), writable=False)]:
        """int32 [stored records, block_tokens]."""

    @property
    def tags(self) -> list[bytes | None]:
        """
        What of each stored record's block is keyed (csrc/index/block_tags.h); made when asked for.
        """

class EventRing:
    """A bounded queue of records; see csrc/index/events.h."""

    def __init__(self, capacity: int, block_tokens: int) -> None: ...

    def stored(self, node: int, parent: int, root: int, group: int, ordinal: int, tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], tier: int = 0) -> None: ...

    def removed(self, node: int, group: int, tier: int = 0) -> None: ...

    def cleared(self) -> None: ...

    def drain(self, max: int, resident: Callable[[], Iterable[object]], restart: bool = False) -> EventRecords:
        """
        `resident()` gives what stored() takes, in tuples, for all that is there.
        """

    @property
    def on(self) -> bool: ...

    def __len__(self) -> int: ...

    @property
    def serial(self) -> int: ...

    @property
    def lost(self) -> int: ...

def keyed_hash(first: int, second: int, bytes: bytes) -> int:
    """What salts are found by; see csrc/base/keyed_hash.h."""

class TokenBlocks:
    """Blocks of token ids, packed; see csrc/index/token_blocks.h."""

    def __init__(self, block_tokens: int) -> None: ...

    def reserve(self, blocks: int) -> None: ...

    def put(self, block: int, tokens: object) -> None: ...

    def common(self, block: int, tokens: object) -> int:
        """How many of these tokens the block begins with."""

    def copy(self, block: int, out: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu')]) -> None:
        """Fills `out` with the first ids of the block."""

    @property
    def bits(self) -> int:
        """Of one id."""

class Scope:
    """
    What a sequence's Python object does at the ends of its life: it has a ``_core`` and an ``_id``.
    """

    def __enter__(self) -> object: ...

    def __exit__(self, kind: object, error: object, at: object, /) -> None: ...
