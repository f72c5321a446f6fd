"""Ops as bytes: what is read is what was written, in few bytes; damage is refused, or gives records of known kinds."""

from __future__ import annotations

import random

import pytest
from rank_processes import make

import kvmem
from kvmem.allocator.ops import KINDS, Op
from kvmem.distributed.op_bytes import pack, unpack

LIMITS = [0, 1, -1, 127, 128, -128, -129, 2**15 - 1, 2**15, 2**31 - 1, 2**31, -(2**31) - 1, 2**63 - 1, -(2**63)]


def drawn(rng: random.Random, count: int, limits: list[int]) -> list[Op]:
    return [(rng.choice(KINDS), *(rng.choice(limits) for _ in range(5))) for _ in range(count)]  # type: ignore[misc]


def test_every_list_comes_back(rng: random.Random) -> None:
    for count in (0, 1, 2, 50):
        for most in range(1, len(LIMITS) + 1):
            ops = drawn(rng, count, LIMITS[:most])
            assert unpack(pack(ops)) == ops
            assert all(type(number) is int for op in unpack(pack(ops)) for number in op[1:])


def test_a_decode_step_takes_few_bytes(backend: str) -> None:
    with make(backend, True) as alloc:
        running = [alloc.sequence() for _ in range(6)]
        for sequence in running:
            sequence.extend(100)
            sequence.commit(count=100)
        alloc.take_ops()
        for sequence in running:
            sequence.extend(1)
            sequence.commit(count=1)
        ops = alloc.take_ops()
        assert unpack(pack(ops)) == ops and len(ops) > 6
        assert len(pack(ops)) < 16 * len(ops)


def test_damaged_bytes_are_refused_or_are_records(rng: random.Random) -> None:
    data = pack(drawn(rng, 9, LIMITS[:8]))
    for end in range(len(data)):
        with pytest.raises(kvmem.SpecError):
            unpack(data[:end])
    with pytest.raises(kvmem.SpecError):
        unpack(data + b"\0")
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << rng.randrange(8)
        try:
            ops = unpack(bytes(damaged))
        except kvmem.SpecError:
            continue
        assert all(kind in KINDS for kind, *_ in ops)
