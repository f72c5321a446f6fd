"""Which slot of a disk tier holds which key, which slots are free, and which block goes when none is."""

from __future__ import annotations

from typing import NamedTuple

from kvmem import _core

__all__ = ["Record", "SlotIndex"]


class Record(NamedTuple):
    """What a slot holds. stamp: grows with each put; the newest record of a key counts."""

    key: bytes
    length: int
    stamp: int


class SlotIndex:
    """Not thread-safe: the tier holds its lock.

    A slot is free, or filled (it has a record), or its taker's. No free slot has a valid header on disk, so that no
    record that was replaced or deleted comes back when the folder is opened again.
    """

    def __init__(self, policy: str) -> None:
        self._policy = _core.EvictionPolicy(policy)  # SpecError for a name that it does not know
        self._slots: dict[bytes, int] = {}
        self._records: dict[int, Record] = {}
        self._free: list[int] = []
        self._reserved = 0
        self.stamp = 0  # the last that was given out

    def __len__(self) -> int:
        return len(self._slots)

    def reserve(self, num_slots: int) -> None:
        """Allow slots below ``num_slots``."""
        self._reserved = max(self._reserved, num_slots)
        self._policy.reserve(self._reserved)

    def find(self, key: bytes, hit: bool = True) -> tuple[int, Record] | None:
        """Return slot and record of a key. hit: it counts as used."""
        slot = self._slots.get(key)
        if slot is None:
            return None
        if hit:
            self._policy.hit(slot)
            self._policy.use(slot)
            self._policy.release(slot)
        return slot, self._records[slot]

    def at(self, slot: int) -> Record | None:
        """Return the record of a slot."""
        return self._records.get(slot)

    def take(self, key: bytes) -> int | None:
        """Return a slot for a payload of ``key``: a free one, that of its old payload, or the policy's victim's. None
        if every slot has a taker."""
        if self._free:
            return self._free.pop()
        slot = self._slots.get(key, -1)
        if slot < 0:
            slot = self._policy.victim()
        if slot < 0:
            return None
        self.empty(slot)
        return slot

    def next_stamp(self) -> int:
        self.stamp += 1
        return self.stamp

    def fill(self, slot: int, record: Record) -> int | None:
        """Give a taken slot its record, and return the slot that loses, whose taker is then the caller: that of the
        key's older payload, which may be ``slot`` itself."""
        other = self._slots.get(record.key)
        if other is not None:
            if self._records[other].stamp > record.stamp:
                return slot
            self.empty(other)
        self._slots[record.key], self._records[slot] = slot, record
        self.stamp = max(self.stamp, record.stamp)
        self._policy.insert(slot, int.from_bytes(record.key[:8], "little"), -1)
        self._policy.release(slot)
        return other

    def empty(self, slot: int) -> Record:
        """Take a slot's record from it, and return it; the slot is then the caller's. REQUIRES: it has one."""
        record = self._records.pop(slot)
        del self._slots[record.key]
        self._policy.evict(slot)
        return record

    def free(self, slot: int) -> None:
        """Take back a slot that has no valid header on disk."""
        self._free.append(slot)
