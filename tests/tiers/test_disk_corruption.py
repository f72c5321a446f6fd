"""Damage on the disk is found: the answer is a miss, never wrong bytes, and the slot is used again."""

from __future__ import annotations

import random
import struct

import pytest
from disk_simulated import Inode, SimulatedFiles
from disk_support import FINGERPRINT, OTHER_FINGERPRINT, open_disk, version_in
from support import LONG
from tier_suite import get, key_of, payload_of, put

from kvmem.errors import TierError
from kvmem.tiers import Result, Status
from kvmem.tiers.checksum import checksum
from kvmem.tiers.record import HEADER_BYTES, header_of

SLOT, FIRST, NUM = 12288, 4096, 6  # of blocks of 6,000 bytes
KEYS = [key_of(n) for n in range(NUM)]
SIZES = (6000, 4096, 100, 5000, 8, 6000)
SEGMENT = "segment-00000.kvmem"


def contents_of(version: int) -> dict[bytes, bytes]:
    return {key: payload_of(key, version, size) for key, size in zip(KEYS, SIZES, strict=True)}


def slot_of(files: SimulatedFiles, key: bytes) -> int:
    """Where the newest record of a key begins."""
    content = files.inodes[SEGMENT].content
    return max(
        (at for at in range(FIRST, len(content), SLOT) if content[at + 16 : at + 48] == key),
        key=lambda at: content[at + 72 : at + 80],
    )


