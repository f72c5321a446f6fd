"""The checksum of payloads: XXH3 with 128 bits, by the package xxhash, at tens of gigabytes a second.

It finds accidents, not attacks: who can write the store can forge it (``docs/tiers.md``, "Promises").
"""

from __future__ import annotations

from typing import Any

from kvmem.errors import SpecError

__all__ = ["checksum"]

_xxh3: Any = None


def checksum(data: Any) -> bytes:
    """Return 16 bytes. data: anything with contiguous bytes. ``SpecError`` without the package xxhash. Releases the
    GIL for large data."""
    global _xxh3
    if _xxh3 is None:
        try:
            from xxhash import xxh3_128_digest
        except ImportError as e:
            raise SpecError("disk, remote stores and files need the package xxhash: pip install 'kvmem[tiers]'") from e
        _xxh3 = xxh3_128_digest
    digest: bytes = _xxh3(data)
    return digest
