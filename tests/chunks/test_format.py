"""Files of chunks: every damage is found, nothing of another cache is read, and memory is bounded by the file."""

from __future__ import annotations

import json
import os
import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from chunk_world import ME, filled, plain, same
from support import LONG

from kvmem.chunks import Chunk, ChunkFile, export, read_chunk, write_chunk
from kvmem.chunks import format as chunk_format
from kvmem.errors import SpecError, TierError
from kvmem.tiers import Identity
from kvmem.tiers.checksum import checksum

IDS = list(range(30))
SPEC = plain()
FUZZ = 10_000 if LONG else 400


@pytest.fixture(scope="module")
def chunk() -> Chunk:
    torch.manual_seed(3)
    alloc, seq = filled(SPEC, IDS)
    return export(alloc, seq, IDS, identity=ME, first=4)


@pytest.fixture
def path(tmp_path: Path, chunk: Chunk) -> Path:
    write_chunk(tmp_path / "one", chunk)
    return tmp_path / "one"


def read(path: Path, **other: Any) -> Chunk:
    return read_chunk(path, **(dict(spec=SPEC, identity=ME) | other))


def test_there_and_back(path: Path, chunk: Chunk) -> None:
    found = read(path)
    assert same(found, chunk) and found.head.exact
    assert (found.head.tokens.tolist(), found.head.position, found.head.before) == (IDS[4:], 4, chunk.head.before)
    with ChunkFile(path, spec=SPEC, identity=ME) as file:
        assert [torch.equal(a, b) for a, b in zip(file.sections, chunk.sections, strict=True)] == [True] * 3


def test_the_file_is_what_the_page_says(path: Path, chunk: Chunk) -> None:
    """``docs/format.md``, read with nothing but struct and json."""
    data = path.read_bytes()
    magic, version, length, seal = struct.unpack("<8sII16s", data[:32])
    assert (magic, version, seal) == (b"kvmemchk", 1, checksum(data[:16] + data[32 : 32 + length]))
    fields = json.loads(data[32 : 32 + length])
    assert (fields["kind"], fields["model"], fields["tokens"], fields["codec"]) == ("chunk", "toy 1", 26, "none")
    at, found = 32 + length, []
    while at < len(data):
        size, total, frame = struct.unpack("<Q16s16s", data[at : at + 40])
        payload = data[at + 40 : at + 40 + size]
        assert total == checksum(payload) and frame == checksum(seal + struct.pack("<IQ", len(found), size) + total)
        found, at = [*found, payload], at + 40 + size
    assert found[0] == struct.pack("<26i", *IDS[4:])
    assert found[1:] == [section.numpy().tobytes() for section in chunk.sections]


def test_equal_chunks_are_equal_files(path: Path, chunk: Chunk) -> None:
    write_chunk(path.parent / "two", chunk)
    assert path.read_bytes() == (path.parent / "two").read_bytes()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (dict(identity=Identity("toy 2", rope="theta 1e4")), "model: was written for 'toy 1', and is read for 'toy 2'"),
        (dict(identity=Identity("toy 1", rope="theta 5e5")), "rope: was written for 'theta 1e4'"),
        (dict(identity=Identity("toy 1", "theta 1e4", 0, 2)), "ranks: was written for 1, and is read for 2"),
        (dict(spec=plain(torch.bfloat16)), "spec: was written with another CacheSpec"),
        (dict(spec=plain(num_layers=4)), "spec: was written with another CacheSpec"),
    ],
)
def test_another_cache(path: Path, other: dict[str, Any], words: str) -> None:
    with pytest.raises(TierError, match=words):
        read(path, **other)


def test_another_rank(tmp_path: Path, chunk: Chunk) -> None:
    """Each rank's file is for that rank."""
    mine, other = (Identity("toy 1", "theta 1e4", rank, 2) for rank in (0, 1))
    write_chunk(tmp_path / "rank 0", Chunk(chunk_format.Head(SPEC, mine, *_rest(chunk)), chunk.sections))
    assert same(read(tmp_path / "rank 0", identity=mine), chunk)
    with pytest.raises(TierError, match="rank: was written for 0, and is read for 1"):
        read(tmp_path / "rank 0", identity=other)


def _rest(chunk: Chunk) -> tuple[Any, int, bytes]:
    return chunk.head.tokens, chunk.head.position, chunk.head.before


def test_every_flip_cut_and_swap_is_found(path: Path, chunk: Chunk, rng: random.Random) -> None:
    """Random ones, and a cut at every length around the edges of fields."""
    good = path.read_bytes()
    starts = _frames(good)
    damaged: list[bytes] = [
        good[:end]
        for edge in (0, 8, 12, 16, 32, *starts, len(good))
        for end in range(max(0, edge - 2), min(len(good), edge + 2))
    ]
    damaged += [good + b"\0", good + good, good[1:], good[: starts[0]] + good[starts[1] :]]
    for _ in range(FUZZ):
        data = bytearray(good)
        kind = rng.randrange(5)
        at = rng.randrange(len(data))
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at : at + rng.choice((1, 8, 512))] = rng.randbytes(rng.choice((1, 8, 512)))
        elif kind == 3:
            del data[at : at + rng.randrange(1, 50)]
        else:  # two sections of equal length change places, frames and all
            a, b = sorted(rng.sample(range(1, 4), 2))
            ends = [*starts[1:], len(good)]
            one, two = good[starts[a] : ends[a]], good[starts[b] : ends[b]]
            data[starts[a] : ends[a]], data[starts[b] : ends[b]] = two, one
        if bytes(data) != good:
            damaged.append(bytes(data))
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(TierError, match="one: "):
            read(path)


