"""What a replica believes: true lists of every kind of program, and damaged ones that must not cost a live token."""

from __future__ import annotations

import random
from typing import Any

import pytest
from follow_world import SPECS, Leader, Replica, tag_of
from ops_rank import digest
from support_world import BACKENDS, LONG, PAGE
from test_ops import spoilt

import kvmem

STEPS = 160 if LONG else 40
DAMAGED = 500 if LONG else 120


def run_model(replica: Replica, leader: Leader) -> None:
    """What was written before is there, also what came from the cache; then the model writes what is new."""
    for handle, sequence in leader.sequences.items():
        ids, written = leader.ids[handle], leader.written[handle]
        for g, group in enumerate(replica.spec.groups):
            held = replica.held(handle, g)
            if group.growth == "fixed":
                if held and leader.state_at[handle]:
                    assert set(held[0]) == {tag_of(ids[: leader.state_at[handle]])}, handle
                continue
            for position in range(min(held, default=0), written):
                assert set(held[position]) == {tag_of(ids[: position + 1])}, (handle, g, position)
        replica.write(handle, ids, written)
        leader.written[handle], leader.state_at[handle] = len(ids), sequence.num_committed_tokens


@pytest.mark.parametrize("zero", ["fresh", "always", "never"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(SPECS))
def test_a_true_list_is_followed_with_every_byte(name: str, backend: str, zero: str, seed: int) -> None:
    """With and without a cache that the replica knows nothing of, in lists of one call and of several. Of several with such
    a cache, who wrote what was found may be gone before the model has run: no bytes to compare.
    """
    rng = random.Random(seed)
    for shares, several in ((True, 0.0), (False, 0.7), (True, 0.7)):
        if several and name != "full":
            break  # a state has to be written at each commit
        leader = Leader(name, backend, zero=zero, prefix_cache=shares or name != "full")
        replica = Replica(name, backend, zero=zero)
        pending: list[Any] = []
        for _ in range(STEPS):
            pending += leader.step(rng)
            if rng.random() < several:
                continue
            replica.alloc.apply(pending)
            pending = []
            assert replica.alloc.check() == []
            assert digest(replica.alloc) == digest(leader.alloc)
            assert counts(replica.alloc) == counts(leader.alloc)
            if not (shares and several):
                run_model(replica, leader)
        replica.alloc.apply(pending)
        decides_by_itself(replica, rng)


def counts(alloc: kvmem.Allocator) -> dict[str, int]:
    """What is counted of live sequences; what else is mapped depends on what is cached, of which a replica knows nothing."""
    stats = alloc.stats()
    return {name: getattr(stats, name) for name in ("mapped_bytes", "used_bytes", "shared_bytes", "num_sequences")}


def decides_by_itself(replica: Replica, rng: random.Random) -> None:
    """The leader is gone: new sequences take all the memory there is, and write to it; nobody else's tokens change."""
    before = replica.all_held()
    new: list[kvmem.Sequence] = []
    try:
        for _ in range(30):
            if not new or rng.random() < 0.4:
                new.append(replica.alloc.sequence())
            new[-1].extend(min(rng.randint(1, 30), replica.alloc.max_tokens - new[-1].num_tokens))
    except kvmem.OutOfMemory:
        pass
    for sequence in new:
        replica.write(sequence.id, [-1] * sequence.num_tokens, 0)
    held = replica.all_held()
    assert {place: held[place] for place in before} == before
    assert replica.alloc.check() == []


def altered(rng: random.Random, ops: list[list[Any]]) -> list[list[Any]]:
    """A list with one number changed into another that could stand there."""
    ops = [list(op) for op in ops]
    at, field = rng.randrange(len(ops)), rng.randrange(2, 6)
    like = [op[field] for op in ops if op[0] == ops[at][0]]
    step = rng.choice([1, 4, PAGE, 4 * 192, 4 * 512, 4 * 128, 192, 1 << rng.randrange(20)])
    ops[at][field] = rng.choice([rng.choice(like), ops[at][field] + step, max(0, ops[at][field] - step)])
    return ops


@pytest.mark.parametrize("zero", ["fresh", "always"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(SPECS))
def test_a_damaged_list_costs_no_live_token(name: str, backend: str, zero: str, seed: int) -> None:
    """Refused, and nothing has changed; or every token that is live before and after holds what it held."""
    rng = random.Random(seed)
    leader, lists = Leader(name, backend, zero=zero), []
    replica = Replica(name, backend, zero=zero)
    refused = accepted = 0
    while refused + accepted < DAMAGED:  # many steps decide nothing, and a list may be one record
        ops = leader.step(rng)
        for _ in range(6 if ops else 0):
            damaged = spoilt(rng, ops)[1] if rng.random() < 0.5 else altered(rng, ops)
            if damaged == ops:
                continue
            before, seen = replica.all_held(), digest(replica.alloc)
            try:
                replica.alloc.apply(damaged)
            except kvmem.SpecError:
                refused += 1
                assert digest(replica.alloc) == seen and replica.all_held() == before, damaged
                continue
            accepted += 1
            assert replica.alloc.check() == [], (ops, damaged)
            now = replica.all_held()
            for key in before.keys() & now.keys():
                least = len_after(damaged, key)
                for position in before[key].keys() & now[key].keys():
                    if position < least:
                        assert before[key][position] == now[key][position], (key, position, ops, damaged)
            replica = replayed(name, backend, zero, lists)
        replica.alloc.apply(ops)
        lists.append((ops, {handle: (list(ids), leader.written[handle]) for handle, ids in leader.ids.items()}))
        run_model(replica, leader)
    print(refused, "refused,", accepted, "accepted")
    assert refused > DAMAGED / 2 and accepted > 0


def len_after(ops: list[list[Any]], key: tuple[int, int]) -> int:
    """The fewest tokens that a list leaves the sequence and group in between."""
    return min((op[3] for op in ops if op[0] == "length" and (op[2], op[1]) == key), default=2**31)


def replayed(name: str, backend: str, zero: str, lists: list[Any]) -> Replica:
    replica = Replica(name, backend, zero=zero)
    for ops, ids in lists:
        replica.alloc.apply(ops)
        for handle, (known, written) in ids.items():
            replica.write(handle, known, written)
    return replica


def two_sequences(backend: str) -> tuple[Leader, Replica, list[list[Any]], int]:
    """A replica with a sequence of 8 written tokens, and the leader's next list, which begins another one."""
    leader, replica = Leader("full", backend, zero="always"), Replica("full", backend, zero="always")
    first = leader.alloc.sequence()
    first.extend(8)
    first.commit(count=8)
    replica.alloc.apply(leader.alloc.take_ops())
    replica.write(first.id, list(range(8)), 0)
    second = leader.alloc.sequence()
    second.extend(60)
    return leader, replica, [list(op) for op in leader.alloc.take_ops()], first.id


@pytest.mark.parametrize("kind", ["zero", "copy"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_write_to_tokens_of_somebody_is_refused_wherever_it_begins(backend: str, kind: str) -> None:
    _, replica, ops, handle = two_sequences(backend)
    before = replica.all_held()
    for tensor, slots in replica.places(handle, 0, 0, 8)[::2]:
        arena = 0 if tensor is replica.places(handle, 0, 0, 8)[0][0] else 1
        for offset in sorted({int(slot) * 192 for slot in slots} | {int(slots[0]) * 192 // PAGE * PAGE}):
            for count in (192, 768, PAGE):
                if all(int(slot) * 192 >= offset + count for slot in slots):
                    continue  # the trash blocks, which lie before them in their page
                record = ["zero", arena, offset, count, 0, 0]
                if kind == "copy":
                    record = ["copy", arena, offset, offset + 4 * 768, min(count, 768), 0]
                for at in (0, len(ops)):
                    with pytest.raises(kvmem.SpecError):
                        replica.alloc.apply([*ops[:at], record, *ops[at:]])
    assert replica.all_held() == before and replica.alloc.check() == []
    replica.alloc.apply(ops)
    assert replica.all_held().keys() > before.keys()


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_without_sense_are_refused_before_memory_is_taken(backend: str) -> None:
    _, replica, ops, handle = two_sequences(backend)
    seen = digest(replica.alloc)
    numbers = [-(2**63), -1, 60, 10**6, 10**8, 2**31 - 2, 2**31, 2**32 + 1, 2**62, 2**63 - 1]
    like = {op[0]: op for op in ops} | {
        "create": ["create", 0, 0, 1, 0, 0], "destroy": ["destroy", 0, 0, 1, 0, 0], "copy": ["copy", 0, 0, 768, 768, 0],
        "close": ["close", 0, handle, 0, 0, 0], "length": ["length", 0, handle, 9, 8, 0],
        "commit": ["commit", 0, handle, 7, 8, 0], "front": ["front", 0, handle, 4, 0, 0],
        "block": ["block", 0, handle, 2, 5, 0], "bind": ["bind", 0, handle, 9, 0, 0],
        "unbind": ["unbind", 0, handle, 1, 0, 0], "unmap": ["unmap", 0, 0, 0, 1, 0], "fence": ["fence", 0, 77, 0, 0, 0],
    }  # fmt: skip
    books = resident_bytes()
    for kind, op in like.items():
        for field in range(1, 5 if kind != "unmap" else 4):
            for number in numbers:
                damaged = list(op)
                damaged[field] = number
                try:
                    replica.alloc.apply([damaged])
                except kvmem.SpecError:
                    assert digest(replica.alloc) == seen, damaged
                    continue
                # A number that the kind does not use, or pages that the budget has room for.
                assert replica.alloc.check() == [], damaged
                replica, seen = two_sequences(backend)[1], seen
    assert resident_bytes() - books < 64 << 20


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("name", sorted(SPECS))
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_page_of_a_live_sequence_can_be_unmapped_by_itself(name: str, backend: str) -> None:
    """Named by its slot alone, by a record of one page or of several; the trash blocks' pages neither."""
    leader, replica = Leader(name, backend), Replica(name, backend)
    seq = leader.alloc.sequence()
    seq.extend(60)
    leader.alloc.batch([seq], pad_to=2)  # takes the trash blocks
    ops = [list(op) for op in leader.alloc.take_ops()]
    replica.alloc.apply(ops)
    replica.write(seq.id, list(range(60)), 0)
    before, tried = replica.all_held(), 0
    for kind, arena, slot, page, count, _ in ops:
        if kind != "map":
            continue
        for first in range(count):
            for n in {1, count - first}:
                tried += 1
                with pytest.raises(kvmem.SpecError):
                    replica.alloc.apply([["unmap", arena, slot + first, page + first, n, 0]])
    assert tried > 5 and replica.all_held() == before and replica.alloc.check() == []


def test_a_replica_without_a_prefix_cache_has_the_rows_of_its_leader() -> None:
    leader = Leader("full", "virtual", max_sequences=2)
    replica = Replica("full", "virtual", max_sequences=2, prefix_cache=False)
    assert replica.alloc.cached_rows == leader.alloc.cached_rows
    for i in range(12):
        with leader.alloc.sequence([i] * 20) as seq:
            seq.extend(20)
            seq.commit([i] * 20)
        replica.alloc.apply(leader.alloc.take_ops())
    fewer = Replica("full", "virtual", max_sequences=2, cached_rows=3)
    with pytest.raises(kvmem.SpecError, match="row.*cached_rows"):
        fewer.alloc.apply([["open", 0, 1, 0, 0, 0], ["bind", 0, 1, 12, 0, 0]])
    with pytest.raises(kvmem.SpecError, match="block 4000.*max_sequences, max_tokens and memory"):
        Replica("full", "paged").alloc.apply([["open", 0, 1, 0, 0, 0], ["block", 0, 1, 0, 4000, 0]])
    with pytest.raises(kvmem.SpecError, match="handle 9.*max_sequences"):
        fewer.alloc.apply([["open", 0, 9, 0, 0, 0]])
    with pytest.raises(kvmem.SpecError, match="arena 7.*interleave"):
        fewer.alloc.apply([["map", 7, 0, 0, 1, 0]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_of_a_replica_zeroes_nothing_that_its_leader_has_cached(backend: str) -> None:
    """What a sequence cut off is zeroed where kernels load it; not in a block that was whole: it may be found again."""
    guard = {"tail_guard_tokens": 16}
    leader, replica = Leader("full", backend, **guard), Replica("full", backend, prefix_cache=False, **guard)
    ids = list(range(1, 10))
    sequence = leader.alloc.sequence(ids)
    sequence.extend(9)
    sequence.commit(ids)
    replica.alloc.apply(leader.alloc.take_ops())
    replica.write(sequence.id, ids, 0)
    other = sequence.fork()
    sequence.truncate(2)
    other.free()  # what is cut off is cached, and nobody's but for the first two tokens
    replica.alloc.apply(leader.alloc.take_ops())
    replica.alloc.batch([sequence.id])
    found = leader.alloc.sequence(ids)
    replica.alloc.apply(leader.alloc.take_ops())
    held = replica.held(found.id, 0)
    assert found.num_cached_tokens == 8
    assert [set(held[i]) for i in range(8)] == [{tag_of(ids[: i + 1])} for i in range(8)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_replica_pads_once_its_leader_has(backend: str) -> None:
    """Blocks 0 and 1 lie on pages that the leader has to know of: else it gives one of them to a sequence."""
    leader, replica = Leader("full", backend), Replica("full", backend)
    first = leader.alloc.sequence()
    first.extend(8)
    replica.alloc.apply(leader.alloc.take_ops())
    before = replica.alloc.core.digest()
    if backend == "virtual":  # paged, the first page has both of them and the first sequence's blocks
        with pytest.raises(kvmem.SpecError, match="pad a batch there once"):
            replica.alloc.batch([first.id], pad_to=4)
        assert replica.alloc.core.digest() == before
    leader.alloc.batch([first.id], pad_to=2)
    second = leader.alloc.sequence()
    second.extend(40)
    ops = [list(op) for op in leader.alloc.take_ops()]
    trash = next(op for op in ops if op[0] == "map")
    for at, op in enumerate(ops):  # the new sequence would be shown a trash page
        if op[0] != "map" or op is trash:
            continue
        with pytest.raises(kvmem.SpecError):
            replica.alloc.apply([*ops[:at], [*op[:3], trash[3], 1, 0], *ops[at + 1 :]])
    assert replica.alloc.core.digest() == before
    replica.alloc.apply(ops)
    batch = replica.alloc.batch([first.id, second.id], pad_to=4)
    assert batch.seq_lens.tolist()[:2] == [8, 40] and digest(replica.alloc) == digest(leader.alloc)
    alone = replica.alloc.sequence()
    alone.extend(8)
    assert replica.alloc.batch([alone.id], pad_to=3) and replica.alloc.check() == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_that_followed_and_goes_on_alone_pads_by_itself(backend: str) -> None:
    leader, replica = Leader("full", backend), Replica("full", backend)
    first = leader.alloc.sequence()
    first.extend(8)
    replica.alloc.apply(leader.alloc.take_ops())
    own = replica.alloc.sequence()
    own.extend(8)
    replica.alloc.batch(replica.alloc.core.handles(), pad_to=4)
    assert replica.alloc.check() == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_that_followed_and_steps_alone_pads_nothing(backend: str) -> None:
    leader, replica = Leader("full", backend), Replica("full", backend)
    first = leader.alloc.sequence()
    first.extend(8)
    replica.alloc.apply(leader.alloc.take_ops())
    followed = kvmem.Sequence(replica.alloc, first.id)
    followed.step(40)
    assert (followed.num_committed_tokens, followed.num_tokens) == (8, 48)
    assert replica.alloc.check() == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_replica_that_goes_on_alone_waits_for_who_used_the_memory(backend: str) -> None:
    """What a followed list has freed may be read by the device still: it is unmapped behind the list's fence."""
    leader, replica = Leader("full", backend), Replica("full", backend, record_ops=True, prefix_cache=False)
    sequence = leader.alloc.sequence()
    sequence.extend(60)
    sequence.free()
    ops = leader.alloc.take_ops()
    (fence,) = (op[2] for op in ops if op[0] == "fence")
    replica.alloc.apply(ops)
    replica.alloc.take_ops()
    replica.alloc.trim()
    waits = {op[5] for op in replica.alloc.take_ops() if op[0] == "unmap"}
    assert waits == {fence}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_copy_before_a_write_cannot_be_lost_or_read_elsewhere(backend: str) -> None:
    leader, replica = Leader("full", backend), Replica("full", backend)
    parent = leader.alloc.sequence()
    parent.extend(60)
    parent.commit(count=60)
    child = parent.fork()
    child.truncate(30)
    replica.alloc.apply(leader.alloc.take_ops())
    replica.write(parent.id, list(range(60)), 0)
    child.extend(3)
    ops, before = [list(op) for op in leader.alloc.take_ops()], replica.all_held()
    copies = [at for at, op in enumerate(ops) if op[0] == "copy"]
    assert copies
    for at in copies:
        for field, step in [(2, 4 * 768), (3, 4 * 768), (3, PAGE), (4, -192), (4, -4)]:
            damaged = [list(op) for op in ops]
            damaged[at][field] += step
            with pytest.raises(kvmem.SpecError):
                replica.alloc.apply(damaged)
        with pytest.raises(kvmem.SpecError):
            replica.alloc.apply([*ops[:at], *ops[at + 1 :]])
    assert replica.all_held() == before and replica.alloc.check() == []
    replica.alloc.apply(ops)
    assert [replica.held(child.id, 0)[i] for i in range(30)] == [before[parent.id, 0][i] for i in range(30)]
