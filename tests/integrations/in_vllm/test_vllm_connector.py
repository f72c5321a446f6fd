"""The connector's two halves under traffic, and with each stage failing once: right bytes, or computed anew."""

from __future__ import annotations

import random
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from dict_tier import DictTier
from vllm_world import PAGE, RANK, SIZE, Request, World, next_token

from kvmem.integrations.background import Background
from kvmem.integrations.vllm.blocks import Block, Load, Step, chain_of, tier_key
from kvmem.tiers.base import Buffer, Result, Status
from kvmem.tiers.host import HostTier

pytestmark = pytest.mark.core

BLOCK = 2 * PAGE  # a payload: a block of two layers
# Windows of the groups, and whether loads are for the step that they begin in: the connector refuses that for several.
CASES = [((0,), False), ((0,), True), ((0, 6), False)]


class Faulty(DictTier):
    """A tier of which one call in turn does something else. at: the call's name and its number, from 1 on."""

    def __init__(self, at: str = "", what: str = "", nth: int = 1) -> None:
        super().__init__(10_000, BLOCK)
        self.at, self.what, self.nth, self.gate = at, what, nth, threading.Event()
        self.happened, self.hung = 0, False

    def arm(self, at: str, what: str) -> None:
        self.at, self.what, self.nth = at, what, 1

    def fails(self, call: str) -> bool:
        if call != self.at:
            return False
        self.nth -= 1
        if self.nth != 0:
            return False
        self.happened += 1
        if self.what == "raises":
            raise OSError("the store is gone")
        if self.what == "hangs":
            self.hung = True
            self.gate.wait(30)
        return True

    def contains(self, keys: Sequence[bytes]) -> int:
        return len(keys) if self.fails("contains") and self.what == "lies" else super().contains(keys)

    def get(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        if not self.fails("get"):
            return super().get(keys, buffers)
        found = super().get(keys, buffers)
        if self.what == "hangs":
            return found
        buffers[-1][:] = b"\xee" * len(buffers[-1])
        wrong = {"fails": Result(Status.FAILED, 0, "no answer"), "corrupt": Result(Status.CORRUPT, 0, "bad checksum"),
                 "short": Result(Status.OK, len(buffers[-1]) - 1)}  # fmt: skip
        return [*found[:-1], wrong[self.what]]

    def put(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        if self.fails("put") and self.what == "full":
            return [Result(Status.FULL, 0, "no room") for _ in keys]
        return super().put(keys, buffers)


@pytest.fixture
def make(rng: random.Random) -> Iterator[Callable[..., World]]:
    worlds = []

    def open_world(**given: Any) -> World:
        worlds.append(World(rng, **given))
        return worlds[-1]

    yield open_world
    for world in worlds:
        for tier in world.transfers._tiers:
            if isinstance(tier, Faulty):
                tier.gate.set()
        world.close()


def expected(prompt: list[int], outputs: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(outputs):
        tokens.append(next_token(tokens))
    return tokens


def host(blocks: int = 1000) -> HostTier:
    return HostTier(capacity=blocks * BLOCK, block_bytes=BLOCK, tells_evicted=True)


def first_and_second(
    world: World, length: int = 26, between: Callable[[], None] = lambda: None
) -> tuple[list[int], list[int]]:
    """Run one prompt twice, its blocks in between gone from the KV cache; return what each run has generated."""
    prompt = [i * 7 % 50 for i in range(length)]
    runs = []
    for name in ("first", "second"):
        request = world.add(Request(name, prompt, 5))
        world.run()
        if name == "first":
            world.settle()
            between()
        world.kv.fill_(0x5A)
        runs.append(request.all_token_ids)
    assert runs[0] == expected(prompt, 5)
    return runs[0], runs[1]


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


def test_many_loads_at_once_stay_within_staging(make: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmem.integrations.vllm.transfers._PART_BYTES", 2 * BLOCK)
    near, most = host(), 0
    first, _ = first_and_second(make(host=near))
    world = make(host=near, blocks=80, staging_bytes=4 * BLOCK)
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
