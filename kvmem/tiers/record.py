"""The header that vouches for a payload outside of memory: on disk, in a remote store, in a file.

``docs/format.md`` gives the fields. A reader believes a payload only if the magic, the version, the whole key, the
length and the checksum of header and payload are right.
"""

from __future__ import annotations

import struct
from typing import Final

from kvmem.tiers.base import Buffer
from kvmem.tiers.checksum import checksum

__all__ = ["HEADER_BYTES", "MAGIC", "VERSION", "header_of", "key_in", "payload_bytes", "stamp_in", "verify"]

MAGIC: Final = b"kvmemblk"
VERSION: Final = 1

# magic, version, bytes of the header, key, bytes of the payload and its checksum, stamp; then the checksum of these.
_FIELDS: Final = struct.Struct("<8sII32sQ16sQ")
HEADER_BYTES: Final = 96


def header_of(key: bytes, payload: Buffer, stamp: int = 0) -> bytes:
    """Return the 96 bytes that go in front of the payload. Cost: one pass over the payload.

    stamp: 8 bytes of the store's own; a disk counts its records, to know the newest of a key.
    """
    fields = _FIELDS.pack(MAGIC, VERSION, HEADER_BYTES, key, len(payload), checksum(payload), stamp)
    return fields + checksum(memoryview(fields))


def payload_bytes(header: bytes | Buffer, key: bytes | None = None) -> int | str:
    """Return the length of the payload behind the header, or a sentence that says why the header is not believed.

    key: what the caller asked for; None takes any, for a scan.
    """
    if len(header) < HEADER_BYTES:
        return f"the header is cut off after {len(header)} of {HEADER_BYTES} bytes"
    fields = bytes(header[:HEADER_BYTES])
    magic, version, size, found, length, _, _ = _FIELDS.unpack(fields[: _FIELDS.size])
    if magic != MAGIC:
        return "this is no block of kvmem"
    if version != VERSION or size != HEADER_BYTES:
        return f"the block has format version {version}, and this kvmem reads version {VERSION}"
    if checksum(memoryview(fields)[:-16]) != fields[-16:]:
        return "the header's checksum is wrong"
    if key is not None and found != key:
        return "the block belongs to another key"
    return int(length)


def key_in(header: bytes | Buffer) -> bytes:
    """Return the key in a header that ``payload_bytes`` believes."""
    return bytes(header[16:48])


def stamp_in(header: bytes | Buffer) -> int:
    """Return the stamp in a header that ``payload_bytes`` believes."""
    return int.from_bytes(header[72:80], "little")


def verify(header: bytes | Buffer, key: bytes, payload: Buffer) -> str:
    """Return ``""`` if the payload is what was stored under the key, else a sentence that says what is wrong.

    Cost: one pass over the payload.
    """
    length = payload_bytes(header, key)
    if isinstance(length, str):
        return length
    if length != len(payload):
        return f"the payload has {len(payload)} of {length} bytes"
    if checksum(payload) != bytes(header[56:72]):
        return "the payload's checksum is wrong"
    return ""
