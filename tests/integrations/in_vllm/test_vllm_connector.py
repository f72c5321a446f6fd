"""The connector's two halves under traffic, and with each stage failing once: right bytes, or computed anew."""

# ruff: noqa: F811  a fixture that is imported has the name of the arguments that ask for it
from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from support_vllm_tiers import BLOCK, Faulty, expected, first_and_second, host, make  # noqa: F401  make is a fixture
from vllm_world import SIZE, Request, World

pytestmark = pytest.mark.core

# Windows of the groups, and whether loads are for the step that they begin in: the connector refuses that for several.
CASES = [((0,), False), ((0,), True), ((0, 6), False)]


@pytest.mark.parametrize("length", [1, SIZE - 1, SIZE, SIZE + 1, 5 * SIZE - 1, 5 * SIZE, 5 * SIZE + 1])
@pytest.mark.parametrize(("windows", "in_step"), [*CASES, ((0, 3), False), ((0, 1), False)])
def test_what_was_saved_is_loaded(
    make: Callable[..., World], length: int, windows: tuple[int, ...], in_step: bool
) -> None:
    """Every whole block of the prompt comes back, but that of its last token."""
    world = make(windows=windows, host=host(), in_step=in_step)
    first, second = first_and_second(world, length)
    assert first == second and world.failed_loads == 0
    assert world.loaded_tokens == (length - 1) // SIZE * SIZE


@pytest.mark.parametrize("in_step", [False, True])
def test_a_shared_tier_is_asked_and_both_are_filled(make: Callable[..., World], in_step: bool) -> None:
    shared, near = Faulty(), host(3)  # which holds only some of the blocks
    world = make(host=near, shared=[shared], in_step=in_step)
    first, second = first_and_second(world)
    assert first == second and world.loaded_tokens == 24 and len(shared.data) == 7
    other = make(shared=[shared], in_step=in_step)  # a new process
    request = other.add(Request("third", first[:26], 5))
    other.run()
    assert request.all_token_ids == first and other.loaded_tokens == 24


def test_what_a_lower_tier_had_comes_to_host_memory(make: Callable[..., World]) -> None:
    shared, near = Faulty(), host()
    first, _ = first_and_second(make(shared=[shared]))
    world = make(host=near, shared=[shared])
    world.add(Request("third", first[:26], 5))
    world.run()
    world.settle()
    shared.data.clear()
    request = world.add(Request("fourth", first[:26], 5))
    world.run()
    assert request.all_token_ids == first and world.loaded_tokens == 2 * 24 and near.capacity().num_blocks == 7


@pytest.mark.parametrize(
    ("at", "what"),
    [("get", "raises"), ("get", "fails"), ("get", "corrupt"), ("get", "short"), ("get", "hangs"),
     ("contains", "raises"), ("contains", "hangs"), ("put", "raises"), ("put", "full")],
)  # fmt: skip
@pytest.mark.parametrize(("windows", "in_step"), CASES)
def test_each_stage_fails_once(
    make: Callable[..., World], at: str, what: str, windows: tuple[int, ...], in_step: bool
) -> None:
    """The tokens are those of a run without failure; blocks that failed are told once, and missed the next time."""
    tier = Faulty(*((at, what) if at == "put" else ()))
    world = make(windows=windows, shared=[tier], in_step=in_step, clock=lambda: 1000.0 * tier.hung)
    first, second = first_and_second(world, between=lambda: tier.arm(at if at != "put" else "", what))
    assert first == second
    loads_fail = at == "get"
    assert world.failed_loads == int(loads_fail) and (len(windows) > 1 or bool(world.reported) == loads_fail)
    assert len(world.reported) == len(set(world.reported))
    tier.gate.set()
    world.settle()
    before = world.loaded_tokens
    third = world.add(Request("third", first[:26], 5))
    world.run()
    assert world.loaded_tokens > before, "what was lost is saved again"
    assert third.all_token_ids == first and world.failed_loads == int(loads_fail)
    assert tier.happened == 1


def test_a_key_that_failed_is_a_miss_until_it_is_saved_again(make: Callable[..., World]) -> None:
    tier = Faulty()
    world = make(shared=[tier])
    prompt = [i * 3 % 50 for i in range(26)]
    world.add(Request("a", prompt, 1))
    world.run()
    world.settle()
    tier.arm("get", "fails")
    failing = world.add(Request("b", prompt, 1))
    while not world.failed_loads:
        world.step()
    assert world.planner.matched(failing, 0) == (0, False)  # this request asks no more
    probe = world.add(Request("c", prompt, 1))
    world.requests.remove(probe)
    while (found := world.planner.matched(probe, 0)[0]) is None:
        pass
    assert found == 20  # the last of six blocks failed
    world.run()
    world.settle()
    world.planner.end("c")
    world.planner.begin(probe)
    while (found := world.planner.matched(probe, 0)[0]) is None:
        pass
    assert found == 24


