"""The parts' documents as Markdown: the goals of each device, then every part's figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from kvmem.arguments import format_bytes
from kvmem.bench.gpu.goals import goals
from kvmem.bench.markdown import table
from kvmem.bench.units import format_percent, format_us

__all__ = ["goal_lines", "gpu_page", "gpu_summary"]

Report = Mapping[str, Any]
_HOW = "`python -m kvmem.bench gpu --out FOLDER` measures it"
_MET = {True: "yes", False: "NO", None: "-"}


def goal_lines(reports: Mapping[str, Report]) -> list[str]:
    """``reports``: by part. What was wanted, what was measured, and whether it was met."""
    rows = [[goal.name, goal.limit, goal.measured, _MET[goal.met]] for goal in goals(reports)]
    return table(["on a GPU", "wanted", "measured", "met"], rows, 4)


def gpu_summary(reports: Sequence[Report]) -> list[str]:
    """For the README: the goals on each device, or that nothing was measured."""
    if not reports:
        return [f"On a GPU: not measured; {_HOW}."]
    lines = []
    for device, of_device in _by_device(reports).items():
        lines += [f"On an {device}:", "", *goal_lines(of_device)]
    return lines


def gpu_page(reports: Sequence[Report]) -> list[str]:
    """A section a device, or one that says that nothing was measured."""
    if not reports:
        return ["## GPU", "", f"Not measured; {_HOW}.", "", *goal_lines({})]
    lines: list[str] = []
    for device, of_device in _by_device(reports).items():
        lines += [
            f"## {device}",
            "",
            _machine(next(iter(of_device.values()))["environment"]),
            "",
            *goal_lines(of_device),
        ]
        for name, report in of_device.items():
            lines += ["", f"### {name}", "", f"`python -m kvmem.bench {' '.join(report['command'])}`", ""]
            lines += _part(name, report)
    return lines


def _by_device(reports: Sequence[Report]) -> dict[str, dict[str, Report]]:
    found: dict[str, dict[str, Report]] = {}
    for report in reports:
        found.setdefault(report["environment"]["device"], {})[report["gpu_part"]] = report
    return found


def _machine(facts: Mapping[str, Any]) -> str:
    names = ("driver", "cuda", "torch", "flashinfer-python", "fa3-fwd", "triton", "python", "kvmem", "commit")
    versions = ", ".join(f"{name} {facts[name]}" for name in names if facts.get(name))
    return f"{facts['device']}, {format_bytes(facts.get('device_bytes') or 0)}; {versions}."


def _part(name: str, report: Report) -> Iterator[str]:
    if report["error"]:
        yield from (f"Cut short: {report['error']}", "")
    for title, columns, texts, rows in _TABLES[name](report):
        if rows:
            yield from (title, "", *table(columns, rows, texts), "")
    reasons: dict[str, list[str]] = {}
    for skipped in report["skipped"]:
        reasons.setdefault(skipped["why"], []).append(skipped["case"])
    for why, cases in reasons.items():
        yield f"- not measured: {'; '.join(cases)}: {why}"


_Tables = Iterator[tuple[str, list[str], int, list[list[str]]]]


def _rows(report: Report, name: str) -> list[dict[str, Any]]:
    return report["results"].get(name, [])  # type: ignore[no-any-return]


def _median(spread: Mapping[str, float]) -> str:
    return format_us(spread["median"])


def _around(spread: Mapping[str, float]) -> str:
    return f"{format_us(spread['p10'])} to {format_us(spread['p90'])}"


def _ratio(ratio: Mapping[str, float] | None) -> str:
    return "" if ratio is None else f"{ratio['median']:.3f} ({ratio['p10']:.3f} to {ratio['p90']:.3f})"


def _vmm(report: Report) -> _Tables:
    found = {(r["page_bytes"], r["run_pages"], r["access"], r["load"]): r for r in _rows(report, "runs")}
    rows = []
    for (page, run, access, load), row in found.items():
        if (access, load) != ("run", "none"):
            continue
        apart, busy = found.get((page, run, "page", load)), found.get((page, run, access, "kernels"))
        cells = [_median(row[name]) for name in ("map_us", "set_access_us", "unmap_us")]
        cells.insert(2, _median((apart or row)["set_access_us"]))
        busy_cells = [_median(busy[n]) for n in ("map_us", "set_access_us", "unmap_us")] if busy else ["", "", ""]
        speeds = [f"{r['gib_per_second']:,.0f}" if r else "" for r in (row, apart, busy)]
        rows.append([format_bytes(page), str(run), *cells, *speeds[:2], *busy_cells, speeds[2]])
    columns = [
        "page",
        "run, pages",
        "map, a page",
        "set_access, the run",
        "set_access, a page of it",
        "unmap, a page",
        "GiB/s",
        "GiB/s, an access a page",
        "map under kernels",
        "set_access",
        "unmap",
        "GiB/s",
    ]
    yield "Microseconds a driver call, medians; GiB/s are of map and set_access together:", columns, 1, rows
    pages = [
        [
            format_bytes(row["page_bytes"]),
            *(_median(row[n]) for n in ("create_us", "destroy_us", "reserve_us", "release_us")),
        ]
        for row in _rows(report, "pages")
    ]
    yield "Microseconds:", ["page", "create", "destroy", "reserve", "release"], 1, pages


def _decode(report: Report) -> _Tables:
    setup = report["setup"]
    rows = [
        [
            r["phase"],
            r["memory"],
            *(format_us(r["step_us"][n]) for n in ("median", "p99", "largest")),
            _ratio(r["ratio"]),
            *(format_us(r["allocator_us"][n]) for n in ("median", "p99", "largest")),
            _median(r["plan_us"]),
            f"{r['driver_calls'] / r['steps']:.2f}",
            str(r["most_driver_calls"]),
            str(r["calls_meanwhile"]),
            str(r["late_steps"]),
            str(r["most_lag_steps"]),
        ]
        for r in _rows(report, "decode")
    ]
    columns = ["phase", "memory", "step, us: median", "p99", "max", "over static", "allocator, us: median", "p99"]
    columns += ["max", "the kernel's plan", "driver calls a step", "at most", "during the allocator's part"]
    columns += ["steps begun with the mapper behind", "by at most, steps"]
    first = next(iter(_rows(report, "decode")), None)
    title = ""
    if first is not None:
        why = f" ({setup['why_fewer_layers']})" if setup.get("why_fewer_layers") else ""
        title = f"{first['sequences']} sequences from {first['prompt_tokens']:,} tokens, {first['steps']} steps, "
        title += f"{setup.get('layers')} layers{why}:"
    yield title, columns, 2, rows


def _attention(report: Report) -> _Tables:
    rows = [
        [
            r["phase"],
            r["kernel"],
            f"{r['sequences']} x {r['tokens']:,}",
            r["memory"],
            _median(r["us"]),
            _around(r["us"]),
            _ratio(r["ratio"]),
            _ratio(r["twin_ratio"]),
            format_percent(r["bandwidth_share"]) if r["phase"] == "decode" else "",
        ]
        for r in _rows(report, "attention")
    ]
    columns = [
        "phase",
        "kernel",
        "batch",
        "memory",
        "us a layer, median",
        "p10 to p90",
        "over static contiguous",
        "over a static copy",
        "of the bandwidth",
    ]
    speed = report["setup"].get("copy_bytes_per_second", 0.0)
    yield f"A copy on the device moves {speed / 1e12:.2f} TB/s, read and written:", columns, 4, rows


def _layout(report: Report) -> _Tables:
    verdicts = [
        [
            r["backend"],
            str(r["interleave"]),
            f"{r['worst_ratio']:.3f}",
            str(r["cases"]),
            "yes" if r["recommended"] else "",
        ]
        for r in _rows(report, "verdict")
    ]
    columns = ["backend", "interleave", "worst ratio to static", "cases", "recommended"]
    yield "The largest interleave that costs at most 2 % more than the best:", columns, 1, verdicts
    rows = [
        [
            r["phase"],
            r["kernel"],
            r["backend"],
            f"{r['sequences']} x {r['tokens']:,}",
            f"{r['interleave']} of {r['layers']}",
            _median(r["us"]),
            _ratio(r["ratio"]),
        ]
        for r in _rows(report, "layout")
    ]
    columns = ["phase", "kernel", "backend", "batch", "interleave", "us a layer", "over static, a layer each"]
    yield "Attention by layout:", columns, 5, rows


def _admit(report: Report) -> _Tables:
    rows = [
        [
            r["way"],
            r["backend"],
            format_bytes(r["page_bytes"]),
            f"{r['prompt_tokens']:,}",
            f"{r['cached_tokens']:,}",
            _median(r["host_us"]),
            format_us(r["host_us"]["p90"]),
            _median(r["ready_us"]),
            f"{r['driver_calls']:,.1f}",
        ]
        for r in _rows(report, "admit")
    ]
    columns = [
        "memory",
        "backend",
        "page",
        "prompt, tokens",
        "cached",
        "us until kernels can be launched",
        "p90",
        "us until the device is done",
        "driver calls",
    ]
    yield "A prompt until it has its memory:", columns, 3, rows


def _elastic(report: Report) -> _Tables:
    rows = [
        [
            r["backend"],
            r["direction"],
            format_bytes(r["moved_bytes"]),
            f"{r['seconds']:.2f}",
            f"{r['gib_per_second']:.1f}",
            _median(r["admission_us"]),
            *(format_us(r["step_us"][n]) for n in ("median", "p99", "largest")),
            format_us(r["quiet_step_us"]["median"]),
            f"{r['ratio']:.3f}",
            f"{r['driver_calls']:,}",
        ]
        for r in _rows(report, "elastic")
    ]
    columns = [
        "backend",
        "direction",
        "moved",
        "seconds, steps included",
        "GiB/s of the admissions",
        "us an admission",
        "step meanwhile, us: median",
        "p99",
        "max",
        "step before",
        "ratio",
        "driver calls",
    ]
    yield "Memory that moves from one allocator to another, while one of them decodes:", columns, 2, rows


_TABLES: dict[str, Callable[[Report], _Tables]] = {
    "vmm": _vmm,
    "decode": _decode,
    "attention": _attention,
    "layout": _layout,
    "admit": _admit,
    "elastic": _elastic,
}
