"""Measured results as Markdown: a folder of JSON reports as one page, and the short table of the README.

Everything on them is read from the reports, so that a number in the documents is one that a command has printed.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmem.arguments import format_bytes
from kvmem.bench.driver_costs import PUBLISHED
from kvmem.bench.errors import BenchError
from kvmem.bench.gpu.tables import gpu_page, gpu_summary
from kvmem.bench.markdown import table as _table
from kvmem.bench.memory_report import mapping_tables, rectangle_tables
from kvmem.bench.results import SCHEMA_VERSION
from kvmem.bench.step_report import COLUMNS as STEP_COLUMNS
from kvmem.bench.step_report import PEER_COLUMNS, memory_rows, peer_rows, step_rows
from kvmem.bench.units import format_percent, format_seconds, format_us

__all__ = ["BEGIN", "END", "Document", "insert", "load_documents", "page", "summary"]

BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
_INTERLEAVED, _PER_LAYER = "all layers in one range", "one range for each layer's K and V"
_META = 'The replays keep the books of a simulated device (`device="meta"`): driver calls are counted, not timed.'


@dataclass(frozen=True)
class Document:
    """One JSON report: ``parts`` are its results by part."""

    file: str
    environment: dict[str, Any]
    command: list[str]
    setup: dict[str, Any]
    parts: dict[str, list[dict[str, Any]]]

    @property
    def run(self) -> str:
        return " ".join(["python -m kvmem.bench", *self.command])

    @property
    def machine(self) -> str:
        facts = self.environment
        return (
            f"{facts['cpu']}, {facts['cpus']} cores shared with others (load {facts['load_1min']:.1f}), no GPU; "
            f"torch {facts['torch']}, Python {facts['python']}; commit {facts['commit']}"
        )


def load_documents(folder: Path) -> list[Document]:
    """The reports ``*.json`` in ``folder``, by name. Raises `BenchError` where one is not a report of this version."""
    paths = sorted(path for path in folder.glob("*.json") if path.name != "instructions.json")  # counts, not a report
    if not paths:
        raise BenchError(f"{folder}: no report (*.json) in this folder; write one with --json")
    return [_load(path) for path in paths]


def _load(path: Path) -> Document:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["schema_version"] != SCHEMA_VERSION:
            raise BenchError(f"{path}: a report of version {report['schema_version']}; this reads {SCHEMA_VERSION}")
        if "gpu_part" in report:
            setup, parts = report["setup"], {"gpu": [report]}
        elif "default_policy" in report:  # of `reuse`
            setup, parts = report["trace"] | {"default_policy": report["default_policy"]}, {"reuse": report["results"]}
        else:
            setup, parts = report["setup"], report["results"]
        return Document(path.name, report["environment"], report["command"], setup, defaultdict(list, parts))
    except OSError as error:
        raise BenchError(f"{path}: cannot read the report: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, BenchError):
            raise
        raise BenchError(f"{path}: not a report of kvmem.bench: {type(error).__name__} {error}") from None


def page(documents: Sequence[Document]) -> str:
    """All that was measured, a section a report."""
    lines = ["# Measured", "", "Written by `python -m kvmem.bench table docs/results`; not by hand.", ""]
    replays = [document for document in documents if document.parts["replay"]]
    if replays:
        lines += ["## Rounding at request end, beside the bytes in use", "", *_table(_WASTE, _waste(replays), 2), ""]
        lines += ["## Replays", "", _META, "", *_table(_REPLAY, _replays(replays), 2), ""]
    reports = [report for document in documents for report in document.parts["gpu"]]
    lines += [*gpu_page(reports), ""]
    for document in (document for document in documents if not document.parts["gpu"]):
        lines += [f"## {document.file}", "", f"`{document.run}`", "", f"On {document.machine}.", ""]
        for title, columns, rows in _details(document):
            lines += [title, "", *_table(columns, rows, 2), ""]
    return "\n".join(lines).rstrip() + "\n"


def summary(documents: Sequence[Document]) -> str:
    """At most twelve rows: what a user decides by."""
    replays = [document for document in documents if document.parts["replay"] and "replay" in document.command]
    columns = ["", *(f"{_title(document)}, {document.setup['requests']:,} requests" for document in replays)]
    runs = [{run["pool"]: run for run in document.parts["replay"]} for document in replays]
    calls = [{run["pool"]: run for run in document.parts["steady"] if run["batch"] == "parked"} for document in replays]

    def both(value: Any) -> list[str]:
        return [" / ".join(value(pools[name]) for name in ("virtual", "paged")) for pools in runs]

    rows = [
        ["waste of the bytes in use, virtual / paged", *both(lambda run: format_percent(_end_waste(run)))],
        ["... with a tensor for each layer's K and V", *(_share(_rounding(doc, _PER_LAYER)) for doc in replays)],
        ["... in a static pool", *(format_percent(_end_waste(pools["static"])) for pools in runs)],
        ["sequences that fitted, virtual / paged", *both(lambda run: f"{run['outcome']['peak_running']:,}")],
        ["... in a static pool", *(f"{pools['static']['outcome']['peak_running']:,}" for pools in runs)],
        ["allocator, us a step, median, virtual / paged", *both(lambda run: _us(run, "step_us", "median"))],
        ["... p99", *both(lambda run: _us(run, "step_us", "p99"))],
        ["prompt tokens found in the cache, virtual / paged", *both(_hits)],
        ["driver calls of the replay, virtual / paged", *both(lambda run: f"{run['driver_calls']:,}")],
        ["... their seconds on an H100", *both(lambda run: f"{run['driver_seconds']:.1f}")],
        [
            f"driver calls of {replays[0].parts['steady'][0]['steps']} decode steps over parked rows, virtual / paged",
            *(" / ".join(str(pools[name]["decode_driver_calls"]) for name in ("virtual", "paged")) for pools in calls),
        ],
    ]  # fmt: skip
    setup = replays[0].setup
    text = (
        f"Two whole traces of real services replayed with the cache of {setup['model']} on a simulated device: "
        f"{format_bytes(setup['device_bytes'])}, {format_bytes(setup['kv_bytes'])} of it for KV.\n"
        "With content, prompts begin alike as the trace's block ids say; without, memory is all that is tested. Waste "
        "is rounding, measured when each request ends.\nDriver calls are counted: the device keeps only the books; "
        f"their seconds are those of an {PUBLISHED.device} as published ({PUBLISHED.source}), not measured here.\n"
        f"`python -m kvmem.bench replay --trace FILE` on {replays[0].environment['cpus']} shared cores of an "
        f"{replays[0].environment['cpu']}, no GPU; more, and the reports, in [docs/results](docs/results/README.md)."
    )
    gpu = gpu_summary([report for document in documents for report in document.parts["gpu"]])
    return "\n".join([text, "", *_table(columns, rows), *_generation(documents), "", *gpu])


def _us(run: dict[str, Any], part: str, edge: str) -> str:
    # The static pool's bookkeeping is the benchmark's own; with content, ids are made in between.
    return "-" if run["pool"] == "static" or run["lookup_tokens"] else format_us(run[part][edge])


def _hits(run: dict[str, Any]) -> str:
    return format_percent(run["hit_tokens"] / run["lookup_tokens"]) if run["lookup_tokens"] else "-"


def _generation(documents: Sequence[Document]) -> Iterator[str]:
    """A sentence for each report of `generate`."""
    for document in documents:
        if rows := document.parts["generate"]:
            speeds = ", ".join(f"{_speed(row)[0]} tokens/s with {row['cache']}" for row in rows)
            same = "the same tokens from all caches" if all(row["same_tokens"] for row in rows) else "DIFFERENT TOKENS"
            yield f"\n`python -m kvmem.bench generate`, {rows[0]['model']} on one thread: {same}; {speeds}."


def insert(text: str, between: str, where: str) -> str:
    """``text`` with ``between`` between its markers. Raises `BenchError` unless both are there, once, in order."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise BenchError(f"{where}: needs the two lines {BEGIN} and {END}, the table goes between them")
    return f"{head}{BEGIN}\n{between}\n{END}{tail}"


