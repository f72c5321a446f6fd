"""Attention over memory that kvmem manages, on the CPU: one layer's decode step, against the same kernel over plain
tensors.

The kernel is torch's ``scaled_dot_product_attention``, one sequence a call, on one thread. In the virtual backend it
reads a sequence in place; in the paged backend its blocks are gathered first, as any kernel that does not know block
tables needs. Every result is checked against float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np
import torch

from kvmem.bench.errors import BenchError
from kvmem.bench.memory import Backend, Budget, open_allocator
from kvmem.bench.model import Model
from kvmem.bench.spread import Spread
from kvmem.units import format_bytes

__all__ = ["AttentionResult", "attention"]

_WARM_UP = 2
_SEED = 20240611
_TOLERANCE = 2e-2  # bfloat16 inputs and outputs of order one, against float64


@dataclass(frozen=True)
class AttentionResult:
    """``us``: microseconds for one layer's decode step of ``sequences`` with ``tokens`` each. ``worst_error``: against
    float64.
    """

    case: str
    backend: str
    sequences: int
    tokens: int
    us: Spread
    worst_error: float


Views = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass
class _Memory:
    """Where the tokens lie: ``read()`` gives (k, v) of each sequence, [tokens, heads, width]."""

    name: str
    read: Callable[[], Views]
    owner: object  # keeps an allocator alive


def attention(
    model: Model,
    backends: Sequence[Backend],
    *,
    memory_bytes: int,
    page_bytes: int,
    sequences: int = 4,
    tokens: int = 512,
    repetitions: int = 20,
    progress: Callable[[int], None] | None = None,
) -> list[AttentionResult]:
    """Decode attention in layer 0 over plain tensors and over each backend, in turn in every repetition."""
    group = next(group for group in model.spec.groups if group.growth == "token")
    names = {component.name for component in group.components}
    if not {"k", "v"} <= names:
        raise BenchError(
            f"{model.name} stores {', '.join(sorted(names))}; this part measures models that store `k` and `v`"
        )
    layer = group.layers[0]
    heads, width, dtype = group.heads("k", layer), group.widths("k", layer)[0], group.component("k").dtype
    queries = model.spec.num_query_heads or heads
    if (need := sequences * tokens * model.bytes_per_token) > memory_bytes:
        raise BenchError(
            f"{sequences} sequences of {tokens} tokens need {format_bytes(need)} of real "
            f"memory; there are {format_bytes(memory_bytes)}. Give more --real-memory"
        )
    data = _random(sequences, tokens, heads, width, dtype)
    query = torch.randn(sequences, heads, queries // heads, width, generator=_generator()).to(dtype)
    budget = Budget(memory_bytes, sequences, -(-tokens // 256) * 256, page_bytes)
    memories = [
        _Memory("plain tensors", lambda: data, None),
        *(_managed(model, backend, budget, layer, data) for backend in backends),
    ]
    expected = _attend(query.double(), [(k.double(), v.double()) for k, v in data])
    times: dict[str, list[int]] = {memory.name: [] for memory in memories}
    errors = {memory.name: 0.0 for memory in memories}
    with _one_thread():
        for repetition in range(_WARM_UP + repetitions):
            for memory in memories:
                begin = perf_counter_ns()
                result = _attend(query, memory.read())
                if repetition >= _WARM_UP:
                    times[memory.name].append(perf_counter_ns() - begin)
                errors[memory.name] = max(errors[memory.name], float((result.double() - expected).abs().max()))
            if progress is not None:
                progress(repetition + 1)
    for name, error in errors.items():
        if not error < _TOLERANCE:
            raise BenchError(
                f"attention over {name} is off by {error} from float64 (seed {_SEED}); at most {_TOLERANCE} is rounding"
            )
    case = f"decode, {sequences} sequences of {tokens:,} tokens"
    return [AttentionResult(case, name, sequences, tokens, Spread.of_ns(times[name]), errors[name]) for name in times]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(_SEED)


def _random(sequences: int, tokens: int, heads: int, width: int, dtype: torch.dtype) -> Views:
    """Values of order one for every sequence."""
    k, v = torch.randn(2, sequences, tokens, heads, width, generator=_generator()).to(dtype)
    return list(zip(k, v, strict=True))


@contextmanager
def _one_thread() -> Iterator[None]:
    """The spread of a parallel region on a shared machine would drown what is measured: how the memory is read."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _managed(model: Model, backend: Backend, budget: Budget, layer: int, data: Views) -> _Memory:
    allocator = open_allocator(model, backend, "cpu", budget)
    ids = allocator.open_batch(len(data))
    counts = np.full(len(data), len(data[0][0]), dtype=np.int32)
    allocator.extend_batch(ids, counts)
    batch = allocator.batch(ids)
    block, offset = batch.slot_mapping // batch.block_size, batch.slot_mapping % batch.block_size
    for cache, values in zip(allocator.kv(layer), zip(*data, strict=True), strict=True):
        cache[block, offset] = torch.cat(values)
    allocator.commit_batch(ids, counts)

    def read() -> Views:
        return [
            (allocator.sequence_tensor(int(i), layer, "k"), allocator.sequence_tensor(int(i), layer, "v")) for i in ids
        ]

    return _Memory(backend, read, allocator)


def _attend(query: torch.Tensor, views: Views) -> torch.Tensor:
    """query [sequences, KV heads, query heads of each, width] -> the same shape.

    One token sees all of its sequence, so the query heads that share a KV head can stand where a prefill has its query
    tokens.
    """
    rows = [
        torch.nn.functional.scaled_dot_product_attention(
            query[i : i + 1], k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0)
        )
        for i, (k, v) in enumerate(views)
    ]
    return torch.cat(rows)
