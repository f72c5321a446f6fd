"""Attention over memory that kvmem manages, on the CPU: one layer's decode step, against the same kernel over plain
tensors.

Over kvmem's memory it is `kvmem.kernels.reference.sdpa`, what a decoder on the CPU calls: it reads a sequence in place
in the virtual backend and gathers its blocks in the paged one. Over plain tensors it is the function that `sdpa` calls
for each sequence, torch's ``scaled_dot_product_attention``. One thread; every result is checked against float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np
import torch
import torch.nn.functional as F

from kvmem.arguments import format_bytes
from kvmem.bench.errors import BenchError
from kvmem.bench.memory import Backend, Budget, open_allocator
from kvmem.bench.model import Model
from kvmem.bench.spread import Spread
from kvmem.bench.threads import one_thread
from kvmem.kernels.reference import sdpa
from kvmem.kernels.write import write_kv

__all__ = ["SEED", "TOLERANCE", "WARM_UP", "AttentionResult", "attention"]

WARM_UP = 2
SEED = 20240611
TOLERANCE = 2e-2  # bfloat16 inputs and outputs of order one, against float64


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


@dataclass(frozen=True)
class _Shape:
    """One layer of the model, and what the step reads of it."""

    layer: int
    sequences: int
    tokens: int
    queries: int
    heads: int
    width: int
    dtype: torch.dtype


@dataclass(frozen=True)
class _Data:
    """``q`` [sequences, query heads, width]; ``k``, ``v`` [sequences, tokens, heads, width]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


_Step = Callable[[], torch.Tensor]


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
    shape = _shape(model, sequences, tokens)
    if (need := sequences * tokens * model.bytes_per_token) > memory_bytes:
        raise BenchError(
            f"{sequences} sequences of {tokens} tokens need {format_bytes(need)} of real "
            f"memory; there are {format_bytes(memory_bytes)}. Give more --real-memory"
        )
    data = _random(shape)
    budget = Budget(memory_bytes, sequences, -(-tokens // 256) * 256, page_bytes)
    steps: dict[str, _Step] = {"plain tensors": lambda: _plain(data)}
    steps |= {backend: _managed(model, backend, budget, shape, data) for backend in backends}
    expected = _plain(_Data(data.q.double(), data.k.double(), data.v.double()))
    times: dict[str, list[int]] = {name: [] for name in steps}
    errors = dict.fromkeys(steps, 0.0)
    with one_thread():
        for repetition in range(WARM_UP + repetitions):
            for name, step in steps.items():
                begin = perf_counter_ns()
                result = step()
                if repetition >= WARM_UP:
                    times[name].append(perf_counter_ns() - begin)
                errors[name] = max(errors[name], float((result.double() - expected).abs().max()))
            if progress is not None:
                progress(repetition + 1)
    for name, error in errors.items():
        if not error < TOLERANCE:
            raise BenchError(
                f"attention over {name} is off by {error} from float64 (seed {SEED}); at most {TOLERANCE} is rounding"
            )
    case = f"decode, {sequences} sequences of {tokens:,} tokens"
    return [AttentionResult(case, name, sequences, tokens, Spread.of_ns(times[name]), errors[name]) for name in steps]


def _shape(model: Model, sequences: int, tokens: int) -> _Shape:
    group = next(group for group in model.spec.groups if group.growth == "token")
    names = {component.name for component in group.components}
    if not {"k", "v"} <= names:
        raise BenchError(
            f"{model.name} stores {', '.join(sorted(names))}; this part measures models that store `k` and `v`"
        )
    layer = group.layers[0]
    heads, width = group.heads("k", layer), group.widths("k", layer)[0]
    queries = model.spec.num_query_heads or heads
    return _Shape(layer, sequences, tokens, queries, heads, width, group.component("k").dtype)


def _random(shape: _Shape) -> _Data:
    """Values of order one."""
    generator = torch.Generator().manual_seed(SEED)
    k, v = torch.randn(2, shape.sequences, shape.tokens, shape.heads, shape.width, generator=generator).to(shape.dtype)
    return _Data(torch.randn(shape.sequences, shape.queries, shape.width, generator=generator).to(shape.dtype), k, v)


def _managed(model: Model, backend: Backend, budget: Budget, shape: _Shape, data: _Data) -> _Step:
    """The batch is built once, as a decoder builds it once for all layers of a step."""
    allocator = open_allocator(model, backend, "cpu", budget)
    ids = allocator.open_batch(shape.sequences)
    counts = np.full(shape.sequences, shape.tokens, dtype=np.int32)
    allocator.extend_batch(ids, counts)
    cache = allocator.kv(shape.layer)
    write_kv(cache, allocator.batch(ids), data.k.flatten(0, 1), data.v.flatten(0, 1))
    allocator.commit_batch(ids, counts - 1)
    batch = allocator.batch(ids)  # the last token of each sequence is the one that asks
    return lambda: sdpa(data.q, cache, batch)


def _plain(data: _Data) -> torch.Tensor:
    """[sequences, query heads, width], one call a sequence."""
    out = torch.empty_like(data.q)
    for i, (q, k, v) in enumerate(zip(data.q, data.k, data.v, strict=True)):
        grouped = q.view(1, k.shape[1], -1, q.shape[-1])  # as `sdpa` has it: a group's query heads as rows of one head
        out[i] = F.scaled_dot_product_attention(grouped, k.transpose(0, 1)[None], v.transpose(0, 1)[None]).view_as(q)
    return out
