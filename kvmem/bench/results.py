"""All that one run measured, and its JSON form.

``{"schema_version": 1, "environment": {...}, "command": [...], "setup": {...}, "results": {part: [...], ...}}``.
``setup`` has the fields of `Setup`. Each part under ``results`` is a list of objects with the fields of its dataclass
(`ReplayResult`, `Rounding`, `SteadyResult`, `MicroResult`, `AttentionResult`, `GenerateResult`); a part that was not
run is an empty list. The ``samples`` of a replay are columns: one list a field of `Sample` and `Usage`, at most 200
moments of all that were taken. ``command`` has the names of files without their folders. Bytes, tokens
and driver calls are integers, shares are fractions of one, ``_us`` are microseconds. Fields may be added within a
version; none changes its meaning.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from kvmem.bench.attention import AttentionResult
from kvmem.bench.environment import environment
from kvmem.bench.errors import BenchError
from kvmem.bench.generate import GenerateResult
from kvmem.bench.micro import MicroResult
from kvmem.bench.replay import ReplayResult
from kvmem.bench.steady import SteadyResult
from kvmem.bench.waste import Rounding

__all__ = ["SCHEMA_VERSION", "Results", "Setup", "check_writable", "without_folders", "write_json"]

SCHEMA_VERSION = 1
_MOST_SAMPLES = 200


@dataclass(frozen=True)
class Setup:
    """What was measured: the model's cache, the simulated device and the trace."""

    model: str
    bytes_per_token: int
    device_bytes: int
    weight_bytes: int
    kv_bytes: int
    page_bytes: int
    block_size: int
    max_sequences: int
    max_tokens: int
    prefill: str
    content: bool
    trace: str
    trace_format: str
    requests: int
    trace_seconds: float
    input_tokens: int
    output_tokens: int
    notes: tuple[str, ...]


@dataclass
class Results:
    """Filled part by part. ``waste`` is at the page size asked for, ``waste_sweep`` over page sizes."""

    setup: Setup
    replay: list[ReplayResult] = field(default_factory=list)
    waste: list[Rounding] = field(default_factory=list)
    waste_sweep: list[Rounding] = field(default_factory=list)
    steady: list[SteadyResult] = field(default_factory=list)
    micro: list[MicroResult] = field(default_factory=list)
    attention: list[AttentionResult] = field(default_factory=list)
    generate: list[GenerateResult] = field(default_factory=list)

    def to_dict(self, command: list[str]) -> dict[str, Any]:
        parts = {
            part.name: [asdict(row) for row in getattr(self, part.name)]
            for part in fields(self)
            if part.name != "setup"
        }
        for run in parts["replay"]:
            run["samples"] = _columns(run["samples"])
        return {
            "schema_version": SCHEMA_VERSION,
            "environment": environment(),
            "command": without_folders(command),
            "setup": asdict(self.setup),
            "results": parts,
        }


def _columns(samples: list[dict[str, Any]]) -> dict[str, list[int]]:
    thinned = samples[:: -(-len(samples) // _MOST_SAMPLES) or 1]
    rows = [sample | sample.pop("usage") for sample in thinned]
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def without_folders(command: list[str]) -> list[str]:
    """The command line as a report shows it."""
    return [_without_folder(word) for word in command]


def _without_folder(word: str) -> str:
    """A report is handed on; where its reader's files lie is nobody's business."""
    option, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    return f"{option}{equals}{Path(value).name if '/' in value else value}"


def check_writable(json_path: Path | None, plot_path: Path | None) -> None:
    """Finds out before the measurement, not after it. Creates the folder of the plots."""
    if json_path is not None and (json_path.is_dir() or not json_path.resolve().parent.is_dir()):
        raise BenchError(
            f"{json_path}: cannot write the JSON report: "
            + ("a folder" if json_path.is_dir() else "its folder does not exist")
        )
    try:
        if plot_path is not None:
            plot_path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(f"{plot_path}: cannot make the folder of the plots: {error.strerror}") from error


def write_json(document: dict[str, Any], path: Path) -> None:
    try:
        path.write_text(json.dumps(document) + "\n", encoding="utf-8")
    except OSError as error:
        raise BenchError(f"{path}: cannot write the JSON report: {error.strerror}") from error
