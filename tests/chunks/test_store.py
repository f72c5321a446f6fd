"""A store of chunks over a dict and over a folder: found again by content, in this process and another, or a miss."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chunk_tier import DictTier
from chunk_world import ME, OTHER, filled, holds, make, plain, same
from toy_model import ME as TOY
from toy_model import Toy, allocator, computed, generate, run

import kvmem
from kvmem.chunks import Chunk, ChunkStore, FolderTier, export
from kvmem.errors import SpecError, TierError
from kvmem.tiers import Identity, Status, Tier

IDS = list(range(70))
SPEC = plain()


@pytest.fixture(params=["dict", "folder"])
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Tier:
    return DictTier() if request.param == "dict" else FolderTier(tmp_path / "chunks")


def store_over(tiers: Any, **options: Any) -> ChunkStore:
    return ChunkStore(tiers, **(dict(spec=SPEC, identity=ME, chunk_tokens=16) | options))


def test_a_prefix_is_stored_once_and_found(tier: Tier, backend: str) -> None:
    """Complete chunks only; what a sequence has already is not loaded; the tokens are shared like computed ones."""
    store = store_over(tier)
    alloc, seq = filled(SPEC, IDS, backend)
    assert store.store(alloc, seq, IDS) == 64 and tier.capacity().num_blocks == 4
    before = tier.capacity().used_bytes
    assert store.store(alloc, seq, IDS) == 64 and tier.capacity().used_bytes == before  # dedup
    for have in (0, 5, 16, 40, 64):
        other = make(SPEC, OTHER[backend])
        copy = other.sequence()
        if have:
            kvmem.chunks.import_(other, copy, export(alloc, seq, IDS, identity=ME, end=have))
        assert store.lookup(IDS) == 64
        assert store.retrieve(other, copy, IDS) == 64 - have
        assert [b[: 64 * 2 * 8 * 2] for b in holds(other, copy).values()] == [
            b[: 64 * 2 * 8 * 2] for b in holds(alloc, seq).values()
        ]
        assert other.match(IDS).num_tokens == 64 and other.check() == []
    short = make(SPEC, backend)
    assert store.retrieve(short, short.sequence(), IDS[:64]) == 48  # one token is left to compute
    assert store.retrieve(short, short.sequence(), IDS[:7]) == 0


def test_a_stored_prefix_is_as_good_as_a_computed_one(backend: str, tmp_path: Path) -> None:
    """After a disk round trip the logits are those of a forward pass without a cache, to 1e-10. Ten prompts with the
    same beginning hold its bytes once, on both backends."""
    model, ids, size = Toy(), [i % 200 for i in range(530)], 256
    one = allocator(backend)
    seq = one.sequence()
    run(model, one, seq, ids)
    options = dict(spec=one.spec, identity=TOY, chunk_tokens=size)
    assert store_over(tmp_path, **options).store(one, seq, ids) == 512
    two = allocator(OTHER[backend])
    users = []
    for user in range(10):
        prompt = [*ids[:512], 5, user]
        users.append(two.sequence(prompt))
        assert store_over(tmp_path, **options).retrieve(two, users[-1], prompt) == (0 if user else 512)
        got = run(model, two, users[-1], prompt[512:])[-1]
        assert (got - model.full(prompt)[0][-1]).abs().max() < 1e-10 if user in (0, 9) else True
    assert two.stats().used_bytes < 1.1 * two.spec.bytes_per_token * 532 and two.check() == []


def test_what_differs_is_not_found(tier: Tier) -> None:
    """Model, RoPE base, rank, dtype, layers, salt, adapter, extra key, chunk size, codec, and the tokens before."""
    store = store_over(tier)
    alloc, seq = filled(SPEC, IDS)
    store.store(alloc, seq, IDS)
    store.put(export(alloc, seq, IDS, identity=ME, end=16))
    assert (store.lookup(IDS), store.get(IDS[:16]).reason) == (64, "")
    others: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (dict(identity=Identity("toy 2", rope="theta 1e4")), {}),
        (dict(identity=Identity("toy 1", rope="theta 5e5")), {}),
        (dict(identity=Identity("toy 1", "theta 1e4", 0, 2)), {}),
        (dict(identity=Identity("toy 1", "theta 1e4", 1, 2)), {}),
        (dict(spec=plain(torch.bfloat16)), {}),
        (dict(spec=plain(num_layers=4)), {}),
        (dict(chunk_tokens=32), {}),
        (dict(codec="int8"), {}),
        ({}, dict(salt="tenant")),
        ({}, dict(adapter="lora")),
    ]
    for options, keys in others:
        other = store_over(tier, **options)
        assert other.lookup(IDS, **keys) == 0
        assert "chunk_tokens" in options or other.get(IDS[:16], **keys).chunk is None
    assert store.lookup(IDS, extra_key=[(3, "image")]) == 0 and store.lookup(IDS, extra_key=[(20, "image")]) == 16
    assert store.lookup([9, *IDS[1:]]) == 0 and store.lookup([*IDS[:20], 9, *IDS[21:]]) == 16
    assert store.get(IDS[1:17]).chunk is None


def test_position_free_chunks(tier: Tier) -> None:
    """Found by their tokens alone, of any length; what was computed behind other tokens is none."""
    store = store_over(tier)
    for tokens in (IDS[:16], IDS[10:33], IDS[40:70]):
        alloc, seq = filled(SPEC, tokens)
        chunk = export(alloc, seq, tokens, identity=ME)
        assert store.put(chunk) == "" == store.put(chunk)
        found = store.get(tokens).chunk
        assert found is not None and same(found, chunk)
    assert tier.capacity().num_blocks == 3
    assert store.get([1, 2]).reason in ("dict: never put", "folder: it is not in the folder")
    for bad in (
        export(alloc, seq, IDS[40:70], identity=ME, first=1),
        Chunk(replace(chunk.head, exact=False), chunk.sections),
    ):
        with pytest.raises(SpecError, match="not exact or was computed behind other tokens"):
            store.put(bad)
    with pytest.raises(SpecError, match="another spec or identity"):
        store.put(export(alloc, seq, IDS[40:70], identity=Identity("toy 2")))


def _damage(tier: Tier, change: Callable[[bytearray], None]) -> None:
    if isinstance(tier, DictTier):
        for record in tier.held.values():
            change(record)
        return
    for file in Path(tier._folder).iterdir():  # type: ignore[attr-defined]
        data = bytearray(file.read_bytes())
        change(data)
        file.write_bytes(data)


def test_a_damaged_chunk_is_a_miss_and_is_stored_anew(tier: Tier, rng: random.Random) -> None:
    """Also one whose record is right and whose content is another cache's: somebody put it under this key."""
    store = store_over(tier)
    alloc, seq = filled(SPEC, IDS)

    def flip(data: bytearray) -> None:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)

    def cut(data: bytearray) -> None:
        del data[rng.randrange(len(data)) :]

    keys = store._chain(np.array(IDS), None, None, None)
    for change in (flip, cut) * 10:
        assert store.store(alloc, seq, IDS) == 64
        _damage(tier, change)
        other = make(SPEC)
        copy = other.sequence()
        assert store.retrieve(other, copy, IDS) == 0 and copy.num_tokens == 0
        assert tier.capacity().num_blocks == 3  # the damaged one that was asked for is gone
        tier.delete(keys)
    foreign, ids = DictTier(), IDS[:16]
    store_over(foreign, identity=Identity("toy 2")).put(export(alloc, seq, IDS, identity=Identity("toy 2"), end=16))
    (record,) = foreign.held.values()
    (mine,) = [store._keys.chunk(np.array(ids))]
    tier.put([mine], [memoryview(record)[96:]])
    assert "model: was written for 'toy 2'" in store.get(ids).reason
    store.put(export(alloc, seq, IDS, identity=ME, end=16))
    buffer, other_key = memoryview(bytearray(1 << 16)), store._keys.chunk(np.array(IDS[:15]))
    size = tier.get([mine], [buffer])[0].num_bytes
    tier.put([other_key], [buffer[:size]])
    assert "belongs to another key" in store.get(IDS[:15]).reason and store.get(ids).chunk is not None


