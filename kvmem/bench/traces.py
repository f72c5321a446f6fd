"""Request traces: when each request arrived and how many tokens it read and wrote. Four public formats, recognised by
their fields.

========== ===== ================================================================== =====================
format     lines fields                                                             prefix blocks
========== ===== ================================================================== =====================
mooncake   JSON  timestamp (ms), input_length, output_length, hash_ids              512 tokens an id
qwen       JSON  chat_id, parent_chat_id, timestamp (s), input_length,              16 tokens an id
                 output_length, type, turn, hash_ids
azure      CSV   TIMESTAMP (date and time), ContextTokens, GeneratedTokens          none
burstgpt   CSV   Timestamp (s), [Session ID, Elapsed time,] Model, Request tokens,  none
                 Response tokens, Total tokens, Log Type
========== ===== ================================================================== =====================

Reading is strict: the first invalid line raises a `TraceError` that names file, line and reason. A file that was cut is
invalid, unless it was cut between two lines (the rest is a shorter, valid trace) or inside the last number of an Azure
file. So a CSV whose last line has no line end carries a note; Azure's own files end that way.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmem.bench.text import TraceError

EXCERPT = Path(__file__).parent / "data" / "mooncake_conversation_excerpt.jsonl"
_LARGEST_TOKENS = 1 << 31  # lengths travel as int32
_BURSTGPT_TOKENS = ("Request tokens", "Response tokens", "Total tokens")
_BURSTGPT_LOGS = ("Conversation log", "API log")


@dataclass(frozen=True)
class Trace:
    """Requests in order of arrival.

    ``arrival_seconds`` float64 [n], from the first arrival; ``input_tokens`` and ``output_tokens`` int64 [n]. Prefix
    identities, where the format has them: request ``i`` begins with the blocks
    ``prefix_ids[prefix_offsets[i]:prefix_offsets[i + 1]]`` (int64), each of ``prefix_block_tokens`` tokens.
    ``failed_requests`` counts the rows left out because the service had refused them (BurstGPT).
    """

    name: str
    format: str
    arrival_seconds: npt.NDArray[np.float64]
    input_tokens: npt.NDArray[np.int64]
    output_tokens: npt.NDArray[np.int64]
    prefix_ids: npt.NDArray[np.int64] | None = None
    prefix_offsets: npt.NDArray[np.int64] | None = None
    prefix_block_tokens: int | None = None
    failed_requests: int = 0
    notes: tuple[str, ...] = ()

    @property
    def num_requests(self) -> int:
        return len(self.input_tokens)

    @property
    def total_tokens(self) -> npt.NDArray[np.int64]:
        """Tokens a request holds when it ends: int64 [n]."""
        return self.input_tokens + self.output_tokens

    def head(self, requests: int) -> Trace:
        """The first ``requests`` arrivals."""
        if requests < 1:
            raise TraceError(f"{self.name}: asked for the first {requests} requests; ask for 1 to {self.num_requests}")
        offsets = None if self.prefix_offsets is None else self.prefix_offsets[: requests + 1]
        ids = None if self.prefix_ids is None or offsets is None else self.prefix_ids[: offsets[-1]]
        arrays = {name: getattr(self, name)[:requests] for name in ("arrival_seconds", "input_tokens", "output_tokens")}
        return replace(self, prefix_ids=ids, prefix_offsets=offsets, **arrays)


@dataclass(frozen=True)
class _Request:
    seconds: float
    input_tokens: int
    output_tokens: int
    prefix_ids: tuple[int, ...] = ()


class _Line:
    """One record of a file. The accessors raise a `TraceError` that names file, line and field."""

    def __init__(self, path: Path, number: int, fields: dict[str, Any]) -> None:
        self.path, self.number, self.fields = path, number, fields

    def fail(self, reason: str) -> TraceError:
        return TraceError(f"{self.path}, line {self.number}: {reason}")

    def get(self, name: str) -> Any:
        if name not in self.fields or self.fields[name] is None:
            raise self.fail(f"field `{name}` is missing; the line has: {', '.join(map(str, self.fields)) or 'nothing'}")
        return self.fields[name]

    def tokens(self, name: str, least: int) -> int:
        value = self.get(name)
        if isinstance(value, str) and value.isascii() and value.isdigit():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < _LARGEST_TOKENS:
            raise self.fail(f"field `{name}` is {value!r}; expected a whole number of tokens, {least} or more")
        return value

    def seconds(self, name: str, scale: float = 1.0) -> float:
        value = self.get(name)
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise self.fail(f"field `{name}` is {value!r}; expected a time as a number")
        return number * scale

    def date(self, name: str) -> float:
        value = str(self.get(name))
        head, dot, tail = value.partition(".")
        digits = len(tail) - len(tail.lstrip("0123456789"))
        try:  # Azure writes seven decimals; datetime before 3.11 reads three or six
            moment = datetime.fromisoformat(f"{head}.{tail[:digits]:0<6.6}{tail[digits:]}" if dot else head)
        except ValueError:
            raise self.fail(
                f"field `{name}` is {value!r}; expected a date and time such as 2023-11-16 18:17:03.9799600"
            ) from None
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()

    def block_ids(self, name: str, input_tokens: int, block_tokens: int) -> tuple[int, ...]:
        value = self.get(name)
        if not isinstance(value, list) or any(isinstance(x, bool) or not isinstance(x, int) for x in value):
            raise self.fail(f"field `{name}` must be a list of whole numbers, one for each {block_tokens}-token block")
        most = -(-input_tokens // block_tokens)
        if len(value) > most:
            raise self.fail(
                f"field `{name}` has {len(value)} ids; {input_tokens} input tokens have {most} blocks of {block_tokens}"
            )
        return tuple(value)


def _hashed(scale: float, block_tokens: int) -> Callable[[_Line], _Request]:
    """``scale``: a unit of the time stamps in seconds."""

    def read(line: _Line) -> _Request:
        tokens = line.tokens("input_length", 1)
        seconds, output = line.seconds("timestamp", scale), line.tokens("output_length", 0)
        return _Request(seconds, tokens, output, line.block_ids("hash_ids", tokens, block_tokens))

    return read


def _azure(line: _Line) -> _Request:
    return _Request(line.date("TIMESTAMP"), line.tokens("ContextTokens", 1), line.tokens("GeneratedTokens", 0))


def _burstgpt(line: _Line) -> _Request | None:
    sent, received, total = (line.tokens(name, 0) for name in _BURSTGPT_TOKENS)
    if sent + received != total:
        raise line.fail(
            f"`Total tokens` is {total}, but {sent} request and {received} response tokens make {sent + received}"
        )
    if line.get("Log Type") not in _BURSTGPT_LOGS:
        raise line.fail(f"`Log Type` is {line.get('Log Type')!r}; expected one of: {', '.join(_BURSTGPT_LOGS)}")
    seconds = line.seconds("Timestamp")
    return _Request(seconds, sent, received) if sent and received else None  # zeros: the service refused the request


@dataclass(frozen=True)
class _Format:
    """A line has this format if it has all ``fields``. ``block_tokens``: of one prefix id, if there are any."""

    fields: set[str]
    read: Callable[[_Line], _Request | None]
    block_tokens: int | None = None


_HASHED = {"timestamp", "input_length", "output_length", "hash_ids"}
# In order of recognition: a Qwen-Bailian line has every field of a Mooncake line and more.
FORMATS: dict[str, _Format] = {
    "qwen": _Format({"chat_id", *_HASHED}, _hashed(1.0, 16), 16),
    "mooncake": _Format(_HASHED, _hashed(1e-3, 512), 512),
    "azure": _Format({"TIMESTAMP", "ContextTokens", "GeneratedTokens"}, _azure),
    "burstgpt": _Format({"Timestamp", "Model", *_BURSTGPT_TOKENS, "Log Type"}, _burstgpt),
}


def load_trace(path: str | Path, format: str | None = None) -> Trace:
    """Reads a trace file; the format is recognised from its first line unless one of `FORMATS` is named.

    Requests come back sorted by arrival (stable), with time zero at the first. Raises `TraceError`. Cost: about 20 us a
    request.
    """
    path = Path(path)
    if format is not None and format not in FORMATS:
        raise TraceError(f"asked for trace format {format!r}; known: {', '.join(FORMATS)}")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise TraceError(f"{path}: cannot read the trace: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TraceError(
            f"{path}: not a text file (byte {error.start} is not UTF-8); a trace is JSON lines or CSV"
        ) from None
    if not text.strip():
        raise TraceError(f"{path}, line 1: the file is empty; a trace has at least one request")
    lines = _json_lines if text.lstrip()[0] == "{" else _csv_lines
    return _collect(path, format, lines(path, text), ends_cleanly=text.endswith(("\n", "}")))


def _recognise(line: _Line, wanted: str | None) -> str:
    names = set(line.fields)
    for name, format in FORMATS.items():
        if format.fields <= names and wanted in (None, name):
            return name
    known = "; ".join(
        f"{name}: {', '.join(sorted(FORMATS[name].fields))}" for name in ([wanted] if wanted else FORMATS)
    )
    found = ", ".join(map(str, line.fields)) or "(none)"
    raise line.fail(f"no known trace format has the fields {found}. Expected {known}")


def _json_lines(path: Path, text: str) -> Iterator[_Line]:
    for number, row in enumerate(text.split("\n"), 1):
        if not row.strip():
            continue
        try:
            fields = json.loads(row)
        except json.JSONDecodeError as error:
            raise TraceError(
                f"{path}, line {number}: not a whole JSON object ({error.msg}, column {error.colno}); "
                "the file may have been cut"
            ) from None
        if not isinstance(fields, dict):
            raise TraceError(f"{path}, line {number}: expected a JSON object, got {type(fields).__name__}")
        yield _Line(path, number, fields)


def _csv_lines(path: Path, text: str) -> Iterator[_Line]:
    rows = csv.reader(text.splitlines(), strict=True)
    header: list[str] | None = None
    try:
        for row in rows:
            if not row:
                continue
            if header is None:
                header = [name.strip().lstrip("\ufeff") for name in row]
                _recognise(_Line(path, rows.line_num, dict.fromkeys(header)), None)
                continue
            if len(row) != len(header):
                raise TraceError(
                    f"{path}, line {rows.line_num}: {len(row)} columns where the header has {len(header)} "
                    f"({', '.join(header)}); the file may have been cut"
                )
            yield _Line(path, rows.line_num, {name: value.strip() for name, value in zip(header, row, strict=True)})
    except csv.Error as error:
        raise TraceError(f"{path}, line {rows.line_num}: not CSV: {error}") from None


def _collect(path: Path, wanted: str | None, lines: Iterator[_Line], ends_cleanly: bool) -> Trace:
    name = ""
    requests: list[_Request] = []
    failed = 0
    for line in lines:
        name = name or _recognise(line, wanted)
        request = FORMATS[name].read(line)
        if request is None:
            failed += 1
        else:
            requests.append(request)
    if not requests:
        answered = f" that was answered ({failed} failed)" if failed else ""
        raise TraceError(f"{path}: the file has a header but no request{answered}")
    requests.sort(key=lambda request: request.seconds)
    start = requests[0].seconds
    block_tokens = FORMATS[name].block_tokens
    offsets = np.cumsum([0, *(len(request.prefix_ids) for request in requests)], dtype=np.int64)
    ids = np.array([block for request in requests for block in request.prefix_ids], dtype=np.int64)
    note = "the last line has no line end: if the file was cut, its last number may be short"
    seconds = np.array([request.seconds - start for request in requests])
    inputs, outputs = (
        np.array([getattr(request, field) for request in requests], dtype=np.int64)
        for field in ("input_tokens", "output_tokens")
    )
    notes = () if ends_cleanly else (note,)
    trace = Trace(path.stem, name, seconds, inputs, outputs, failed_requests=failed, notes=notes)
    if block_tokens is None:
        return trace
    return replace(trace, prefix_ids=ids, prefix_offsets=offsets, prefix_block_tokens=block_tokens)
