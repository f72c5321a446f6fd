"""What a tier is: a store of blocks behind the device. Host memory, disks and remote stores implement this interface.

A tier answers right or not at all. Each answer is a typed :class:`Result` for each key; a fault of the store is a
result too, never an exception in the caller's step.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from kvmem.errors import SpecError
from kvmem.tiers.keys import KEY_BYTES

__all__ = ["Buffer", "Capacity", "Result", "Status", "Tier", "check_batch"]

Buffer: TypeAlias = memoryview
"""Contiguous bytes (format ``"B"``); writable where a tier fills them. Aligned to 4,096 bytes where a disk profits."""


class Status(enum.Enum):
    """What became of one key."""

    OK = "ok"
    MISS = "miss"  # the tier does not have it
    CORRUPT = "corrupt"  # what is stored is not what was put, or belongs to another key: it counts as absent
    FULL = "full"  # there is no room for it
    FAILED = "failed"  # the store answered with an error, late, or not at all


class Result(NamedTuple):
    """The answer for one key.

    num_bytes: bytes of the payload that ``get`` wrote, or that ``put`` stored; 0 unless ``status`` is ``OK``.
    reason: why the status is not ``OK``, as a sentence; ``""`` if it is.
    """

    status: Status
    num_bytes: int = 0
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether the payload was moved, whole and verified."""
        return self.status is Status.OK


class Capacity(NamedTuple):
    """What a tier can hold and holds, in bytes of payload and metadata; ``total_bytes`` is None where nobody says."""

    total_bytes: int | None
    used_bytes: int
    num_blocks: int


def check_batch(keys: Sequence[bytes], buffers: Sequence[Buffer] | None = None, *, writable: bool = False) -> None:
    """Raise ``SpecError`` unless keys have 32 bytes each and buffers, one for each key, are contiguous bytes."""
    for key in keys:
        if not isinstance(key, bytes) or len(key) != KEY_BYTES:
            raise SpecError(f"keys: got {key!r}; each is {KEY_BYTES} bytes, as kvmem.tiers.keys makes them")
    if buffers is None:
        return
    if len(buffers) != len(keys):
        raise SpecError(f"buffers: got {len(buffers)} for {len(keys)} keys; there is one for each key")
    for view in buffers:
        if not (isinstance(view, memoryview) and view.format == "B" and view.ndim == 1 and view.c_contiguous):
            raise SpecError(f"buffers: got {view!r}; each is a contiguous memoryview of bytes: memoryview(x).cast('B')")
        if writable and view.readonly:
            raise SpecError("buffers: one is read-only; get needs memory that it may write")


class Tier(ABC):
    """A store of payloads under keys of 32 bytes (:mod:`kvmem.tiers.keys`).

    Thread-safe: the transfer engine calls it from several threads. No function waits longer than the bound that the
    tier was opened with, and none raises for what a store does: only ``SpecError`` for arguments of the wrong form, and
    ``TierError`` once the tier is closed. A new payload under a key that is stored replaces it, and readers see the old
    one, the new one, or a miss. A ``put`` that is not ``OK`` was never there.
    """

    #: What reports call the tier: ``"host"``, ``"disk"``, ``"redis"``, ...
    name: str = ""

    @abstractmethod
    def contains(self, keys: Sequence[bytes]) -> int:
        """Return how many of the first keys the tier has, without a gap. A later ``get`` may miss all the same."""

    @abstractmethod
    def get(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        """Fill each buffer with the payload of its key, and return a result for each.

        A buffer may be larger than the payload; one that is smaller is a ``MISS``. The payload is verified: its
        checksum, its length and its key. A buffer whose result is not ``OK`` holds undefined bytes.
        """

    @abstractmethod
    def put(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        """Store each buffer under its key, and return a result for each. ``OK``: a later ``get`` can find it."""

    @abstractmethod
    def delete(self, keys: Sequence[bytes]) -> list[Result]:
        """Remove the keys: ``OK`` where one was there, ``MISS`` where none was."""

    @abstractmethod
    def capacity(self) -> Capacity:
        """Return what the tier can hold and what it holds."""

    @abstractmethod
    def close(self) -> None:
        """Finish what was put, and release files, connections and memory. Closing twice is no error."""

    def __enter__(self) -> Tier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
