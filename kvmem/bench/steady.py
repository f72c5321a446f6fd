"""Driver calls of a steady state: a batch that decodes to its end, is freed, and is followed by another just like it.

The first batch finds a pool in which nothing is mapped. The second finds the first one's parked rows, still mapped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvmem.arguments import format_bytes
from kvmem.bench.errors import BenchError
from kvmem.bench.pools import Int32s, Pool

__all__ = ["SteadyResult", "steady"]


@dataclass(frozen=True)
class SteadyResult:
    """Driver calls of one batch of ``sequences``, each with ``prompt_tokens``, over ``steps`` decode steps."""

    pool: str
    batch: str  # "first" or "parked"
    sequences: int
    prompt_tokens: int
    steps: int
    admit_driver_calls: int
    decode_driver_calls: int


def steady(pool: Pool, *, sequences: int, prompt_tokens: int, steps: int) -> list[SteadyResult]:
    """Both batches on ``pool``, which is left empty. Raises `BenchError` when one does not fit."""
    return [_run(pool, batch, sequences, prompt_tokens, steps) for batch in ("first", "parked")]


def _run(pool: Pool, batch: str, sequences: int, prompt_tokens: int, steps: int) -> SteadyResult:
    prompt, one = (np.full(sequences, tokens, dtype=np.int32) for tokens in (prompt_tokens, 1))
    calls = [pool.usage().driver_calls]
    ids = pool.open(sequences)
    _grow(pool, ids, prompt)
    calls.append(pool.usage().driver_calls)
    for _ in range(steps):
        _grow(pool, ids, one)
    calls.append(pool.usage().driver_calls)
    pool.free(ids)
    admitted, decoded = np.diff(calls).tolist()
    return SteadyResult(pool.name, batch, sequences, prompt_tokens, steps, admitted, decoded)


def _grow(pool: Pool, ids: Int32s, counts: Int32s) -> None:
    if not pool.try_extend(ids, counts):
        raise BenchError(
            f"the steady-state batch does not fit: {len(ids)} sequences, {format_bytes(pool.usage().free_bytes)} "
            "free. Give more --memory"
        )
    pool.commit(ids, counts)
