"""How exposed memory is laid out, so that reads alone find a block in it: a directory of buckets, then slots.

Bucket ``b`` has the keys that hash to it: up to ``ENTRIES`` entries of 24 bytes, the last 16 bytes of the key and the
number of the slot plus 1; 0: the entry is empty. A slot has a header (``kvmem.tiers.record``) and the payload. Whoever
reads an entry or a slot that is just being written finds another key, or a checksum that is wrong: a miss.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from kvmem.errors import SpecError
from kvmem.tiers.record import HEADER_BYTES
from kvmem.transport.base import address_of, fields_of

__all__ = ["ENTRIES", "ENTRY", "Directory"]

ENTRY: Final = struct.Struct("<16sQ")
ENTRIES: Final = 32  # of a bucket, which half of as many blocks hash to on average: one in ten thousand overflows
_BUCKET: Final = ENTRY.size * ENTRIES
_ALIGNMENT: Final = 64
_NAME: Final = "kvmem 1"


class Directory(NamedTuple):
    """slots: how many. slot_bytes: of each, with the header."""

    slots: int
    slot_bytes: int

    @classmethod
    def of(cls, capacity: int, block_bytes: int) -> Directory:
        """Return what ``capacity`` bytes hold of payloads of up to ``block_bytes``."""
        slot = -(-(HEADER_BYTES + block_bytes) // _ALIGNMENT) * _ALIGNMENT
        found = cls(max(0, (capacity - 2 * _BUCKET) // (slot + 2 * ENTRY.size)), slot)
        if found.slots < 1:
            raise SpecError(f"capacity: got {capacity} bytes; a block takes {slot + 2 * _BUCKET + 2 * ENTRY.size}")
        return found

    @property
    def buckets(self) -> int:
        return -(-2 * self.slots // ENTRIES)

    @property
    def num_bytes(self) -> int:
        return self.slot_at(self.slots)

    def bucket_of(self, key: bytes) -> tuple[int, int]:
        """Return offset and length of the bucket of a key."""
        return int.from_bytes(key[:8], "little") % self.buckets * _BUCKET, _BUCKET

    def slot_at(self, slot: int) -> int:
        return -(-self.buckets * _BUCKET // _ALIGNMENT) * _ALIGNMENT + slot * self.slot_bytes

    def found(self, key: bytes, bucket: bytes | bytearray) -> int:
        """Return the slot that a bucket names for a key, or -1."""
        for tag, slot in ENTRY.iter_unpack(bucket):
            if tag == key[16:] and 0 < slot <= self.slots:
                return int(slot) - 1
        return -1

    def address(self, memory: bytes) -> bytes:
        """Return the address of a directory whose memory has that address."""
        return address_of(_NAME, memory=memory.decode("ascii"), slots=self.slots, slot_bytes=self.slot_bytes)

    @classmethod
    def parse(cls, address: bytes) -> tuple[Directory, bytes]:
        """Return a directory and the address of its memory."""
        found = fields_of(address, _NAME, memory=str, slots=int, slot_bytes=int)
        if not 0 < found["slots"] <= 1 << 32 or not HEADER_BYTES < found["slot_bytes"] <= 1 << 40:
            raise SpecError("address: its sizes are damaged")
        return cls(found["slots"], found["slot_bytes"]), found["memory"].encode("ascii", "replace")
