"""Attention over memory that kvmem manages, on the CPU: one layer's decode step, each result checked against float64.

`attention` times `kvmem.kernels.reference.sdpa`, which reads a sequence in place in the virtual backend and gathers its
blocks in the paged one, beside the same kernel over plain tensors. `sdpa` times one call of torch's kernel for a whole
batch, over the rows of the virtual backend, beside a contiguous tensor. One thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from time import thread_time_ns
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from kvmem import Allocator, CacheSpec
from kvmem.bench.model import Backend, Budget, Model, check_fits, open_allocator
from kvmem.bench.text import BenchError, Progress
from kvmem.bench.timing import Ratio, Spread, in_turn, one_thread
from kvmem.kernels.checks import plain
from kvmem.kernels.reference import sdpa as reference_sdpa
from kvmem.kernels.write import write_kv

PLAIN = "plain"
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


@dataclass(frozen=True)
class SdpaResult:
    """``us``: microseconds of CPU time of one layer's step. ``ratio``: over the plain tensor, of times of the same
    repetition.
    """

    memory: str
    sequences: int
    tokens: int
    us: Spread
    ratio: Ratio
    worst_error: float


_Step = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class _Data:
    """``q`` [sequences, query heads, width]; ``k``, ``v`` [sequences, tokens, heads, width]: values of order one."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @classmethod
    def random(cls, sequences: int, tokens: int, queries: int, heads: int, width: int, dtype: torch.dtype) -> _Data:
        generator = torch.Generator().manual_seed(_SEED)
        k, v = torch.randn(2, sequences, tokens, heads, width, generator=generator).to(dtype)
        return cls(torch.randn(sequences, queries, width, generator=generator).to(dtype), k, v)

    def double(self) -> _Data:
        return _Data(self.q.double(), self.k.double(), self.v.double())


def _compare(
    steps: dict[str, _Step], expected: torch.Tensor, repetitions: int, **options: Any
) -> tuple[dict[str, list[int]], dict[str, float]]:
    """Times of all, on one thread, and the worst error of each. Raises `BenchError` where one is wrong."""
    errors = dict.fromkeys(steps, 0.0)

    def look(name: str, result: torch.Tensor) -> None:
        errors[name] = max(errors[name], float((result.double() - expected).abs().max()))

    with one_thread():
        times = in_turn(steps, repetitions, look=look, **options)
    for name, error in errors.items():
        if not error < _TOLERANCE:
            raise BenchError(
                f"attention over {name} is off by {error} from float64 (seed {_SEED}); at most {_TOLERANCE} is rounding"
            )
    return times, errors


