"""Salts are found by a hash under a secret key: nobody can choose salts that collide, in this process or in the next."""

from __future__ import annotations

import random

import pytest
from support_drivers import assert_runs

from kvmem import _core

pytestmark = pytest.mark.core


def test_the_published_values() -> None:
    """SipHash-1-3 under the key 00 01 ... 0f, of 00 01 ... of each length."""
    key = int.from_bytes(bytes(range(8)), "little"), int.from_bytes(bytes(range(8, 16)), "little")
    first = [0xABAC0158050FC4DC, 0xC9F49BF37D57CA93, 0x82CB9B024DC7D44D, 0x8BF80AB8E7DDF7FB]
    assert [_core.keyed_hash(*key, bytes(range(n))) for n in range(4)] == first


def test_each_bit_of_salt_and_key_moves_half_of_the_hash(rng: random.Random) -> None:
    moved = total = 0
    for _ in range(400):
        key, text = [rng.getrandbits(64), rng.getrandbits(64)], rng.randbytes(rng.randrange(1, 40))
        plain = _core.keyed_hash(*key, text)
        flipped = bytearray(text)
        flipped[rng.randrange(len(text))] ^= 1 << rng.randrange(8)
        other = list(key)
        other[rng.randrange(2)] ^= 1 << rng.randrange(64)
        for value in (_core.keyed_hash(*key, bytes(flipped)), _core.keyed_hash(*other, text)):
            moved, total = moved + (plain ^ value).bit_count(), total + 64
    assert 0.48 < moved / total < 0.52


def test_the_order_of_roots_tells_nothing_of_the_hash() -> None:
    """Roots are told by age at a restart, the newest first, whatever the secret of the allocator and the process."""
    code = """
import kvmem
spec = kvmem.CacheSpec.kv(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32", block_size=1)
for _ in range(2):
    alloc = kvmem.Allocator(spec, memory="1MiB", max_sequences=4, max_tokens=8, events=500, backend="paged")
    for i in range(100):
        with alloc.sequence([1], extra_key=i) as seq: seq.extend(1), seq.commit([1])
    print([event.extra_keys[0][0] for event in alloc.events(restart=True)[1:]])
"""
    orders = [line for _ in range(2) for line in assert_runs(code).splitlines()]
    assert orders == [str(list(range(99, -1, -1)))] * 4