_WASTE = [
    "trace",
    "layout",
    "tokens a page",
    "by arithmetic",
    "as a part of mapped bytes",
    "measured, virtual",
    "measured, paged",
]
_REPLAY = ["trace", "pool", "fitted, at most", "running, mean", "preemptions", "time to serve, simulated",
           "found in the cache", "driver calls", "map", "set_access", "unmap", "driver seconds, H100 as published",
           "us a step: median", "p99", "growing steps: median", "p99"]  # fmt: skip


def _title(document: Document) -> str:
    name = str(document.setup["trace"]).replace("_", " ")
    page = format_bytes(document.setup["page_bytes"])
    return f"{name}, {page} pages" + (", with content" if document.setup.get("content") else "")


def _waste(replays: Sequence[Document]) -> list[list[str]]:
    rows = []
    for document in replays:
        runs = {run["pool"]: format_percent(_end_waste(run)) for run in document.parts["replay"]}
        for layout in (_INTERLEAVED, _PER_LAYER):
            row = _rounding(document, layout)
            measured = [runs.get(pool, "") if layout == _INTERLEAVED else "" for pool in ("virtual", "paged")]
            rows.append(
                [
                    _title(document),
                    layout,
                    f"{row['page_tokens']:,.0f}",
                    _share(row),
                    format_percent((row["mapped_bytes"] - row["used_bytes"]) / row["mapped_bytes"]),
                    *measured,
                ]
            )
    return rows


def _replays(replays: Sequence[Document]) -> list[list[str]]:
    return [[_title(document), *_replay(run)] for document in replays for run in document.parts["replay"]]


