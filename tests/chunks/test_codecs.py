"""Codecs: bounds on their error, bytes that they cannot code, and damage that the checksums of a file do not see."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from chunk_world import ME, make, plain, random_bytes, same, write

import kvmem
from kvmem.chunks import Chunk, export, read_chunk, write_chunk
from kvmem.chunks.chunk import sections_of
from kvmem.chunks.codecs import CODECS, CacheGen, codec_named
from kvmem.errors import SpecError, TierError

IDS = list(range(64))


def need(codec: str) -> None:
    if codec == "cachegen":
        pytest.importorskip("constriction", reason="needs the extra kvmem[cachegen]")


def smooth(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """As K is: channels of unequal size with an offset, neighbours alike."""
    offset, size = torch.randn(shape[1:]) * 4, torch.rand(shape[1:])
    walk = torch.randn(shape).cumsum(0) * 0.2
    return (offset + size * walk).to(dtype)


def chunk_of(spec: kvmem.CacheSpec, values: Any = smooth) -> Chunk:
    alloc = make(spec)
    seq = alloc.sequence()
    write(alloc, seq, IDS, values)
    return export(alloc, seq, IDS, identity=ME)


def through(codec: str, chunk: Chunk, folder: Path) -> tuple[Chunk, int]:
    write_chunk(folder / codec, chunk, codec=codec)
    return read_chunk(folder / codec, spec=chunk.head.spec, identity=chunk.head.identity), (
        folder / codec
    ).stat().st_size


def floats(chunk: Chunk) -> list[torch.Tensor]:
    """Each part of each section, ``[tokens, elements]``."""
    head = chunk.head
    return [
        data[at : at + size].view(part.dtype).view(len(head.tokens), -1).double()
        for section, data in zip(sections_of(head.spec), chunk.sections, strict=True)
        for part, at, size in head.places(section)
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("codec", "most_bytes"), [("none", 1.1), ("int8", 0.70), ("int4", 0.45), ("cachegen", 0.45)])
def test_error_and_size(codec: str, most_bytes: float, dtype: torch.dtype, tmp_path: Path) -> None:
    """Integers: half a step of a group of 32 at most. CacheGen: half a step of a token. Sizes are those of 16 bits."""
    need(codec)
    chunk = chunk_of(plain(dtype, num_layers=12, num_kv_heads=4, head_dim=64))
    found, size = through(codec, chunk, tmp_path)
    assert size < most_bytes * chunk.num_bytes * (2 / dtype.itemsize if codec != "none" else 1)
    assert found.head.exact == (codec == "none") and same(found, chunk) == (codec == "none")
    eps = torch.finfo(dtype).eps * 20
    for number, (x, y) in enumerate(zip(floats(chunk), floats(found), strict=True)):
        if codec == "cachegen":
            layer, name = divmod(number, 2)
            top = 15 if layer < (10, 2)[name] else 7
            anchors = torch.arange(64) // 10 * 10
            off = (x - y[anchors]).abs()  # from the anchor as it is decoded
            bound = off.amax(1, keepdim=True) / top * 0.505 + eps * x.abs() + 1e-6
            bound[::10] = x[::10].abs().amax(1, keepdim=True) / 127 * 0.505 + eps * x[::10].abs()
            assert ((x - y).abs() <= bound).all() and (x - y).norm() < 0.1 * x.norm()
        else:
            groups = x.view(64, -1, 32)
            step = (groups.amax(-1) - groups.amin(-1)) / (2 ** {"none": 64, "int8": 8, "int4": 4}[codec] - 1)
            bound = step.repeat_interleave(32, 1) * 0.51 + 2e-3 * (codec != "none") * x.abs().amax() / 4 + eps * x.abs()
            assert ((x - y).abs() <= bound).all()


@pytest.mark.parametrize("codec", CODECS)
def test_what_cannot_be_coded_is_kept_as_it_is(codec: str, tmp_path: Path) -> None:
    """Random bits with NaN and infinities, 8-bit floats, integers, rows that would grow; no tokens at all."""
    need(codec)
    for spec in (plain(), plain("float8_e4m3fn"), plain("int8"), plain(torch.float16, num_kv_heads=1, head_dim=1)):
        chunk = chunk_of(spec, random_bytes)
        found, size = through(codec, chunk, tmp_path)
        assert same(found, chunk) and size < chunk.num_bytes + 1500
    empty = Chunk(
        kvmem.chunks.Head(plain(), ME, chunk.head.tokens[:0], 0, b"\0" * 32), (torch.empty(0, dtype=torch.uint8),) * 3
    )
    found, _ = through(codec, empty, tmp_path)
    assert same(found, empty)


@pytest.mark.parametrize("codec", ["int8", "int4", "cachegen"])
def test_extremes(codec: str, tmp_path: Path) -> None:
    """Zeros, equal values, entries beyond the range of the scales, and one token."""
    need(codec)
    for value in (0.0, 3.5, 6e4, 1e30):
        chunk = chunk_of(
            plain(torch.float32, head_dim=32), lambda shape, dtype, v=value: torch.full(shape, v, dtype=dtype)
        )
        found, _ = through(codec, chunk, tmp_path)
        for x, y in zip(floats(chunk), floats(found), strict=True):
            torch.testing.assert_close(y, x, rtol=2e-3, atol=0)
    alloc = make(plain(torch.float32, head_dim=32))
    seq = alloc.sequence()
    write(alloc, seq, [7], smooth)
    one = export(alloc, seq, [7], identity=ME)
    found, _ = through(codec, one, tmp_path)
    for x, y in zip(floats(one), floats(found), strict=True):
        assert (x - y).norm() < 0.12 * x.norm()


@pytest.mark.parametrize("codec", ["int8", "int4", "cachegen"])
def test_sections_that_were_never_encoded(codec: str, rng: random.Random) -> None:
    """Behind right checksums: a ``ValueError``, or a section of the right length; nothing else, and no crash."""
    need(codec)
    chunk = chunk_of(plain(torch.float16, head_dim=32))
    places = chunk.head.places(sections_of(chunk.head.spec)[0])
    coder = codec_named(codec)
    good = bytes(memoryview(coder.encode(chunk.sections[0], places)))  # type: ignore[arg-type]
    found = 0
    for _ in range(200):
        data = bytearray(good)
        at = rng.randrange(len(data))
        if rng.random() < 0.3:
            del data[at:]
        else:
            data[at : at + 4] = rng.randbytes(rng.choice((0, 4, 9)))
        try:
            out = coder.decode(torch.frombuffer(bytearray(data) or bytearray(1), dtype=torch.uint8), places)
        except ValueError:
            found += 1
        else:
            assert len(out) == len(chunk.sections[0])
    assert found > 40


def test_symbols_have_a_checksum() -> None:
    """Words that were changed decode to symbols all the same, which nothing else would notice."""
    need("cachegen")
    chunk = chunk_of(plain(torch.float16, head_dim=32))
    places = chunk.head.places(sections_of(chunk.head.spec)[0])
    data = bytearray(codec_named("cachegen").encode(chunk.sections[0], places))
    reasons = []
    for at in range(len(data) - 600, len(data) - 100, 50):
        bad = data.copy()
        bad[at] ^= 16
        with pytest.raises(ValueError, match="component 'v'") as error:
            codec_named("cachegen").decode(torch.frombuffer(bad, dtype=torch.uint8), places)
        reasons.append(str(error.value))  # a few the coder itself finds
    assert sum("other symbols than were encoded" in reason for reason in reasons) >= 5


def test_the_coder_takes_rows_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any size, with the same bytes: what it needs beside the section does not grow with it."""
    need("cachegen")
    chunk = chunk_of(plain(torch.float16, head_dim=32))
    whole, _ = through("cachegen", chunk, tmp_path)
    stored = (tmp_path / "cachegen").read_bytes()
    monkeypatch.setattr(CacheGen, "rows_at_once", 7)
    pieces, _ = through("cachegen", chunk, tmp_path)
    assert same(pieces, whole) and (tmp_path / "cachegen").read_bytes() == stored


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = chunk_of(plain(torch.float16, head_dim=32))
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(SpecError, match="needs the package constriction"):
        write_chunk(tmp_path / "one", chunk, codec="cachegen")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    need("cachegen")
    write_chunk(tmp_path / "one", chunk, codec="cachegen")
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(TierError, match="needs the package constriction"):
        read_chunk(tmp_path / "one", spec=chunk.head.spec, identity=ME)
