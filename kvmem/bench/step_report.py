"""`bench step` and `bench peers` as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kvmem.arguments import format_bytes
from kvmem.bench.units import format_us

__all__ = ["COLUMNS", "PEER_COLUMNS", "memory_rows", "peer_rows", "step_rows"]

COLUMNS = ["case", "manager", "goal", "median", "quietest round", "met", "floor", "times the floor", "p99", "largest",
           "typical p99 / median"]  # fmt: skip
PEER_COLUMNS = ["workload", "call", "manager", "median", "p99", "largest", "times the floor", "times kvmem",
                "times kvmem by request", "process grew by"]  # fmt: skip


def peer_rows(rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """Cells of `PEER_COLUMNS` for `PeersResult` as dicts. "times kvmem": over the faster of our backends, called
    once a step; "by request": over `SchedulerCache`, called for each.
    """
    for row in rows:
        us = row["us"]
        yield [
            row["workload"],
            f"{row['case']}, us a {row['unit']}",
            row["manager"],
            *(format_us(us[edge]) for edge in ("median", "p99", "largest")),
            *(
                "" if row[name] is None else f"{row[name]:,.1f}"
                for name in ("times_floor", "times_kvmem", "times_by_request")
            ),
            "" if row["peak_bytes"] is None else format_bytes(row["peak_bytes"]),
        ]


def step_rows(rows: Sequence[dict[str, Any]], floor: str = "floor") -> Iterator[list[str]]:
    """Cells of `COLUMNS` for the rows of a report (`StepResult` as dicts); the floor's own rows are columns of others.

    "typical": of each position in the round the median of all rounds, so without the machine's own pauses. "floor" is
    that of all rounds; a goal met in the quietest round alone is told as such.
    """
    floors = {row["case"]: row["us"]["median"] for row in rows if row["manager"] == floor}
    for row in rows:
        if row["manager"] == floor:
            continue
        us, goal, least = row["us"], row["goal_us"], floors.get(row["case"])
        yield [
            f"{row['case']}, us a {row['unit']}",
            row["manager"],
            "" if goal is None else format_us(goal),
            format_us(us["median"]),
            format_us(row["quiet_us"]),
            "" if goal is None else _met(us["median"], row["quiet_us"], goal),
            "" if least is None else format_us(least),
            f"{us['median'] / least:.1f}" if least else "",
            format_us(us["p99"]),
            format_us(us["largest"]),
            f"{row['typical_p99']:.2f}",
        ]


def _met(median: float, quiet: float, goal: float) -> str:
    return "yes" if median <= goal else "quietly" if quiet <= goal else "no"


def memory_rows(rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """Heap of the books, the largest of each manager and pool."""
    found: dict[tuple[int, str], int] = {}
    for row in rows:
        if row["heap_bytes"] is not None:
            key = row["pool_blocks"], row["manager"]
            found[key] = max(found.get(key, 0), row["heap_bytes"])
    for (pool, manager), size in sorted(found.items()):
        yield [f"{pool:,} blocks", manager, format_bytes(size), f"{size / pool:.0f}"]
