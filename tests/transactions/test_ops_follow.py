"""What a replica believes: true lists of every kind of program, and damaged ones that must not cost a live token."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from follow_world import SPECS, Following, all_held, make, make_leader, slots_of, write_all
from ops_rank import digest
from prefix_walk import author, step
from support import LONG
from support_world import PAGE
from test_ops import spoilt

import kvmem
from kvmem.allocator.ops import HEADER

STEPS = 160 if LONG else 40
DAMAGED = 500 if LONG else 120


@pytest.mark.parametrize("zero", ["fresh", "always", "never"])
@pytest.mark.parametrize("name", sorted(SPECS))
def test_a_true_list_is_followed_with_every_byte(name: str, backend: str, zero: str, rng: random.Random) -> None:
    """With and without a cache that the replica knows nothing of, in lists of one call and of several."""
    for shares, several in ((True, 0.0), (False, 0.7), (True, 0.7)):
        pair = Following(name, backend, zero=zero, shares=shares)
        writer = author(pair, rng)
        for _ in range(STEPS):
            step(pair, rng, writer, without=("memory",))
            if rng.random() < several:
                continue
            pair.agree()
            pair.contents_agree()
            assert pair.memory.check() == []
            assert digest(pair.memory) == digest(pair.alloc)
            assert counts(pair.memory) == counts(pair.alloc)
        pair.hand_over()
        decides_by_itself(pair.memory, rng)


def counts(alloc: kvmem.Allocator) -> dict[str, int]:
    """What is counted of live sequences; what else is mapped depends on what is cached, of which a replica knows nothing."""
    stats = alloc.stats()
    return {name: getattr(stats, name) for name in ("mapped_bytes", "used_bytes", "shared_bytes", "num_sequences")}


def decides_by_itself(replica: kvmem.Allocator, rng: random.Random) -> None:
    """The leader is gone: new sequences take all the memory there is, and write to it; nobody else's tokens change."""
    before = all_held(replica)
    new: list[kvmem.Sequence] = []
    try:
        for _ in range(30):
            if not new or rng.random() < 0.4:
                new.append(replica.sequence())
            new[-1].extend(min(rng.randint(1, 30), replica.max_tokens - new[-1].num_tokens))
    except kvmem.OutOfMemory:
        pass
    for sequence in new:
        write_all(replica, sequence.id, 2**40)
    held = all_held(replica)
    assert {place: held[place] for place in before} == before
    assert replica.check() == []


def altered(rng: random.Random, ops: list[list[Any]]) -> list[list[Any]]:
    """A list with one number changed into another that could stand there."""
    ops = [list(op) for op in ops]
    at, field = rng.randrange(len(ops)), rng.randrange(2, 6)
    like = [op[field] for op in ops if op[0] == ops[at][0]]
    step = rng.choice([1, 4, PAGE, 4 * 192, 4 * 512, 4 * 128, 192, 1 << rng.randrange(20)])
    ops[at][field] = rng.choice([rng.choice(like), ops[at][field] + step, max(0, ops[at][field] - step)])
    return ops


class Damaging(Following):
    """Each list is tried with damages first: refused, and nothing has changed; or every token that is live before and after
    holds what it held."""

    rng: random.Random
    refused = accepted = 0

    def deliver(self, ops: list[list[Any]]) -> None:
        for _ in range(6):
            damaged = spoilt(self.rng, ops)[1] if self.rng.random() < 0.5 else altered(self.rng, ops)
            if damaged != ops:
                self.try_damaged(ops, damaged)
        super().deliver(ops)

    def try_damaged(self, ops: list[list[Any]], damaged: list[list[Any]]) -> None:
        before, seen = all_held(self.memory), digest(self.memory)
        try:
            self.memory.apply(damaged)
        except kvmem.SpecError:
            self.refused += 1
            assert digest(self.memory) == seen and all_held(self.memory) == before, damaged
            return
        self.accepted += 1
        assert self.memory.check() == [], (ops, damaged)
        now = all_held(self.memory)
        for key in before.keys() & now.keys():
            least = len_after(damaged, key)
            for position in before[key].keys() & now[key].keys():
                if position < least:
                    assert before[key][position] == now[key][position], (key, position, ops, damaged)
        self.start_replica_again()


