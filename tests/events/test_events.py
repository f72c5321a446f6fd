"""Cache events up to their public form: the ring that holds the records, the digests, the stream."""

from __future__ import annotations

import gc
import hashlib
import json
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from event_world import BLOCK, Router, World, spec_of, stream_of
from support import LONG, latent, plain, recurrent, windows

import kvmem
from kvmem import _core
from kvmem.events.digests import block_digests
from kvmem.events.stream import AllBlocksCleared, BlockRemoved, BlockStored, group_kind

pytestmark = pytest.mark.core
ROOT = Path(__file__).resolve().parents[2]
STORED, REMOVED, CLEARED = 0, 1, 2


def block(value: int) -> np.ndarray:
    return np.arange(value * 10, value * 10 + BLOCK, dtype=np.int32)


def nothing() -> list[tuple[object, ...]]:
    raise AssertionError("nothing was lost, so nobody asks what is resident")


def emit(ring: _core.EventRing, count: int, first: int = 0) -> None:
    for i in range(first, first + count):
        ring.stored(i, i - 1, 3, 0, i, block(i))


# ---- The ring --------------------------------------------------------------------------------------------------------


def test_records_come_out_in_order_with_all_their_fields() -> None:
    ring = _core.EventRing(8, BLOCK)
    ring.stored(5, -1, 2, 1, 0, block(1), 1)
    ring.stored(6, 5, 2, 0, 1, block(2))
    ring.removed(5, 1, 1)
    ring.cleared()
    assert len(ring) == 4 and ring.on
    records = ring.drain(-1, nothing)
    assert len(records) == 4 and len(ring) == 0
    assert records.kinds.tolist() == [STORED, STORED, REMOVED, CLEARED]
    assert records.nodes.tolist() == [5, 6, 5, -1]
    assert records.parents.tolist()[:2] == [-1, 5] and records.roots.tolist()[:2] == [2, 2]
    assert records.groups.tolist()[:3] == [1, 0, 1] and records.tiers.tolist()[:3] == [1, 0, 1]
    assert records.ordinals.tolist()[:2] == [0, 1]
    assert records.tokens.tolist() == [block(1).tolist(), block(2).tolist()]


def test_it_is_drained_in_pieces_round_and_round() -> None:
    ring, made, seen = _core.EventRing(5, BLOCK), 0, []
    for _ in range(40):
        emit(ring, 3, made)
        made += 3
        while len(ring) > 1:
            records = ring.drain(2, nothing)
            assert len(records) == 2 and (records.tokens[:, 0] == 10 * records.nodes).all()
            seen += records.nodes.tolist()
    assert seen + ring.drain(-1, nothing).nodes.tolist() == list(range(made))
    assert (ring.serial, ring.lost) == (made, 0)
    assert len(ring.drain(0, nothing)) == 0


def test_full_is_not_lost_but_one_more_is_and_all_that_is_resident_takes_its_place() -> None:
    ring = _core.EventRing(4, BLOCK)
    emit(ring, 4)
    assert ring.lost == 0
    emit(ring, 2, 4)
    assert (ring.lost, ring.serial, len(ring)) == (6, 6, 0)
    resident = [(7, -1, 0, 1, 0, block(7), 1), (8, 7, 0, 0, 1, block(8), 0)]
    records = ring.drain(1, lambda: resident)
    assert records.kinds.tolist() == [CLEARED, STORED, STORED] and records.nodes.tolist() == [-1, 7, 8]
    assert records.tokens.tolist() == [block(7).tolist(), block(8).tolist()]
    assert records.groups.tolist()[1:] == [1, 0] and records.tiers.tolist()[1:] == [1, 0]
    emit(ring, 4)  # it works as new, with all its room
    assert ring.drain(-1, nothing).nodes.tolist() == [0, 1, 2, 3] and ring.lost == 6


def test_a_restart_gives_what_is_resident_in_place_of_what_waits() -> None:
    ring = _core.EventRing(4, BLOCK)
    emit(ring, 2)
    records = ring.drain(0, lambda: [(1, -1, 0, 0, 0, block(1), 0)], restart=True)
    assert records.kinds.tolist() == [CLEARED, STORED] and len(ring) == 0 and ring.lost == 0


