"""transformers' continuous batching over kvmem's memory: the tokens of transformers' own cache, whatever the pool, the
blocks, the attention, and which requests are preempted or cancelled; and what is refused.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from importlib import import_module
from random import Random
from typing import Any

import pytest
import torch
from support_transformers import IDS, VOCABULARY, make_gemma, make_llama, one_thread  # noqa: F401

from kvmem import OutOfMemory, SpecError
from kvmem.integrations.transformers import continuous_batching
from kvmem.tiers import Tiers

pytest.importorskip("transformers", minversion="5.23", reason="needs the extra kvmem[transformers]")

from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel, Qwen3NextConfig

from kvmem.integrations.transformers.batching import names

pytestmark = pytest.mark.timeout(120)

NEW_TOKENS = 16
GREEDY = GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=-1, pad_token_id=0)
# Weights and prompts have fixed seeds, since tokens are compared: no choice between two ids may hang on the last bits,
# which differ with the batch that a request is in. `world` asserts that none does.
_random = Random(11)
BEGIN = [_random.randrange(3, VOCABULARY) for _ in range(40)]
PROMPTS = [
    BEGIN[: _random.randrange(41)] + [_random.randrange(3, VOCABULARY) for _ in range(_random.randrange(1, 24))]
    for _ in range(9)
]
MAKERS = {"llama": make_llama, "gemma3": make_gemma}
_worlds: dict[str, tuple[PreTrainedModel, list[list[int]]]] = {}


def world(name: str) -> tuple[PreTrainedModel, list[list[int]]]:
    """A model, and what transformers' own cache makes of the prompts."""
    if name not in _worlds:
        model = MAKERS[name]()
        config = ContinuousBatchingConfig(page_size=16, num_blocks=64, max_batch_tokens=64)
        outputs = model.generate_batch(PROMPTS, generation_config=GREEDY, continuous_batching_config=config)
        tokens = [output.generated_tokens for output in outputs.values()]
        assert len({tuple(t) for t in tokens}) == len(PROMPTS)
        for prompt, new in zip(PROMPTS, tokens, strict=True):
            with torch.no_grad():
                top = model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1].topk(2).values
            assert (top[:, 0] - top[:, 1]).min() > 1e-4
        _worlds[name] = model, tokens
    return _worlds[name]