def test_a_tier_that_lies_costs_one_load(make: Callable[..., World]) -> None:
    tier = Faulty("contains", "lies", 1)
    world = make(shared=[tier])
    request = world.add(Request("a", list(range(26)), 3))
    world.run()
    assert request.all_token_ids == expected(list(range(26)), 3) and world.failed_loads == 1


def test_a_late_answer_writes_nowhere_and_waits_are_bounded(make: Callable[..., World]) -> None:
    """On a clock of the test's own: the lookup and the load each end with their deadline."""
    now = [0.0]
    tier = Faulty()
    world = make(shared=[tier], deadline_seconds=5.0, clock=lambda: now[0])
    first, second = first_and_second(world)
    assert first == second
    tier.arm("contains", "hangs")
    request = world.add(Request("late", first[:26], 5))
    for _ in range(3):
        world.step()
        assert not request.loading and not request.running  # the planner asks for time
    now[0] = 5.1
    world.step()
    assert request.running  # computed, since nobody knows what the tier has
    tier.gate.set()
    world.run()
    tier.gate.clear()
    tier.arm("get", "hangs")
    request = world.add(Request("later", first[:26], 5))
    while not request.loading:
        world.step()
    for _ in range(3):
        world.step()
        assert request.loading
    now[0] = 20.0
    world.run()
    assert request.all_token_ids == first and world.reported
    world.kv.fill_(0x5A)
    tier.gate.set()
    world.transfers._loaders.close(10)  # the late answer has come
    world.transfers._advance()
    assert bool((world.kv == 0x5A).all())


def test_aborted_while_it_loads(make: Callable[..., World]) -> None:
    tier = Faulty()
    world = make(shared=[tier])
    first, _ = first_and_second(world)
    tier.arm("get", "hangs")
    request = world.add(Request("gone", first[:26], 5))
    while not request.loading:
        world.step()
    world.abort(request)
    other = world.add(Request("other", [9, 9, 9], 4))
    world.run()
    assert other.all_token_ids == expected([9, 9, 9], 4)
    tier.gate.set()
    while world.zombies:
        world.step()
    assert sum(block.ref_cnt for block in world.pool) == 1  # block 0


def test_saves_that_find_no_room_on_the_way_are_left_out(make: Callable[..., World]) -> None:
    tier = Faulty("put", "hangs")
    world = make(shared=[tier], staging_bytes=2 * BLOCK)
    request = world.add(Request("a", list(range(26)), 5))
    world.run()
    assert request.all_token_ids == expected(list(range(26)), 5) and world.transfers._staged <= 2 * BLOCK
    tier.gate.set()
    world.settle()
    assert world.transfers._staged == 0 and 1 <= len(tier.data) <= 2


@pytest.mark.parametrize(("windows", "in_step"), CASES)
@pytest.mark.parametrize("tiers", ["host", "shared", "both"])
def test_random_traffic(
    make: Callable[..., World], rng: random.Random, tiers: str, windows: tuple[int, ...], in_step: bool
) -> None:
    """Shared prefixes, a small pool, preemptions, aborts and failing tiers; each step compares what attention reads."""
    tier = Faulty()
    world = make(
        windows=windows, blocks=40, in_step=in_step, host=host(12) if tiers != "shared" else None,
        shared=[tier] if tiers != "host" else None,
    )  # fmt: skip
    prompts = [[rng.randrange(50) for _ in range(rng.randint(10, 40))] for _ in range(4)]
    finished = 0
    for n in range(60):
        base = rng.choice(prompts)
        prompt = base[: rng.randint(1, len(base))] + [rng.randrange(50) for _ in range(rng.randint(0, 6))]
        outputs, salt = rng.randint(1, 6), rng.choice([None, None, "tenant"])
        request = world.add(Request(f"r{n}", prompt, outputs, salt))
        for _ in range(rng.randint(1, 6)):
            if rng.random() < 0.1:
                at = rng.choice(["get", "put", "contains"])
                whats = {"get": ["raises", "fails", "corrupt", "short"], "put": ["raises", "full"]}
                tier.arm(at, rng.choice(whats.get(at, ["raises", "lies"])))
            world.step()
            running = [r for r in world.requests if r.running]
            if running and rng.random() < 0.08:
                world.preempt(rng.choice(running))
            if world.requests and rng.random() < 0.05:
                world.abort(rng.choice(world.requests))
        if len(world.requests) > 4:
            world.run()
        finished += request not in world.requests
        if request.is_done:
            assert request.all_token_ids == expected(prompt, outputs)
    world.run()
    for _ in range(1000):
        if world.zombies:
            world.step()
    assert finished and world.loaded_tokens > 0
    assert sum(block.ref_cnt for block in world.pool) == 1
