"""kvmem's eviction order under the calls of vLLM's CPU tier, as its manager makes them."""

from __future__ import annotations

import random
from typing import Any

import pytest

from kvmem.integrations.vllm.density import EvictionOrder

pytestmark = pytest.mark.core


class Chunk:
    def __init__(self, chunk_id: int) -> None:
        self.chunk_id, self.ref_cnt = chunk_id, -1


class Context:
    def __init__(self) -> None:
        self.states: dict[type, Any] = {}

    def get_state(self, kind: type) -> Any:
        return self.states.get(kind)

    def set_state(self, value: Any) -> None:
        self.states[type(value)] = value


def key(n: int, group: int = 0) -> bytes:
    return n.to_bytes(32, "big") + group.to_bytes(4, "big")


def store(order: EvictionOrder, keys: list[bytes], context: Context, first: int) -> None:
    order.on_store_miss(keys, context)
    for i, one in enumerate(keys):
        order.insert(one, Chunk(first + i))
        order.get(one).ref_cnt = 0
        order.mark_evictable(one)


def test_the_end_of_a_prefix_goes_before_its_beginning() -> None:
    order, context = EvictionOrder(8, "density"), Context()
    store(order, [key(0), key(1)], context, 0)
    store(order, [key(2), key(3)], context, 2)  # of the same request
    store(order, [key(0, 1)], Context(), 4)
    order.on_request_finished([[key(0, 1)]], set(), {key(0, 1)}, context)  # used again
    gone = order.evict(3, set())
    assert gone is not None and [k for k, _ in gone] == [key(3), key(2), key(1)]
    assert order.get(key(3)) is None and order.get(key(0)) is not None and order.get(key(0, 1)) is not None


def test_protected_and_used_chunks_stay_and_a_failed_eviction_changes_nothing() -> None:
    order = EvictionOrder(4, "density")
    for n in range(4):
        store(order, [key(n)], Context(), n)
    order.get(key(0)).ref_cnt = 1
    order.mark_non_evictable(key(0))
    before = order._policy.digest()
    assert order.evict(3, {key(1)}) is None
    assert order._policy.digest() == before and all(order.get(key(n)) for n in range(4))
    gone = order.evict(2, {key(1)})
    assert gone is not None and {k for k, _ in gone} == {key(2), key(3)}
    order.mark_evictable(key(0))
    again = order.evict(2, set())
    assert again is not None and {k for k, _ in again} == {key(0), key(1)}
    assert order.evict(0, set()) == [] and order.evict(1, set()) is None


@pytest.mark.parametrize("name", ["density", "lru"])
def test_random_calls_against_a_dict(name: str, rng: random.Random) -> None:
    """Stores, failed stores, loads, evictions and resets, more keys than chunks; every chunk has one key."""
    capacity, order = 12, EvictionOrder(12, name)
    model: dict[bytes, Chunk] = {}
    free = list(range(capacity))
    for _ in range(3000):
        kind = rng.random()
        ready = [k for k, c in model.items() if c.ref_cnt == 0]
        if kind < 0.4:
            start = rng.randrange(40)
            keys = [k for k in map(key, range(start, start + rng.randint(1, 5))) if k not in model]
            order.on_store_miss(keys, Context())
            need = len(keys) - len(free)
            if need > 0:
                protected = set(rng.sample(sorted(model), min(2, len(model))))
                gone = order.evict(need, protected)
                assert (gone is None) == (len(set(ready) - protected) < need) or name == "density"
                if gone is None:
                    continue
                assert len(gone) == need and not protected & {k for k, _ in gone}
                for k, chunk in gone:
                    assert model.pop(k) is chunk and chunk.ref_cnt == 0
                    free.append(chunk.chunk_id)
            for k in keys:
                order.insert(k, chunk := Chunk(free.pop()))
                model[k] = chunk
        elif kind < 0.7:
            for k in [k for k, c in model.items() if c.ref_cnt == -1][: rng.randint(0, 3)]:
                if rng.random() < 0.2:
                    free.append(model.pop(k).chunk_id)
                    order.remove(k)
                else:
                    model[k].ref_cnt = 0
                    order.mark_evictable(k)
        elif kind < 0.85 and ready:
            model[k := rng.choice(ready)].ref_cnt = 1
            order.mark_non_evictable(k)
        elif kind < 0.995:
            for k in [k for k, c in model.items() if c.ref_cnt == 1]:
                model[k].ref_cnt = 0
                order.mark_evictable(k)
                order.on_request_finished([[k]], set(), {k}, Context())
        else:
            order.clear()
            model, free = {}, list(range(capacity))
        for n in range(45):
            assert order.get(key(n)) is model.get(key(n))
