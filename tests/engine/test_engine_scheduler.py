"""The engine's scheduler without HTTP: whatever is chunked, shared, preempted or aborted, tokens are those of one request
alone, and memory comes back."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23", reason="the engine's models need kvmem[transformers]")

from support_engine import (
    VOCAB,
    answer,
    assert_back_to_start,
    assert_greedy,
    greedy,
    run,
    scheduler,
    tiny,
    tiny_spec,
    words,
)
from transformers import GPT2Config, GPT2LMHeadModel

import kvmem
from examples.engine.sampling import Sampling, choose
from examples.engine.scheduler import Request, Scheduler
from kvmem.tiers import Identity, Tiers, largest_block_bytes
from kvmem.tiers.disk import DiskTier


def test_a_long_prompt_comes_in_chunks_while_others_go_on(backend: str, rng: random.Random) -> None:
    engine = scheduler(backend, batch_tokens=32)
    short, long = greedy(words(rng, 5), 20), greedy(words(rng, 200), 8)
    engine.add(short)
    assert [output[0] for output in engine.step()] == [short]
    engine.add(long)
    for done in range(31, 187, 31):  # one token of each batch is the short one's, which gets another each time
        before = engine.counters["computed_tokens"]
        assert [output[0] for output in engine.step()] == [short]
        assert (long.computed, engine.counters["computed_tokens"] - before) == (done, 32)
    assert {output[0] for output in engine.step()} == {short, long}
    run(engine)
    for request in (short, long):
        assert len(set(answer(request))) > 4  # or equal tokens would prove little
        assert_greedy(request.prompt, answer(request))


def test_a_prompt_is_found_by_others_of_its_salt(backend: str, rng: random.Random) -> None:
    engine, prompt = scheduler(backend), words(rng, 100)
    first, again, other = greedy(prompt), greedy([*prompt[:80], *words(rng, 20)]), greedy(prompt, salt="tenant")
    run(engine, first)
    run(engine, again, other)
    assert first.cached_tokens == 0 and again.cached_tokens >= 64 and other.cached_tokens == 0
    assert engine.counters["cached_tokens"] == again.cached_tokens
    for request in (first, again, other):
        assert_greedy(request.prompt, answer(request))
    assert answer(first) == answer(other)


@pytest.mark.parametrize("host", [None, "1MiB"], ids=["recompute", "offload"])
def test_preemption(backend: str, rng: random.Random, host: str | None) -> None:
    """Four that fit one by one, and not together. With host memory, what was evicted comes back instead."""
    engine = scheduler(backend, tokens=224, tiers=None if host is None else Tiers(host))
    mapped_bytes = engine.allocator.stats().mapped_bytes
    requests = [greedy(words(rng, 60), 40) for _ in range(4)]
    assert set(run(engine, *requests).values()) == {"length"}
    assert engine.counters["preemptions"] > 0
    lost = engine.counters["recomputed_tokens"]
    if host is None:
        assert lost > 0
    else:  # the rest of a block; on the virtual backend blocks share pages, so there it is the same
        assert lost <= 16 * engine.counters["preemptions"] and engine.allocator.tiering.counters["host"] > 0
    for request in requests:
        assert_greedy(request.prompt, answer(request))
    assert_back_to_start(engine, mapped_bytes)


def tiers_of(tmp_path: Path) -> tuple[Tiers, DiskTier]:
    spec, who = tiny_spec(), Identity("tiny")
    disk = DiskTier(tmp_path, capacity="2MiB", block_bytes=largest_block_bytes(spec), fingerprint=who.fingerprint(spec))
    return Tiers("256KiB", [disk], who), disk


def test_a_restart_finds_prompts_on_disk(backend: str, rng: random.Random, tmp_path: Path) -> None:
    pytest.importorskip("xxhash", reason="checksums of kvmem[tiers]")
    prompt, found = words(rng, 100), []
    for _ in range(2):
        tiers, disk = tiers_of(tmp_path)
        engine = scheduler(backend, tiers=tiers, keep=True)
        request = greedy(prompt)
        run(engine, request)
        assert engine.allocator.flush(30)
        engine.allocator.close()
        disk.close()
        found.append((request.cached_tokens, answer(request)))
    assert found == [(0, found[0][1]), (96, found[0][1])]


@pytest.mark.parametrize("tier", ["none", "host", "disk"])
def test_random_requests_and_aborts(backend: str, rng: random.Random, tmp_path: Path, tier: str) -> None:
    """What is asked for, and when it is aborted, is drawn; the pool holds a fraction of it."""
    tiers = {"none": lambda: None, "host": lambda: Tiers("512KiB"), "disk": lambda: tiers_of(tmp_path)[0]}[tier]()
    engine = scheduler(
        backend,
        tokens=320,
        max_running=rng.randint(3, 8),
        batch_tokens=rng.choice([8, 17, 64]),
        tiers=tiers,
        keep=tier == "disk",
    )
    mapped_bytes = engine.allocator.stats().mapped_bytes
    starts = [words(rng, rng.randint(1, 60)) for _ in range(4)]
    live, ended = [], []
    for number in range(16):
        prompt = rng.choice(starts) + words(rng, rng.randint(0, 40))
        request = greedy(prompt, rng.randint(1, 30), rng.choice([None, "a"]))
        engine.add(request)
        live.append(request)
        for _ in range(rng.randint(0, 6) if number < 15 else 10_000):
            for one, _, reason in engine.step():
                if reason is not None:
                    assert reason == "length" and len(answer(one)) == one.sampling.max_tokens
                    live.remove(one)
                    ended.append(one)
            if rng.random() < 0.05 and live:
                gone = live.pop(rng.randrange(len(live)))
                engine.abort(gone)
                assert gone not in engine.cache and gone not in engine.waiting and gone not in engine.running
                engine.abort(gone)  # no error
            if not live:
                break
        assert engine.allocator.check() == []
    assert not engine.running and not engine.waiting and len(ended) + engine.counters["aborted"] == 16
    assert ended
    for request in ended:
        assert_greedy(request.prompt, answer(request))
    assert_back_to_start(engine, mapped_bytes)
    engine.allocator.close()


def test_draws_do_not_depend_on_the_batch(backend: str, rng: random.Random) -> None:
    sampling = Sampling(24, temperature=1.0, top_p=0.9, top_k=40, seed=rng.randrange(2**31))
    prompt, others = words(rng, 30), [Request(words(rng, 20), Sampling(30)) for _ in range(4)]
    alone, together, unlike = (Request(prompt, s) for s in (sampling, sampling, Sampling(24, seed=1 + sampling.seed)))
    run(scheduler(backend), alone)
    run(scheduler(backend, tokens=160), *others, together, unlike)
    assert alone.tokens == together.tokens != unlike.tokens
    assert len({tuple(one.tokens) for one in others}) == 4


def test_a_request_ends_at_the_end_of_text(backend: str, rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    free = greedy(words(rng, 10), 12)
    run(scheduler(backend), free)
    last = answer(free)[5]
    monkeypatch.setattr(tiny().generation_config, "eos_token_id", last)
    engine, stops = scheduler(backend), greedy(free.prompt, 12)
    goes_on = Request(free.prompt, Sampling(12, temperature=0.0, ignore_eos=True))
    assert run(engine, stops, goes_on) == {stops: "stop", goes_on: "length"}
    assert answer(stops) == answer(free)[: answer(free).index(last) + 1] and answer(goes_on) == answer(free)


def test_memory_that_somebody_else_takes(backend: str, rng: random.Random) -> None:
    engine = scheduler(backend, tokens=128)
    request = greedy(words(rng, 20), 60)
    engine.add(request)
    engine.step()
    with engine.allocator.sequence() as other:
        while other.try_extend(1):
            pass
        assert run(engine) == {request: "error"}
    assert engine.allocator.check() == [] and request not in engine.cache
    run(engine, request := greedy(request.prompt, 60))
    assert_greedy(request.prompt, answer(request))


def test_what_can_never_be_served_is_refused(backend: str, rng: random.Random) -> None:
    engine = scheduler(backend, tokens=96)
    assert 48 <= engine.max_tokens <= 96
    for prompt, more in (([], 1), (words(rng, engine.max_tokens), 1), ([1], engine.max_tokens)):
        with pytest.raises(kvmem.SpecError, match="tokens at most"):
            engine.add(greedy(prompt, more))
    assert not engine.waiting
    run(engine, longest := greedy([1], engine.max_tokens - 1))
    assert len(longest.tokens) == engine.max_tokens
    with pytest.raises(kvmem.SpecError, match="max_running"):
        scheduler(backend, max_running=8, batch_tokens=7)


def test_a_model_with_windows_is_refused() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=32,
    )  # fmt: skip
    spec = kvmem.CacheSpec.from_config(config, dtype=torch.float32)
    alloc = kvmem.Allocator(spec, backend="paged", device="cpu", memory="1MiB", max_sequences=2, max_tokens=64)
    with pytest.raises(kvmem.SpecError, match="mistral: this engine needs full attention"):
        Scheduler(MistralForCausalLM(config), alloc, max_running=2, batch_tokens=8)


def draws(logits: torch.Tensor, count: int = 300, **options: Any) -> set[int]:
    sampling, generator = Sampling(**options), torch.Generator().manual_seed(0)
    return {choose(logits, sampling, generator) for _ in range(count)}


def test_choices() -> None:
    """The seed is fixed: that a token of probability 0.1 or more is not among 300 draws has a chance of 2e-14."""
    logits = torch.tensor([0.5, 0.1, 0.3, 0.1]).log()
    assert draws(logits) == {0, 1, 2, 3}
    assert draws(logits, temperature=0.0) == draws(logits, top_k=1) == draws(logits, top_p=1e-9) == {0}
    assert draws(logits, top_k=2) == draws(logits, top_p=0.79) == {0, 2}
    assert draws(logits, top_k=3, top_p=0.45) == {0} and draws(logits, top_k=100) == {0, 1, 2, 3}
    for tiniest in (1e-38, 1e-3):
        assert draws(logits * 1e4, temperature=tiniest) == {0}
    assert len(draws(torch.zeros(10_000), 50)) > 40  # equal tokens, all as likely


def test_an_end_of_text_that_is_token_0(backend: str, rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny().generation_config, "eos_token_id", 0)
    engine, request = scheduler(backend), greedy(words(rng, 10), 12)
    engine._run = lambda handles, tokens, rows: torch.eye(VOCAB)[[0] * len(rows)]  # type: ignore[assignment]
    assert run(engine, request) == {request: "stop"} and answer(request) == [0]


def test_layers_that_scale_their_scores_in_ways_of_their_own(backend: str, rng: random.Random) -> None:
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=64, n_layer=4, n_head=4, n_positions=256, initializer_range=0.3,
        scale_attn_by_inverse_layer_idx=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    slow = copy.deepcopy(model).double()
    slow.set_attn_implementation("eager")
    spec = kvmem.CacheSpec.from_config(config, dtype=torch.float32, block_size=16)
    sizes: dict[str, Any] = {"memory": "8MiB", "max_sequences": 4, "max_tokens": 256}
    alloc = kvmem.Allocator(spec, backend=backend, device="cpu", **sizes)  # type: ignore[arg-type]
    requests = [greedy(words(rng, 40), 20) for _ in range(3)]
    run(Scheduler(model, alloc, max_running=4, batch_tokens=32), *requests)
    for request in requests:
        assert_greedy(request.prompt, answer(request), slow)