def damage(content: bytearray, at: int, size: int, stale: bytes, foreign: bytes, rng: random.Random) -> str:
    """Change what a read of the slot at ``at`` sees; return how."""
    kind = rng.choice(
        ("flip in header", "flip in payload", "overwritten", "cut", "swapped", "stale", "another model's")
    )
    if kind == "flip in header":
        content[at + rng.randrange(HEADER_BYTES)] ^= 1 << rng.randrange(8)
    elif kind == "flip in payload":
        content[at + 4096 + rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif kind == "overwritten":
        start, length = at + rng.choice((0, 4096 + rng.randrange(size))), rng.choice((1, 96, 512, 4096))
        content[start : start + length] = (bytes if rng.random() < 0.5 else rng.randbytes)(length)
    elif kind == "cut":
        del content[at + rng.randrange(4096 + size) :]
    elif kind == "swapped":
        other = rng.choice([slot for slot in range(FIRST, FIRST + NUM * SLOT, SLOT) if slot != at])
        content[at : at + SLOT], content[other : other + SLOT] = content[other : other + SLOT], content[at : at + SLOT]
    else:  # a whole valid slot of another time or model
        source = stale if kind == "stale" else foreign
        content[at : at + SLOT] = source[at : at + SLOT]
    return kind


def test_every_corruption_is_found(seed: int) -> None:
    """10,000 of seven kinds; KVMEM_LONG=1: 100,000. The tier finds each on the next get, drops the block and takes it
    again; one in ten meets a tier that is opened afterwards, which may find the block elsewhere, whole."""
    rng, files, foreign, kinds = random.Random(seed), SimulatedFiles(), SimulatedFiles(), dict[str, int]()
    with open_disk("disk", files=foreign, fingerprint=OTHER_FINGERPRINT) as tier:
        put(tier, {key_of(100 + n): b"another model's" for n in range(NUM)})
    tier = open_disk("disk", files=files)
    put(tier, contents_of(1))
    stale = bytes(files.inodes[SEGMENT].content)
    put(tier, contents := contents_of(2))
    content = files.inodes[SEGMENT].content
    for _ in range(100_000 if LONG else 10_000):
        key = rng.choice(KEYS)
        at, whole = slot_of(files, key), bytes(content)
        kind = damage(content, at, len(contents[key]), stale, bytes(foreign.inodes[SEGMENT].content), rng)
        if bytes(content[at : at + 4096 + len(contents[key])]) == whole[at : at + 4096 + len(contents[key])]:
            continue  # zeros over zeros
        kinds[kind] = kinds.get(kind, 0) + 1
        if rng.random() < 0.1:
            with open_disk("disk", files=files.copy()) as opened:
                for other in KEYS:
                    data = get(opened, other, 6000)
                    if isinstance(data, bytes):
                        assert version_in(other, data) == 2 or kind == "stale", kind
                    else:
                        assert data.status is not Status.OK and opened.contains([other]) == 0
        result = get(tier, key, 6000)
        assert isinstance(result, Result), kind
        assert result.status is (Status.FAILED if kind == "cut" else Status.CORRUPT) and result.reason, (kind, result)
        assert tier.contains([key]) == (kind == "cut")
        content[:] = whole
        if kind != "cut":
            assert put(tier, {key: contents[key]})[0].ok
        assert get(tier, key, 6000) == contents[key]
    assert len(kinds) == 7 and min(kinds.values()) > 500, kinds
    assert tier.capacity().num_blocks == NUM


@pytest.mark.parametrize("position", range(0, 68, 3))
def test_a_damaged_superblock_is_refused(position: int) -> None:
    files = SimulatedFiles()
    with open_disk("disk", files=files) as tier:
        put(tier, contents_of(1))
    files.inodes[SEGMENT].content[position] ^= 4
    before = bytes(files.inodes[SEGMENT].content)
    for read_only in (True, False):
        with pytest.raises(TierError, match=SEGMENT):
            open_disk("disk", files=files, read_only=read_only)
    assert bytes(files.inodes[SEGMENT].content) == before


def hostile_slot(rng: random.Random) -> bytes:
    """Random bytes, a valid header with fields at their limits, or a valid one with random bytes in it."""
    if (kind := rng.randrange(3)) == 0:
        return rng.randbytes(SLOT)
    slot = bytearray(
        header_of(rng.choice(KEYS), memoryview(rng.randbytes(rng.choice((0, 8, 6000)))), rng.getrandbits(64))
    )
    if kind == 1:
        length = rng.choice((0, 1, 6000, 6001, 8192, 8193, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1))
        slot[48:56] = struct.pack("<Q", length)
        slot[12:16] = struct.pack("<I", rng.choice((96, 96, 0, 2**32 - 1)))
        slot[80:96] = checksum(bytes(slot[:80]))
    else:
        for _ in range(rng.randint(1, 8)):
            slot[rng.randrange(len(slot))] = rng.randrange(256)
    return bytes(slot).ljust(SLOT, rng.choice((b"\0", b"\xff")))


def test_hostile_headers(seed: int) -> None:
    """1,000 folders of hostile slots (KVMEM_LONG=1: 20,000): opening, reading and writing raise nothing, find nothing
    that was not put, and use no length that a header names before it is checked."""
    rng = random.Random(seed)
    with open_disk("disk", files=(good := SimulatedFiles())) as tier:
        put(tier, {KEYS[0]: payload_of(KEYS[0], 1, 5000)})
    template = bytes(good.inodes[SEGMENT].content)
    for _ in range(20_000 if LONG else 1_000):
        content = template[:FIRST] + b"".join(hostile_slot(rng) for _ in range(NUM))
        if rng.random() < 0.2:
            content = content[: rng.randrange(len(content))]
        if rng.random() < 0.1:
            content = rng.randbytes(80) + content[80:]
        files = SimulatedFiles({SEGMENT: Inode(content)})
        try:
            tier = open_disk("disk", files=files, read_only=rng.random() < 0.3)
        except TierError:
            assert not content.startswith(template[:68])
            continue
        with tier:
            used = tier.capacity()
            assert used.num_blocks <= NUM and used.total_bytes is not None and used.total_bytes <= NUM * SLOT
            for key in KEYS:
                data = get(tier, key, 6000)
                assert isinstance(data, Result) or data in (b"", b"\0" * len(data), b"\xff" * len(data)), data
            tier.put([KEYS[1]], [memoryview(b"written")])
            assert len(tier._scratch._free) <= 2 and tier._scratch._size == SLOT  # memory is what the options said


@pytest.mark.parametrize(("length", "blocks"), [(6000, 1), (6001, 0), (2**32 + 8, 0), (2**64 - 1, 0)])
def test_a_length_beyond_the_slot_is_no_record(length: int, blocks: int) -> None:
    header = bytearray(header_of(KEYS[0], memoryview(b"")))
    header[48:56] = struct.pack("<Q", length)
    header[80:] = checksum(bytes(header[:80]))
    with open_disk("disk", files=(files := SimulatedFiles())):
        pass
    files.inodes[SEGMENT].content[FIRST : FIRST + HEADER_BYTES] = header
    with open_disk("disk", files=files) as tier:
        assert tier.capacity().num_blocks == blocks
        result = get(tier, KEYS[0], 20_000)
        assert isinstance(result, Result) and not result.ok


def test_a_block_of_another_fingerprint_is_never_found(rng: random.Random) -> None:
    """Even if its slot is copied into a folder: its key is not among ours."""
    files, foreign = SimulatedFiles(), SimulatedFiles()
    with open_disk("disk", files=files):
        pass
    with open_disk("disk", files=foreign, fingerprint=OTHER_FINGERPRINT) as tier:
        put(tier, {key_of(100): b"another model's"})
    files.inodes[SEGMENT].content[FIRST:] = foreign.inodes[SEGMENT].content[FIRST:]
    with open_disk("disk", files=files, fingerprint=FINGERPRINT) as tier:
        assert tier.contains(KEYS) == 0
        assert put(tier, contents_of(1)) == [Result(Status.OK, size) for size in SIZES]  # its slot is used in turn
        assert {key: get(tier, key, 6000) for key in KEYS} == contents_of(1)
