"""A tier in another process's memory, read by a transport."""

from __future__ import annotations

import time
from collections.abc import Sequence

from kvmem.errors import SpecError
from kvmem.tiers.base import Buffer, Capacity, Result, Status
from kvmem.tiers.record import HEADER_BYTES, payload_bytes
from kvmem.tiers.remote import ABSENT, Call, Limits, Record, RemoteTier
from kvmem.transport.base import Transport
from kvmem.transport.directory import Directory

__all__ = ["PeerTier"]

_LIMITS = Limits()
_READ_ONLY = Result(Status.FULL, 0, "a peer's memory is only read here; put a tier of this process's own before it")


class PeerTier(RemoteTier):
    """The blocks of an ``ExposedTier`` of another process. That process takes no part in a read.

    A decode process has it among its lower tiers: ``Tiers(host=..., lower=[PeerTier(transport, address)],
    identity=...)``, and ``alloc.sequence(prompt, load="all")`` brings what the other has of the prompt. Every block is
    verified: key, length, checksum. A peer that is gone, dies in the middle of a transfer or does not answer is a miss
    with a reason, within ``timeout_seconds``, and is then left alone for a while. Nothing is written: ``put`` says
    ``FULL``.

    transport: of the kind that the other side has; not closed by the tier. address: ``ExposedTier.address``.
    timeout_seconds, limits: see :class:`~kvmem.tiers.remote.RemoteTier`. Cost of a get: two reads a batch, first of the
    buckets, then of the blocks; two copies.
    """

    name = "peer"

    def __init__(
        self, transport: Transport, address: bytes, *, timeout_seconds: float = 2.0, limits: Limits = _LIMITS
    ) -> None:
        if not isinstance(transport, Transport):
            raise SpecError(f"transport: got {type(transport).__name__}; must be a kvmem.transport.Transport")
        self._at, memory = Directory.parse(address)
        self._remote = transport.connect(memory)
        try:
            if self._remote.num_bytes < self._at.num_bytes:
                raise SpecError("address: its sizes are damaged")
            super().__init__(self._remote.where, timeout_seconds, "peer", limits)
        except BaseException:
            self._remote.close()
            raise

    def put(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        self._names(keys, buffers)
        return [_READ_ONLY] * len(keys)

    def delete(self, keys: Sequence[bytes]) -> list[Result]:
        self._names(keys)
        return [_READ_ONLY] * len(keys)

    def _places(self, call: Call, names: Sequence[str]) -> list[int]:
        keys = [_key(name) for name in names]
        buckets = self._remote.read([self._at.bucket_of(key) for key in keys], call.deadline - time.monotonic())
        return [self._at.found(key, bucket) for key, bucket in zip(keys, buckets, strict=True)]

    def _ping(self, call: Call) -> Sequence[object] | Result:
        return self._places(call, [self._prefix + bytes(32).hex()])

    def _exists(self, call: Call, names: Sequence[str]) -> list[bool] | Result:
        return [slot >= 0 for slot in self._places(call, names)]

    def _read(self, call: Call, names: Sequence[str], sizes: Sequence[int]) -> Sequence[Record] | Result:
        slots = self._places(call, names)
        there = [n for n, slot in enumerate(slots) if slot >= 0]
        parts = [(self._at.slot_at(slots[n]), min(sizes[n], self._at.slot_bytes)) for n in there]
        found: list[Record] = [None] * len(names)
        for n, data in zip(there, self._remote.read(parts, call.deadline - time.monotonic()), strict=True):
            length = payload_bytes(memoryview(data), _key(names[n]))
            if isinstance(length, int):
                found[n] = memoryview(data)[: HEADER_BYTES + length]
        return found  # a slot whose header is not the key's is being written: a miss

    def _write(self, call: Call, names: Sequence[str], records: Sequence[tuple[bytes, Buffer]]) -> list[Result]:
        return [_READ_ONLY] * len(names)

    def _remove(self, call: Call, names: Sequence[str]) -> list[Result]:
        return [ABSENT] * len(names)  # of a block that is not believed: its owner replaces it

    def _measure(self, call: Call) -> list[Capacity]:
        return [Capacity(self._at.slots * self._at.slot_bytes, 0, 0)]

    def _release(self, idle: bool) -> None:
        if idle:
            self._remote.close()


def _key(name: str) -> bytes:
    return bytes.fromhex(name.rpartition("/")[2])
