"""The transfer engine: threads that move blocks between host slots and the tiers below.

Its threads touch host slots that they hold, and nothing else of the allocator. A fault of a tier ends a load early, or
leaves a block unwritten; it is counted, and never raised.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import compress
from typing import TYPE_CHECKING
from weakref import WeakSet

import numpy as np

from kvmem.allocator.tiers.loads import POLL_SECONDS, Arrivals, Block, Load, Place, wait_until
from kvmem.allocator.tiers.search import key_of, search
from kvmem.tiers.base import Result, Status, Tier
from kvmem.tiers.fault_log import FaultLog

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvmem.allocator.tiers.engine import Tiering
    from kvmem.allocator.tiers.events import Facts
    from kvmem.allocator.tiers.places import Located, Prompt

    Bytes = npt.NDArray[np.uint8]

__all__ = ["Load", "Transfers"]

_THREADS = 4  # for loads, and as many for writes, which must not wait for loads that wait for slots
_AT_ONCE = 16  # blocks in one call of a tier
_MOST_QUEUED = 1024  # blocks that wait to be written; what comes then is not written
_FENCE_SECONDS = 30.0
_STARVED_SECONDS = 30.0  # without a call of advance(): nobody asks for the load any more


class Turns:
    """Loads go first, because somebody waits for them: while one is under way, writes take turns, one at a time."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._loads = self._writes = 0

    @contextmanager
    def load(self) -> Iterator[None]:
        """Within it, a load is under way."""
        self._change(1, 0)
        try:
            yield
        finally:
            self._change(-1, 0)

    @contextmanager
    def write(self) -> Iterator[None]:
        """Wait for the turn of a write, which ends with the block."""
        with self._changed:
            self._changed.wait_for(lambda: self._loads == 0 or self._writes == 0)
            self._writes += 1
        try:
            yield
        finally:
            self._change(0, -1)

    def _change(self, loads: int, writes: int) -> None:
        with self._changed:
            self._loads, self._writes = self._loads + loads, self._writes + writes
            self._changed.notify_all()


