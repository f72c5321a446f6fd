"""The connector where a tier is silent or wrong, where much comes at once, and at a reset: bounded, and right."""

# ruff: noqa: F811  a fixture that is imported has the name of the arguments that ask for it
from __future__ import annotations

import random
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support_vllm_tiers import BLOCK, Faulty, first_and_second, host, make  # noqa: F401  make is a fixture
from vllm_world import RANK, SIZE, Request, World

from kvmem.integrations.background import Background
from kvmem.integrations.vllm.blocks import Block, Load, Report, Step, chain_of, tier_key
from kvmem.integrations.vllm.planner import Planner
from kvmem.tiers.keys import BlockKeys

pytestmark = pytest.mark.core


def test_what_is_left_out_is_planned_once(make: Callable[..., World]) -> None:
    """Tiers that are behind for long must not cost a look at all blocks of all requests in each step."""
    tier = Faulty("put", "hangs")
    world = make(shared=[tier], staging_bytes=2 * BLOCK)
    world.add(Request("a", list(range(26)), 20))
    planned = list[Any]()
    step = world.planner.step
    world.planner.step = lambda *given: planned.append(step(*given)) or planned[-1]  # type: ignore[func-returns-value]
    world.run()
    names = [block.name for one in planned for block in one.saves]
    assert len(names) == len(set(names)) == 11