def test_several_tiers(tmp_path: Path) -> None:
    """Written to all, read from the first that has it, put back into faster ones; the smaller forgets the oldest."""
    alloc, seq = filled(SPEC, IDS)
    one = export(alloc, seq, IDS, identity=ME, end=16).num_bytes
    fast, slow = DictTier("fast", limit=int(2.9 * one)), FolderTier(tmp_path)
    store = store_over([fast, slow])
    assert store.store(alloc, seq, IDS) == 0  # the first tier has kept the last two
    keys = store._chain(np.array(IDS), None, None, None)
    assert [fast.contains([key]) for key in keys] == [0, 0, 1, 1] and slow.contains(keys) == 4
    assert store.lookup(IDS) == 64
    reads = fast.calls[0]
    assert store._get(keys[0], np.array(IDS[:16])).chunk is not None
    assert fast.contains([keys[0]]) == 1 and fast.calls[0] == reads + 1
    assert [fast.contains([key]) for key in keys] == [1, 0, 0, 1]
    other = make(SPEC)
    assert store.retrieve(other, other.sequence(), IDS) == 64
    assert store_over([DictTier(limit=10)]).put(export(alloc, seq, IDS, identity=ME, end=16)) == "dict: too large"


def test_lossy_chunks_are_not_shared(tier: Tier) -> None:
    store = store_over(tier, codec="int8", spec=plain(head_dim=32))
    alloc, seq = filled(plain(head_dim=32), IDS)
    store.store(alloc, seq, IDS)
    other = make(plain(head_dim=32))
    copy = other.sequence()
    assert store.retrieve(other, copy, IDS) == 64 and other.match(IDS).num_tokens == 0
    clean = store_over(DictTier(), spec=plain(head_dim=32))
    assert clean.store(other, copy, IDS) == 0 == clean.lookup(IDS)  # nobody takes them for computed


