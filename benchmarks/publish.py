"""Measured results as Markdown: a folder of JSON documents as one page, and the short table of the README.

All numbers are read from the documents, so that each number in the docs was printed by a command.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.batching import batching_tables
from benchmarks.generate import generate_tables
from benchmarks.peers.compare import peer_tables
from benchmarks.perplexity import perplexity_tables
from benchmarks.resume import resume_tables
from benchmarks.serve import serve_tables
from benchmarks.step import step_tables
from benchmarks.vllm_memory import memory_tables
from benchmarks.vllm_scheduler import hit_tables, time_tables
from kvmem.arguments import format_bytes
from kvmem.bench.__main__ import main
from kvmem.bench.cli import PATH
from kvmem.bench.document import SCHEMA_VERSION
from kvmem.bench.gpu.tables import goal_table, part_tables
from kvmem.bench.render import Row, Table, cell, each, replay_row, reuse_tables, setup_lines, tables
from kvmem.bench.replay import PUBLISHED
from kvmem.bench.text import BenchError

BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
_HOW = "`python -m kvmem.bench gpu --out FOLDER` measures it"
_META = 'Replays have the metadata of a simulated device (`device="meta"`): driver calls are counted, not timed.'
#: Commands of developers, which older documents name as parts of ``kvmem.bench``.
_OWN = (
    *("step", "peers", "generate", "perplexity", "memory", "resume", "batching", "serve"),
    *("vllm_scheduler", "vllm_memory"),
)
_OURS = {name: name for name in _OWN} | {
    "mapping": "memory",
    "rectangle": "memory",
}


@dataclass(frozen=True)
class Document:
    """One JSON document: ``parts`` are its results by part."""

    file: str
    environment: dict[str, Any]
    command: list[str]
    setup: dict[str, Any]
    parts: dict[str, list[dict[str, Any]]]

    @property
    def run(self) -> str:
        first = next(iter(self.command), "")
        if first in _OURS:
            rest = self.command[1:] if _OURS[first] == first else self.command
            return " ".join([f"python -m benchmarks.{_OURS[first]}", *rest])
        return " ".join(["python -m kvmem.bench", *self.command])

    @property
    def machine(self) -> str:
        form = "{cpu}, {cpus} cores shared with others (load {load_1min:.1f}), no GPU; torch {torch}, Python {python}; "
        return cell(form + "commit {commit}", self.environment)


def load_documents(folder: Path) -> list[Document]:
    """The documents ``*.json`` in ``folder``, by name. Raises `BenchError` where one is not of this version."""
    paths = sorted(path for path in folder.glob("*.json") if path.name != "instructions.json")  # counts alone
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
    except BenchError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{path}: not a report of kvmem.bench: {type(error).__name__} {error}") from None


def page(documents: Sequence[Document]) -> str:
    """Everything that was measured, a section a document."""
    lines = ["# Measured", "", "Written by `python -m benchmarks.publish docs/results`; not by hand.", "", _META, ""]
    lines += [*_gpu_page([report for document in documents for report in document.parts["gpu"]]), ""]
    for document in documents:
        if not document.parts["gpu"]:
            lines += [f"## {document.file}", "", f"`{document.run}`", "", f"On {document.machine}.", ""]
            if document.parts["replay"]:
                lines += [*(f"- {' '.join(line.split())}" for line in setup_lines(document.setup)), ""]
            for table in _tables(document):
                lines += [f"{table.title}:", "", *table.markdown(), ""]
    return "\n".join(lines).rstrip() + "\n"


def _tables(document: Document) -> Iterator[Table]:
    setup, parts = document.setup, document.parts
    if rows := parts["reuse"]:
        yield from reuse_tables(setup, setup["default_policy"], rows)
    yield from tables(setup, parts)
    if rows := parts["steady"]:  # of older documents: a test now
        title = "Driver calls of {sequences} sequences, {prompt_tokens:,} prompt tokens, {steps} decode steps"
        spec = "pool={pool}; batch={batch}; at admission={admit_driver_calls:,}; while decoding={decode_driver_calls:,}"
        yield Table.of(cell(title, rows[0]), spec, rows, 2)
    if rows := parts["mapping_decode"]:
        spec = "sequences={sequences}; steps={steps}; driver calls={driver_calls}"
        yield Table.of("Decoding over parked rows, the mapper on", spec, rows)
    if rows := parts["step"]:
        yield from step_tables(rows)
    if rows := parts["peers"]:
        versions = ", ".join(f"{name} {version}" for name, version in setup["versions"].items())
        yield from peer_tables(rows, f"CPU time; {versions}")
    if rows := parts["generate"]:
        yield from generate_tables(rows)
    if rows := parts["perplexity"]:
        yield from perplexity_tables(setup, rows)
    if rows := parts["resume"]:
        yield from resume_tables(rows)
    if rows := parts["batching"]:
        yield from batching_tables(rows)
    if rows := parts["vllm_time"]:
        yield from time_tables(rows, setup)
    if rows := parts["vllm_hits"]:
        yield from hit_tables(rows, setup)
    if rows := parts["vllm_memory"]:
        yield from memory_tables(setup, rows)
    if rows := parts["serve"]:
        yield from serve_tables(setup, rows)


def _gpu_page(reports: Sequence[Row]) -> Iterator[str]:
    """A section for each device, or one that says that nothing was measured."""
    if not reports:
        yield from ("## GPU", "", f"Not measured; {_HOW}.", "", *goal_table({}).markdown())
    for device, of_device in _by_device(reports).items():
        facts = next(iter(of_device.values()))["environment"]
        names = ("driver", "cuda", "torch", "flashinfer-python", "fa3-fwd", "triton", "python", "kvmem", "commit")
        versions = ", ".join(f"{name} {facts[name]}" for name in names if facts.get(name))
        machine = f"{facts['device']}, {format_bytes(facts.get('device_bytes') or 0)}; {versions}."
        yield from (f"## {device}", "", machine, "", *goal_table(of_device).markdown())
        for name, report in of_device.items():
            yield from ("", f"### {name}", "", f"`python -m kvmem.bench {' '.join(report['command'])}`", "")
            if report["error"]:
                yield from (f"Cut short: {report['error']}", "")
            for table in part_tables(report):
                yield from (f"{table.title}:", "", *table.markdown(), "")
            reasons: dict[str, list[str]] = {}
            for skipped in report["skipped"]:
                reasons.setdefault(skipped["why"], []).append(skipped["case"])
            yield from (f"- not measured: {'; '.join(cases)}: {why}" for why, cases in reasons.items())


def _by_device(reports: Sequence[Row]) -> dict[str, dict[str, Row]]:
    found: dict[str, dict[str, Row]] = {}
    for report in reports:
        found.setdefault(report["environment"]["device"], {})[report["gpu_part"]] = report
    return found


def summary(documents: Sequence[Document]) -> str:
    """The figures that a user needs to choose: a column for each whole trace."""
    replays = [document for document in documents if document.parts["replay"] and "replay" in document.command]
    columns = ["", *(f"{_title(document)}, {document.setup['requests']:,} requests" for document in replays)]
    runs = [{run["pool"]: replay_row(run) for run in document.parts["replay"]} for document in replays]

    def both(form: str, pools: Sequence[str] = ("virtual", "paged")) -> list[str]:
        return [" / ".join(cell(form, of[name]) or "-" for name in pools) for of in runs]

    apart = [next(row for row in doc.parts["waste"] if "each layer's K and V" in row["layout"]) for doc in replays]
    parked = [[row for row in doc.parts["steady"] if row["batch"] == "parked"] for doc in replays]
    rows = [
        ["waste of the bytes in use, virtual / paged", *both("{end_waste:share}")],
        ["... with a tensor for each layer's K and V",
         *(cell("{v:share}", {"v": row["mapped_bytes"] / row["used_bytes"] - 1}) for row in apart)],
        ["... in a static pool", *both("{end_waste:share}", ["static"])],
        ["sequences that fitted, virtual / paged", *both("{outcome[peak_running]:,}")],
        ["... in a static pool", *both("{outcome[peak_running]:,}", ["static"])],
        ["allocator, us a step, median, virtual / paged", *both("{step_us[median]:us}")],
        ["... p99", *both("{step_us[p99]:us}")],
        ["prompt tokens found in the cache, virtual / paged", *both("{hit_rate:share}")],
        ["driver calls of the replay, virtual / paged", *both("{driver_calls:,}")],
        ["... their seconds on an H100", *both("{driver_seconds:.1f}")],
    ]  # fmt: skip
    if all(parked):
        name = cell("driver calls of {steps} decode steps over parked rows, virtual / paged", parked[0][0])
        rows.append([name, *(" / ".join(str(row["decode_driver_calls"]) for row in found) for found in parked)])
    gpu = _gpu_summary([report for document in documents for report in document.parts["gpu"]])
    table = Table("", columns, rows).markdown()
    return "\n".join([_introduction(replays[0]), "", *table, *_generation(documents), "", *gpu])


def _introduction(replay: Document) -> str:
    setup = replay.setup
    return (
        f"Two whole traces of real services replayed with the cache of {setup['model']} on a simulated device: "
        f"{format_bytes(setup['device_bytes'])}, {format_bytes(setup['kv_bytes'])} of it for KV.\n"
        "With content, prompts begin alike as the trace's block ids say; without, memory is all that is tested. Waste "
        "is rounding, measured when each request ends.\nDriver calls are counted: the device has metadata alone; "
        f"their seconds are those of an {PUBLISHED.device} as published ({PUBLISHED.source}), not measured here.\n"
        f"`python -m kvmem.bench replay --trace FILE` on {replay.environment['cpus']} shared cores of an "
        f"{replay.environment['cpu']}, no GPU; more, and the reports, in [docs/results](docs/results/README.md)."
    )


def _gpu_summary(reports: Sequence[Row]) -> Iterator[str]:
    if not reports:
        yield f"On a GPU: not measured; {_HOW}."
    for device, of_device in _by_device(reports).items():
        yield from (f"On an {device}:", "", *goal_table(of_device).markdown())


def _title(document: Document) -> str:
    name = str(document.setup["trace"]).replace("_", " ")
    page = format_bytes(document.setup["page_bytes"])
    return f"{name}, {page} pages" + (", with content" if document.setup.get("content") else "")


def _generation(documents: Sequence[Document]) -> Iterator[str]:
    """A sentence for each document of `generate`."""
    for rows in (document.parts["generate"] for document in documents):
        if rows:
            shown = [row | {"speed": row["tokens"] * 1e6 / row["us"]["median"]} for row in rows]
            speeds = each("{speed:.1f} tokens/s with {cache}", shown)
            same = "the same tokens from all caches" if all(row["same_tokens"] for row in rows) else "DIFFERENT TOKENS"
            yield f"\n`python -m benchmarks.generate`, {rows[0]['model']} on one thread: {same}; {speeds}."


def insert(text: str, between: str, where: str) -> str:
    """``text`` with ``between`` between its markers. Raises `BenchError` unless both are there, once, in order."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise BenchError(f"{where}: needs the two lines {BEGIN} and {END}, the table goes between them")
    return f"{head}{BEGIN}\n{between}\n{END}{tail}"


@click.command()
@click.argument("folder", type=PATH)
@click.option("--readme", type=PATH, help="Also puts the short table between its markers.")
def command(folder: Path, readme: Path | None) -> None:
    """Writes FOLDER/README.md from the JSON documents in FOLDER."""
    documents = load_documents(folder)
    try:
        (folder / "README.md").write_text(page(documents), encoding="utf-8")
        if readme is not None:
            text = insert(readme.read_text(encoding="utf-8"), summary(documents), str(readme))
            readme.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BenchError(f"{error.filename}: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main(None, command, "python -m benchmarks.publish"))