def attention(
    model: Model, backends: Sequence[Backend], *, memory_bytes: int, page_bytes: int, sequences: int = 4,
    tokens: int = 512, repetitions: int = 20, progress: Progress = lambda done: None,
) -> list[AttentionResult]:  # fmt: skip
    """Decode attention in layer 0 over plain tensors and over each backend."""
    group = next(group for group in model.spec.groups if group.growth == "token")
    names = {component.name for component in group.components}
    if not {"k", "v"} <= names:
        raise BenchError(
            f"{model.name} stores {', '.join(sorted(names))}; this part measures models that store `k` and `v`"
        )
    check_fits(sequences, tokens, sequences * tokens * model.bytes_per_token, memory_bytes)
    layer = group.layers[0]
    heads, width = group.heads("k", layer), group.widths("k", layer)[0]
    queries = model.spec.num_query_heads or heads
    data = _Data.random(sequences, tokens, queries, heads, width, group.component("k").dtype)
    budget = Budget(memory_bytes, sequences, -(-tokens // 256) * 256, page_bytes)
    steps: dict[str, _Step] = {"plain tensors": lambda: _one_by_one(data)}
    for backend in backends:
        steps[backend] = _over(open_allocator(model, backend, "cpu", budget), layer, data)
    times, errors = _compare(steps, _one_by_one(data.double()), repetitions, done=progress)
    case = f"decode, {sequences} sequences of {tokens:,} tokens"
    return [AttentionResult(case, name, sequences, tokens, Spread.of_ns(times[name]), errors[name]) for name in steps]


def _over(allocator: Allocator, layer: int, data: _Data) -> _Step:
    """The batch is built once, as a decoder builds it once for all layers of a step."""
    batch = _write(allocator, layer, data)
    cache = allocator.kv(layer)
    return lambda: reference_sdpa(data.q, cache, batch)


def _write(allocator: Allocator, layer: int, data: _Data) -> Any:
    """A filled batch. Its queries are the last tokens of the sequences."""
    counts = np.full(len(data.k), data.k.shape[1], dtype=np.int32)
    ids = allocator.open_batch(len(counts))
    allocator.extend_batch(ids, counts)
    write_kv(allocator.kv(layer), allocator.batch(ids), data.k.flatten(0, 1), data.v.flatten(0, 1))
    allocator.commit_batch(ids, counts - 1)
    return allocator.batch(ids)


def _one_by_one(data: _Data) -> torch.Tensor:
    """[sequences, query heads, width], one call a sequence, as in `kvmem.kernels.reference.sdpa`."""
    out = torch.empty_like(data.q)
    for i in range(len(out)):
        out[i] = at_once(data.q[i : i + 1], data.k[i : i + 1], data.v[i : i + 1])[0]
    return out


def at_once(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A group's query heads as rows of one head: torch's own GQA is many times slower on a CPU."""
    grouped = q.view(len(q), k.shape[2], -1, q.shape[-1])
    return F.scaled_dot_product_attention(grouped, k.transpose(1, 2), v.transpose(1, 2)).view_as(q)


Layouts = dict[str, tuple[Backend, int | Literal["all", "none"]]]
_APART: Layouts = {"virtual, K and V apart": ("virtual", "none")}


def sdpa(
    sequences: int = 8, tokens: int = 4096, repetitions: int = 20, layouts: Layouts | None = None
) -> list[SdpaResult]:
    """A batch as one rectangle ``[batch, tokens, heads, width]`` of a small GQA model, 2 KiB a token: a plain tensor,
    and kvmem's memory by ``layouts``: name -> backend and ``interleave``. Rows of the virtual backend lie at equal
    distances and are read in place, here K and V of a layer in ranges of their own, as dense as the plain tensor.
    Times are CPU time of the thread, in an order that is drawn anew in each repetition.
    """
    spec = CacheSpec.kv(num_layers=4, num_kv_heads=2, head_dim=64, dtype="bfloat16", block_size=16, num_query_heads=8)
    data = _Data.random(sequences, tokens, 8, 2, 64, torch.bfloat16)
    steps: dict[str, _Step] = {PLAIN: lambda: at_once(data.q, data.k, data.v)}
    for name, (backend, interleave) in (layouts or _APART).items():
        steps[name] = _rectangle(spec, backend, interleave, data)
    exact = data.double()
    times, errors = _compare(
        steps, at_once(exact.q, exact.k, exact.v), repetitions, clock=thread_time_ns, order=Random(_SEED)
    )
    return [
        SdpaResult(name, sequences, tokens, Spread.of_ns(ns), Ratio.of(ns, times[PLAIN]), errors[name])
        for name, ns in times.items()
    ]


def _rectangle(spec: CacheSpec, backend: Backend, interleave: Any, data: _Data) -> _Step:
    """One call over the rows, or over the blocks, which are gathered in every step. Their ids are looked up once."""
    sequences, tokens = data.k.shape[:2]
    page_bytes = 64 << 10
    pages = (sequences + 2) * (-(-tokens * spec.bytes_per_token // page_bytes) + spec.num_layers)
    allocator = Allocator(
        spec, backend=backend, device="cpu", memory=pages * page_bytes, max_sequences=sequences, max_tokens=tokens,
        page_bytes=page_bytes, interleave=interleave, map_ahead_tokens=0, tail_guard_tokens=0, prefix_cache=False,
    )  # fmt: skip
    batch = _write(allocator, 0, data)
    if backend == "paged":
        blocks, pool = batch.block_table.long().flatten(), tuple(plain(allocator.tensor(0, name)) for name in "kv")
        shape = (sequences, -1, *pool[0].shape[2:])
        return lambda: at_once(data.q, *(part.index_select(0, blocks).view(shape)[:, :tokens] for part in pool))
    first, memory = int(batch.rows[0]), tuple(plain(allocator.rows(0, name)) for name in "kv")
    if batch.rows.tolist() != list(range(first, first + sequences)):
        raise BenchError("the rows of the batch do not lie side by side, so they cannot be read in place")
    return lambda: at_once(data.q, *(part[first : first + sequences, :tokens] for part in memory))