def test_arguments() -> None:
    for tiers in ([], [3], 5, None):
        with pytest.raises((SpecError, TypeError)):
            store_over(tiers)
    for options in (dict(chunk_tokens=0), dict(codec="zip")):
        with pytest.raises(SpecError):
            store_over(DictTier(), **options)


# --- the folder ---


def test_the_folder_as_a_tier(tmp_path: Path) -> None:
    tier = FolderTier(tmp_path / "a" / "b")
    keys = [bytes([i]) * 32 for i in range(4)]
    data = [memoryview(bytes([i]) * (100 * i)) for i in range(4)]
    assert [r.num_bytes for r in tier.put(keys[:3], data[:3])] == [0, 100, 200]
    rooms = [memoryview(bytearray(250)) for _ in keys]
    assert [r.status for r in tier.get(keys, rooms)] == [Status.OK] * 3 + [Status.MISS]
    assert rooms[2][:200] == data[2] and tier.contains(keys) == 3 and tier.contains([keys[3], keys[0]]) == 0
    assert tier.get([keys[2]], [memoryview(bytearray(199))])[0].status is Status.MISS
    tier.put([keys[2]], [data[1]])  # replaces
    assert tier.get([keys[2]], [rooms[2]])[0].num_bytes == 100
    assert [r.status for r in tier.delete([keys[0], keys[3]])] == [Status.OK, Status.MISS]
    file, copied = (tmp_path / "a" / "b" / f"{key.hex()}.kvc" for key in (keys[1], keys[0]))
    good = file.read_bytes()
    for damaged in (good[:-1], good[:50], b"", good[:-1] + b"x", b"x" + good[1:], good[:90] + b"x" + good[91:]):
        file.write_bytes(damaged)
        assert tier.get([keys[1]], [rooms[0]])[0].status is Status.CORRUPT
    file.write_bytes(good), copied.write_bytes(good)
    assert [r.status for r in tier.get(keys[:2], rooms[:2])] == [Status.CORRUPT, Status.OK]
    copied.unlink()
    assert tier.capacity()[::2] == (None, 2) and os.listdir(tmp_path / "a") == ["b"]
    for key in (b"short", "text", b"/" * 31):
        with pytest.raises(SpecError, match="32 bytes"):
            tier.put([key], [data[0]])  # type: ignore[list-item]
    (tmp_path / "secret").write_bytes(b"x" * 200)
    (tmp_path / "a" / "b" / f"{keys[3].hex()}.kvc").symlink_to(tmp_path / "secret")
    assert tier.get([keys[3]], [rooms[0]])[0].status is Status.FAILED
    tier.close(), tier.close()
    with pytest.raises(TierError, match="closed"):
        tier.contains([keys[1]])


