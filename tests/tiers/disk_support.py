"""What the tests of the disk tier share."""

from __future__ import annotations

from typing import Any

from tier_suite import payload_of

from kvmem.errors import SpecError, TierError
from kvmem.tiers.disk import DiskTier
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
    geometry = Geometry(block_bytes)  # segments as large as they get
    full, rest = divmod(num_slots, geometry.slots)
    return full * geometry.file_bytes(geometry.slots) + (geometry.file_bytes(rest) if rest else 0)


def open_disk(
    path: object, num_slots: int = 6, block_bytes: int = 6000, fingerprint: bytes = FINGERPRINT, **options: Any
) -> DiskTier:
    """A disk tier of a few small slots: one thread, unless the options say otherwise."""
    options = dict(io="threads", threads=1, capacity=capacity_of(num_slots, block_bytes)) | options
    return DiskTier(str(path), block_bytes=block_bytes, fingerprint=fingerprint, **options)


def version_in(key: bytes, data: bytes) -> int:
    """The version of a payload, every byte of which is verified. REQUIRES: it has eight bytes or more."""
    version = int.from_bytes(data[:8], "little")
    assert data == payload_of(key, version, len(data)), "these bytes were never put under this key"
    return version
