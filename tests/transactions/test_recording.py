"""What records say of themselves, and that recording them changes no decision."""

from __future__ import annotations

import random

import pytest
from follow_world import SPECS, make, make_leader
from ops_rank import digest
from random_calls import Calls
from support import LONG, Steps

import kvmem
from kvmem.allocator.ops import FIELDS, HEADER, KINDS, PHYSICAL

STEPS = 3_000 if LONG else 500


@pytest.mark.parametrize(
    "options", [{"device": "cpu"}, {"zero": "always"}, {"tail_guard_tokens": 16}, {"policy": "density"}], ids=str
)
@pytest.mark.parametrize("name", sorted(SPECS))
def test_recording_changes_no_decision(name: str, backend: str, options: dict[str, object], seed: int) -> None:
    """The same calls, with memory and sequences running out: equal tables, statistics, free lists, eviction orders."""
    options = {"device": "meta", **options}
    silent = Calls(make(name, backend, **options), random.Random(seed))
    recorded = Calls(make(name, backend, record_ops=True, **options), random.Random(seed))
    records = 0
    loop = Steps(STEPS)
    while step := loop.next(recorded.alloc.stats().evicted_blocks and records > STEPS):
        assert silent.step() == 0
        records += recorded.step()
        assert recorded.ids == silent.ids, step
        assert recorded.alloc.core.digest() == silent.alloc.core.digest(), step
        assert recorded.alloc.stats() == silent.alloc.stats(), step
        if step % 10 == 0:
            assert digest(recorded.alloc) == digest(silent.alloc), step


def test_a_run_of_blocks_is_one_record(backend: str) -> None:
    leader, replica = make_leader("full", backend), make("full", backend)
    sequence = leader.sequence()
    sequence.extend(60)
    sequence.commit(count=60)
    replica.apply(leader.take_ops())
    sequence.free()
    ops = leader.take_ops()
    runs = [op for op in ops if op[0] in ("block", "drop")]
    assert runs == ([("drop", 0, sequence.id, 0, 15, 0)] if backend == "paged" else [])
    assert ops[-1] == ("close", 0, sequence.id, 60, 60, 0)
    replica.apply(ops)
    assert digest(replica) == digest(leader)


def test_runs_that_are_not_there_are_refused() -> None:
    leader, replica = make_leader("full", "paged"), make("full", "paged")
    sequence = leader.sequence()
    sequence.extend(60)
    replica.apply(leader.take_ops())
    before = replica.core.digest()
    handle = sequence.id
    for record, words in [
        (("acquire", 0, handle, 15, 11, 40), "entries from 15, 11 of them; a sequence has 25"),
        (("acquire", 0, handle, 15, 0, 40), "entries from 15, 0"),
        (("acquire", 0, handle, 15, 2**62, 40), "entries from 15"),
        (("acquire", 0, handle, 14, 2, 40), "entry 14 is 16, not 0"),
        (("acquire", 0, handle, 15, 2, 1), "blocks from 1, 2 of them.*max_sequences"),
        (("acquire", 0, handle, 15, 2, 2**62), "blocks from .*max_sequences"),
        (("acquire", 1, handle, 15, 2, 40), "group 1 does not exist"),
        (("drop", 0, handle, 14, 2, 0), "drop: entry 15 is none"),
        (("drop", 0, handle, -1, 2, 0), "entries from -1"),
        (("drop", 0, handle, 0, 15, 0), "would lose tokens of its block 0"),
        (("drop", 0, handle + 1, 0, 1, 0), "not live"),
    ]:
        with pytest.raises(kvmem.SpecError, match=words):
            replica.apply([HEADER, record])
        assert replica.core.digest() == before, record
    with pytest.raises(kvmem.SpecError, match="virtual backend has no block table"):
        make("full", "virtual").apply([HEADER, ("open", 0, 1, 0, 0, 0), ("acquire", 0, 1, 0, 1, 2)])


def test_lists_of_another_version_are_refused(backend: str) -> None:
    leader, replica = make_leader("full", backend), make("full", backend)
    assert leader.take_ops() == []
    first = leader.sequence()
    first.extend(8)
    ops = leader.take_ops()
    assert ops[0] == HEADER == ("version", 0, 2, 0, 0, 0) and [op[0] for op in ops].count("version") == 1
    before = replica.core.digest()
    newer = ("version", 0, 3, 0, 0, 0)
    for damaged, words in [
        ([newer, ("teleport", 0, 0, 0, 0, 0)], "version 3, and this kvmem reads version 2: run the same kvmem"),
        ([*ops, newer], "version 3"),
        ([("version", 0, 2, 0, 0, 7), *ops[1:]], "version 2"),
        (ops[1:], "begin with '.*', not with their version: hand over whole lists"),
    ]:
        with pytest.raises(kvmem.SpecError, match=words):
            replica.apply(damaged)
        assert replica.core.digest() == before
    first.extend(8)
    replica.apply([])
    replica.apply(ops + leader.take_ops())  # two lists, each with its header
    assert digest(replica) == digest(leader)


@pytest.mark.parametrize("kind", ["load", "store"])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_record_of_a_tier_is_refused_where_there_is_none(backend: str, device: str, kind: str) -> None:
    leader, replica = make_leader("full", backend), make("full", backend, device=device)
    leader.sequence().extend(8)
    ops = leader.take_ops()
    (mapped,) = {op[1] for op in ops if op[0] == "map" and op[1] == 0}
    first = next(op[2] for op in ops if op[0] == "map" and op[1] == mapped)
    at, before = first * 4096, replica.core.digest()
    for record, words in [
        ((kind, mapped, at, 5, 768, 0), f"{kind}: no such bytes of host slots: 768 from 5; this allocator has 0"),
        ((kind, mapped, at, -1, 768, 0), f"{kind}: no such bytes of host slots: 768 from -1"),
        ((kind, mapped, 2**40, 5, 768, 0), f"{kind}: .*"),
        ((kind, 9, at, 5, 768, 0), "no such slots: arena 9"),
    ]:
        with pytest.raises(kvmem.SpecError, match=words):
            replica.apply([*ops, record])
        assert replica.core.digest() == before
    replica.apply(ops)


def test_every_kind_says_what_its_numbers_are() -> None:
    assert PHYSICAL == ("create", "destroy", "map", "unmap", "zero", "copy", "load", "store", "fence")
    assert KINDS[: len(PHYSICAL)] == PHYSICAL and len(set(KINDS)) == len(KINDS)
    assert set(KINDS) - set(PHYSICAL) == {
        "version", "open", "close", "bind", "unbind", "length", "commit", "front", "block", "acquire", "drop",
    }  # fmt: skip
    for kind, fields in FIELDS.items():
        assert fields.endswith(".") and "a: " in fields, kind
