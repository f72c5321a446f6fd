"""What was wanted of a GPU, and whether it was met: read off the parts' documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvmem.arguments import format_bytes
from kvmem.bench.units import format_us

__all__ = ["Goal", "goals"]

_ONE_PERCENT, _TWO_PERCENT = 1.01, 1.02
_STEP_US, _FRESH_US, _PARKED_US = 50.0, 1000.0, 50.0
_GIB_PER_SECOND, _PAGE_BYTES, _PROMPT = 200.0, 16 << 20, 8192
_NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Goal:
    """met: None where it was not measured."""

    name: str
    limit: str
    measured: str
    met: bool | None


def goals(documents: Mapping[str, Mapping[str, Any]]) -> list[Goal]:
    """``documents``: by part, as `kvmem.bench.gpu.part` describes them; parts may be missing or cut short."""

    def rows(part: str, name: str) -> list[dict[str, Any]]:
        return documents.get(part, {}).get("results", {}).get(name, [])  # type: ignore[no-any-return]

    decode = [row for row in rows("decode", "decode") if row["ratio"] is not None]
    count = max((row["sequences"] for row in decode), default=256)
    steady = [row for row in decode if row["phase"] == "parked"]
    growing = [row for row in decode if row["phase"] == "fresh" and row["memory"] == "virtual"]
    calls = {row["memory"]: row["driver_calls"] for row in steady}
    return [
        _goal(f"steady decode of {count} sequences: driver calls", "none", calls, lambda value: value == 0, "{}"),
        *_step(steady, f"steady decode of {count} sequences"),
        *_step(growing, f"{count} sequences growing into fresh pages, the mapper on"),
        _attention(rows("attention", "attention")),
        *_admission(rows("admit", "admit")),
        _mapping(rows("vmm", "runs")),
    ]


def _step(rows: Sequence[Mapping[str, Any]], what: str) -> Iterator[Goal]:
    p99 = {row["memory"]: row["allocator_us"]["p99"] for row in rows}
    yield _goal(
        f"{what}: the allocator's part of a step, p99", f"under {_STEP_US:.0f} us", p99, lambda us: us < _STEP_US, "us"
    )
    ratios = {row["memory"]: row["ratio"]["median"] for row in rows}
    yield _goal(
        f"{what}: a whole step, over a static pool's", f"at most {_ONE_PERCENT}", ratios, lambda r: r <= _ONE_PERCENT,
        "{:.3f}",
    )  # fmt: skip


def _attention(rows: Sequence[Mapping[str, Any]]) -> Goal:
    ours = [row for row in rows if row["memory"] == "virtual" and row["ratio"] is not None]
    ratios = {
        f"{row['kernel']}, {row['phase']}, {row['sequences']} x {row['tokens']:,}": row["ratio"]["median"]
        for row in ours
    }
    worst = dict([max(ratios.items(), key=lambda item: item[1])]) if ratios else {}
    return _goal(
        f"attention over the virtual backend, over static contiguous tensors, worst of {len(ratios) or 'all'} cases",
        f"at most {_TWO_PERCENT}", worst, lambda r: r <= _TWO_PERCENT, "{:.3f}",
    )  # fmt: skip


def _admission(rows: Sequence[Mapping[str, Any]]) -> Iterator[Goal]:
    def ready(way: str, backend: str = "virtual") -> dict[str, float]:
        return {
            f"pages of {format_bytes(row['page_bytes'])}": row["host_us"]["median"]
            for row in rows
            if (row["way"], row["backend"], row["prompt_tokens"]) == (way, backend, _PROMPT)
        }

    for way, limit in (("fresh", _FRESH_US), ("parked", _PARKED_US)):
        times = ready(way)
        best = dict([min(times.items(), key=lambda item: item[1])]) if times else {}
        others = {name: us for name, us in times.items() if name not in best}
        goal = _goal(
            f"a prompt of {_PROMPT:,} tokens on the virtual backend, ready from {way} memory, at the best page size",
            f"under {limit:,.0f} us", best, lambda us, limit=limit: us < limit, "us",
        )  # fmt: skip
        more = "".join(f"; {name}: {format_us(us)} us" for name, us in others.items())
        yield Goal(goal.name, goal.limit, goal.measured + more, goal.met)


def _mapping(rows: Sequence[Mapping[str, Any]]) -> Goal:
    speeds = {
        f"{row['run_pages']} pages a run": row["gib_per_second"]
        for row in rows
        if (row["page_bytes"], row["access"], row["load"]) == (_PAGE_BYTES, "run", "none")
    }
    best = dict([max(speeds.items(), key=lambda item: item[1])]) if speeds else {}
    return _goal(
        f"mapping, pages of {format_bytes(_PAGE_BYTES)}", f"at least {_GIB_PER_SECOND:.0f} GiB/s", best,
        lambda speed: speed >= _GIB_PER_SECOND, "{:.0f} GiB/s",
    )  # fmt: skip


def _goal(name: str, limit: str, values: Mapping[str, float], good: Any, form: str) -> Goal:
    """Met when every value is ``good``. ``form``: ``"us"``, or a format of one value."""
    if not values:
        return Goal(name, limit, _NOT_MEASURED, None)

    def text(value: float) -> str:
        return f"{format_us(value)} us" if form == "us" else form.format(value)

    measured = "; ".join(f"{key}: {text(value)}" for key, value in values.items())
    return Goal(name, limit, measured, all(good(value) for value in values.values()))