def test_the_folder_forgets_what_was_used_longest_ago(tmp_path: Path) -> None:
    one, two = FolderTier(tmp_path, memory=4 * 196), FolderTier(tmp_path, memory=4 * 196)  # as two processes
    keys = [bytes([i]) * 32 for i in range(6)]
    data, room = memoryview(bytes(100)), memoryview(bytearray(100))
    for i, key in enumerate(keys[:4]):
        (one, two)[i % 2].put([key], [data])
        os.utime(tmp_path / f"{key.hex()}.kvc", ns=(i, i))  # clocks of file systems are coarse
    assert two.get([keys[0]], [room])[0].ok
    one.put([keys[4]], [data])
    assert [two.contains([key]) for key in keys] == [1, 0, 1, 1, 1, 0]
    assert one.put([keys[5]], [memoryview(bytes(800))])[0].status is Status.FULL
    assert one.capacity() == two.capacity() and one.capacity().num_blocks == 4


def test_folders_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", "/proc/none"):
        with pytest.raises(TierError, match="folder: cannot use|path: cannot write"):
            FolderTier(path)
    tier, left = FolderTier(tmp_path / "chunks"), tmp_path / "chunks" / ".of a killed process.tmp"
    left.write_text("x")
    FolderTier(tmp_path / "chunks")
    assert left.exists()  # its process may be alive
    os.utime(left, (0, 0))
    FolderTier(tmp_path / "chunks")
    assert not left.exists()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = tier.put([b"k" * 32], [memoryview(bytes(10))])[0]
    assert result.status is Status.FAILED and "No space left" in result.reason and not os.listdir(tmp_path / "chunks")
    (tmp_path / "chunks").rmdir()  # while it is in use
    assert [tier.put([b"k" * 32], [memoryview(bytes(9))])[0].status, tier.capacity().num_blocks] == [Status.FAILED, 0]
    assert (
        tier.get([b"k" * 32], [memoryview(bytearray(9))])[0].status is tier.delete([b"k" * 32])[0].status is Status.MISS
    )


OTHER_PROCESS = """
import sys
from pathlib import Path
from toy_model import ME, Toy, allocator, generate, spec_of
from kvmem.chunks import ChunkStore
folder, backend, *ids = sys.argv[1:]
ids = [int(i) for i in ids]
store = ChunkStore(folder, spec=spec_of(), identity=ME, chunk_tokens=16)
alloc = allocator(backend)
seq = alloc.sequence()
assert store.retrieve(alloc, seq, ids) == 80
print(*generate(Toy(), alloc, seq, ids, 12))
assert store.store(alloc, seq, ids) == 80
"""


@pytest.mark.parametrize("backend", ["virtual"])  # the other process has the other one
def test_two_processes_share_a_folder(tmp_path: Path, backend: str) -> None:
    """A prompt that one computes is continued by the other, with the tokens of a model without a cache."""
    model, draw = Toy(), random.Random(4)
    ids = [draw.randrange(200) for _ in range(90)]
    alloc = allocator(backend)
    seq = alloc.sequence()
    run(model, alloc, seq, ids)
    store = ChunkStore(tmp_path, spec=alloc.spec, identity=TOY, chunk_tokens=16)
    assert store.store(alloc, seq, ids) == 80
    here = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, str(tmp_path), OTHER[backend], *map(str, ids)],
        env={**os.environ, "PYTHONPATH": here}, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tokens = list(ids)
    for _ in range(12):
        tokens.append(int(model.full(tokens)[0][-1].argmax()))
    assert [int(i) for i in done.stdout.split()] == tokens[90:]
    assert computed(model, ids[:16]).head.exact and generate(model, alloc, alloc.sequence(ids), ids, 1)
