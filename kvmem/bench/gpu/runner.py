"""All parts, one after the other, each in a process of its own: what one of them breaks is not the others' loss.

After an illegal access a CUDA context answers every call with the same error, and a crash takes the process along; so
a part's process is expendable. It writes its document after every figure; this one notes how the process ended.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from kvmem.bench.errors import BenchError
from kvmem.bench.gpu.device import open_bench_device
from kvmem.bench.gpu.part import document_path, empty_document, without_paths, write_document
from kvmem.bench.gpu.parts import PARTS, WARM_UP

__all__ = ["Say", "parse_parts", "run_all"]

Say = Callable[[str], None]
_GRACE_SECONDS = 10.0  # for a part that is in the middle of a case when its time is up


def parse_parts(text: str | None) -> list[str]:
    """``"vmm,decode"`` as a list in the parts' own order; None is all of them."""
    known = [name for name in PARTS if name != WARM_UP]
    if text is None:
        return known
    asked = [name.strip() for name in text.split(",") if name.strip()]
    if not asked or set(asked) - set(known):
        raise BenchError(f"--part: got {text!r}; parts are {', '.join(known)}")
    return [name for name in known if name in asked]


def run_all(
    parts: Sequence[str], folder: Path, *, device: str, tiny: bool, seconds: float, command: list[str], say: Say
) -> dict[str, dict[str, Any]]:
    """The documents by part. ``seconds``: for all of it; what a part leaves over goes to those after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(f"--out: cannot make {folder}: {error.strerror}") from error
    opened = open_bench_device(device)
    end = monotonic() + seconds
    queue = [*([WARM_UP] if opened.kind == "cuda" else []), *parts]
    documents = {}
    for index, name in enumerate(queue):
        left = end - monotonic()
        wanted = left * PARTS[name].share / sum(PARTS[other].share for other in queue[index:])
        path = document_path(folder, name, opened.name)
        path.unlink(missing_ok=True)  # of a run before this one
        why = _run(name, folder, device, tiny, wanted, min(left, wanted + _GRACE_SECONDS), command)
        took = f"{monotonic() + left - end:.0f} s"
        if name == WARM_UP:
            say(f"{name}: {why or 'done'}, {took}")
            continue
        documents[name] = _finish(name, path, opened.kind, why, command)
        rows = sum(len(rows) for rows in documents[name]["results"].values())
        say(f"{name}: {why or 'done'}, {rows} rows, {len(documents[name]['skipped'])} skipped, {took}")
    return documents


def _run(
    name: str, folder: Path, device: str, tiny: bool, seconds: float, limit: float, command: list[str]
) -> str | None:
    """Why the part's process did not come to its end; None when it did."""
    words = [sys.executable, "-m", "kvmem.bench.gpu", name, "--out", str(folder), "--device", device]
    words += ["--seconds", f"{seconds:.1f}", "--command", json.dumps(command), *(["--tiny"] if tiny else [])]
    if limit <= 0:
        return "no time was left for it"
    try:
        done = subprocess.run(words, stderr=subprocess.PIPE, text=True, errors="replace", timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return f"ended after {limit:.0f} s, its time and {_GRACE_SECONDS:.0f} s more"
    if done.returncode == 0:
        return None
    last = " | ".join(line.strip() for line in done.stderr.splitlines() if line.strip())[-1500:]
    return f"exit code {done.returncode}: {without_paths(last)}"


def _finish(name: str, path: Path, kind: str, error: str | None, command: list[str]) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it died before its first figure
        document = empty_document(name, kind, command)
    if error is not None or not document["complete"]:
        document.update(error=error or "the part ended without a word", complete=False)
        write_document(document, path)
    return document
