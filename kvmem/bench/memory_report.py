"""`bench mapping` and `bench rectangle`: the commands and their tables."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from kvmem.arguments import format_bytes
from kvmem.bench.mapping import mapping
from kvmem.bench.progress import progress
from kvmem.bench.rectangle import rectangle
from kvmem.bench.report import Report
from kvmem.bench.results import check_writable, write_json
from kvmem.bench.units import format_us

__all__ = ["Table", "mapping_tables", "rectangle_tables", "run_mapping", "run_rectangle"]

Table = tuple[str, list[str], list[list[str]]]  # title, columns, rows
_WIDTH = 160


def run_mapping(repetitions: int, json_path: Path | None, quiet: bool) -> None:
    check_writable(json_path, None)
    with progress(Console(stderr=True, highlight=False), "mapping, cases", 6, quiet) as done:
        report = mapping(repetitions, progress=done)
    _show(report.to_dict(sys.argv[1:]), mapping_tables, json_path)


def run_rectangle(repetitions: int, json_path: Path | None, quiet: bool) -> None:
    check_writable(json_path, None)
    with progress(Console(stderr=True, highlight=False), "rectangle, cases", 9, quiet) as done:
        report = rectangle(repetitions=repetitions, progress=done)
    _show(report.to_dict(sys.argv[1:]), rectangle_tables, json_path)


def _show(document: dict[str, Any], tables: Any, json_path: Path | None) -> None:
    out = Report(Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH))
    for table in tables(document["results"]):
        out.table(*table)
    if json_path is not None:
        write_json(document, json_path)


def mapping_tables(parts: Mapping[str, Sequence[dict[str, Any]]]) -> Iterator[Table]:
    """For the results of a report."""
    rows = [
        [format_bytes(r["page_bytes"]), str(r["run_pages"]), r["way"], *_spread(r["us"]), f"{r['times_bare']:.2f}",
         f"{r['driver_calls']:g}"]
        for r in parts["mapping"]
    ]  # fmt: skip
    columns = ["page", "pages in a run", "way", "median", "p10 to p90", "times a bare mmap", "driver calls"]
    yield "Mapping a run of pages on the CPU, microseconds a run; no page is touched:", columns, rows
    calls = [[f"{r['sequences']}", f"{r['steps']}", f"{r['driver_calls']}"] for r in parts["mapping_decode"]]
    yield "Decoding over parked rows, the mapper on:", ["sequences", "steps", "driver calls"], calls


def rectangle_tables(parts: Mapping[str, Sequence[dict[str, Any]]]) -> Iterator[Table]:
    """For the results of a report."""
    rows = []
    for r in parts["rectangle"]:
        ratio = r["ratio"]
        times = [f"{ratio['median']:.2f}", f"{ratio['p10']:.2f} to {ratio['p90']:.2f}"]
        rows.append([f"{r['sequences']} x {r['tokens']:,}", r["memory"], *_spread(r["us"]), *times])
    columns = ["sequences x tokens", "memory", "median", "p10 to p90", "times plain", "p10 to p90"]
    yield "One SDPA call for a batch, one layer's decode step, one thread, microseconds of CPU time:", columns, rows


def _spread(us: dict[str, float]) -> list[str]:
    return [format_us(us["median"]), f"{format_us(us['p10'])} to {format_us(us['p90'])}"]
