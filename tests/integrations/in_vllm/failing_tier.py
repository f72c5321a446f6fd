"""A tier of the engine tests: what it has cannot be read at first, each time in another way; named in the configuration."""

from __future__ import annotations

from collections.abc import Sequence

from dict_tier import DictTier

from kvmem.tiers.base import Buffer, Result, Status

_STORED: dict[bytes, bytes] = {}  # of this process: the scheduler's half and the worker's see one store


class FailingTier(DictTier):
    def __init__(self) -> None:
        super().__init__(100_000, 1 << 30)
        self.data, self._calls = _STORED, 0

    def get(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        self._calls += 1
        if self._calls == 1:
            raise ConnectionError("the store is gone")
        found = super().get(keys, buffers)
        if self._calls <= 3 and found:
            middle = len(found) // 2
            buffers[middle][:] = b"\xee" * len(buffers[middle])
            found[middle] = Result(Status.CORRUPT, 0, "the checksum is wrong")
        return found
