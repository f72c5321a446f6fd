"""Whole caches on disk: what is loaded goes on token for token, in another process, on the other backend."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from chunk_world import ME, OTHER, filled, holds, make, plain, write
from support import LAYOUTS
from toy_model import ME as TOY
from toy_model import VOCAB, Toy, allocator, generate, run

import kvmem
from kvmem.chunks import Session, export, import_, load, save, write_chunk
from kvmem.chunks import format as chunk_format
from kvmem.errors import OutOfMemory, SpecError, TierError
from kvmem.layouts.quantised import QuantisedKV
from kvmem.layouts.rope import Rope
from kvmem.tiers import Identity

IDS = list(range(100, 190))


@pytest.mark.parametrize("name", [*LAYOUTS, "blocks"])
def test_every_spec_comes_back(name: str, backend: str, tmp_path: Path) -> None:
    """Windows with what they hold, recurrent states, cross attention, layouts that encode whole blocks."""
    spec = QuantisedKV(plain(head_dim=32), k="int4", v="int4").spec if name == "blocks" else LAYOUTS[name].spec(16)
    interleave: Any = "all" if name == "blocks" else LAYOUTS[name].interleave
    alloc, seq = filled(spec, IDS, backend, interleave=interleave)
    save(alloc, tmp_path / "cache", [Session(IDS, seq, label="one")], identity=ME)
    other = make(spec, OTHER[backend])
    (found,) = load(other, tmp_path / "cache", identity=ME)
    assert found.sequence is not None and found.sequence.label == found.label == "one"
    assert found.sequence.num_committed_tokens == 90 and list(found.tokens) == IDS
    assert holds(other, found.sequence) == holds(alloc, seq)
    dropped = any(g.window_tokens and alloc.core.first_token(seq.id, i) for i, g in enumerate(spec.groups))
    if not dropped:
        assert other.match(IDS, extra_key=None).num_tokens == alloc.match(IDS).num_tokens
    else:
        assert other.match(IDS).num_tokens == 0
    (again,) = load(other, tmp_path / "cache", identity=ME)  # beside the first one
    assert again.sequence is not None and holds(other, again.sequence) == holds(alloc, seq)
    write(other, found.sequence, [1, 2, 3])
    assert other.check() == []
    found.sequence.free(), again.sequence.free()
    assert other.check() == [] and other.stats().num_sequences == 0


def test_salts_keys_and_further_tokens(backend: str, tmp_path: Path) -> None:
    """A session keeps who may share it, and the sampled token that is not computed yet."""
    alloc = make(plain(), backend)
    keys: list[dict[str, Any]] = [
        dict(salt="tenant"), dict(salt=b"\xff\0"), dict(adapter="lora"), dict(extra_key=[(3, b"image"), (9, ("a", 5, None))]),
        dict(extra_key="one"), {},
    ]  # fmt: skip
    sessions = []
    for number, key in enumerate(keys):
        seq = alloc.sequence(**key)
        write(alloc, seq, [number, *IDS[1:40]])
        sessions.append(Session([number, *IDS[1:40], 7], seq, **key))
    save(alloc, tmp_path / "cache", sessions, identity=ME)
    other = make(plain(), OTHER[backend])
    for number, (key, found) in enumerate(zip(keys, load(other, tmp_path / "cache", identity=ME), strict=True)):
        prompt = [number, *IDS[1:40]]
        assert found.sequence is not None and found.sequence.num_committed_tokens == 40 and found.tokens[40] == 7
        assert other.match(prompt, **key).num_tokens == alloc.match(prompt, **key).num_tokens >= 32
        assert key == {} or other.match(prompt).num_tokens < 32
        assert holds(other, found.sequence) == holds(alloc, sessions[number].sequence)  # type: ignore[arg-type]


def test_a_system_prompt_without_a_sequence(backend: str, tmp_path: Path) -> None:
    alloc, seq = filled(plain(), IDS, backend)
    kept = holds(alloc, seq)
    seq.free()
    save(alloc, tmp_path / "cache", [Session(IDS[:64])], identity=ME)
    other = make(plain(), OTHER[backend])
    (found,) = load(other, tmp_path / "cache", identity=ME)
    assert found.sequence is None and other.stats().num_sequences == 0
    with other.sequence([*IDS[:64], 5]) as again:
        assert again.num_cached_tokens == 64
        assert [a[:100] for a in holds(other, again).values()] == [b[:100] for b in kept.values()]
    with pytest.raises(SpecError, match="nothing is cached of a prompt of 20 tokens"):
        save(alloc, tmp_path / "none", [Session([1] * 20)], identity=ME)
    assert os.listdir(tmp_path) == ["cache"]


def test_sessions_with_a_common_prefix_share_it(backend: str, tmp_path: Path) -> None:
    """Ten sequences of 1,024 common tokens and some of their own hold the common ones once, also when loaded twice."""
    spec = plain(num_layers=2)
    sizes: Any = dict(max_sequences=24, max_tokens=1100, debug=False)
    alloc = make(spec, backend, **sizes)
    system, sessions = [7] * 1024, []
    parent = alloc.sequence()
    write(alloc, parent, system)
    for user in range(10):
        seq = parent.fork()
        write(alloc, seq, [user] * (20 + user))
        sessions.append(Session(system + [user] * (20 + user), seq, label=str(user)))
    save(alloc, tmp_path / "cache", sessions, identity=ME)
    once = spec.bytes_per_token * 1024
    other = make(spec, OTHER[backend], **sizes)
    for _ in range(2):
        found = load(other, tmp_path / "cache", identity=ME)
        assert [s.label for s in found] == [str(i) for i in range(10)]
        for mine, its in zip(found, sessions, strict=True):
            assert holds(other, mine.sequence) == holds(alloc, its.sequence)  # type: ignore[arg-type]
        assert other.stats().used_bytes < 2 * once and other.check() == []


def test_approximate_sequences_stay_unshared(backend: str, tmp_path: Path) -> None:
    alloc, seq = filled(plain(), IDS, backend)
    target = make(plain(), backend)
    copy = target.sequence()
    import_(target, copy, export(alloc, seq, IDS, identity=ME, first=10), rope=Rope.default(8))
    assert not export(target, copy, IDS[10:], identity=ME).head.exact
    save(target, tmp_path / "cache", [Session(IDS[10:], copy)], identity=ME)
    other = make(plain(), backend)
    write(other, other.sequence(), IDS[10:])  # the same ids, cached already, with KV that was computed
    (found,) = load(other, tmp_path / "cache", identity=ME)
    assert holds(other, found.sequence) == holds(target, copy)  # type: ignore[arg-type]
    assert not export(other, found.sequence, IDS[10:], identity=ME).head.exact  # type: ignore[arg-type]
    other = make(plain(), backend)
    load(other, tmp_path / "cache", identity=ME)
    assert other.match(IDS[10:]).num_tokens == 0


def test_one_layer_at_a_time(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the sections in host memory at most two live at any time."""
    alive: list[weakref.ref[Any]] = []
    most = 0
    make_one = torch.empty

    def watched(*args: Any, **options: Any) -> torch.Tensor:
        nonlocal most
        found = make_one(*args, **options)
        if options.get("dtype") is torch.uint8:
            alive.append(weakref.ref(found))
            most = max(most, sum(one() is not None for one in alive))
        return found

    spec = plain(num_layers=12)
    alloc, seq = filled(spec, IDS, backend)
    gc.collect()
    monkeypatch.setattr(torch, "empty", watched)
    save(alloc, tmp_path / "cache", [Session(IDS, seq)], identity=ME)
    monkeypatch.undo()
    assert len(alive) == 12 and most <= 2
    alive.clear()
    most, take = 0, torch.frombuffer

    def counted(*args: Any, **options: Any) -> torch.Tensor:
        nonlocal most
        found = take(*args, **options)
        alive.append(weakref.ref(found))
        most = max(most, sum(one() is not None for one in alive))
        return found

    monkeypatch.setattr(torch, "frombuffer", counted)
    other = make(spec, backend)
    load(other, tmp_path / "cache", identity=ME)
    assert len(alive) >= 12 and most <= 3  # the ids are one more