class _Write:
    """Blocks on their way to a lower tier, whose slots are held."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.begun = self.claimed = False


class Transfers:
    """The engine of one ``Tiering``, whose lock it never holds while a tier works.

    deadline_seconds: the longest that a load is waited for, by ``clock``.
    """

    def __init__(self, tiering: Tiering, deadline_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.tiering, self.deadline_seconds, self.clock = tiering, deadline_seconds, clock
        self._lock = threading.Lock()
        self._threads: dict[str, ThreadPoolExecutor] = {}
        self._writes: set[_Write] = set()  # under way
        self._turns = Turns()
        self._bytes: Bytes | None = None
        self._spare: dict[int, list[Bytes]] = {}
        self._log = FaultLog("tiers")
        self._closed = False
        self._loads: WeakSet[Load] = WeakSet()
        self.left: deque[tuple[int, int]] = deque()  # held slots of loads that nobody asked for any more

    # --- to lower tiers ---

    def put(self, blocks: Sequence[Block], fence: int) -> None:
        """Write blocks to the first lower tier. ``fence``: until it has passed, the device fills their slots."""
        for first in range(0, len(blocks), _AT_ONCE):
            some, held = blocks[first : first + _AT_ONCE], list[bool]()
            write = _Write()
            try:
                held[:] = self.tiering.core.hold_slots([b.name for b in some])
                write.blocks += compress(some, held)
                self.tiering.leave(write.blocks)
                self._begin(write, fence)
            finally:
                if not write.begun and self._claim(write):
                    write.blocks = list(compress(some, held))
                    self._end_write(write, [False] * len(write.blocks))
            for block, here in zip(some, held, strict=True):
                if not here:
                    self.tiering.forget(block)

    def _begin(self, write: _Write, fence: int) -> None:
        waiting = sum(len(w.blocks) for w in list(self._writes))
        if waiting + len(write.blocks) > _MOST_QUEUED:  # back-pressure would hold up a step
            self.tiering.counters["not written: queue full"] += len(write.blocks)
        elif write.blocks:
            self._writes.add(write)
            write.begun = self._submit(self._write, write, fence) is not None

    def _claim(self, write: _Write) -> bool:
        """Whether the caller is the one that ends this write: the thread, or ``put()`` if no thread was started."""
        with self._lock:
            first, write.claimed = not write.claimed, True
        return first

    def _write(self, write: _Write, fence: int) -> None:
        if not self._claim(write):
            return
        stored = [False] * len(write.blocks)
        try:
            self.wait_for(fence)
            with self._turns.write():
                stored = self._put_all(write.blocks)
        except Exception as error:  # noqa: BLE001  # of somebody's tier, which must not raise
            self._log.warn("writing", f"writing failed with {type(error).__name__}: {error}")
        finally:
            self._end_write(write, stored)

    def _put_all(self, blocks: list[Block]) -> list[bool]:
        tier = self.tiering.tiers[0]
        stored = [tier.contains([b.key]) == 1 for b in blocks]
        new = [b for b, is_there in zip(blocks, stored, strict=True) if not is_there]
        with self._staging([b.group for b in new]) as buffers:
            for block, buffer in zip(new, buffers, strict=True):
                self.tiering.forms[block.group].to_canonical(self._slot(block.group, block.name[0]), buffer)
            results = tier.put([b.key for b in new], [b.data for b in buffers]) if new else []
        self._count(tier, "written", results)
        ok = iter([r.ok for r in results])
        return [is_there or next(ok) for is_there in stored]

    def _end_write(self, write: _Write, stored: list[bool]) -> None:
        try:
            for block, done in zip(write.blocks, stored, strict=True):
                self.tiering.written(block, done)
        finally:
            self.tiering.core.release_slots([b.name for b in write.blocks])
            self._writes.discard(write)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything that was handed over is written, ``timeout`` seconds at most; return whether it is."""
        writes = set(self._writes)
        return wait_until(lambda: writes.isdisjoint(self._writes), timeout)

    # --- from lower tiers ---

    def load(self, prompt: Prompt, located: Located, *, to_device: bool) -> Load:
        """Start a load of what device and host do not have."""
        arrivals = Arrivals(prompt, to_device)
        load = Load(self, arrivals)
        with self._lock:
            self._loads.add(load)
        if self.tiering.tiers and self.tiering.reach(prompt.num_blocks, located.has) < prompt.num_blocks:
            load.future = self._submit(self._load, arrivals, located)
        return load

    def _load(self, load: Arrivals, located: Located) -> None:
        with self._turns.load():
            self._read(load, located)

    def _read(self, load: Arrivals, located: Located) -> None:
        try:
            found, blocks, load.reason = search(self.tiering, load.prompt, located)
            wanted = [(place, found[place]) for place in sorted(self.tiering.needed(blocks)) if place in found]
            events = self.tiering.events
            facts = None if events is None else events.chain(load.prompt, self.tiering.block_size)
            for first in range(0, len(wanted), _AT_ONCE):
                some = wanted[first : first + _AT_ONCE]
                for tier in dict.fromkeys(tier for _, tier in some):
                    if not self._get(load, tier, [place for place, of in some if of is tier], facts):
                        return
        except Exception as error:  # noqa: BLE001  # as in _write()
            load.reason = f"{type(error).__name__}: {error}"
            self._log.warn("reading", f"reading failed with {load.reason}")

    def _get(self, load: Arrivals, tier: Tier, places: list[Place], facts: list[Facts] | None) -> bool:
        """Fill slots with these blocks of a tier. Return whether to go on: no, once a full group's block is missing."""
        tiering = self.tiering
        keys = [key_of(load.prompt, place) for place in places]
        with self._staging([g for _, g in places]) as buffers:
            results = tier.get(keys, [b.data for b in buffers])
            self._count(tier, "read", results)
            for (k, g), result, buffer in zip(places, results, buffers, strict=True):
                if result.ok and result.num_bytes != len(buffer):
                    result = Result(Status.CORRUPT, 0, f"the block has {result.num_bytes} of {len(buffer)} bytes")
                if not result.ok:
                    load.reason = load.reason or f"block {k} from {tier.name}: {result.reason}"
                    if g in tiering.full_groups:
                        return False
                elif not self._arrive(load, (k, g), buffer, None if facts is None else facts[k]):
                    load.reason = load.reason or f"block {k} from {tier.name}: cancelled"
                    return False
        return True

    def _arrive(self, load: Arrivals, place: Place, buffer: Bytes, facts: Facts | None) -> bool:
        """Put a block into a slot, which the load holds then. Return False if the load is cancelled."""
        tiering, (k, g) = self.tiering, place
        block = Block(g, load.prompt.digests[k], self._take_slot(load, *place))
        if block.name[0] < 0:
            return False
        try:
            self.wait_for(tiering.core.latest_fence())  # the device may still read or fill the slot for what it had
            tiering.forms[g].from_canonical(buffer, self._slot(g, block.name[0]))
            tiering.note(block, facts)
        except BaseException:
            tiering.core.drop_slots([block.name])
            tiering.core.release_slots([block.name])
            raise
        load.held.append(block.name)
        if load.over:
            load.give_to(self.left)
            self.release_left()
        return not load.over

    def _take_slot(self, load: Arrivals, block: int, group: int) -> tuple[int, int]:
        """Return a slot, held. Waits for load.advance() while all are held; slot -1 if the load is cancelled, or if
        nobody calls it.
        """
        end = time.monotonic() + _STARVED_SECONDS
        while (name := self.tiering.take(group, load.prompt, block))[0] < 0 and not load.over:
            if time.monotonic() > end:
                load.cancelled.set()
            if load.to_device and not load.over:
                load.starved.set()
            else:  # what has arrived needs no further call
                load.give_to(self.left)
            self.release_left()
            load.cancelled.wait(POLL_SECONDS)
        return name

    def release_left(self) -> None:
        """Release the slots of loads that nobody asked for any more."""
        if not self.left:
            return
        with suppress(IndexError):  # another thread was faster
            while self.left:
                self.tiering.core.release_slots([self.left.popleft()])

    # --- helpers ---

    def _submit(self, call: Callable[..., None], *args: object) -> Future[None] | None:
        """Start a call on a thread; return None after ``close()``."""
        with self._lock:
            if self._closed:
                return None
            kind = call.__name__
            if kind not in self._threads:
                self._threads[kind] = ThreadPoolExecutor(_THREADS, thread_name_prefix=f"kvmem-tier{kind}")
            with suppress(RuntimeError):  # the interpreter ends
                return self._threads[kind].submit(call, *args)
            return None

    def wait_for(self, fence: int) -> None:
        end = time.monotonic() + _FENCE_SECONDS
        while not self.tiering.core.has_passed(fence):
            if time.monotonic() > end:
                raise TimeoutError("the device has not filled the host slots")
            time.sleep(POLL_SECONDS)

    def _slot(self, group: int, slot: int) -> Bytes:
        """The bytes of a slot that the caller holds."""
        if self._bytes is None:
            self._bytes = self.tiering.core.host_bytes()
        first = self.tiering.core.slot_offset(slot)
        return self._bytes[first : first + self.tiering.forms[group].slot_bytes]

    @contextmanager
    def _staging(self, groups: Sequence[int]) -> Iterator[list[Bytes]]:
        """Lend one buffer for each group, in the canonical form's size, aligned to pages."""
        buffers = []
        with self._lock:
            for g in groups:
                spare = self._spare.setdefault(g, [])
                buffers.append(spare.pop() if spare else _aligned(self.tiering.forms[g].canonical_bytes))
        try:
            yield buffers
        finally:
            with self._lock:
                for g, buffer in zip(groups, buffers, strict=True):
                    if len(self._spare[g]) < _AT_ONCE:
                        self._spare[g].append(buffer)

    def _count(self, tier: Tier, verb: str, results: Sequence[Result]) -> None:
        for result in results:
            self.tiering.counters[f"{tier.name}: {verb if result.ok else result.status.value}"] += 1
            if not result.ok and result.status is not Status.MISS:
                self._log.warn(tier.name, f"{tier.name}: {result.reason}; its blocks count as missing")

    def count_late(self, reason: str) -> None:
        """Note that a load was given up."""
        self.tiering.counters["given up: late"] += 1
        self._log.warn("late", f"a load was given up: {reason}; what has not arrived is computed")

    def close(self) -> None:
        """End the loads, finish the writes that were begun, and end the threads."""
        with self._lock:
            threads, self._threads, self._closed = self._threads, {}, True
            loads = list(self._loads)
        for load in loads:
            load.cancel()
        for some in threads.values():
            some.shutdown(wait=True, cancel_futures=False)


def _aligned(size: int) -> Bytes:
    return np.frombuffer(mmap.mmap(-1, max(size, 1)), np.uint8)[:size]