class Watch:
    """Counts preemptions of a manager, and holds every step to the block tables that earlier steps were told."""

    def __init__(self, manager: Any) -> None:
        self.preempted = 0
        self._told: dict[tuple[int, int], list[int]] = {}
        self._cache, offloading = manager.cache, manager._processor.offloading_manager
        self._fill, self._requeue = self._cache.allocator.fill, offloading._offload_to_cpu
        self._cache.allocator.fill, offloading._offload_to_cpu = self.fill, self.requeue

    def requeue(self, states: list[Any], tables: Any) -> set[str]:
        self.preempted += len(states)
        return self._requeue(states, tables)

    def fill(self, handles: list[int], batch: Any, **options: Any) -> None:
        self._fill(handles, batch, **options)
        for g, group in enumerate(self._cache.allocator.spec.groups):
            of = batch.group(g)
            for row, handle in enumerate(handles):
                blocks = of.block_table[row, : -(-int(of.seq_lens[row]) // of.block_size)].tolist()
                for was, now in zip(self._told.get((handle, g), []), blocks, strict=False):
                    assert now == was or (now == 0 and group.window_tokens is not None)
                self._told[handle, g] = blocks


def session(manager: Any, prompts: list[list[int]], **options: Any) -> dict[str, Any]:
    """The results by request; all requests are there before the first step, so that it does not depend on timing."""
    with manager.pause():
        ids = {manager.add_request(prompt, **options) for prompt in prompts}
    results: dict[str, Any] = {}
    while len(results) < len(ids):
        result = manager.get_result(timeout=60)
        assert result is not None
        assert result.error is None
        results[result.request_id] = result
    return results


def tokens_of(results: dict[str, Any]) -> list[list[int]]:
    return [results[key].generated_tokens for key in sorted(results, key=lambda key: int(key.removeprefix("req_")))]


def assert_empty(manager: Any) -> None:
    allocator = manager.cache.allocator
    assert (allocator.check(), allocator.stats().num_sequences) == ([], 0)


@pytest.mark.parametrize("name", list(MAKERS))
@pytest.mark.parametrize("attention", ["transformers", "kvmem"])
def test_random_worlds(name: str, attention: Any, backend: str, rng: Random) -> None:
    """Blocks, steps, sharing, tiers and scheduler are drawn; the pool holds two or three of the nine requests."""
    model, expected = world(name)
    share = rng.random() < 0.7
    options: dict[str, Any] = {"tiers": Tiers(host="1MiB")} if share and rng.random() < 0.5 else {}
    config = ContinuousBatchingConfig(
        page_size=rng.choice([4, 7, 16]), max_batch_tokens=rng.choice([11, 24, 64]), allow_block_sharing=share,
        safety_margin=0.0, scheduler_type=rng.choice(["fifo", "prefill_first"]),
    )  # fmt: skip
    where = {"backend": backend, "page_bytes": 4096, "memory": 4096 * 36, "interleave": "all", "debug": True}
    with continuous_batching(
        model, generation_config=GREEDY, config=config, attention=attention, **where, **options
    ) as manager:
        Watch(manager)
        assert tokens_of(session(manager, PROMPTS)) == expected, (config, options)
        assert_empty(manager)
        assert share or manager.cache.allocator.stats().hit_tokens == 0
    assert model.config._attn_implementation == "sdpa"


def test_preempted_requests_come_back_from_the_host(backend: str, seed: int) -> None:
    """What was preempted is found again, in the pool or in host memory: fewer tokens are computed than without."""
    model, expected = world("llama")
    computed = []
    for share in (False, True):
        config = ContinuousBatchingConfig(
            page_size=4, max_batch_tokens=64, allow_block_sharing=share, safety_margin=0.0
        )  # fmt: skip
        options: dict[str, Any] = {"tiers": Tiers(host="4MiB")} if share else {}
        with continuous_batching(
            model,
            memory=4096 * 30,
            page_bytes=4096,
            generation_config=GREEDY,
            config=config,
            backend=backend,
            **options,
        ) as manager:
            watch, total = Watch(manager), 0
            extend = manager.cache.extend_read_and_write_indices

            def counted(request: str, past: int, new: int, *rest: Any, extend: Any = extend) -> None:
                nonlocal total
                total += new
                extend(request, past, new, *rest)

            manager.cache.extend_read_and_write_indices = counted
            assert tokens_of(session(manager, PROMPTS)) == expected
            assert watch.preempted > 0
            computed.append(total)
    assert computed[1] < computed[0]


def test_cancelled_requests(backend: str) -> None:
    """One while it waits, one in the middle of its answer; the others are not disturbed, and nothing is left."""
    model, expected = world("llama")
    with continuous_batching(model, memory="4MiB", generation_config=GREEDY, backend=backend) as manager:
        with manager.pause():
            for number, prompt in enumerate(PROMPTS):
                manager.add_request(
                    prompt, f"req_{number}", streaming=number == 3, max_new_tokens=400 if number == 3 else None
                )
            manager.cancel_request("req_5")
        results: dict[str, Any] = {}
        cancelled = False
        while len(results) < len(PROMPTS) - 2:
            result = manager.get_result(timeout=60)
            if result.request_id != "req_3":
                results[result.request_id] = result
            elif not cancelled:
                cancelled = True
                manager.cancel_request("req_3")
        assert cancelled
        assert tokens_of(results) == [t for n, t in enumerate(expected) if n not in (3, 5)]
        manager.stop()
        assert_empty(manager)


def test_generate_batch_and_forks(backend: str) -> None:
    """``generate_batch`` runs over kvmem each time, and so do samples of one prompt, which share its blocks."""
    model, expected = world("gemma3")
    several = GenerationConfig(**{**GREEDY.to_dict(), "num_return_sequences": 1})
    several.num_return_sequences = 3  # transformers refuses several greedy answers, but only when it makes a config
    with continuous_batching(model, memory="4MiB", generation_config=several, backend=backend) as manager:
        for _ in range(2):
            outputs = model.generate_batch(PROMPTS, generation_config=several)
            assert [o.generated_tokens for o in outputs.values()] == [t for t in expected for _ in range(3)]
            assert_empty(manager)
        assert manager.cache.allocator.stats().hit_tokens > 0
    assert not hasattr(model, "_cached_continuous_batching_manager")


def test_an_error_in_the_body_stops_at_once() -> None:
    model, _ = world("llama")
    with (
        pytest.raises(ZeroDivisionError),
        continuous_batching(model, memory="4MiB", generation_config=GREEDY) as manager,
    ):
        manager.add_request(PROMPTS[0])
        raise ZeroDivisionError
    assert not manager.is_running()


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "config", "message"),
    [
        ({"memory": 4096}, {}, "memory"),
        ({"attention": "flash"}, {}, "attention"),
        ({"prefix_cache": True}, {"allow_block_sharing": False}, "prefix_cache"),
        ({"tiers": Tiers(host="1MiB")}, {"allow_block_sharing": False}, "tiers"),
        ({}, {"page_size": 2}, "page_size"),
        ({}, {"page_size": 8192}, "page_size"),
        ({}, {"max_batch_tokens": 0}, "max_batch_tokens"),
        ({}, {"num_blocks": 8}, "memory= says"),
        ({}, {"cpu_offload_space": 1.0}, "tiers="),
        ({}, {"use_async_batching": True}, "for GPUs"),
        ({}, {"default_compile_level": 1}, "compiled"),
        ({}, {"scheduler_type": "priority"}, "scheduler_type"),
    ],
)
def test_arguments(options: dict[str, Any], config: dict[str, Any], message: str) -> None:
    model, _ = world("llama")
    before = model.config._attn_implementation
    given = {"memory": "4MiB", "generation_config": GREEDY} | options
    with (
        pytest.raises((SpecError, OutOfMemory), match=message),
        continuous_batching(model, config=ContinuousBatchingConfig(**config), **given),
    ):
        pass
    assert model.config._attn_implementation == before
    assert not hasattr(model, "_cached_continuous_batching_manager")


