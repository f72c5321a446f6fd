"""The parts' documents as tables: the goals and whether they are met, then every part's figures.

Documents are in the form of `kvmem.bench.document.PartReport`; parts may be missing or cut short.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvmem.arguments import format_bytes
from kvmem.bench.render import Row, Table, cell
from kvmem.bench.text import format_us

_STEP_US, _FRESH_US, _PARKED_US = 50.0, 1000.0, 50.0
_STEP_RATIO, _ATTENTION_RATIO = 1.01, 1.02
_RELATIONS = {"none": operator.eq, "under": operator.lt, "at most": operator.le, "at least": operator.ge}
_GIB_PER_SECOND, _PAGE_BYTES, _PROMPT = 200.0, 16 << 20, 8192


@dataclass(frozen=True)
class Goal:
    """met: None where it was not measured."""

    name: str
    limit: str
    measured: str
    met: bool | None


def goal_table(documents: Mapping[str, Row]) -> Table:
    """``documents``: by part."""
    marks = {True: "yes", False: "NO", None: "-"}
    rows = [[goal.name, goal.limit, goal.measured, marks[goal.met]] for goal in goals(documents)]
    return Table("", ["on a GPU", "wanted", "measured", "met"], rows, 4)


def goals(documents: Mapping[str, Row]) -> list[Goal]:
    def rows(part: str, name: str) -> list[Row]:
        return documents.get(part, {}).get("results", {}).get(name, [])  # type: ignore[no-any-return]

    decode = [row for row in rows("decode", "decode") if row["ratio"] is not None]
    count = max((row["sequences"] for row in decode), default=256)
    parked = [row for row in decode if row["phase"] == "parked"]
    growing = [row for row in decode if row["phase"] == "fresh" and row["memory"] == "virtual"]
    calls = {row["memory"]: row["driver_calls"] for row in parked}
    return [
        _goal(f"steady decode of {count} sequences: driver calls", "none", 0, calls, "{v}"),
        *_step(parked, f"steady decode of {count} sequences"),
        *_step(growing, f"{count} sequences growing into fresh pages, the mapper on"),
        _attention(rows("attention", "attention")),
        *(_admission(rows("admit", "admit"), *wanted) for wanted in (("fresh", _FRESH_US), ("parked", _PARKED_US))),
        _mapping(rows("vmm", "runs")),
    ]


def _goal(name: str, relation: str, limit: float, values: Mapping[str, Any], form: str, unit: str = "") -> Goal:
    """Met when every value is in ``relation`` to ``limit``. ``form``: of one value ``v``, as for `cell`."""
    measured = "; ".join(f"{key}: {cell(form + unit, {'v': value})}" for key, value in values.items())
    met = all(_RELATIONS[relation](value, limit) for value in values.values()) if values else None
    return Goal(name, f"{relation} {limit:,.4g}{unit}" if limit else relation, measured or "not measured", met)


def _step(rows: Sequence[Row], what: str) -> Iterator[Goal]:
    p99 = {row["memory"]: row["allocator_us"]["p99"] for row in rows}
    name = f"{what}: the allocator's part of a step, p99"
    yield _goal(name, "under", _STEP_US, p99, "{v:us}", " us")
    ratios = {row["memory"]: row["ratio"]["median"] for row in rows}
    name = f"{what}: a whole step, over a static pool's"
    yield _goal(name, "at most", _STEP_RATIO, ratios, "{v:.3f}")


def _extreme(choose: Callable[..., str], values: Mapping[str, float]) -> dict[str, float]:
    """The one pair with the largest or smallest value, if there is one."""
    return {best: values[best] for best in [choose(values, key=values.__getitem__)]} if values else {}


def _attention(rows: Sequence[Row]) -> Goal:
    form = "{kernel}, {phase}, {sequences} x {tokens:,}"
    ours = (row for row in rows if row["memory"] == "virtual" and row["ratio"] is not None)
    ratios = {cell(form, row): row["ratio"]["median"] for row in ours}
    name = f"attention over the virtual backend, over static contiguous tensors, worst of {len(ratios) or 'all'} cases"
    return _goal(name, "at most", _ATTENTION_RATIO, _extreme(max, ratios), "{v:.3f}")


def _admission(rows: Sequence[Row], way: str, limit: float) -> Goal:
    """At the best page size; what the others take is said too."""
    times = {
        cell("pages of {page_bytes:bytes}", row): row["host_us"]["median"]
        for row in rows
        if (row["way"], row["backend"], row["prompt_tokens"]) == (way, "virtual", _PROMPT)
    }
    best = _extreme(min, times)
    name = f"a prompt of {_PROMPT:,} tokens on the virtual backend, ready from {way} memory, at the best page size"
    goal = _goal(name, "under", limit, best, "{v:us}", " us")
    more = "".join(f"; {name}: {format_us(us)} us" for name, us in times.items() if name not in best)
    return replace(goal, measured=goal.measured + more)


def _mapping(rows: Sequence[Row]) -> Goal:
    speeds = {
        f"{row['run_pages']} pages a run": row["gib_per_second"]
        for row in rows
        if (row["page_bytes"], row["access"], row["load"]) == (_PAGE_BYTES, "run", "none")
    }
    name = f"mapping, pages of {format_bytes(_PAGE_BYTES)}"
    return _goal(name, "at least", _GIB_PER_SECOND, _extreme(max, speeds), "{v:.0f}", " GiB/s")


# The parts' figures: by the name of the rows their title, how many columns are words, and the columns.

_SPECS: dict[str, tuple[str, int, str]] = {
    "runs": (
        "Microseconds a driver call, medians; GiB/s are of map and set_access together", 1,
        """page={page_bytes:bytes}; run, pages={run_pages}; map, a page={map_us[median]:us};
        set_access, the run={set_access_us[median]:us}; set_access, a page of it={each[set_access_us][median]:us};
        unmap, a page={unmap_us[median]:us}; GiB/s={gib_per_second:,.0f};
        GiB/s, an access a page={apart[gib_per_second]:,.0f}; map under kernels={busy[map_us][median]:us};
        set_access={busy[set_access_us][median]:us}; unmap={busy[unmap_us][median]:us};
        GiB/s={busy[gib_per_second]:,.0f}""",
    ),
    "pages": (
        "Microseconds", 1,
        """page={page_bytes:bytes}; create={create_us[median]:us}; destroy={destroy_us[median]:us};
        reserve={reserve_us[median]:us}; release={release_us[median]:us}""",
    ),
    "decode": (
        "{sequences} sequences from {prompt_tokens:,} tokens, {steps} steps, {layers} layers{why}", 2,
        """phase={phase}; memory={memory}; step, us: median={step_us[median]:us}; p99={step_us[p99]:us};
        max={step_us[largest]:us}; over static={ratio:ratio}; allocator, us: median={allocator_us[median]:us};
        p99={allocator_us[p99]:us}; max={allocator_us[largest]:us}; the kernel's plan={plan_us[median]:us};
        driver calls a step={calls_a_step:.2f}; at most={most_driver_calls};
        during the allocator's part={calls_meanwhile}; steps begun with the mapper behind={late_steps};
        by at most, steps={most_lag_steps}""",
    ),
    "attention": (
        "A copy on the device moves {terabytes:.2f} TB/s, read and written", 4,
        """phase={phase}; kernel={kernel}; batch={sequences} x {tokens:,}; memory={memory}; us a layer={us:spread};
        over static contiguous={ratio:ratio}; over a static copy={twin_ratio:ratio};
        of the bandwidth={of_bandwidth:share}""",
    ),
    "verdict": (
        "The largest interleave that costs at most 2 % more than the best", 1,
        """backend={backend}; interleave={interleave}; worst ratio to static={worst_ratio:.3f}; cases={cases};
        recommended={recommended:mark}""",
    ),
    "layout": (
        "Attention by layout", 5,
        """phase={phase}; kernel={kernel}; backend={backend}; batch={sequences} x {tokens:,};
        interleave={interleave} of {layers}; us a layer={us[median]:us}; over static, a layer each={ratio:ratio}""",
    ),
    "admit": (
        "A prompt until it has its memory", 3,
        """memory={way}; backend={backend}; page={page_bytes:bytes}; prompt, tokens={prompt_tokens:,};
        cached={cached_tokens:,}; us until kernels can be launched={host_us[median]:us}; p90={host_us[p90]:us};
        us until the device is done={ready_us[median]:us}; driver calls={driver_calls:,.1f}""",
    ),
    "elastic": (
        "Memory that moves from one allocator to another, while one of them decodes", 2,
        """backend={backend}; direction={direction}; moved={moved_bytes:bytes}; seconds, steps included={seconds:.2f};
        GiB/s of the admissions={gib_per_second:.1f}; us an admission={admission_us[median]:us};
        step meanwhile, us: median={step_us[median]:us}; p99={step_us[p99]:us}; max={step_us[largest]:us};
        step before={quiet_step_us[median]:us}; ratio={ratio:.3f}; driver calls={driver_calls:,}""",
    ),
    "prefetch": (
        "Attention over a layer of which some was prefetched into the cache", 2,
        """kernel={kernel}; backend={backend}; layer={layer_bytes:bytes}; prefetched={budget_bytes:bytes};
        us of the prefetch={prefetch_us[median]:us}; us={us:spread}; over a cold cache={ratio:ratio}""",
    ),
}  # fmt: skip


def part_tables(document: Row) -> Iterator[Table]:
    """All that the part has measured."""
    for name, rows in document["results"].items():
        shown = list(_SHOWN[name](rows, document["setup"]) if name in _SHOWN else rows)
        if shown:
            title, texts, spec = _SPECS[name]
            yield Table.of(cell(title, shown[0]), spec, shown, texts)


def _runs(rows: Sequence[Row], setup: Row) -> Iterator[Row]:
    """A row for each run without load; beside it that with an access a page, and that under kernels."""
    found = {(r["page_bytes"], r["run_pages"], r["access"], r["load"]): r for r in rows}
    for (page, run, access, load), row in found.items():
        if (access, load) == ("run", "none"):
            apart, busy = found.get((page, run, "page", load)), found.get((page, run, access, "kernels"))
            yield {**row, "apart": apart, "each": apart or row, "busy": busy}


def _decode(rows: Sequence[Row], setup: Row) -> Iterator[Row]:
    why = f" ({setup['why_fewer_layers']})" if setup.get("why_fewer_layers") else ""
    for row in rows:
        yield {**row, "calls_a_step": row["driver_calls"] / row["steps"], "why": why}


def _reads(rows: Sequence[Row], setup: Row) -> Iterator[Row]:
    for row in rows:
        share = row["bandwidth_share"] if row["phase"] == "decode" else None
        yield {**row, "of_bandwidth": share, "terabytes": setup.get("copy_bytes_per_second", 0.0) / 1e12}


_SHOWN: dict[str, Callable[[Sequence[Row], Row], Iterator[Row]]] = {
    "runs": _runs,
    "decode": _decode,
    "attention": _reads,
}
