"""What a replica believes: true lists of every kind of program, and damaged ones that must not cost a live token."""

from __future__ import annotations

import random
from typing import Any

import pytest
from follow_world import SPECS, Leader, Replica, tag_of
from ops_rank import digest
from support_world import BACKENDS, LONG, PAGE, seed_from_environment
from test_ops import spoilt

import kvmem

STEPS = 160 if LONG else 40


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
    """With and without a cache that the replica knows nothing of, in lists of one call and of several."""
    rng = random.Random(seed)
    for _ in range(2):
        leader, replica = Leader(name, backend, zero=zero), Replica(name, backend, zero=zero)
        pending: list[Any] = []
        for _ in range(STEPS):
            pending += leader.step(rng)
            if name == "full" and rng.random() < 0.3:
                continue
            replica.alloc.apply(pending)
            pending = []
            assert replica.alloc.check() == []
            assert digest(replica.alloc) == digest(leader.alloc)
            run_model(replica, leader)


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
    for _ in range(STEPS):
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
    assert refused > 50


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