@pytest.mark.parametrize("zero", ["fresh", "always"])
@pytest.mark.parametrize("name", sorted(SPECS))
def test_a_damaged_list_costs_no_live_token(name: str, backend: str, zero: str, rng: random.Random) -> None:
    pair = Damaging(name, backend, zero=zero)
    pair.rng, writer = rng, author(pair, rng)
    while pair.refused + pair.accepted < DAMAGED:  # many steps decide nothing, and a list may be one record
        step(pair, rng, writer, without=("memory",))
        pair.hand_over()
        pair.contents_agree()
    print(pair.refused, "refused,", pair.accepted, "accepted")
    assert pair.refused > DAMAGED / 2 and pair.accepted > 0


def len_after(ops: list[list[Any]], key: tuple[int, int]) -> int:
    """The fewest tokens that a list leaves the sequence and group in between."""
    return min((op[3] for op in ops if op[0] == "length" and (op[2], op[1]) == key), default=2**31)


def two_sequences(backend: str) -> tuple[kvmem.Allocator, list[list[Any]], int]:
    """A replica with a sequence of 8 written tokens, and the leader's next list, which begins another one."""
    leader, replica = make_leader("full", backend, zero="always"), make("full", backend, zero="always")
    first = leader.sequence()
    first.extend(8)
    first.commit(count=8)
    replica.apply(leader.take_ops())
    write_all(replica, first.id)
    second = leader.sequence()
    second.extend(60)
    return replica, [list(op) for op in leader.take_ops()], first.id


