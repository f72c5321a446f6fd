"""Retention over each policy: the order of priorities, times to live by a clock of the test, and never a lost block."""

from __future__ import annotations

import math

import pytest
from eviction_world import World
from support import Steps

from kvmem import _core
from kvmem.errors import SpecError

POLICIES = _core.eviction_policy_names()


class Clock:
    def __init__(self) -> None:
        self.now, self.reads = 1000.0, 0

    def __call__(self) -> float:
        self.reads += 1
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=POLICIES)
def policy(request, clock):
    made = _core.RetentionPolicy(request.param, clock)
    made.reserve(64)
    return made


def lone(policy, *blocks: int) -> None:
    """Blocks without parents, in use."""
    for block in blocks:
        policy.insert(block, 1000 + block, -1)


def chain(policy, *blocks: int) -> None:
    for depth, block in enumerate(blocks):
        policy.insert(block, 1000 + block, blocks[depth - 1] if depth else -1)


def release(policy, *blocks: int) -> None:
    for block in blocks:
        policy.release(block)


def drain(policy) -> list[int]:
    order = []
    while (named := policy.victim()) >= 0:
        policy.evict(named)
        order.append(named)
    return order


def drain_until(policy, count: int) -> list[int]:
    order = []
    for _ in range(count):
        order.append(policy.victim())
        policy.evict(order[-1])
    return order


def test_priorities_order_the_victims(policy, clock):
    lone(policy, *range(7))
    for block, priority in zip(range(7), (100, 51, 50, 0, 49, 50, 80), strict=True):
        policy.retain(block, priority, math.inf)
    release(policy, *range(7))
    assert drain(policy) == [3, 4, 2, 5, 1, 6, 0]
    assert clock.reads == 0, "no time to live, no clock"


def test_released_before_or_after(policy):
    """retain() of a block in use, or released already, or again."""
    lone(policy, 0, 1, 2)
    release(policy, 0, 1, 2)
    policy.retain(0, 90, 0)
    policy.retain(1, 10, 0)
    assert policy.victim() == 1
    policy.retain(1, 95, 0)
    assert policy.victim() == 2
    policy.retain(2, 92, 0)
    assert policy.victim() == 0
    policy.retain(1, 50, 0)
    assert drain(policy) == [1, 0, 2]


@pytest.mark.parametrize("forever", [0, -1.0, math.inf])
def test_for_ever(policy, clock, forever):
    lone(policy, 0, 1)
    policy.retain(0, 60, forever)
    release(policy, 0, 1)
    clock.now += 1e12
    assert drain(policy) == [1, 0]


def test_time_to_live_counts_from_each_release(policy, clock):
    lone(policy, 0, 1)
    policy.retain(0, 60, 10)
    release(policy, 0, 1)
    clock.now += 9
    policy.use(0)
    policy.hit(0)
    clock.now += 100  # in use, nothing runs out
    policy.release(0)
    clock.now += 9.5
    assert policy.victim() == 1
    policy.hit(1)  # victim() repeats itself until another call
    clock.now += 1
    policy.evict(1)
    assert drain(policy) == [0]


def test_what_ran_out_is_the_bases_again(policy, clock):
    lone(policy, 0, 1, 2)
    policy.retain(0, 10, 5)
    policy.retain(2, 99, 5)
    release(policy, 0, 1, 2)
    assert policy.victim() == 0
    clock.now += 5
    assert policy.victim() == 0, "the same until another call"
    policy.hit(1)
    lone(policy, 3)
    policy.release(3)
    assert policy.victim() != 0
    assert sorted(drain(policy)) == [0, 1, 2, 3]


def test_times_run_out_in_order(policy, clock, rng):
    """Against a sorted list: at each moment the blocks kept are those whose time has not come."""
    lone(policy, *range(40))
    times = {block: rng.uniform(1, 100) for block in range(40)}
    for block, ttl in times.items():
        policy.retain(block, 70, ttl)
    release(policy, *rng.sample(range(40), 40))
    for block in rng.sample(range(40), 10):  # some leave the heap from its middle
        policy.use(block)
        del times[block]
    clock.now += 50
    expired = {block for block, ttl in times.items() if ttl <= 50}
    order = drain(policy)
    assert set(order[: len(expired)]) == expired
    assert set(order) == set(times)


def test_forgotten_on_eviction_and_back_on_restore(policy, clock):
    lone(policy, 0, 1)
    policy.retain(0, 5, 20)
    release(policy, 0, 1)
    policy.evict(0)
    policy.restore(0)
    assert policy.victim() == 0, "as before"
    policy.evict(0)
    policy.insert(0, 7, -1)
    policy.release(0)
    reads = clock.reads
    assert policy.victim() in (0, 1)
    assert clock.reads == reads, "block 0 is a new one, without a time to live"


def test_a_kept_block_keeps_the_chain_that_leads_to_it(policy, clock):
    """Without its parents it could not be found."""
    chain(policy, 0, 1, 2, 3)
    lone(policy, 4)
    policy.retain(2, 80, 10)
    release(policy, 3, 2, 1, 0, 4)
    assert set(drain_until(policy, 2)) == {3, 4}
    clock.now += 10
    policy.hit(0)
    assert drain(policy) == [2, 1, 0]


def test_a_low_prefix_goes_after_its_extensions(policy):
    chain(policy, 0, 1, 2)
    lone(policy, 3)
    policy.retain(0, 0, 0)
    release(policy, 2, 1, 0, 3)
    order = drain(policy)
    assert order.index(2) < order.index(1) < order.index(0)


@pytest.mark.parametrize("priority", [-1, 101])
def test_no_such_priority(policy, priority):
    lone(policy, 0)
    with pytest.raises(SpecError, match="0 to 100"):
        policy.retain(0, priority, 0)


@pytest.mark.parametrize("name", POLICIES)
def test_random_traffic_with_retention(rng, name):
    """The rules of every policy hold under random priorities and times."""
    clock = Clock()
    world = World(_core.RetentionPolicy(name, clock), rng, ids=60, leaves_first=name != "lru")
    loop = Steps(2500)
    while loop.next(world.hits > 300 and world.evictions > 100):
        world.step()
        clock.now += rng.random()
        if world.state and rng.random() < 0.3:
            ttl = rng.choice([0, 0.5, 5, 50])
            world.policy.retain(rng.choice(list(world.state)), rng.choice([0, 20, 50, 51, 90]), ttl)
    world.drain()
    assert sorted(world.free) == list(range(60))


@pytest.mark.parametrize("name", POLICIES)
def test_without_retention_it_is_the_base(seed, name):
    import random

    plain, wrapped = (
        World(made, random.Random(seed), ids=50)
        for made in (_core.EvictionPolicy(name), _core.RetentionPolicy(name, Clock()))
    )
    loop = Steps(1500)
    while loop.next(plain.evictions > 100):
        plain.step()
        wrapped.step()
        assert plain.policy.victim() == wrapped.policy.victim()
