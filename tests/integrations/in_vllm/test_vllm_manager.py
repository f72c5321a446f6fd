"""kvmem's block manager under a stub of vLLM's scheduler: no vLLM is needed.

The worker's tokens come from what its tables name, so each request must generate what a worker of its own would, with
hits, chunks, preemption, aborts and resets in between. In a pool that is never short, hits are those of a reference: a
set of all prefixes that were computed."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from support_vllm_scheduler import VOCABULARY, StubBlocks, StubRequest, StubScheduler, StubStats, Worker, expected

from kvmem import SpecError
from kvmem.integrations.vllm.manager import BlockManager, Foreign

pytestmark = pytest.mark.core

SIZE = 8


def open_manager(num_blocks: int, **options: Any) -> BlockManager:
    given = {"block_size": SIZE, "max_model_len": 200, "max_requests": 40, "log_stats": True} | options
    return BlockManager(Foreign(StubBlocks, range(num_blocks), StubStats), num_blocks=num_blocks, **given)


def draw_request(draw: random.Random, name: str, texts: list[list[int]]) -> StubRequest:
    """A prompt that begins as others do, with an end of its own."""
    text = draw.choice(texts)
    shared = draw.randrange(len(text) + 1)
    prompt = text[:shared] + [draw.randrange(VOCABULARY) for _ in range(draw.randrange(1, 20))]
    return StubRequest(
        name, prompt, draw.randrange(1, 30), cache_salt=draw.choice([None, None, "tenant"]),
        skip_reading_prefix_cache=draw.random() < 0.1, prompt_embeds=object() if draw.random() < 0.05 else None,
    )  # fmt: skip


CASES: dict[str, dict[str, Any]] = {
    "large pool": {"num_blocks": 600},
    "small pool": {"num_blocks": 30},
    "small pool, lru": {"num_blocks": 30, "policy": "lru"},
    "no prefix cache": {"num_blocks": 30, "prefix_cache": False},
    "published when computed": {"num_blocks": 40, "ahead": False},
    "watermark": {"num_blocks": 40, "watermark": 0.2},
    "window": {"num_blocks": 40, "window_tokens": 20},
    "window of one block": {"num_blocks": 40, "window_tokens": SIZE},
}


@pytest.mark.parametrize("case", CASES)
def test_requests_generate_what_they_would_alone(case: str, seed: int) -> None:
    seen = {"hits": 0, "preemptions": 0, "ended": 0}
    for run in range(6):
        draw = random.Random(f"{seed} {case} {run}")
        manager = open_manager(**CASES[case])
        worker = Worker(SIZE, CASES[case].get("window_tokens"))
        scheduler = StubScheduler(
            manager,
            worker,
            budget=draw.choice([17, 64, 300]),
            must_fit=draw.random() < 0.7,
            lookahead=draw.choice([0, 0, 3]),
        )
        texts = [[draw.randrange(VOCABULARY) for _ in range(60)] for _ in range(3)]
        prompts: dict[str, list[int]] = {}
        for turn in range(400):
            if turn < 60 and draw.random() < 0.5:
                request = draw_request(draw, f"request {turn}", texts)
                prompts[request.request_id] = list(request.all_token_ids)
                scheduler.waiting.append(request)
            if draw.random() < 0.02:
                scheduler.abort(draw)
            if draw.random() < 0.05:
                assert manager.reset_prefix_cache() == (not scheduler.running)
            for request in scheduler.step():
                seen["ended"] += 1
                prompt = prompts[request.request_id]
                assert request.output == expected(prompt, request.max_tokens, worker.window), request.request_id
            if turn >= 60 and not scheduler.running and not scheduler.waiting:
                break
        assert not scheduler.running and not scheduler.waiting
        seen["hits"] += sum(scheduler.hits.values())
        seen["preemptions"] += scheduler.preemptions
        assert (
            manager.allocator.check() == []
            and manager.usage == 0
            and manager.block_pool.get_num_free_blocks() == manager.block_pool.num_blocks
        )
    assert seen["ended"] > 20 and (seen["hits"] > 0) == CASES[case].get("prefix_cache", True)
    assert (seen["preemptions"] > 0) or "small" not in case


def test_hits_are_those_of_a_set_of_prefixes(seed: int) -> None:
    draw = random.Random(seed)
    manager = open_manager(2000, max_requests=200)
    scheduler = StubScheduler(manager, Worker(SIZE), budget=10_000)
    texts = [[draw.randrange(VOCABULARY) for _ in range(60)] for _ in range(3)]
    cached: set[tuple[str | None, tuple[int, ...]]] = set()

    def publish(request: StubRequest, tokens: int) -> None:
        if request.prompt_embeds is None:
            for end in range(SIZE, tokens + 1, SIZE):
                cached.add((request.cache_salt, tuple(request.all_token_ids[:end])))

    for turn in range(80):
        for request in scheduler.running:
            publish(request, request.num_computed_tokens)
        new = [draw_request(draw, f"{turn} {i}", texts) for i in range(draw.randrange(3))]
        wanted = {}
        for request in new:  # in order: the prompts of a step find each other
            hits = 0
            while (
                request.cache_salt,
                tuple(request.all_token_ids[: hits + SIZE]),
            ) in cached and hits + SIZE < request.num_tokens:
                hits += SIZE
            blind = request.skip_reading_prefix_cache or request.prompt_embeds is not None
            wanted[request.request_id] = 0 if blind else hits
            if request.num_tokens - wanted[request.request_id] > 1:
                publish(request, request.num_tokens)
        scheduler.waiting.extend(new)
        for request in scheduler.step():
            publish(request, request.num_computed_tokens)
        assert {name: scheduler.hits[name] for name in wanted} == wanted
    assert manager.prefix_cache_stats.requests == 0  # the scheduler records them
    assert sum(scheduler.hits.values()) > 0


def test_names_that_a_step_calls() -> None:
    manager = open_manager(20)
    request = StubRequest("a", list(range(20)), 4)
    empty, hits, boundary = manager.get_computed_blocks(request)
    assert (empty.ids, hits, boundary) == ([], 0, 0)
    assert manager.allocate_slots(request, 20).ids == manager.get_blocks("a").ids and manager.usage == 3 / 18
    request.num_computed_tokens = 20
    assert manager.estimate_cached_tokens(request) == 16
    assert manager.get_block_ids_for_computed_tokens("a", 9)[0] == manager.get_block_ids("a")[0][:2]
    assert manager.coordinator.get_num_blocks_to_allocate("a", 33, ()) == 2
    assert manager.coordinator.get_num_blocks_to_allocate("b", 33, ()) == 5
    assert [group.block_size for group in manager.coordinator.single_type_managers] == [SIZE]
    again = StubRequest("b", list(range(20)), 4)
    hits = manager.get_computed_blocks(again)[1]
    manager.record_prefix_cache_stats(again, hits)
    stats = manager.make_prefix_cache_stats()
    assert (hits, stats.hits, stats.queries, manager.make_prefix_cache_stats().hits) == (16, 16, 20, 0)
    assert not manager.reset_prefix_cache()
    # A free that waits for the device: the request may begin again before its first blocks are given back.
    first = manager.pop_blocks_for_free(request)
    assert manager.get_block_ids("a") == ([],) and manager.usage > 0
    request.num_computed_tokens = 0
    assert manager.allocate_slots(request, 4, 16).ids != []
    manager.block_pool.free_blocks(reversed(first))
    assert manager.block_pool.get_usage() == manager.usage == 3 / 18
    manager.free(request)
    manager.free(request)  # as the stock manager: nothing
    assert manager.block_pool.get_num_free_blocks() == 18 and manager.reset_prefix_cache()
    assert manager.get_computed_blocks(again)[1] == 0 and manager.prefix_cache_stats.reset


def test_what_the_kv_depends_on_beside_its_tokens() -> None:
    manager = open_manager(60)
    tokens = list(range(20))
    image = SimpleNamespace(mm_position=SimpleNamespace(offset=8), identifier="image 1")
    kinds: list[dict[str, Any]] = [
        {}, {"cache_salt": "tenant"}, {"mm_features": [image]},
        {"lora_request": SimpleNamespace(lora_name="adapter", lora_path="/a")},
        {"lora_request": SimpleNamespace(lora_name="adapter", lora_path="/b")},  # the name was given to another
    ]  # fmt: skip
    for i, kind in enumerate(kinds):
        for j, hits in enumerate([8 if "mm_features" in kind else 0, 16]):  # tokens before the image are the same
            request = StubRequest(f"{i} {j}", list(tokens), 1, **kind)
            assert manager.get_computed_blocks(request)[1] == hits
            manager.allocate_slots(request, 20 - hits, hits)
    session = StubRequest("session", list(tokens), 1, resumable=True)  # images may be added to it later
    assert manager.get_computed_blocks(session)[1] == 0


def test_a_hit_that_is_gone_is_no_hit() -> None:
    """Between the question and the admission the scheduler may ask a connector, which may do anything."""
    manager = open_manager(20)
    request = StubRequest("a", list(range(20)), 4)
    manager.allocate_slots(request, 20)
    request.num_computed_tokens = 20
    manager.free(request)
    again = StubRequest("b", list(range(20)), 4)
    hits = manager.get_computed_blocks(again)[1]
    assert hits == 16 and manager.reset_prefix_cache()
    assert manager.allocate_slots(again, 4, hits) is None and manager.usage == 0
    assert manager.get_computed_blocks(again)[1] == 0 and manager.allocate_slots(again, 20) is not None


def test_loads_of_a_connector_are_published_when_it_says_so() -> None:
    manager = open_manager(20, ahead=False)
    request = StubRequest("a", list(range(24)), 4)
    assert len(manager.allocate_slots(request, 0, num_external_computed_tokens=16, delay_cache_blocks=True).ids) == 2
    other = StubRequest("b", list(range(24)), 4)
    assert manager.get_computed_blocks(other)[1] == 0
    request.num_computed_tokens = 8  # the load of the second block failed
    manager.cache_blocks(request, 8)
    assert manager.get_computed_blocks(other)[1] == 8
    assert len(manager.allocate_slots(request, 16).ids) == 1  # the two are still its own
    assert len(manager.get_block_ids("a")[0]) == 3


def test_a_load_that_was_not_confirmed_is_not_published() -> None:
    """vLLM frees an aborted request when its load has ended, well or not, with all its tokens counted as computed."""
    for later, new in ((True, 0), (False, 8)):  # with the load in the same step, the abort comes before its output
        manager = open_manager(20, ahead=False)
        gone, other = StubRequest("gone", list(range(24)), 4), StubRequest("other", list(range(24)), 4)
        manager.allocate_slots(gone, new, num_external_computed_tokens=16, delay_cache_blocks=later)
        gone.num_computed_tokens, gone.num_in_flight_tokens = 16 + new, new
        manager.free(gone)
        assert manager.get_computed_blocks(other)[1] == 0 and manager.usage == 0
    manager.allocate_slots(other, 8, num_external_computed_tokens=16)
    other.num_computed_tokens = 24  # the output has told nothing bad
    manager.free(other)
    assert manager.get_computed_blocks(gone)[1] == 16


@pytest.mark.parametrize("case", ["small pool", "no prefix cache", "window"])
def test_memory_of_freed_blocks_can_be_given_back(case: str, seed: int) -> None:
    """The worker forgets what it is told: tokens stay right, and it keeps what requests and cached content use."""
    draw, options = random.Random(f"{seed} {case}"), CASES[case]
    manager = open_manager(**options)
    assert manager.take_freed_blocks() == []
    worker = Worker(SIZE, options.get("window_tokens"))
    scheduler = StubScheduler(manager, worker, budget=64)
    texts = [[draw.randrange(VOCABULARY) for _ in range(60)] for _ in range(3)]
    prompts, most, turn = dict[str, list[int]](), 0, 0
    while turn < 60 or scheduler.running or scheduler.waiting:
        if turn < 60 and draw.random() < 0.5:
            request = draw_request(draw, f"request {turn}", texts)
            prompts[request.request_id] = list(request.all_token_ids)
            scheduler.waiting.append(request)
        for request in scheduler.step():
            assert request.output == expected(prompts[request.request_id], request.max_tokens, worker.window)
        freed = set(manager.take_freed_blocks())
        assert not freed & {block for name in list(manager._held) for block in manager.get_block_ids(name)[0]}
        worker.memory = {at: value for at, value in worker.memory.items() if at[0] not in freed}
        resident = len({block for block, _ in worker.memory})
        stats = manager.allocator.stats()
        assert resident * manager.allocator.pool.page_bytes <= stats.held_bytes + stats.cached_bytes
        most, turn = max(most, resident), turn + 1
    assert manager.reset_prefix_cache()
    left = {block for block, _ in worker.memory} - set(manager.take_freed_blocks())
    assert left == set() and most > 5 and manager.allocator.check() == []


@pytest.mark.parametrize("num_blocks", [0, 1, 2])
def test_a_pool_without_a_block(num_blocks: int) -> None:
    with pytest.raises(SpecError, match=f"has {num_blocks} blocks, of which kvmem reserves 2"):
        open_manager(num_blocks)


@pytest.mark.parametrize("size", [1, 16, 48, 128])
def test_ids_stay_below_the_pool_and_off_the_null_block(size: int) -> None:
    manager = open_manager(23, block_size=size, max_model_len=21 * size)
    request = StubRequest("a", [7] * (21 * size), 1)
    blocks = manager.allocate_slots(request, 21 * size).ids
    assert sorted(blocks) == list(range(2, 23)) and manager.usage == 1
    assert manager.allocate_slots(StubRequest("b", [7], 1), 1) is None
    assert manager.block_pool.get_num_free_blocks() == 0
