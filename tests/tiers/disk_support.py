"""What the tests of the disk tier share."""

from __future__ import annotations

from kvmem.errors import SpecError, TierError
from kvmem.tiers.file_io import UringIO
from kvmem.tiers.segments import Geometry

FINGERPRINT = b"model one".ljust(32, b".")
OTHER_FINGERPRINT = b"model two".ljust(32, b".")


def _ios() -> tuple[str, ...]:
    try:
        UringIO().close()
    except (SpecError, TierError):
        return ("threads",)
    return ("threads", "io_uring")


IOS = _ios()  # the ways to read and write that work here


def capacity_of(num_slots: int, block_bytes: int) -> int:
    """The bytes of disk that so many slots take, in segments as large as they get."""
    geometry = Geometry(block_bytes)
    full, rest = divmod(num_slots, geometry.slots)
    return full * geometry.file_bytes(geometry.slots) + (geometry.file_bytes(rest) if rest else 0)
