"""A part's time and its JSON document, which is written anew after every figure: what is measured is not lost.

``{"schema_version": 1, "gpu_part": name, "environment": {...}, "command": [...], "setup": {...}, "results": {list:
[row, ...]}, "skipped": [{"case", "why"}, ...], "error": null or a text, "complete": bool, "seconds": s}``. Rows have
the fields of the dataclass that the part's file defines; ``_us`` are microseconds, ``ratio`` is this time over the time
it is compared with, in the same run.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any

from kvmem.bench.environment import device_facts, environment
from kvmem.bench.errors import BenchError
from kvmem.bench.gpu.device import BenchDevice
from kvmem.bench.gpu.sizes import Sizes
from kvmem.bench.results import SCHEMA_VERSION

__all__ = ["Budget", "Report", "document_path", "empty_document", "without_paths", "write_document"]


class Budget:
    """Seconds that a part may take, counted from its making."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._begin = seconds, monotonic()

    @property
    def spent(self) -> float:
        return monotonic() - self._begin

    def allows(self, seconds: float) -> bool:
        return self.spent + seconds <= self.seconds


class Report:
    """Collects a part's rows."""

    def __init__(self, part: str, device: BenchDevice, sizes: Sizes, folder: Path | None, command: list[str]) -> None:
        self.document = empty_document(part, device.torch_device.type, command)
        self.document["setup"] = {"model": _plain(asdict(sizes.model)), "device": device.name}
        self._path = None if folder is None else document_path(folder, part, device.name)

    def note(self, **facts: Any) -> None:
        self.document["setup"].update(facts)

    def add(self, name: str, row: Any) -> None:
        """``row``: a dataclass."""
        self.document["results"].setdefault(name, []).append(asdict(row))
        self.save()

    def skip(self, case: str, why: object) -> None:
        self.document["skipped"].append({"case": case, "why": without_paths(str(why))})
        self.save()

    def close(self, seconds: float, error: str | None) -> None:
        self.document.update(seconds=round(seconds, 1), error=error, complete=error is None)
        self.save()

    def save(self) -> None:
        if self._path is not None:
            write_document(self.document, self._path)


def empty_document(part: str, kind: str, command: list[str]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "gpu_part": part,
        "environment": environment() | device_facts(kind),
        "command": command,
        "setup": {},
        "results": {},
        "skipped": [],
        "error": None,
        "complete": False,
        "seconds": 0.0,
    }


def document_path(folder: Path, part: str, device: str) -> Path:
    """``gpu_nvidia-h100-80gb-hbm3_vmm.json``: a name of letters, digits, '.', '_' and '-' alone."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return folder / f"gpu_{slug}_{part}.json"


def without_paths(text: str) -> str:
    """A report is handed on; where things lie on the machine that wrote it is nobody's business."""
    return re.sub(r"(?<![\w.])(/[\w.+-]+)+/", "", text)


def write_document(document: dict[str, Any], path: Path) -> None:
    """Whole or not at all, so that a process that is ended leaves the last whole one."""
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_text(json.dumps(document) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise BenchError(f"{path}: cannot write the JSON report: {error.strerror}") from error


def _plain(facts: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value if isinstance(value, int) else str(value).removeprefix("torch.") for name, value in facts.items()
    }