def test_models() -> None:
    model = make_llama(layers=1)
    with continuous_batching(model, memory="1MiB"), pytest.raises(SpecError, match="keeps a manager"):
        continuous_batching(model, memory="1MiB").__enter__()
    model.set_attn_implementation("kvmem")
    with pytest.raises(SpecError, match="must be sdpa or eager"):
        continuous_batching(model, memory="1MiB").__enter__()
    with continuous_batching(model, memory="1MiB", attention="kvmem"):
        pass
    assert model.config._attn_implementation == "kvmem"
    with pytest.raises(SpecError, match="must be a model"):
        continuous_batching("llama", memory="1MiB").__enter__()  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="one CPU"):
        continuous_batching(make_llama(layers=1).to("meta"), memory="1MiB").__enter__()
    model.config = Qwen3NextConfig(num_hidden_layers=4, **IDS)  # every fourth layer has attention
    with pytest.raises(SpecError, match="linear_attention"):
        continuous_batching(model, memory="1MiB").__enter__()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"input_ids": []}, "one or more"),
        ({"input_ids": [1.5]}, "one or more"),
        ({"input_ids": [[1, 2], [3]]}, "one or more"),
        ({"input_ids": [3], "max_new_tokens": 0}, "max_new_tokens"),
        ({"input_ids": [VOCABULARY]}, "ids 0 to"),
        ({"input_ids": [-1]}, "ids 0 to"),
        ({"input_ids": [3] * 200}, "room for"),
        ({"input_ids": [3], "max_new_tokens": 200}, "room for"),
        ({"input_ids": [3], "request_id": "here"}, "not ended"),
    ],
)
def test_requests(request_: dict[str, Any], message: str) -> None:
    """Each would end the session of all requests, since transformers sees it in the middle of a step."""
    model, expected = world("llama")
    with continuous_batching(
        model, memory=4096 * 24, page_bytes=4096, interleave="all", generation_config=GREEDY
    ) as manager:
        with manager.pause():
            manager.add_request(PROMPTS[0], "here")
            with pytest.raises(SpecError, match=message):
                manager.add_request(**request_)
        assert manager.get_result(timeout=60).generated_tokens == expected[0]


# --- the names of transformers ---


def read_from(owners: set[str], *modules: str) -> set[str]:
    """The attributes that modules of continuous batching read of variables or attributes with one of these names."""

    def inside(tree: ast.AST) -> Iterator[str]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                owner = node.value
                if getattr(owner, "id", getattr(owner, "attr", None)) in owners:
                    yield node.attr

    package = "transformers.generation.continuous_batching"
    return {
        name
        for module in modules
        for name in inside(ast.parse(inspect.getsource(import_module(f"{package}.{module}"))))
    }


def test_every_name_that_transformers_reads_is_there() -> None:
    """The list of foreign names: what a version begins to read of the cache, or ceases to have, fails here."""
    assert names.differences() == []
    callers = ("scheduler", "input_outputs", "model_runner", "offloading_manager", "continuous_api", "requests")
    with continuous_batching(make_llama(layers=1), memory="1MiB") as manager:
        cache = manager.cache
        (kind,) = cache.cache_allocators.values()
        wanted = read_from({"cache", "paged_attention_cache"}, *callers)
        replaced = set(vars(type(cache))) | set(vars(cache)) | names.NOT_CALLED
        assert wanted - replaced == set()
        of_kinds = read_from({"allocator", "cache_allocator", "ca"}, *callers)
        # Of the requests that move to transformers' own host memory, which is refused.
        offload = {"blocks_per_sector", "bytes_per_block", "_copy_view"}
        assert {name for name in of_kinds if not hasattr(kind, name)} == offload


@pytest.mark.parametrize("change", ["gone", "argument", "new"])
def test_another_version_is_refused_in_one_sentence(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = import_module("transformers.generation.continuous_batching.cache").PagedAttentionCache
    if change == "gone":
        monkeypatch.delattr(cache, "prepare_fork_request")
    elif change == "argument":
        monkeypatch.setattr(cache, "free_blocks", lambda self, request_id: None)
    else:
        monkeypatch.setattr(cache, "compact_blocks", lambda self: None, raising=False)
    wanted = {"gone": "prepare_fork_request` is gone", "argument": "takes no no_cache", "new": "compact_blocks` is new"}
    with pytest.raises(SpecError, match=rf"made for transformers 5.*{wanted[change]}.*install transformers"):
        continuous_batching(world("llama")[0], memory="1MiB").__enter__()