def test_a_walk_that_fails_takes_nothing_out() -> None:
    ring = _core.EventRing(4, BLOCK)
    emit(ring, 2)
    with pytest.raises(ZeroDivisionError):
        ring.drain(-1, lambda: [1 // 0], restart=True)
    assert ring.drain(-1, nothing).nodes.tolist() == [0, 1]
    emit(ring, 5)
    with pytest.raises(ZeroDivisionError):
        ring.drain(-1, lambda: [1 // 0])
    assert ring.drain(-1, list).kinds.tolist() == [CLEARED]


def test_capacity_0_is_off() -> None:
    ring = _core.EventRing(0, BLOCK)
    emit(ring, 3)
    ring.removed(1, 0)
    ring.cleared()
    assert not ring.on and (len(ring), ring.serial, ring.lost) == (0, 0, 0)
    assert len(ring.drain(-1, nothing)) == 0 and len(ring.drain(-1, nothing, restart=True)) == 0


def test_bad_sizes_are_refused() -> None:
    for capacity, tokens in ((-1, 4), (4, 0), (2**31, 4)):
        with pytest.raises(kvmem.SpecError):
            _core.EventRing(capacity, tokens)
    ring = _core.EventRing(2, BLOCK)
    with pytest.raises(kvmem.SpecError):
        ring.drain(-2, nothing)
    with pytest.raises(kvmem.SpecError):
        ring.stored(0, -1, 0, 0, 0, np.zeros(BLOCK - 1, np.int32))


def test_views_outlive_the_records_and_cannot_be_written() -> None:
    ring = _core.EventRing(4, BLOCK)
    emit(ring, 3)
    nodes, tokens = (lambda records: (records.nodes, records.tokens))(ring.drain(-1, nothing))
    emit(ring, 3, 7)
    del ring
    gc.collect()
    assert nodes.tolist() == [0, 1, 2] and tokens[2].tolist() == block(2).tolist()
    with pytest.raises(ValueError, match="read-only"):
        nodes[0] = 1


# ---- Digests ---------------------------------------------------------------------------------------------------------


def test_digests_are_what_the_document_says() -> None:
    """Computed here by hand: another program must be able to, and a change would make routers forget."""
    spec, tokens = spec_of(), list(range(2 * BLOCK + 1))
    text = spec.fingerprint.encode()
    root = b"s" + len(text).to_bytes(8, "little") + text
    root += b"s" + (1).to_bytes(8, "little") + b"a" + b"n" + bytes(8)
    before = hashlib.blake2b(root, digest_size=32, key=b"k", person=b"kvmem root").digest()
    expected = []
    for begin in (0, BLOCK):
        ids = b"".join(t.to_bytes(4, "little") for t in tokens[begin : begin + BLOCK])
        before = hashlib.blake2b(before + ids, digest_size=32, key=b"k", person=b"kvmem block").digest()
        expected.append(before)
    assert block_digests(spec, tokens, salt="a", key=b"k") == expected


def test_digests_are_equal_in_another_process() -> None:
    code = (
        "import json, sys; sys.path.insert(0, 'tests/support'); from event_world import spec_of; from kvmem.events.digests import *\n"
        "print(json.dumps([d.hex() for d in block_digests(spec_of(), range(12), salt='s', extra_key=('lora', 1))]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    mine = block_digests(spec_of(), range(12), salt="s", extra_key=("lora", 1))
    assert json.loads(done.stdout) == [d.hex() for d in mine] and len(mine) == 3


def test_digests_differ_by_everything_that_separates_caches() -> None:
    spec, other = plain(BLOCK), latent(BLOCK)
    tokens = list(range(3 * BLOCK))
    same = block_digests(spec, tokens)
    found = [
        *same,
        *block_digests(other, tokens),
        *block_digests(spec, [99, *tokens[1:]]),  # the first block's tokens tell in all that follow
        *block_digests(spec, tokens, key=b"secret"),
        *(d for salt in ("a", b"a", "b", "", b"") for d in block_digests(spec, tokens, salt=salt)),
        *(d for e in ("a", b"a", 1, "1", ("a",), ("a", "b"), (("a",), "b")) for d in block_digests(spec, tokens, extra_key=e)),
        *block_digests(spec, tokens, salt="a", extra_key="b"),
        *block_digests(spec, tokens, salt="ab"),
    ]  # fmt: skip
    assert len(set(found)) == len(found) == 3 * 18
    assert {len(d) for d in found} == {32}
    assert block_digests(spec, [*tokens, 7])[:3] == same and len(block_digests(spec, tokens[:-1])) == 2


def test_what_is_no_salt_and_no_key_is_refused() -> None:
    for salt in (True, 1.5, ["a"], {}):
        with pytest.raises(kvmem.SpecError):
            block_digests(plain(BLOCK), range(BLOCK), salt=salt)  # type: ignore[arg-type]
    for key in ("text", b"x" * 65):
        with pytest.raises(kvmem.SpecError):
            block_digests(plain(BLOCK), range(BLOCK), key=key)  # type: ignore[arg-type]


def test_group_kinds_are_the_routers_words() -> None:
    assert [group_kind(g) for g in windows(BLOCK).groups] == ["full_attention", "sliding_window"]
    assert [group_kind(g) for g in latent(BLOCK).groups] == ["mla_attention"]
    assert "mamba" in [group_kind(g) for g in recurrent(BLOCK).groups]


# ---- The stream ------------------------------------------------------------------------------------------------------


def test_a_chain_is_one_event_and_a_branch_another() -> None:
    ring = _core.EventRing(64, BLOCK)
    stream = stream_of(ring)
    emit(ring, 3)
    ring.stored(9, 0, 3, 0, 1, block(9))  # continues the first block of the chain
    ring.stored(4, -1, 0, 0, 0, block(0))  # the same tokens under another root
    events = stream.poll()
    chain, branch, other = events
    assert isinstance(chain, BlockStored) and isinstance(branch, BlockStored) and isinstance(other, BlockStored)
    tokens = [*block(0).tolist(), *block(1).tolist(), *block(2).tolist()]
    assert chain.block_hashes == tuple(block_digests(spec_of(), tokens, salt="s3", adapter="e3"))
    assert chain.token_ids == tuple(tokens) and chain.parent_block_hash is None and chain.block_size == BLOCK
    assert (chain.medium, chain.group, chain.group_kind, chain.window_tokens) == ("GPU", 0, "full_attention", None)
    assert (chain.adapter, chain.extra_keys, chain.ordinal, branch.ordinal) == ("e3", None, 0, 1)
    assert branch.parent_block_hash == chain.block_hashes[0] and len(branch.block_hashes) == 1
    assert other.parent_block_hash is None and other.block_hashes[0] != chain.block_hashes[0]
    assert stream.poll() == []


def test_chains_of_several_groups_and_tiers_are_joined_though_their_records_alternate() -> None:
    ring = _core.EventRing(64, BLOCK)
    stream = stream_of(ring)
    for i in range(3):
        for group, tier in ((0, 0), (1, 0), (0, 1)):
            ring.stored(i, i - 1, 0, group, i, block(i), tier)
    events = stream.poll()
    assert [(e.group, e.medium, e.ordinal) for e in events] == [(0, "GPU", 0), (1, "GPU", 0), (0, "CPU", 0)]  # type: ignore[union-attr]
    assert len({e.block_hashes for e in events}) == 1 and len(events[0].block_hashes) == 3  # type: ignore[union-attr]
    assert (events[1].group_kind, events[1].window_tokens) == ("sliding_window", 40)  # type: ignore[union-attr]


def test_removed_has_the_hashes_of_stored_also_when_ids_are_used_again() -> None:
    ring = _core.EventRing(64, BLOCK)
    stream = stream_of(ring)
    emit(ring, 2)
    ring.removed(1, 0)
    ring.stored(1, 0, 3, 0, 1, block(5))
    ring.removed(1, 0)
    ring.removed(0, 0)
    stored, removed, again, rest = stream.poll()
    assert isinstance(stored, BlockStored) and isinstance(again, BlockStored)
    assert removed == BlockRemoved(stored.block_hashes[1:], "GPU", 0)
    assert again.parent_block_hash == stored.block_hashes[0] and again.block_hashes != stored.block_hashes[1:]
    assert rest == BlockRemoved((again.block_hashes[0], stored.block_hashes[0]), "GPU", 0)


def test_a_block_nobody_holds_names_what_continues_it() -> None:
    ring = _core.EventRing(64, BLOCK)
    stream = stream_of(ring)
    ring.stored(0, -1, 3, -1, 0, block(0))
    ring.stored(1, 0, 3, 1, 1, block(1))
    (event,) = stream.poll()
    digests = block_digests(spec_of(), [*block(0).tolist(), *block(1).tolist()], salt="s3", adapter="e3")
    assert isinstance(event, BlockStored) and event.ordinal == 1
    assert (event.parent_block_hash, event.block_hashes) == (digests[0], (digests[1],))


def test_poll_gives_no_more_than_asked_and_no_event_twice() -> None:
    ring = _core.EventRing(64, BLOCK)
    stream = stream_of(ring)
    for i in range(5):
        ring.stored(i, -1, 0, 0, 0, block(i))
    assert stream.poll(0) == []
    first = stream.poll(2)
    ring.cleared()
    assert len(first) == 2 and len(stream.poll(2)) == 2
    assert isinstance(stream.poll(1)[0], BlockStored) and stream.poll() == [AllBlocksCleared()] and stream.poll(3) == []
    for bad in (-1, True):
        with pytest.raises(kvmem.SpecError):
            stream.poll(bad)


def test_a_restart_forgets_what_was_waiting() -> None:
    ring = _core.EventRing(64, BLOCK)
    stream = stream_of(ring)
    for i in range(5):
        ring.stored(i, -1, 0, 0, 0, block(i))
    assert len(stream.poll(2)) == 2
    assert stream.poll(1, restart=True) == [AllBlocksCleared()] and stream.poll() == []


def test_a_record_that_cannot_be_is_an_error_not_a_wrong_hash() -> None:
    for node in (0, 700):
        ring = _core.EventRing(8, BLOCK)
        stream = stream_of(ring)
        ring.removed(node, 0)
        with pytest.raises(kvmem.KVMemError, match="never stored"):
            stream.poll()


def test_a_router_that_follows_knows_what_is_there(seed: int) -> None:
    """Random insertions, removals, clearings, losses and restarts, against a plain model of the index."""
    total_lost = 0
    for round_ in range(60 if LONG else 6):
        rng = np.random.default_rng([seed, round_])
        world = World(rng, capacity=(7, 40, 5000)[round_ % 3])
        stream, router = world.stream(), Router()
        for _ in range(400):
            world.step()
            chance = rng.random()
            if chance < 0.04:
                router.follow(stream.poll(None, restart=bool(rng.random() < 0.2)))
                assert router.held == world.held(), "after a poll for everything"
            elif chance < 0.1:
                router.follow(stream.poll(int(rng.integers(0, 4))))
        router.follow(stream.poll())
        assert router.held == world.held()
        total_lost += world.ring.lost
    assert total_lost > 0, "the small rings never ran over: this proves less than it says"


def test_several_threads_may_poll_one_stream() -> None:
    ring = _core.EventRing(100_000, BLOCK)
    stream = stream_of(ring)
    count, found = 6000, [[] for _ in range(3)]  # type: ignore[var-annotated]
    done = threading.Event()

    def poll(mine: list[object]) -> None:
        while not done.is_set() or len(ring):
            mine += stream.poll(5)
        mine += stream.poll()

    threads = [threading.Thread(target=poll, args=(mine,)) for mine in found]
    for thread in threads:
        thread.start()
    for i in range(count):
        ring.stored(i % 50, -1, 0, 0, 0, np.full(BLOCK, i, np.int32))
        ring.removed(i % 50, 0)
    done.set()
    for thread in threads:
        thread.join()
    stored = [h for mine in found for e in mine if isinstance(e, BlockStored) for h in e.block_hashes]
    removed = [h for mine in found for e in mine if isinstance(e, BlockRemoved) for h in e.block_hashes]
    expected = {block_digests(spec_of(), [i] * BLOCK, salt="s0", adapter="e0")[0] for i in range(count)}
    assert len(stored) == len(removed) == count and set(stored) == set(removed) == expected


def test_the_stream_keeps_32_bytes_a_block_and_no_object() -> None:
    ring = _core.EventRing(20_000, BLOCK)
    stream = stream_of(ring)
    tracemalloc.start()
    emit(ring, 10_000)
    stream.poll()
    gc.collect()
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert 320_000 <= kept < 400_000, "a bytes object of its own for each block would be 650,000 more"
