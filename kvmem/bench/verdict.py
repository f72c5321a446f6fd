"""What a whole run found, in three sentences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvmem.bench.attention import AttentionResult
from kvmem.bench.results import Results
from kvmem.bench.units import format_percent, format_seconds

__all__ = ["sentences"]

_PLAIN = "plain tensors"


def sentences(results: Results, pictures: Sequence[Path]) -> list[str]:
    """Of a run with all parts: what was served, what it cost, what attention takes; with the first picture's name."""
    served = ", ".join(
        f"{run.pool} in {format_seconds(run.simulated_seconds)} with up to {run.outcome.peak_running} at once"
        for run in results.replay
    )
    first = f"Of the trace's {results.setup.requests:,} requests all that fit were served: {served}."
    wasted = ", ".join(f"{run.pool} {format_percent(run.end_waste)}" for run in results.replay)
    second = f"Memory held beyond the tokens in it, at the end of requests: {wasted}; {_parked_calls(results)}."
    third = _attention(results.attention)
    if pictures:
        third += f"; the memory over time is drawn in {pictures[0]}"
    return [first, second, third + "."]


def _parked_calls(results: Results) -> str:
    again = [row for row in results.steady if row.batch == "parked"]
    calls = sum(row.admit_driver_calls + row.decode_driver_calls for row in again)
    return f"a batch that finds parked memory makes {calls or 'no'} driver calls"


def _attention(rows: Sequence[AttentionResult]) -> str:
    plain = {row.case: row.us.median for row in rows if row.backend == _PLAIN}
    ratios = ", ".join(
        f"{row.us.median / plain[row.case]:.2f} over the {row.backend} backend"
        for row in rows
        if row.backend != _PLAIN and row.case in plain
    )
    return f"Attention on this CPU takes {ratios}, where plain tensors take 1"
