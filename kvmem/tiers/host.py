"""Blocks in this process's own memory, for engines that keep their own page tables (``kvmem.integrations.vllm``).

An allocator of kvmem does not need it: its host slots are part of the core, and take a block in the same transaction
that evicts it (``kvmem.tiers.Tiers.host``).
"""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Sequence
from typing import Final

import numpy as np

from kvmem import _core
from kvmem.arguments import check_size, parse_bytes
from kvmem.errors import SpecError, TierError
from kvmem.tiers.base import Buffer, Capacity, Result, Status, Tier, check_batch

__all__ = ["HostTier"]

_ABSENT: Final = Result(Status.MISS, reason="the tier does not have it")
_ALIGNMENT: Final = 64  # a cache line


class HostTier(Tier):
    """Payloads in slots of one size, in memory that is taken as it fills.

    capacity: bytes of memory, an int or a text such as ``"8GiB"``. block_bytes: the largest payload. policy: which
    payload goes when the tier is full, by name, as for ``Allocator(policy=)``. tells_evicted: keep the keys of
    what was evicted until ``take_evicted`` asks.

    No checksum is kept: the bytes never leave this process, and one lock covers each copy. Cost: one copy.
    """

    name = "host"

    def __init__(
        self, *, capacity: int | str, block_bytes: int, policy: str = "density", tells_evicted: bool = False
    ) -> None:
        self._most = check_size("block_bytes", block_bytes, most=1 << 40)
        self._slot_bytes = -(-self._most // _ALIGNMENT) * _ALIGNMENT
        count = parse_bytes("capacity", capacity) // self._slot_bytes
        if count == 0:
            raise SpecError(f"capacity: got {capacity!r}; one block takes {self._slot_bytes} bytes")
        self._policy = _core.EvictionPolicy(policy)  # SpecError for a name that it does not know
        self._policy.reserve(count)
        self._memory = np.frombuffer(mmap.mmap(-1, count * self._slot_bytes), np.uint8).reshape(count, -1)
        self._lock = threading.Lock()
        self._slots: dict[bytes, int] = {}
        self._held: dict[int, tuple[bytes, int]] = {}  # by slot: key and length
        self._free = list(reversed(range(count)))
        self._tells, self._evicted = tells_evicted, deque[bytes]()
        self._closed = False

    def contains(self, keys: Sequence[bytes]) -> int:
        check_batch(keys)
        with self._lock:
            self._check_open()
            return next((i for i, key in enumerate(keys) if key not in self._slots), len(keys))

    def get(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        check_batch(keys, buffers, writable=True)
        results = []
        for key, buffer in zip(keys, buffers, strict=True):
            with self._lock:  # for each payload: a long batch must not keep others from theirs
                self._check_open()
                results.append(self._get(key, buffer))
        if not keys:
            self._check_open()
        return results

    def put(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        check_batch(keys, buffers)
        results = []
        for key, buffer in zip(keys, buffers, strict=True):
            with self._lock:
                self._check_open()
                results.append(self._put(key, buffer))
        if not keys:
            self._check_open()
        return results

    def delete(self, keys: Sequence[bytes]) -> list[Result]:
        check_batch(keys)
        with self._lock:
            self._check_open()
            return [self._delete(key) for key in keys]

    def take_evicted(self) -> list[bytes]:
        """Return the keys that have left the tier for want of room since the last call, the first first; none without
        ``tells_evicted``.
        """
        with self._lock:
            found = list(self._evicted)
            self._evicted.clear()
            return found

    def capacity(self) -> Capacity:
        with self._lock:
            self._check_open()
            return Capacity(self._memory.nbytes, len(self._slots) * self._slot_bytes, len(self._slots))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._memory = np.empty((0, 0), np.uint8)

    def _check_open(self) -> None:
        if self._closed:
            raise TierError("the host tier is closed")

    def _get(self, key: bytes, buffer: Buffer) -> Result:
        slot = self._slots.get(key)
        if slot is None:
            return _ABSENT
        length = self._held[slot][1]
        if length > len(buffer):
            return Result(Status.MISS, 0, f"the payload has {length} bytes, and the buffer {len(buffer)}")
        buffer[:length] = self._memory[slot, :length].data
        self._policy.hit(slot)
        self._policy.use(slot)
        self._policy.release(slot)
        return Result(Status.OK, length)

    def _put(self, key: bytes, buffer: Buffer) -> Result:
        if len(buffer) > self._most:
            return Result(Status.FULL, 0, f"the payload has {len(buffer)} bytes, and a slot {self._most}")
        if key in self._slots:
            self._remove(self._slots[key])
        elif not self._free:
            gone = self._remove(self._policy.victim())
            if self._tells:
                self._evicted.append(gone)
        slot = self._free.pop()
        self._memory[slot, : len(buffer)] = np.frombuffer(buffer, np.uint8)
        self._slots[key], self._held[slot] = slot, (key, len(buffer))
        self._policy.insert(slot, int.from_bytes(key[:8], "little"), -1)
        self._policy.release(slot)
        return Result(Status.OK, len(buffer))

    def _delete(self, key: bytes) -> Result:
        if key not in self._slots:
            return _ABSENT
        self._remove(self._slots[key])
        return Result(Status.OK)

    def _remove(self, slot: int) -> bytes:
        key, _ = self._held.pop(slot)
        del self._slots[key]
        self._policy.evict(slot)
        self._free.append(slot)
        return key