# --- refusals ---


def saved(backend: str, path: Path) -> tuple[kvmem.Allocator, list[Session]]:
    alloc = make(plain(), backend)
    sessions = []
    for length in (30, 50):
        seq = alloc.sequence()
        write(alloc, seq, IDS[:length])
        sessions.append(Session(IDS[:length], seq))
    save(alloc, path, sessions, identity=ME)
    return alloc, sessions


def test_a_damaged_file_leaves_nothing_open(backend: str, tmp_path: Path, rng: random.Random) -> None:
    path = tmp_path / "cache"
    saved(backend, path)
    good = path.read_bytes()
    target = make(plain(), backend, debug=False)
    edges = [i for i in range(len(good)) if good[i : i + 8] == b"kvmemchk"]
    damaged = [good[:end] for end in (0, *edges[1:], *(rng.randrange(len(good)) for _ in range(60)))]
    damaged += [
        good + good,
        good + b"\0",
        good[: edges[1]] + good[edges[2] :],
        good[: edges[1]] + good[edges[2] :] + good[edges[1] : edges[2]],
    ]
    for _ in range(200):
        data = bytearray(good)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(data))
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(TierError, match="cache: "):
            load(target, path, identity=ME)
        assert target.stats().num_sequences == 0
    path.write_bytes(good)
    assert len(load(target, path, identity=ME)) == 2 and target.check() == []


