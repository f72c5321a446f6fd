"""The smallest tier: a dict. What tests put in the place of a store that has no faults."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from kvmem.errors import TierError
from kvmem.tiers.base import Buffer, Capacity, Result, Status, Tier, check_batch


class DictTier(Tier):
    name = "dict"

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        self._num_blocks, self._block_bytes = num_blocks, block_bytes
        self._lock, self.data, self._closed = threading.Lock(), dict[bytes, bytes](), False

    def _check(self) -> None:
        if self._closed:
            raise TierError("the tier is closed")

    def contains(self, keys: Sequence[bytes]) -> int:
        check_batch(keys)
        self._check()
        return next((i for i, key in enumerate(keys) if key not in self.data), len(keys))

    def get(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        check_batch(keys, buffers, writable=True)
        self._check()
        return [self._get(key, buffer) for key, buffer in zip(keys, buffers, strict=True)]

    def _get(self, key: bytes, buffer: Buffer) -> Result:
        if (data := self.data.get(key)) is None:
            return Result(Status.MISS, reason="the tier does not have it")
        if len(buffer) < len(data):
            return Result(Status.MISS, reason=f"the payload has {len(data)} bytes, the buffer {len(buffer)}")
        buffer[: len(data)] = data
        return Result(Status.OK, len(data))

    def put(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        check_batch(keys, buffers)
        self._check()
        return [self._put(key, bytes(buffer)) for key, buffer in zip(keys, buffers, strict=True)]

    def _put(self, key: bytes, data: bytes) -> Result:
        if len(data) > self._block_bytes:
            return Result(Status.FULL, reason=f"the payload has {len(data)} bytes, a slot {self._block_bytes}")
        with self._lock:
            if key not in self.data and len(self.data) >= self._num_blocks:
                del self.data[next(iter(self.data))]
            self.data[key] = data
        return Result(Status.OK, len(data))

    def delete(self, keys: Sequence[bytes]) -> list[Result]:
        check_batch(keys)
        self._check()
        with self._lock:
            found = [self.data.pop(key, None) is not None for key in keys]
        return [Result(Status.OK) if ok else Result(Status.MISS, reason="the tier does not have it") for ok in found]

    def capacity(self) -> Capacity:
        self._check()
        with self._lock:
            used = sum(map(len, self.data.values()))
            return Capacity(self._num_blocks * self._block_bytes, used, len(self.data))

    def close(self) -> None:
        self._closed = True