def _frames(data: bytes) -> list[int]:
    """Where each section's frame begins."""
    at, found = 32 + struct.unpack_from("<I", data, 12)[0], []
    while at < len(data):
        found.append(at)
        at += 40 + struct.unpack_from("<Q", data, at)[0]
    return found


def sealed(fields: Any, sections: list[bytes], lengths: dict[int, int] | None = None, version: int = 1) -> bytes:
    """A file whose checksums are right, whatever it says."""
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    start = struct.pack("<8sII", b"kvmemchk", version, len(text))
    seal = checksum(start + text)
    out = start + seal + text
    for index, data in enumerate(sections):
        size = (lengths or {}).get(index, len(data))
        total = checksum(data)
        out += struct.pack("<Q16s16s", size, total, checksum(seal + struct.pack("<IQ", index, size) + total)) + data
    return out


def test_files_that_lie_with_right_checksums(path: Path, chunk: Chunk) -> None:
    """Wrong fields, lengths beyond the file, other versions: refused, in memory bounded by the file."""
    good = path.read_bytes()
    length = struct.unpack_from("<I", good, 12)[0]
    fields = json.loads(good[32 : 32 + length])
    sections = [chunk.head.tokens.tobytes(), *(s.numpy().tobytes() for s in chunk.sections)]
    path.write_bytes(sealed(fields, sections))
    assert same(read(path), chunk)
    lies: list[tuple[bytes, str]] = [
        (sealed(fields, sections, {1: 2**40}), "section 1: has 1099511627776 bytes, and"),
        (sealed(fields | dict(codec="int4"), sections, {1: 2**40}), "section 1: is cut off"),
        (sealed(fields | dict(codec="int4"), sections), "section 1: component 'k'"),
        (sealed(fields | dict(codec="zip"), sections), "codec: got 'zip'"),
        (sealed(fields | dict(tokens=2**40), sections), "section 0: has 104 bytes, and"),
        (sealed(fields | dict(tokens=25), [sections[0][:-4], *sections[1:]]), "section 1: has"),
        (sealed(fields | dict(tokens=-1), sections), "section 0: has"),
        (sealed(fields | dict(position=-1), sections), "make no sense"),
        (sealed(fields | dict(position=2**31), sections), "make no sense"),
        (sealed(fields | dict(spans=[[0, 2**30]]), sections), "section 1: has"),
        (sealed(fields | dict(spans=[[5, 1]]), sections), "make no sense"),
        (sealed(fields | dict(spans=[[5]]), sections), "make no sense"),
        (sealed(fields | dict(spans=["ab"]), sections), "make no sense"),
        (sealed(fields | dict(spans=[5]), sections), "make no sense"),
        (sealed(fields | dict(spans=[[0, 1]] * 2), sections), "make no sense"),
        (sealed(fields | dict(kind="cache"), sections), "holds a cache, not a chunk"),
        (sealed(fields | dict(before="xy" * 32), sections), "make no sense"),
        (sealed(fields | dict(rank=True), sections), "other fields"),
        (sealed({k: v for k, v in fields.items() if k != "rank"}, sections), "other fields"),
        (sealed(fields | dict(more=1), sections), "other fields"),
        (sealed([1], sections), "other fields"),
        (sealed(b"[" * 60_000, sections), "other fields"),
        (sealed(b"\xff", sections), "other fields"),
        (sealed(b"", sections), "other fields"),
        (sealed(fields, sections, version=2), "format version 2, and this kvmem reads version 1"),
        (good[:12] + struct.pack("<I", 2**31) + good[16:], "claims 2147483648 bytes"),
        (b"kvmemblk" + good[8:], "no chunk or cache of kvmem"),
    ]
    tracemalloc.start()
    for data, words in lies:
        path.write_bytes(data)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        with pytest.raises(TierError, match=words):
            read(path)
        assert tracemalloc.get_traced_memory()[1] - before < 40 * len(good) + 2**21
    tracemalloc.stop()


def test_paths_that_are_no_files(tmp_path: Path, path: Path, chunk: Chunk) -> None:
    (tmp_path / "link").symlink_to(path)
    os.mkfifo(tmp_path / "pipe")
    for name, words in (
        ("absent", "cannot read"),
        ("link", "cannot read"),
        (".", "no regular file"),
        ("pipe", "no regular file"),
        ("a\0b", "cannot read"),
    ):
        with pytest.raises(TierError, match=words):
            read(tmp_path / name)
    for name in ("absent/one", ".", "one/two"):
        with pytest.raises(TierError, match="path: cannot write"):
            write_chunk(tmp_path / name, chunk)
    with pytest.raises(SpecError, match="codec: got 'zip'"):
        write_chunk(path, chunk, codec="zip")
    long = Chunk(chunk_format.Head(SPEC, Identity("m" * 70_000), *_rest(chunk)), chunk.sections)
    with pytest.raises(SpecError, match="must fit 65536"):
        write_chunk(path, long)
    assert sorted(os.listdir(tmp_path)) == ["link", "one", "pipe"] and same(read(path), chunk)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(
    call: str, path: Path, chunk: Chunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fails)
    before = path.read_bytes()
    with pytest.raises(TierError, match="No space left"):
        write_chunk(path, chunk, codec="int8")
    assert os.listdir(path.parent) == ["one"] and path.read_bytes() == before