def test_other_caches_and_bad_arguments(backend: str, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    alloc, sessions = saved(backend, path)
    for spec, identity, words in (
        (plain(), Identity("toy 2", rope="theta 1e4"), "model: was written for 'toy 1'"),
        (plain(), Identity("toy 1", rope="theta 5e5"), "rope: was written for"),
        (plain(), Identity("toy 1", "theta 1e4", 1, 2), "rank: was written for 0"),
        (plain(torch.bfloat16), ME, "spec: was written with another CacheSpec"),
    ):
        with pytest.raises(TierError, match=words):
            load(make(spec, backend), path, identity=identity)
    chunk = export(alloc, sessions[0].sequence, IDS, identity=ME)  # type: ignore[arg-type]
    write_chunk(tmp_path / "chunk", chunk)
    with pytest.raises(TierError, match="holds a chunk, not a cache"):
        load(make(plain(), backend), tmp_path / "chunk", identity=ME)
    with pytest.raises(TierError, match="holds a cache, not a chunk"):
        kvmem.chunks.read_chunk(path, spec=plain(), identity=ME)
    before = path.read_bytes()
    for bad in ([], [3], [Session(IDS[:29], sessions[0].sequence)], [*sessions, Session([1] * 9)]):
        with pytest.raises(SpecError):
            save(alloc, path, bad, identity=ME)  # type: ignore[arg-type]
    assert path.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["cache", "chunk"]
    assert alloc.stats().num_sequences == 2
    with pytest.raises(TierError, match="cannot be opened here: .*max_tokens"):
        load(make(plain(), backend, max_tokens=40), path, identity=ME)
    small = make(plain(), backend, memory=3 * 4096)
    with pytest.raises(OutOfMemory):
        load(small, path, identity=ME)
    assert small.stats().num_sequences == 0 and small.check() == []
    with pytest.raises(TierError, match="cannot read"):
        load(alloc, tmp_path / "absent", identity=ME)


def test_sessions_that_lie_with_right_checksums(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = tmp_path / "cache", chunk_format.json.dumps
    lies: list[dict[str, Any]] = [
        dict(committed=91), dict(committed=-1), dict(committed="9"),
        dict(keys="00"), dict(keys="zz"), dict(keys=None), dict(keys=(b"t" + b"\xff" * 8).hex()), dict(label=5),
    ]  # fmt: skip
    for lie in lies:
        monkeypatch.setattr(
            chunk_format.json,
            "dumps",
            lambda d, lie=lie, **o: real(d | {"extra": d["extra"] | lie} if d.get("kind") == "session" else d, **o),
        )
        alloc, seq = filled(plain(), IDS, backend)
        save(alloc, path, [Session(IDS, seq)], identity=ME)
        monkeypatch.undo()
        target = make(plain(), backend)
        with pytest.raises(TierError, match="cache: "):
            load(target, path, identity=ME)
        assert target.stats().num_sequences == 0 and target.check() == []


# --- another process ---

OTHER_PROCESS = """
import sys
from toy_model import ME, Toy, allocator, generate
from kvmem.chunks import load
alloc = allocator(sys.argv[2])
(session,) = load(alloc, sys.argv[1], identity=ME)
seq = session.sequence
assert seq.num_committed_tokens == len(session.tokens) - 1
print(*generate(Toy(), alloc, seq, session.tokens.tolist(), 12))
"""


@pytest.mark.parametrize("backend", ["paged"])  # the other process has the other one
def test_another_process_goes_on(tmp_path: Path, backend: str) -> None:
    """Computed here, saved with the next token that was sampled; continued there on the other backend."""
    model, draw = Toy(), random.Random(8)
    ids = [draw.randrange(VOCAB) for _ in range(70)]
    alloc = allocator(backend)
    seq = alloc.sequence()
    sampled = int(run(model, alloc, seq, ids)[-1].argmax())
    save(alloc, tmp_path / "cache", [Session([*ids, sampled], seq)], identity=TOY)
    here = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, str(tmp_path / "cache"), OTHER[backend]],
        env={**os.environ, "PYTHONPATH": here}, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [int(i) for i in done.stdout.split()] == generate(model, alloc, seq, [*ids, sampled], 12)