@pytest.mark.parametrize("kind", ["zero", "copy"])
def test_a_write_to_tokens_of_somebody_is_refused_wherever_it_begins(backend: str, kind: str) -> None:
    replica, ops, handle = two_sequences(backend)
    before = all_held(replica)
    slots = slots_of(replica.batch([handle]).block_table[0], torch.arange(8), 4)
    for arena in (0, 1):
        for offset in sorted({int(slot) * 192 for slot in slots} | {int(slots[0]) * 192 // PAGE * PAGE}):
            for count in (192, 768, PAGE):
                if all(int(slot) * 192 >= offset + count for slot in slots):
                    continue  # the trash blocks, which lie before them in their page
                record = ["zero", arena, offset, count, 0, 0]
                if kind == "copy":
                    record = ["copy", arena, offset, offset + 4 * 768, min(count, 768), 0]
                for at in (1, len(ops)):  # behind the header
                    with pytest.raises(kvmem.SpecError):
                        replica.apply([*ops[:at], record, *ops[at:]])
    assert all_held(replica) == before and replica.check() == []
    replica.apply(ops)
    assert all_held(replica).keys() > before.keys()


def test_numbers_without_sense_are_refused_before_memory_is_taken(backend: str) -> None:
    replica, ops, handle = two_sequences(backend)
    seen = digest(replica)
    numbers = [-(2**63), -1, 60, 10**6, 10**8, 2**31 - 2, 2**31, 2**32 + 1, 2**62, 2**63 - 1]
    like = {op[0]: op for op in ops} | {
        "create": ["create", 0, 0, 1, 0, 0], "destroy": ["destroy", 0, 0, 1, 0, 0], "copy": ["copy", 0, 0, 768, 768, 0],
        "close": ["close", 0, handle, 0, 0, 0], "length": ["length", 0, handle, 9, 8, 0],
        "commit": ["commit", 0, handle, 7, 8, 0], "front": ["front", 0, handle, 4, 0, 0],
        "block": ["block", 0, handle, 2, 5, 0], "bind": ["bind", 0, handle, 9, 0, 0],
        "unbind": ["unbind", 0, handle, 1, 0, 0], "acquire": ["acquire", 0, handle, 2, 1, 5],
        "drop": ["drop", 0, handle, 1, 1, 0], "load": ["load", 0, 0, 0, 768, 0], "store": ["store", 0, 0, 0, 768, 0],
        "unmap": ["unmap", 0, 0, 0, 1, 0], "fence": ["fence", 0, 77, 0, 0, 0],
    }  # fmt: skip
    books = resident_bytes()
    for kind, op in like.items():
        for field in range(1, 6 if kind == "acquire" else 4 if kind == "unmap" else 5):
            for number in numbers:
                damaged = list(op)
                damaged[field] = number
                try:
                    replica.apply([HEADER, damaged])
                except kvmem.SpecError:
                    assert digest(replica) == seen, damaged
                    continue
                # A number that the kind does not use, or pages that the budget has room for.
                assert replica.check() == [], damaged
                replica = two_sequences(backend)[0]
    assert resident_bytes() - books < 64 << 20


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("name", sorted(SPECS))
def test_no_page_of_a_live_sequence_can_be_unmapped_by_itself(name: str, backend: str) -> None:
    """Named by its slot alone, by a record of one page or of several; the trash blocks' pages neither."""
    leader, replica = make_leader(name, backend), make(name, backend)
    seq = leader.sequence()
    seq.extend(60)
    leader.batch([seq], pad_to=2)  # takes the trash blocks
    ops = [list(op) for op in leader.take_ops()]
    replica.apply(ops)
    write_all(replica, seq.id)
    before, tried = all_held(replica), 0
    for kind, arena, slot, page, count, _ in ops:
        if kind != "map":
            continue
        for first in range(count):
            for n in {1, count - first}:
                tried += 1
                with pytest.raises(kvmem.SpecError):
                    replica.apply([HEADER, ["unmap", arena, slot + first, page + first, n, 0]])
    assert tried > 5 and all_held(replica) == before and replica.check() == []


def test_a_replica_without_a_prefix_cache_has_the_rows_of_its_leader() -> None:
    leader = make_leader("full", "virtual", max_sequences=2)
    replica = make("full", "virtual", max_sequences=2, prefix_cache=False)
    assert replica.cached_rows == leader.cached_rows
    for i in range(12):
        with leader.sequence([i] * 20) as seq:
            seq.extend(20)
            seq.commit([i] * 20)
        replica.apply(leader.take_ops())
    fewer = make("full", "virtual", max_sequences=2, cached_rows=3)
    with pytest.raises(kvmem.SpecError, match="row.*cached_rows"):
        fewer.apply([HEADER, ["open", 0, 1, 0, 0, 0], ["bind", 0, 1, 12, 0, 0]])
    with pytest.raises(kvmem.SpecError, match="block 4000.*max_sequences, max_tokens and memory"):
        make("full", "paged").apply([HEADER, ["open", 0, 1, 0, 0, 0], ["block", 0, 1, 0, 4000, 0]])
    with pytest.raises(kvmem.SpecError, match="handle 9.*max_sequences"):
        fewer.apply([HEADER, ["open", 0, 9, 0, 0, 0]])
    with pytest.raises(kvmem.SpecError, match="arena 7.*interleave"):
        fewer.apply([HEADER, ["map", 7, 0, 0, 1, 0]])


def test_a_step_of_a_replica_zeroes_nothing_that_its_leader_has_cached(backend: str) -> None:
    """What a sequence cut off is zeroed where kernels load it; not in a block that was whole: it may be found again."""
    guard = {"tail_guard_tokens": 16}
    leader, replica = make_leader("full", backend, **guard), make("full", backend, prefix_cache=False, **guard)
    ids = list(range(1, 10))
    sequence = leader.sequence(ids)
    sequence.extend(9)
    sequence.commit(ids)
    replica.apply(leader.take_ops())
    write_all(replica, sequence.id)
    written = all_held(replica)[sequence.id, 0]
    other = sequence.fork()
    sequence.truncate(2)
    other.free()  # what is cut off is cached, and nobody's but for the first two tokens
    replica.apply(leader.take_ops())
    replica.batch([sequence.id])
    found = leader.sequence(ids)
    replica.apply(leader.take_ops())
    assert found.num_cached_tokens == 8
    assert all_held(replica)[found.id, 0] == {i: written[i] for i in range(8)}


def test_a_replica_pads_once_its_leader_has(backend: str) -> None:
    """Blocks 0 and 1 lie on pages that the leader has to know of: else it gives one of them to a sequence."""
    leader, replica = make_leader("full", backend), make("full", backend)
    first = leader.sequence()
    first.extend(8)
    replica.apply(leader.take_ops())
    before = replica.core.digest()
    if backend == "virtual":  # paged, the first page has both of them and the first sequence's blocks
        with pytest.raises(kvmem.SpecError, match="pad a batch there once"):
            replica.batch([first.id], pad_to=4)
        assert replica.core.digest() == before
    leader.batch([first.id], pad_to=2)
    second = leader.sequence()
    second.extend(40)
    ops = [list(op) for op in leader.take_ops()]
    trash = next(op for op in ops if op[0] == "map")
    for at, op in enumerate(ops):  # the new sequence would be shown a trash page
        if op[0] != "map" or op is trash:
            continue
        with pytest.raises(kvmem.SpecError):
            replica.apply([*ops[:at], [*op[:3], trash[3], 1, 0], *ops[at + 1 :]])
    assert replica.core.digest() == before
    replica.apply(ops)
    batch = replica.batch([first.id, second.id], pad_to=4)
    assert batch.seq_lens.tolist()[:2] == [8, 40] and digest(replica) == digest(leader)
    alone = replica.sequence()
    alone.extend(8)
    assert replica.batch([alone.id], pad_to=3) and replica.check() == []


def test_one_that_followed_and_goes_on_alone_pads_by_itself(backend: str) -> None:
    leader, replica = make_leader("full", backend), make("full", backend)
    first = leader.sequence()
    first.extend(8)
    replica.apply(leader.take_ops())
    own = replica.sequence()
    own.extend(8)
    replica.batch(replica.core.handles(), pad_to=4)
    assert replica.check() == []


def test_one_that_followed_and_steps_alone_pads_nothing(backend: str) -> None:
    leader, replica = make_leader("full", backend), make("full", backend)
    first = leader.sequence()
    first.extend(8)
    replica.apply(leader.take_ops())
    followed = kvmem.Sequence(replica, first.id)
    followed.step(40)
    assert (followed.num_committed_tokens, followed.num_tokens) == (8, 48)
    assert replica.check() == []


def test_a_replica_that_goes_on_alone_waits_for_who_used_the_memory(backend: str) -> None:
    """What a followed list has freed may be read by the device still: it is unmapped behind the list's fence."""
    leader, replica = make_leader("full", backend), make("full", backend, record_ops=True, prefix_cache=False)
    sequence = leader.sequence()
    sequence.extend(60)
    sequence.free()
    ops = leader.take_ops()
    (fence,) = (op[2] for op in ops if op[0] == "fence")
    replica.apply(ops)
    replica.take_ops()
    replica.trim()
    waits = {op[5] for op in replica.take_ops() if op[0] == "unmap"}
    assert waits == {fence}


def test_a_copy_before_a_write_cannot_be_lost_or_read_elsewhere(backend: str) -> None:
    leader, replica = make_leader("full", backend), make("full", backend)
    parent = leader.sequence()
    parent.extend(60)
    parent.commit(count=60)
    child = parent.fork()
    child.truncate(30)
    replica.apply(leader.take_ops())
    write_all(replica, parent.id)
    child.extend(3)
    ops, before = [list(op) for op in leader.take_ops()], all_held(replica)
    copies = [at for at, op in enumerate(ops) if op[0] == "copy"]
    assert copies
    for at in copies:
        for field, by in [(2, 4 * 768), (3, 4 * 768), (3, PAGE), (4, -192), (4, -4)]:
            damaged = [list(op) for op in ops]
            damaged[at][field] += by
            with pytest.raises(kvmem.SpecError):
                replica.apply(damaged)
        with pytest.raises(kvmem.SpecError):
            replica.apply([*ops[:at], *ops[at + 1 :]])
    assert all_held(replica) == before and replica.check() == []
    replica.apply(ops)
    held = all_held(replica)[child.id, 0]
    assert [held[i] for i in range(30)] == [before[parent.id, 0][i] for i in range(30)]