def _replay(run: dict[str, Any]) -> list[str]:
    outcome = run["outcome"]
    static = run["pool"] == "static"
    return [
        run["pool"],
        f"{outcome['peak_running']:,}",
        f"{run['mean_running']:.1f}",
        f"{outcome['preemptions']:,}",
        format_seconds(run["simulated_seconds"]),
        _hits(run),
        *(
            "-" if static else f"{run[kind]:,}"
            for kind in ("driver_calls", "map_calls", "set_access_calls", "unmap_calls")
        ),
        "-" if static else f"{run['driver_seconds']:.1f}",
        *(_us(run, part, edge) for part in ("step_us", "grow_us") for edge in ("median", "p99")),
    ]


def _details(document: Document) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    parts = document.parts
    if rows := parts["reuse"]:
        title = (
            f"Share of {document.setup['blocks']:,} blocks of {document.setup['block_tokens']} tokens read in "
            f"{document.setup['requests']:,} requests that were cached; in brackets of what Belady's rule finds:"
        )
        yield title, *_reuse(document)
    if rows := parts["steady"]:
        title = (
            f"Driver calls of a batch of {rows[0]['sequences']} sequences, {rows[0]['prompt_tokens']:,} prompt tokens, "
            f"{rows[0]['steps']} decode steps:"
        )
        cells = [[r["pool"], r["batch"], f"{r['admit_driver_calls']:,}", f"{r['decode_driver_calls']:,}"] for r in rows]
        yield title, ["pool", "batch", "at admission", "while decoding"], cells
    if rows := parts["micro"]:
        cells = [[f"{r['case']}, a {r['unit']}", r["backend"], *_spread(r["us"])] for r in rows]
        title = f"Real memory on the CPU, {rows[0]['sequences']} sequences, microseconds:"
        yield title, ["call", "backend", "median", "p10 to p90"], cells
    if rows := parts["attention"]:
        cells = [[r["case"], r["backend"], *_spread(r["us"])] for r in rows]
        yield "Attention on one thread, microseconds a layer:", ["case", "memory", "median", "p10 to p90"], cells
    if parts["mapping"]:
        yield from mapping_tables(parts)
    if parts["rectangle"]:
        yield from rectangle_tables(parts)
    if rows := parts["step"]:
        yield "Calls of a scheduler, microseconds:", STEP_COLUMNS, list(step_rows(rows))
        yield "Books at the end of a round:", ["pool", "manager", "heap", "bytes a block"], list(memory_rows(rows))
    if rows := parts["peers"]:
        versions = ", ".join(f"{name} {version}" for name, version in document.setup["versions"].items())
        yield f"Microseconds of CPU time; {versions}:", PEER_COLUMNS, list(peer_rows(rows))
    if rows := parts["generate"]:
        title = (
            f"{rows[0]['model']}, float32, one thread, {rows[0]['sequences']} prompts, {rows[0]['us']['count']} times:"
        )
        cells = [[r["cache"], *_speed(r), format_bytes(r["used_bytes"]), format_bytes(r["mapped_bytes"]),
                  "yes" if r["same_tokens"] else "NO"] for r in rows]  # fmt: skip
        columns = ["cache", "tokens/s, median", "p10 to p90", "used at the end", "mapped", "same tokens"]
        yield title, columns, cells


def _reuse(document: Document) -> tuple[list[str], list[list[str]]]:
    rows = document.parts["reuse"]
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    found = {(row["capacity"], row["policy"]): row for row in rows}
    named = [f"{name}, the default" if name == document.setup["default_policy"] else name for name in policies]
    cells = []
    for capacity in dict.fromkeys(row["capacity"] for row in rows):
        here = [found[capacity, policy] for policy in policies]
        rates = [f"{format_percent(row['hit_rate'])} ({row['share_of_belady']:.0%})" for row in here]
        known = not isinstance(capacity, str)
        tokens = f"{capacity * document.setup['block_tokens'] / 1e6:.1f} M" if known else "all"
        title = f"{capacity:,} blocks" if known else capacity
        cells.append([title, tokens, *rates, format_percent(here[0]["belady_hit_rate"])])
    return ["capacity", "tokens", *named, "Belady"], cells


def _speed(row: dict[str, Any]) -> list[str]:
    median, slow, fast = (row["tokens"] * 1e6 / row["us"][edge] for edge in ("median", "p90", "p10"))
    return [f"{median:.1f}", f"{slow:.1f} to {fast:.1f}"]


def _spread(us: dict[str, float]) -> list[str]:
    return [format_us(us["median"]), f"{format_us(us['p10'])} to {format_us(us['p90'])}"]


def _rounding(document: Document, layout: str) -> dict[str, Any]:
    return next(row for row in document.parts["waste"] if row["layout"] == layout)


def _share(row: dict[str, Any]) -> str:
    return format_percent((row["mapped_bytes"] - row["used_bytes"]) / row["used_bytes"])


def _end_waste(run: dict[str, Any]) -> float:
    return float(run["end_wasted_bytes"] / max(1, run["end_used_bytes"]))
