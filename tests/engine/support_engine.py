"""What the tests of the engine share: a tiny model, its schedulers, and a slow judge of the tokens they give."""

from __future__ import annotations

import copy
import random
import time
from functools import cache
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvmem
from examples.engine.sampling import Sampling
from examples.engine.scheduler import Request, Scheduler

VOCAB = 512


@cache
def tiny() -> Any:
    """Random weights, larger than usual: its answers vary."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=2048, initializer_range=0.3, bos_token_id=None,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tiny_spec() -> kvmem.CacheSpec:
    return kvmem.CacheSpec.from_config(tiny().config, dtype=torch.float32, block_size=16)


@cache
def judge() -> Any:
    """The same weights in float64 with torch's SDPA, no cache and no batch: nothing of the engine."""
    model = copy.deepcopy(tiny()).double()
    model.set_attn_implementation("sdpa")
    return model


def assert_greedy(prompt: list[int], answer: list[int], model: Any = None, margin: float = 1e-3) -> None:
    """Each token is the likeliest behind those before it. margin: of logits, for ties that float32 decides otherwise."""
    with torch.inference_mode():
        logits = (model or judge())(torch.tensor([prompt + answer])).logits[0]
    scores = logits[len(prompt) - 1 : -1]
    chosen = scores.gather(1, torch.tensor(answer)[:, None])[:, 0]
    behind = scores.max(-1).values - chosen
    assert float(behind.max()) < margin, f"token {int(behind.argmax())} of {answer} behind {prompt}"


def scheduler(
    backend: str, *, tokens: int = 1024, max_running: int = 8, batch_tokens: int = 64, **options: Any
) -> Scheduler:
    """Over memory for about ``tokens`` tokens. options: ``keep`` of the scheduler, others of the allocator."""
    keep = options.pop("keep", False)
    spec = tiny_spec()
    alloc = kvmem.Allocator(
        spec, backend=backend, device="cpu", memory=tokens * spec.bytes_per_token, page_bytes=4096,
        max_sequences=max_running, max_tokens=1024, **options,
    )  # fmt: skip
    return Scheduler(tiny(), alloc, max_running=max_running, batch_tokens=batch_tokens, keep=keep)


def greedy(prompt: list[int], max_tokens: int = 16, salt: str | None = None) -> Request:
    return Request(prompt, Sampling(max_tokens, temperature=0.0), salt)


def words(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(count)]


def answer(request: Request) -> list[int]:
    return request.tokens[len(request.prompt) :]


def run(engine: Scheduler, *requests: Request) -> dict[Request, str]:
    """Add the requests, step until all that are there have ended; return the reasons."""
    for request in requests:
        engine.add(request)
    reasons = {}
    for _ in range(10_000):
        for request, _, reason in engine.step():
            if reason is not None:
                reasons[request] = reason
        if not engine.running and not engine.waiting:
            return reasons
        if not engine.running:
            time.sleep(0.001)  # for a load
    raise AssertionError(f"{len(engine.running)} run and {len(engine.waiting)} wait after 10,000 steps")


def assert_back_to_start(engine: Scheduler, mapped_bytes: int) -> None:
    """No sequence is left, and all memory goes back to what was mapped at the start."""
    alloc = engine.allocator
    assert alloc.check() == []
    assert len(engine.cache) == 0 and alloc.stats().num_sequences == 0 and alloc.stats().used_bytes == 0
    alloc.clear_cache()
    alloc.trim()
    assert alloc.stats().mapped_bytes <= mapped_bytes and alloc.check() == []
