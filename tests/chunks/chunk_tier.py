"""The smallest tier: a dict with a limit. Payloads lie behind the header that vouches for them, as everywhere else."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from kvmem.tiers import Capacity, Result, Status, Tier
from kvmem.tiers.base import Buffer
from kvmem.tiers.record import HEADER_BYTES, header_of, verify


class DictTier(Tier):
    def __init__(self, name: str = "dict", limit: int | None = None) -> None:
        self.name, self.limit, self.calls = name, limit, [0, 0]
        self.held: OrderedDict[bytes, bytearray] = OrderedDict()

    def contains(self, keys: Sequence[bytes]) -> int:
        return next((i for i, key in enumerate(keys) if key not in self.held), len(keys))

    def get(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        self.calls[0] += 1
        return [self._get(key, buffer) for key, buffer in zip(keys, buffers, strict=True)]

    def _get(self, key: bytes, buffer: Buffer) -> Result:
        if key not in self.held:
            return Result(Status.MISS, reason="never put")
        self.held.move_to_end(key)
        record = memoryview(self.held[key])
        payload = record[HEADER_BYTES:]
        if why := verify(record[:HEADER_BYTES], key, payload):
            return Result(Status.CORRUPT, reason=why)
        buffer[: len(payload)] = payload
        return Result(Status.OK, len(payload))

    def put(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        self.calls[1] += 1
        for key, buffer in zip(keys, buffers, strict=True):
            self.held[key] = bytearray(header_of(key, buffer) + bytes(buffer))
        while self.limit is not None and sum(map(len, self.held.values())) > self.limit:
            self.held.popitem(last=False)
        return [
            Result(Status.OK, len(b)) if k in self.held else Result(Status.FULL, reason="too large")
            for k, b in zip(keys, buffers, strict=True)
        ]

    def delete(self, keys: Sequence[bytes]) -> list[Result]:
        return [Result(Status.OK if self.held.pop(key, None) is not None else Status.MISS) for key in keys]

    def capacity(self) -> Capacity:
        return Capacity(self.limit, sum(map(len, self.held.values())), len(self.held))

    def close(self) -> None:
        self.held.clear()
