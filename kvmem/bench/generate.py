"""A language model generating over kvmem's memory, token for token what transformers' own cache generates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Protocol

import torch

from kvmem.bench.language_models import LanguageModel
from kvmem.bench.memory import Backend
from kvmem.bench.spread import Spread
from kvmem.bench.threads import one_thread

if TYPE_CHECKING:
    from kvmem.integrations.transformers import KVMemCache

__all__ = ["DYNAMIC_CACHE", "GenerateResult", "generate"]

DYNAMIC_CACHE = "DynamicCache"


@dataclass(frozen=True)
class GenerateResult:
    """Greedy decoding of ``sequences`` prompts with one kind of cache, ``tokens`` new tokens in all.

    ``us``: microseconds of a whole generation, prefill included. ``same_tokens``: as with transformers' `DynamicCache`,
    in every repetition. ``used_bytes`` hold tokens at the end, ``mapped_bytes`` is the memory behind them.
    """

    model: str
    cache: str
    sequences: int
    tokens: int
    us: Spread
    same_tokens: bool
    used_bytes: int
    mapped_bytes: int

    @property
    def tokens_per_second(self) -> tuple[float, float, float]:
        """(median, at p90, at p10) of the repetitions' times: the slow edge before the fast one."""
        median, slow, fast = (self.tokens / us * 1e6 for us in (self.us.median, self.us.p90, self.us.p10))
        return median, slow, fast


class _Cache(Protocol):
    @property
    def name(self) -> str: ...

    def empty(self) -> Any:
        """The cache with nothing in it, for ``past_key_values``."""

    def bytes(self) -> tuple[int, int]:
        """(used, mapped) after a generation."""


class _Dynamic:
    """A `DynamicCache` is made anew for each generation, as ``generate()`` does."""

    name = DYNAMIC_CACHE

    def __init__(self, model: Any) -> None:
        self._config = model.config
        self._cache: Any = None

    def empty(self) -> Any:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._config)
        return self._cache

    def bytes(self) -> tuple[int, int]:
        tensors = [tensor for layer in self._cache.layers for tensor in (layer.keys, layer.values)]
        held = sum(tensor.nbytes for tensor in tensors)
        return held, held


class _Managed:
    """One cache for all generations: from the second on it finds the memory that the one before has freed."""

    def __init__(self, backend: Backend, cache: KVMemCache) -> None:
        self.name, self._cache = backend, cache

    def empty(self) -> KVMemCache:
        self._cache.reset()
        return self._cache

    def bytes(self) -> tuple[int, int]:
        stats = self._cache.allocator.stats()
        return stats.used_bytes, stats.mapped_bytes


def generate(
    language_model: LanguageModel,
    backends: Sequence[Backend],
    *,
    memory_bytes: int,
    new_tokens: int = 64,
    repetitions: int = 5,
    progress: Callable[[int], None] | None = None,
) -> list[GenerateResult]:
    """The same prompts with every cache, in turn in each repetition, after one generation each to warm up."""
    from kvmem.integrations.transformers import KVMemCache

    model = language_model.model
    sequences, prompt = language_model.inputs["input_ids"].shape
    caches: list[_Cache] = [_Dynamic(model)]
    for backend in backends:
        ours = KVMemCache(
            model, backend=backend, memory=memory_bytes, max_batch=sequences, max_tokens=prompt + new_tokens
        )
        caches.append(_Managed(backend, ours))
    ns: dict[str, list[int]] = {cache.name: [] for cache in caches}
    same = dict.fromkeys(ns, True)
    expected: list[list[int]] | None = None
    for repetition in range(1 + repetitions):
        for cache in caches:
            empty = cache.empty()
            begin = perf_counter_ns()
            with one_thread():
                tokens = _greedy(language_model, empty, new_tokens)
            if repetition:
                ns[cache.name].append(perf_counter_ns() - begin)
            expected = expected or tokens
            same[cache.name] &= tokens == expected
        if progress is not None:
            progress(repetition)
    total = sequences * new_tokens
    return [
        GenerateResult(
            language_model.name,
            cache.name,
            sequences,
            total,
            Spread.of_ns(ns[cache.name]),
            same[cache.name],
            *cache.bytes(),
        )
        for cache in caches
    ]


def _greedy(language_model: LanguageModel, cache: Any, new_tokens: int) -> list[list[int]]:
    """Exactly ``new_tokens`` for each prompt, so that a token that ends a text does not change the work."""
    tokens: torch.Tensor = language_model.model.generate(
        **language_model.inputs,
        past_key_values=cache,
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
    )
    return tokens.tolist()