@pytest.mark.parametrize("part", [2 * BLOCK + 1, 1 << 20])
def test_many_loads_at_once_stay_within_staging(
    make: Callable[..., World], monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    monkeypatch.setattr("kvmem.integrations.vllm.transfers._PART_BYTES", part)
    near, most = host(), 0
    first, _ = first_and_second(make(host=near))
    world = make(host=near, blocks=80, staging_bytes=4 * BLOCK + 2)
    world.planner._held.update(dict.fromkeys(world_names(world, first[:24]), 1))
    requests = [world.add(Request(f"{n}", first[:26], 5)) for n in range(8)]
    while world.requests:
        world.step()
        most = max(most, world.transfers._fetching)
    assert [request.all_token_ids for request in requests] == [first] * 8 and 0 < most <= 4 * BLOCK
    assert world.loaded_tokens == 8 * 24 and world.failed_loads == 0 and world.transfers._fetching == 0


def world_names(world: World, tokens: list[int]) -> list[Any]:
    chain = chain_of(Request("names", tokens, 0), world.planner._keys)
    assert chain is not None
    chain.extend(tokens, len(tokens))
    return [chain.name(0, SIZE, block) for block in range(len(tokens) // SIZE)]


def test_a_tier_that_never_answers_is_left_alone(make: Callable[..., World]) -> None:
    """It costs the deadline as often as there are threads; later requests do not wait, and nothing of theirs is kept."""
    for call, threads in (("contains", "_background"), ("get", "_loaders")):
        now = [0.0]
        tier = Faulty()
        world = make(shared=[tier], deadline_seconds=5.0, clock=lambda now=now: now[0])  # type: ignore[misc]
        first, _ = first_and_second(world)
        if call == "get":
            world.planner._held.update(dict.fromkeys(world_names(world, first[:24]), 1))
        for n in range(2):
            tier.arm(call, "hangs")
            world.add(Request(f"stuck {n}", first[:26], 5))
            before = tier.happened
            while tier.happened == before:
                world.step()
            now[0] += 5.1
            world.run()
            world.settle()
        owner = world.planner if call == "contains" else world.transfers
        background = getattr(owner, threads)
        assert background.is_stuck
        request = world.add(Request("next", first[:26], 5))
        world.run()  # the clock stands still
        assert request.all_token_ids == first
        tier.gate.set()
        while background.is_stuck:
            pass


def test_a_request_that_finds_no_room_asks_again_after_its_deadline(make: Callable[..., World]) -> None:
    """Its lookup never began, behind two that hang."""
    now, gate = [0.0], threading.Event()
    tier = Faulty()
    world = make(shared=[tier], deadline_seconds=5.0, clock=lambda: now[0])
    tier.contains = lambda keys: int(gate.wait(30)) * 0  # type: ignore[method-assign]
    requests = [Request(f"{n}", list(range(9)), 1) for n in range(3)]
    for request in requests:
        world.planner.begin(request)
        assert world.planner.matched(request, 0) == (None, False)
    now[0] = 5.1
    for request in requests * 3:
        assert world.planner.matched(request, 0) == (0, False)
    gate.set()


def test_work_that_is_cancelled_keeps_no_memory() -> None:
    begun, gate, memory = threading.Event(), threading.Event(), torch.empty(1)
    background = Background(1, "test")
    busy = background.submit(lambda: begun.set() or gate.wait(30))  # type: ignore[func-returns-value]
    begun.wait(10)
    background.leave(background.submit(partial(torch.add, memory, 1)))
    seen = weakref.ref(memory)
    del memory
    assert seen() is None and not background.is_stuck
    background.leave(busy)
    assert background.is_stuck
    gate.set()
    busy.result(10)
    assert not background.is_stuck
    background.close(10)


@pytest.mark.parametrize("answer", [-1, 1000, None])
def test_a_tier_that_counts_wrong(make: Callable[..., World], monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    """It is no reason to wait, nor to ask no other."""
    wrong, right = Faulty(), Faulty()
    monkeypatch.setattr(wrong, "contains", lambda keys: answer)
    world = make(shared=[wrong, right])
    first, second = first_and_second(world)
    assert first == second and world.loaded_tokens >= 24 and world.failed_loads == int(answer == 1000)


@pytest.mark.parametrize("answers", [[None] * 6, [], None, 5])
def test_a_tier_that_answers_with_anything(
    make: Callable[..., World], monkeypatch: pytest.MonkeyPatch, answers: Any
) -> None:
    tier = Faulty()
    world = make(shared=[tier])
    first, second = first_and_second(world, between=lambda: monkeypatch.setattr(tier, "get", lambda *_: answers))
    assert first == second and world.failed_loads == 1


def test_nothing_of_a_spoilt_step_is_saved_whenever_it_ends(make: Callable[..., World]) -> None:
    """With draft tokens vLLM asks which blocks failed before it ends the step."""
    tier = Faulty()
    world = make(shared=[tier], in_step=True)
    first, _ = first_and_second(world)
    tier.data.clear()
    (block,) = (Block(name, 3) for name in world_names(world, first[:4]))
    step = Step([Load("a", [block])], [Block((0, b"x" * 32), 4)])
    world.transfers.begin(step, in_step=True)
    for layer in world.pages:
        world.transfers.wait_for_layer(layer)
        world.transfers.save_layer(layer, step)
    assert world.transfers.take_failed_blocks() == {3}
    world.transfers.end(step, idle=False)
    world.settle()
    assert not tier.data


def test_blocks_from_before_a_reset_are_not_saved_after_it(make: Callable[..., World]) -> None:
    """Their KV is that of the old weights. vLLM tells of the reset also while requests run."""
    near = host()
    world = make(host=near)
    old = world.add(Request("old", list(range(26)), 9))
    while old.num_computed_tokens < 20:
        world.step()
    waiting = world.add(Request("new", list(range(30, 56)), 2))
    world.settle()
    before = near.capacity().num_blocks
    world.planner.reset()
    while not old.is_done:
        world.step()
    world.run()
    world.settle()
    again = world.add(Request("old again", list(range(26)), 1))
    assert world.planner.matched(again, 0) == (0, False)
    assert near.capacity().num_blocks == before + (waiting.num_tokens - 1) // SIZE


def test_an_answer_of_a_tier_is_for_what_was_asked(make: Callable[..., World]) -> None:
    """vLLM's own cache may lose blocks between two questions, and a preempted request may find what it has saved."""
    tier = Faulty()
    world = make(shared=[tier])
    first, _ = first_and_second(world)
    lost = tier_key(RANK, world_names(world, first[:4])[0])
    payload = tier.data.pop(lost)
    request = world.add(Request("asked", first[:26], 5))
    world.requests.clear()

    def ask(computed: int) -> int:
        while (found := world.planner.matched(request, computed)[0]) is None:
            pass
        return found

    assert ask(8) == 16 and ask(0) == 0
    world.planner.allocated(request, (), 0)  # it runs, and is preempted later
    tier.data[lost] = payload
    assert ask(0) == 24


def test_host_memory_and_what_is_told_of_it_agree(make: Callable[..., World], rng: random.Random) -> None:
    """A block that is evicted and put again is neither forgotten nor thought to be there for ever."""
    near = host(4)
    world = make(host=near)
    for _ in range(30):
        name = (0, bytes([rng.randrange(9)]) * 32)
        world.transfers._staged += BLOCK
        world.transfers._start_saving([(name, torch.zeros(BLOCK, dtype=torch.uint8))])
        if rng.random() < 0.5:
            world.planner.learn(world.transfers.take_report())
    world.settle()
    there = {name for name in world.transfers._held.values() if near.contains([tier_key(RANK, name)])}
    assert there == set(world.transfers._held.values()) and len(there) == 4
    assert {name for name, ranks in world.planner._held.items() if ranks} <= there


def test_ranks_that_save_again_one_after_the_other(make: Callable[..., World]) -> None:
    planner = Planner(make(host=host()).groups, BlockKeys(b"world", SIZE), [b"a" * 32, b"b" * 32])
    request = Request("a", list(range(9)), 1)
    planner.begin(request)
    assert planner.matched(request, 0) == (0, False)
    names = [planner._requests["a"].chain.name(0, SIZE, block) for block in (0, 1)]
    both = Counter(dict.fromkeys(names, 2))
    planner.learn(Report(saved=both, held=both))
    assert planner.matched(request, 0) == (8, True)
    planner.learn(Report(failed={names[1]}))
    assert planner.matched(request, 0) == (4, True)
    for found in (4, 8):  # one rank, and the other in a later step
        planner.learn(Report(saved=Counter([names[1]]), held=Counter([names[1]])))
        assert planner.matched(request, 0) == (found, True)
