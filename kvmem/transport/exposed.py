"""A tier in this process's memory that other processes read, without asking this one."""

from __future__ import annotations

import mmap
import threading
from collections import OrderedDict
from collections.abc import Sequence

from kvmem.arguments import check_size, parse_bytes
from kvmem.errors import SpecError, TierError
from kvmem.tiers.base import Buffer, Capacity, Result, Status, Tier, check_batch
from kvmem.tiers.record import HEADER_BYTES, header_of, payload_bytes, verify
from kvmem.transport.base import Transport
from kvmem.transport.directory import ENTRY, Directory

__all__ = ["ExposedTier"]

_EMPTY = ENTRY.pack(b"", 0)


class ExposedTier(Tier):
    """Blocks that every process with ``address`` reads by a ``PeerTier``: what one machine has computed, others use.

    A prefill process has it as its first lower tier, ``Tiers(host=..., lower=[exposed], identity=...)``; there
    ``alloc.store(prompt)`` and ``alloc.flush()`` put a prompt. When it is full, the block goes that was put or
    read *here* the longest ago; a reader elsewhere finds a miss.

    transport: what exposes the memory; it must not be closed before this tier. capacity: bytes of memory, an int or a
    text such as ``"8GiB"``; physical memory is taken as it fills, unless the transport pins it. block_bytes: of the
    largest payload, such as ``kvmem.tiers.largest_block_bytes(spec)``. Cost of a put: a copy and a checksum.
    """

    name = "exposed"

    def __init__(self, transport: Transport, *, capacity: int | str, block_bytes: int) -> None:
        if not isinstance(transport, Transport):
            raise SpecError(f"transport: got {type(transport).__name__}; must be a kvmem.transport.Transport")
        self._at = Directory.of(parse_bytes("capacity", capacity), check_size("block_bytes", block_bytes))
        self._block_bytes, self._transport = block_bytes, transport  # kept: the memory is exposed as long as it lives
        self._memory = memoryview(mmap.mmap(-1, self._at.num_bytes)).cast("B")
        self._lock = threading.Lock()
        self._where: OrderedDict[bytes, tuple[int, int]] = OrderedDict()  # key: slot, offset of its entry; oldest first
        self._free = list(range(self._at.slots - 1, -1, -1))
        self._closed = False
        #: What a ``PeerTier`` is opened with, anywhere: ASCII bytes. Whoever has it can read the blocks.
        self.address = self._at.address(transport.expose(self._memory))

    def contains(self, keys: Sequence[bytes]) -> int:
        self._check(keys)
        with self._lock:
            return next((n for n, key in enumerate(keys) if key not in self._where), len(keys))

    def get(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        self._check(keys, buffers, writable=True)
        with self._lock:
            return [self._get(key, buffer) for key, buffer in zip(keys, buffers, strict=True)]

    def put(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        self._check(keys, buffers)
        return [self._put(key, buffer) for key, buffer in zip(keys, buffers, strict=True)]

    def delete(self, keys: Sequence[bytes]) -> list[Result]:
        self._check(keys)
        with self._lock:
            return [Result(Status.OK) if self._drop(key) else _absent() for key in keys]

    def capacity(self) -> Capacity:
        self._check([])
        with self._lock:
            used = len(self._where)
        return Capacity(self._at.slots * self._at.slot_bytes, used * self._at.slot_bytes, used)

    def close(self) -> None:
        """The memory stays readable until the transport is closed, but it is empty."""
        with self._lock:
            self._closed = True
            for key in list(self._where):
                self._drop(key)

    def _check(self, keys: Sequence[bytes], buffers: Sequence[Buffer] | None = None, writable: bool = False) -> None:
        if self._closed:
            raise TierError("the exposed tier is closed")
        check_batch(keys, buffers, writable=writable)

    def _get(self, key: bytes, buffer: Buffer) -> Result:
        if key not in self._where:
            return _absent()
        self._where.move_to_end(key)
        at = self._at.slot_at(self._where[key][0])
        header = bytes(self._memory[at : at + HEADER_BYTES])
        size = payload_bytes(header, key)
        if isinstance(size, str):
            return Result(Status.CORRUPT, 0, size)
        if size > len(buffer):
            return Result(Status.MISS, 0, f"the payload has {size} bytes, and the buffer {len(buffer)}")
        buffer[:size] = self._memory[at + HEADER_BYTES : at + HEADER_BYTES + size]
        reason = verify(header, key, buffer[:size])
        return Result(Status.CORRUPT, 0, reason) if reason else Result(Status.OK, size)

    def _put(self, key: bytes, buffer: Buffer) -> Result:
        if len(buffer) > self._block_bytes:
            return Result(
                Status.FULL, 0, f"the payload has {len(buffer)} bytes, and block_bytes is {self._block_bytes}"
            )
        header = header_of(key, buffer)
        with self._lock:
            if self._closed:
                raise TierError("the exposed tier is closed")
            self._drop(key)  # first the entry: a reader who comes now finds none
            slot, entry = self._room(key)
            at, data = self._at.slot_at(slot), self._memory
            data[at : at + HEADER_BYTES] = bytes(HEADER_BYTES)  # a reader who came before believes nothing of it
            data[at + HEADER_BYTES : at + HEADER_BYTES + len(buffer)] = buffer
            data[at : at + HEADER_BYTES] = header
            data[entry : entry + ENTRY.size] = ENTRY.pack(key[16:], slot + 1)
            self._where[key] = slot, entry
        return Result(Status.OK, len(buffer))

    def _room(self, key: bytes) -> tuple[int, int]:
        """Return a free slot and the offset of a free entry in the bucket of the key."""
        first, length = self._at.bucket_of(key)
        entries = range(first, first + length, ENTRY.size)
        if all(self._memory[at : at + ENTRY.size] != _EMPTY for at in entries):
            self._drop(next(one for one, (_, at) in self._where.items() if at in entries))
        if not self._free:
            self._drop(next(iter(self._where)))
        return self._free.pop(), next(at for at in entries if self._memory[at : at + ENTRY.size] == _EMPTY)

    def _drop(self, key: bytes) -> bool:
        if key not in self._where:
            return False
        slot, entry = self._where.pop(key)
        self._memory[entry : entry + ENTRY.size] = _EMPTY
        self._free.append(slot)
        return True


def _absent() -> Result:
    return Result(Status.MISS, 0, "the tier has no such block")
