"""The parts of ``python -m kvmem.bench near``, by name, each a list of rows in the form of a document."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kvmem.bench.model import BACKENDS
from kvmem.bench.text import BenchError, Progress

Rows = Sequence[Any]


@dataclass(frozen=True)
class Options:
    """What the command line says. threads, tokens: of ``attend``. model: of ``decode`` and ``selectors``. folder: on
    the disk to measure. vllm_library: see ``attention``.
    """

    threads: tuple[int, ...]
    tokens: tuple[int, ...]
    model: str
    repetitions: int
    folder: Path | None
    vllm_library: Path | None


def _attend(options: Options) -> dict[str, Rows]:
    from kvmem.bench.near.attention import attention

    heads, dtypes = [(8, 4), (32, 1), (8, 1)], [torch.bfloat16, torch.float32]
    rows = attention(dtypes, heads, options.tokens, options.threads, options.repetitions, options.vllm_library)
    return {"attend": rows}


def _decode(options: Options) -> dict[str, Rows]:
    from kvmem.bench.near.decode import decode

    return {"decode": decode(options.model, [128, 1024], options.repetitions)}


def _tiers(options: Options) -> dict[str, Rows]:
    from kvmem.bench.near.tiers import near_tiers

    return dict(near_tiers(repetitions=options.repetitions, folder=options.folder))


def _selectors(options: Options) -> dict[str, Rows]:
    from kvmem.bench.near.selectors import measure

    return {"selectors": measure(options.model)}


def _modules(options: Options) -> dict[str, Rows]:
    from kvmem.bench.near.modules import module_batching

    return {"modules": [row for one in BACKENDS for row in module_batching(one, repetitions=options.repetitions)]}


def _prefetch(options: Options) -> dict[str, Rows]:
    from kvmem.bench.near.prefetch import near_prefetch

    return {"prefetch": near_prefetch(options.folder, repetitions=options.repetitions)}


PARTS: dict[str, Callable[[Options], dict[str, Rows]]] = {
    "attend": _attend, "decode": _decode, "tiers": _tiers, "selectors": _selectors, "modules": _modules,
    "prefetch": _prefetch,
}  # fmt: skip


def parse(names: str | None) -> list[str]:
    """The parts that ``names`` lists, all for None; ``BenchError`` for others."""
    chosen = list(PARTS) if names is None else [name.strip() for name in names.split(",")]
    if unknown := [name for name in chosen if name not in PARTS]:
        raise BenchError(f"--part {', '.join(unknown)}: must be of {', '.join(PARTS)}")
    return chosen


def parse_counts(option: str, text: str) -> tuple[int, ...]:
    """Numbers from 1 on; ``BenchError`` for others."""
    words = text.split(",")
    if not all(re.fullmatch("[1-9][0-9]{0,6}", word) for word in words):
        raise BenchError(f"{option}: got {text!r}; give numbers from 1 on, such as 1,2")
    return tuple(map(int, words))


def measure(names: Sequence[str], options: Options, done: Progress) -> dict[str, list[dict[str, Any]]]:
    """The rows of each part, as a document holds them."""
    found: dict[str, list[dict[str, Any]]] = {}
    for number, name in enumerate(names):
        for part, rows in PARTS[name](options).items():
            found[part] = [asdict(row) for row in rows]
        done(number + 1)
    return found
