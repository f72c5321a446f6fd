"""Decode attention on the CPU over both backends, beside a sum of the same bytes, torch's SDPA and vLLM's kernel.

All move the same bytes in turn: the sum is the bandwidth that there is, SDPA over a contiguous tensor what a program
without a memory manager has, and SDPA over gathered blocks what a block table costs without a kernel that follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from time import perf_counter_ns, thread_time_ns
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from kvmem import Allocator, CacheSpec, _core
from kvmem.bench.model import BACKENDS, Backend
from kvmem.bench.text import BenchError
from kvmem.bench.timing import Ratio, Spread, in_turn
from kvmem.errors import SpecError
from kvmem.kernels import cpu, vllm_cpu
from kvmem.kernels.base import Cache
from kvmem.kernels.checks import plain
from kvmem.kernels.write import write_kv

WIDTH, BLOCK_TOKENS = 128, 16
_SEED = 20250611
_GOAL = 0.8
_ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of outputs of order one, against float64
SUM, CONTIGUOUS, GATHERED, VLLM = "sum", "SDPA, contiguous", "SDPA, gathered", "vLLM"

Step = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class AttendRow:
    """One layer's decode step of one sequence by ``kernel``.

    us: CPU time of one thread, or wall time of several. bytes_per_second: of K and V, at the median. of_sum: its speed
    over that of the sum, by repetition. goal: for the median of ``of_sum``, or None. error: against float64.
    """

    dtype: str
    heads: int
    query_heads: int
    tokens: int
    threads: int
    kernel: str
    us: Spread
    bytes_per_second: float
    of_sum: Ratio
    goal: float | None
    error: float


@dataclass(frozen=True)
class _Case:
    dtype: torch.dtype
    heads: int
    group: int
    tokens: int
    threads: int


class _Data:
    """``q`` [1, query heads, width]; ``k``, ``v`` [tokens, heads, width]: values of order one."""

    def __init__(self, case: _Case) -> None:
        draw = torch.Generator().manual_seed(_SEED)
        self.k, self.v = torch.randn(2, case.tokens, case.heads, WIDTH, generator=draw).to(case.dtype)
        self.q = torch.randn(1, case.heads * case.group, WIDTH, generator=draw).to(case.dtype)
        self.grouped = self.q.view(1, case.heads, case.group, WIDTH)  # torch's own GQA is many times slower on a CPU

    def sdpa(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """k, v: ``[heads, tokens, width]``."""
        return F.scaled_dot_product_attention(self.grouped, k.unsqueeze(0), v.unsqueeze(0)).view_as(self.q)

    def expected(self) -> torch.Tensor:
        q, k, v = (t.double().transpose(0, 1) for t in (self.grouped[0].transpose(0, 1), self.k, self.v))
        out: torch.Tensor = ((q @ k.transpose(1, 2) * WIDTH**-0.5).softmax(-1) @ v).reshape(self.q.shape)
        return out


def attention(
    dtypes: Sequence[torch.dtype], heads: Sequence[tuple[int, int]], tokens: Sequence[int], threads: Sequence[int],
    repetitions: int, vllm_library: Path | None = None,
) -> list[AttendRow]:  # fmt: skip
    """A row for each kernel and case. heads: of K and V, and query heads for each. vllm_library: ``_C*.so`` of the
    package vllm-cpu, whose kernel is timed too. ``BenchError`` where a result is wrong.
    """
    cases = [_Case(*case) for case in _product(dtypes, heads, tokens, threads)]
    rows: list[AttendRow] = []
    for case in cases:
        with _threads(case.threads):
            rows += _measure(case, repetitions, vllm_library)
    return rows


def _product(
    dtypes: Sequence[torch.dtype], heads: Sequence[tuple[int, int]], tokens: Sequence[int], threads: Sequence[int]
) -> Iterator[tuple[torch.dtype, int, int, int, int]]:
    for dtype in dtypes:
        for of_cache, group in heads:
            for length in tokens:
                for count in threads:
                    yield dtype, of_cache, group, length, count


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measure(case: _Case, repetitions: int, vllm_library: Path | None) -> list[AttendRow]:
    data, expected = _Data(case), _Data(case).expected()
    flat = torch.cat([data.k.flatten(), data.v.flatten()]).view(torch.float32)
    contiguous = tuple(t.transpose(0, 1).contiguous() for t in (data.k, data.v))
    steps: dict[str, Step] = {SUM: flat.sum, CONTIGUOUS: lambda: data.sdpa(*contiguous)}
    for backend in BACKENDS:
        steps[f"kvmem, {backend}"], gathered = _over(backend, case, data)
        if backend == "paged":
            steps[GATHERED] = gathered
    if vllm_library is not None:
        steps[VLLM] = _vllm(vllm_library, case, data)
    errors: dict[str, float] = {}

    def look(name: str, result: torch.Tensor) -> None:
        if name != SUM:
            errors[name] = max(errors.get(name, 0.0), float((result.double() - expected).abs().max()))

    clock = thread_time_ns if case.threads == 1 else perf_counter_ns
    times = in_turn(steps, repetitions, clock=clock, look=look, order=Random(_SEED))
    for name, error in errors.items():
        if not error <= _ALLOWED[case.dtype]:
            raise BenchError(f"{name} is off by {error} from float64; {_ALLOWED[case.dtype]} is rounding: {case}")
    return [_row(case, name, times[name], times[SUM], errors.get(name, 0.0), flat.nbytes) for name in steps]


def _row(case: _Case, name: str, ns: list[int], base: list[int], error: float, size: int) -> AttendRow:
    us = Spread.of_ns(ns)
    goal = _GOAL if name.startswith("kvmem") else None
    what = str(case.dtype).removeprefix("torch."), case.heads, case.heads * case.group, case.tokens, case.threads
    return AttendRow(*what, name, us, 1e6 * size / us.median, Ratio.of(base, ns), goal, error)


def _over(backend: Backend, case: _Case, data: _Data) -> tuple[Step, Step]:
    """The kernel over a cache in this backend, planned once, and SDPA over what is gathered from its blocks."""
    spec = CacheSpec.kv(
        num_layers=1, num_kv_heads=case.heads, head_dim=WIDTH, dtype=case.dtype, block_size=BLOCK_TOKENS,
        num_query_heads=case.heads * case.group,
    )  # fmt: skip
    size = case.tokens * spec.bytes_per_token
    alloc = Allocator(
        spec, backend=backend, device="cpu", memory=size + (16 << 20), max_sequences=1, max_tokens=case.tokens,
        page_bytes=2 << 20, interleave="none", prefix_cache=False, tail_guard_tokens=0, map_ahead_tokens=0,
    )  # fmt: skip
    ids = alloc.open_batch(1)
    alloc.extend_batch(ids, np.array([case.tokens], np.int32))
    cache: Cache = alloc.kv(0)
    write_kv(cache, alloc.batch(ids), data.k, data.v)
    alloc.commit_batch(ids, np.array([case.tokens - 1], np.int32))
    batch = alloc.batch(ids)
    run = cpu.plan(
        batch, num_query_heads=case.heads * case.group, num_kv_heads=case.heads, head_dim=WIDTH, dtype=case.dtype,
        threads=case.threads,
    )  # fmt: skip
    blocks = batch.block_table[0, : -(-case.tokens // BLOCK_TOKENS)].long()

    def gathered() -> torch.Tensor:
        k, v = (plain(part).index_select(0, blocks).flatten(0, 1)[: case.tokens] for part in cache)
        return data.sdpa(k.transpose(0, 1), v.transpose(0, 1))

    return lambda: run(data.q, cache)[0], gathered


def _vllm(library: Path, case: _Case, data: _Data) -> Step:
    """vLLM's paged kernel for CPUs over blocks in its own order, which its own writer fills."""
    if not library.is_file():  # also where the process has loaded another one
        raise BenchError(f"--vllm-library {library}: no such file")
    if not hasattr(torch.ops._C, "cpu_attention_with_kv_cache"):
        try:
            vllm_cpu.open_library(library)
        except SpecError as error:
            raise BenchError(f"--vllm-library {library}: {error}") from error
    ops: Any = torch.ops._C
    size, isa = 32, "vec"
    blocks = -(-case.tokens // size)
    k_cache, v_cache = torch.zeros(2, blocks, case.heads, size, WIDTH, dtype=case.dtype)
    slots = torch.arange(case.tokens)
    ops.cpu_attn_reshape_and_cache(data.k, data.v, k_cache, v_cache, slots, isa, 1.0, 1.0, "auto")
    lengths, starts = torch.tensor([case.tokens], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    table, out = torch.arange(blocks, dtype=torch.int32).unsqueeze(0), torch.empty_like(data.q)
    plan = ops.get_scheduler_metadata(
        1, case.heads * case.group, case.heads, WIDTH, lengths, case.dtype, starts, True, -1, isa, True, None, "auto"
    )

    def step() -> torch.Tensor:
        ops.cpu_attention_with_kv_cache(
            data.q, k_cache, v_cache, out, starts, lengths, WIDTH**-0.5, True, None, -1, table, 0.0, plan, None, None,
            1.0, 1.0, "auto",
        )  # fmt: skip
        return out

    return step


def setup(threads: Sequence[int], repetitions: int) -> dict[str, Any]:
    """What a document says of the run."""
    return {
        "width": WIDTH, "block_tokens": BLOCK_TOKENS, "threads": list(threads), "repetitions": repetitions,
        "vector_unit": _core.attention_levels()[-1],
    }  # fmt: skip
