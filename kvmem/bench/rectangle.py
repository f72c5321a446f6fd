"""One call of torch's SDPA over a whole batch, on the CPU: a plain contiguous tensor beside kvmem's memory.

A decode step of one layer. The batch is one rectangle ``[batch, tokens, heads, width]``: a plain tensor; the rows of
the virtual backend, which lie at equal distances and are read in place; the blocks of the paged backend, which are
gathered into one first, every step. One thread, all in every repetition, in an order that is drawn anew (whoever comes
after the gather finds less of its own in the CPU's caches), every result against float64. Times are CPU time of the
thread, which waiting for a core is no part of.

The virtual rows come in three layouts (``interleave``): all layers side by side, K and V of one layer, and each of them
in a range of its own, as dense as the plain tensor. ``plain, same strides`` is an ordinary tensor that lies as the
first of these: what it costs over the contiguous one is the layout's price, what the rows cost over it is that of
mapped memory. The last layout has no such price, and the goal is for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from random import Random
from time import thread_time_ns
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from kvmem.bench.attention import SEED, TOLERANCE, WARM_UP
from kvmem.bench.environment import environment
from kvmem.bench.errors import BenchError
from kvmem.bench.gpu.measure import Ratio
from kvmem.bench.memory import Backend
from kvmem.bench.results import SCHEMA_VERSION, without_folders
from kvmem.bench.spread import Spread
from kvmem.bench.threads import one_thread
from kvmem.integrations.dense_batch import EVERY, LockstepRows
from kvmem.kernels.checks import plain
from kvmem.kernels.write import write_kv

__all__ = ["RectangleReport", "RectangleResult", "rectangle"]

PLAIN, STRIDED = "plain", "plain, same strides"
GOAL = 1.05  # times the plain tensor, for K and V in ranges of their own

_LAYERS, _HEADS, _QUERIES, _WIDTH = 4, 2, 8, 64  # a small GQA model, 2 KiB a token


@dataclass(frozen=True)
class RectangleResult:
    """``us``: microseconds of CPU time of one layer's step. ``ratio``: over the plain tensor, of times of the same
    repetition.
    """

    memory: str
    sequences: int
    tokens: int
    us: Spread
    ratio: Ratio
    worst_error: float


@dataclass
class RectangleReport:
    """Its JSON form has ``schema_version``, ``environment``, ``command``, ``setup``, ``results``."""

    repetitions: int
    rows: list[RectangleResult]

    def to_dict(self, command: list[str]) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "environment": environment(),
            "command": without_folders(command),
            "setup": {
                "repetitions": self.repetitions, "layers": _LAYERS, "kv_heads": _HEADS, "query_heads": _QUERIES,
                "width": _WIDTH, "dtype": "bfloat16", "seed": SEED, "goal_ratio": GOAL,
            },
            "results": {"rectangle": [asdict(row) for row in self.rows]},
        }  # fmt: skip


_Step = Callable[[], torch.Tensor]


def rectangle(
    sequences: tuple[int, ...] = (1, 8, 32),
    tokens: tuple[int, ...] = (1024, 4096, 8192),
    repetitions: int = 20,
    progress: Callable[[int], None] | None = None,
) -> RectangleReport:
    """Every batch size with every context."""
    rows: list[RectangleResult] = []
    for done, (batch, context) in enumerate(product(sequences, tokens), 1):
        rows += _case(batch, context, repetitions)
        if progress is not None:
            progress(done)
    return RectangleReport(repetitions, rows)


def _case(batch: int, tokens: int, repetitions: int) -> list[RectangleResult]:
    generator = torch.Generator().manual_seed(SEED)
    k, v = (torch.randn(batch, tokens, _HEADS, _WIDTH, generator=generator).bfloat16() for _ in "kv")
    # A group's query heads as rows of one head: torch's own GQA is many times slower on a CPU.
    q = torch.randn(batch, _HEADS, _QUERIES // _HEADS, _WIDTH, generator=generator).bfloat16()
    managed = {
        "virtual": _managed("virtual", "all", q, k, v),
        "virtual, a layer a range": _managed("virtual", 1, q, k, v),
        "virtual, K and V apart": _managed("virtual", "none", q, k, v),
        "paged": _managed("paged", "all", q, k, v),
    }
    strides = [strides for _, strides in managed.values()]
    steps: dict[str, _Step] = {PLAIN: lambda: _attend(q, k, v), STRIDED: _strided(strides[0], q, k, v)}
    steps |= {name: step for name, (step, _) in managed.items()}
    expected = _attend(q.double(), k.double(), v.double())
    times: dict[str, list[int]] = {name: [] for name in steps}
    errors = dict.fromkeys(steps, 0.0)
    names, draw = list(steps), Random(SEED)
    with one_thread():
        for repetition in range(WARM_UP + repetitions):
            for name in draw.sample(names, len(names)):
                begin = thread_time_ns()
                result = steps[name]()
                if repetition >= WARM_UP:
                    times[name].append(thread_time_ns() - begin)
                errors[name] = max(errors[name], float((result.double() - expected).abs().max()))
    for name, error in errors.items():
        if not error < TOLERANCE:
            raise BenchError(f"attention over {name} is off by {error} from float64; at most {TOLERANCE} is rounding")
    return [
        RectangleResult(
            name, batch, tokens, Spread.of_ns(times[name]), Ratio.of(times[name], times[PLAIN]), errors[name]
        )
        for name in steps
    ]


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2))


def _managed(
    backend: Backend, interleave: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[_Step, tuple[int, ...]]:
    """The step, and the strides of what it reads. Where the tokens lie is found once for all layers of a step."""
    from kvmem import Allocator, CacheSpec

    batch, tokens = k.shape[:2]
    config = {"model_type": "llama", "hidden_size": _QUERIES * _WIDTH, "num_hidden_layers": _LAYERS,
              "num_attention_heads": _QUERIES, "num_key_value_heads": _HEADS, "head_dim": _WIDTH}  # fmt: skip
    spec = CacheSpec.from_config(config, dtype="bfloat16", block_size=16)
    page_bytes = 64 << 10
    pages = (batch + 2) * (-(-tokens * spec.bytes_per_token // page_bytes) + _LAYERS)
    allocator = Allocator(
        spec, backend=backend, device="cpu", memory=pages * page_bytes, max_sequences=batch, max_tokens=tokens,
        page_bytes=page_bytes, interleave=interleave, map_ahead_tokens=0, tail_guard_tokens=0, prefix_cache=False,
    )  # fmt: skip
    rows = LockstepRows(allocator)
    rows.extend(EVERY, batch, tokens)
    write_kv(allocator.kv(0), allocator.batch(np.array(rows._ids, np.int32)), k.flatten(0, 1), v.flatten(0, 1))
    place = rows.place(0)
    memory = tuple(
        plain(allocator.rows(0, name) if backend == "virtual" else allocator.tensor(0, name)) for name in "kv"
    )
    found = place.read(memory[0], 0, tokens)
    if backend == "virtual" and found.data_ptr() < memory[0].data_ptr():
        raise BenchError("the rows of the batch do not lie at equal distances, so they cannot be read in place")

    def step() -> torch.Tensor:
        assert rows.num_rows == batch  # they live as long as this function
        return _attend(q, *(place.read(part, 0, tokens) for part in memory))

    return step, found.stride()


def _strided(strides: tuple[int, ...], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> _Step:
    """K and V as two of the layers' slices that lie side by side in ordinary memory."""
    slice_elements = _HEADS * _WIDTH
    memory = torch.zeros(k.shape[0] * strides[0], dtype=k.dtype)
    both = [memory.as_strided(k.shape, strides, i * slice_elements) for i in range(2)]
    for view, content in zip(both, (k, v), strict=True):
        view.copy_(content)
    return lambda: _attend(q, *both)
