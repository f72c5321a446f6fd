"""The errors of kvmem. A message says what was asked for, what is available, the largest value that would work, and
what to change.
"""

from __future__ import annotations

__all__ = ["DeviceError", "KVMemError", "NotReady", "OutOfMemory", "SpecError", "StaleHandle", "TierError"]


class KVMemError(Exception):
    """The base of every error that kvmem raises. A call that raises one has changed nothing."""


class SpecError(KVMemError, ValueError):
    """An argument, a cache spec or a model config that is invalid or not supported, whatever the allocator's state."""


class OutOfMemory(KVMemError, MemoryError):
    """The memory budget is exhausted. This is a scheduling outcome: free or preempt a sequence, and try again."""


class DeviceError(KVMemError, RuntimeError):
    """A driver call failed for another reason than lack of memory, or a device does not exist.

    If undoing a failed call fails too, the pool is poisoned: every later call of its allocators raises a
    ``DeviceError`` that says so. Close and discard them, and make new ones.

    call: the name of the driver's function that failed, or ``""``. code: its error code, or 0.
    """

    def __init__(self, message: str, call: str = "", code: int = 0) -> None:
        super().__init__(message)
        self.call = call
        self.code = code


class TierError(KVMemError, OSError):
    """A storage tier behind the device (host, disk, remote) failed."""


class NotReady(KVMemError, RuntimeError):
    """A sequence that is pending: its blocks are still being loaded from a tier. Ask ``Allocator.ready()``."""


class StaleHandle(KVMemError, RuntimeError):
    """A sequence that was freed, or a handle that this allocator never returned."""
