"""The errors of kvmem. A message says what was asked, what there is, the largest that would fit, and what to change."""

from __future__ import annotations

__all__ = ["DeviceError", "KVMemError", "OutOfMemory", "SpecError", "StaleHandle", "TierError"]


class KVMemError(Exception):
    """Base of every error kvmem raises on purpose. A call that raises one has changed nothing."""


class SpecError(KVMemError, ValueError):
    """A cache spec, a model config or an argument that describes something that cannot be built."""


class OutOfMemory(KVMemError, MemoryError):
    """No room within the memory budget. A scheduling outcome: free or preempt something and try again."""


class DeviceError(KVMemError, RuntimeError):
    """A driver call failed, or a device does not exist. ``call`` and ``code`` are the driver's own names.

    Where taking back what the call had done failed too, the pool is poisoned: every later call of its allocators raises
    one that says so. Close and discard them, and make new ones.
    """

    def __init__(self, message: str, call: str = "", code: int = 0) -> None:
        super().__init__(message)
        self.call = call
        self.code = code


class TierError(KVMemError, OSError):
    """A store behind the device (host, disk, remote) failed."""


class StaleHandle(KVMemError, RuntimeError):
    """A sequence that was freed, or a handle that this allocator never gave out."""
