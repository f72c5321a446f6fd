"""Decode steps of a real model through ``KVMemCache`` and transformers' ``DynamicCache``, on one thread, in turn."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from time import thread_time_ns
from typing import Any

import torch

from kvmem.bench.language_models import load_language_model
from kvmem.bench.model import BACKENDS
from kvmem.bench.text import BenchError
from kvmem.bench.timing import WARM_UP, Ratio, Spread, one_thread

DYNAMIC = "DynamicCache, sdpa"
_SEED = 20250612


@dataclass(frozen=True)
class DecodeRow:
    """One token a step, after a prompt of ``context`` tokens. us: CPU time of the whole model's step. speed: that of
    ``DynamicCache`` over it, by step.
    """

    model: str
    cache: str
    context: int
    us: Spread
    speed: Ratio


def decode(which: str, contexts: list[int], repetitions: int) -> list[DecodeRow]:
    """A row for each context and cache. which: of ``load_language_model``. ``BenchError`` where a package is missing,
    or where the caches do not lead to the same tokens.
    """
    loaded = load_language_model(which)
    rows: list[DecodeRow] = []
    with one_thread(), torch.no_grad():
        for context in contexts:
            rows += _measure(loaded.name, loaded.model, context, repetitions)
    return rows


def _measure(name: str, model: Any, context: int, repetitions: int) -> list[DecodeRow]:
    from transformers import DynamicCache

    from kvmem.integrations.transformers import KVMemCache

    before = model.config._attn_implementation
    draw = torch.Generator().manual_seed(_SEED)
    prompt = torch.randint(5, model.config.vocab_size, (1, context), generator=draw)
    sizes: dict[str, Any] = {"memory": "1GiB", "max_batch": 1, "max_tokens": context + repetitions + WARM_UP + 1}
    ways: dict[str, tuple[Any, str]] = {DYNAMIC: (DynamicCache(config=model.config), "sdpa")}
    for backend in BACKENDS:
        for attention in ("sdpa", "kvmem"):
            ways[f"{backend}, {attention}"] = KVMemCache(model, backend=backend, **sizes), attention
    next_token, times = dict[str, torch.Tensor](), dict[str, list[int]]()
    order, names = Random(_SEED), list(ways)
    try:
        for step in range(1 + WARM_UP + repetitions):
            for way in order.sample(names, len(names)):
                cache, attention = ways[way]
                model.set_attn_implementation(attention)
                start = thread_time_ns()
                logits = model(prompt if step == 0 else next_token[way], past_key_values=cache, use_cache=True).logits
                spent = thread_time_ns() - start
                next_token[way] = logits[:, -1:].argmax(-1)
                if step > WARM_UP:
                    times.setdefault(way, []).append(spent)
            if len({int(token) for token in next_token.values()}) > 1:
                raise BenchError(f"the caches led to different tokens: {next_token}")
    finally:
        model.set_attn_implementation(before)
        for cache, _ in ways.values():
            if isinstance(cache, KVMemCache):
                cache.close()
    return [
        DecodeRow(name, way, context, Spread.of_ns(times[way]), Ratio.of(times[DYNAMIC], times[way])) for way in names
    ]
