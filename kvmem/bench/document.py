"""The JSON form of measured results: the schema, the environment, and writing to a file.

``{"schema_version": 1, "environment": {...}, "command": [...], "setup": {...}, "results": {part: [row, ...], ...}}``.
A row has the fields of its part's dataclass; a part of a run that was left out is an empty list. The ``samples`` of a
replay are columns: one list a field, at most 200 moments of all that were taken. ``command`` has the names of files
without their folders. Bytes, tokens and driver calls are integers, shares are fractions of one, ``_us`` are
microseconds, ``ratio`` is this time over the time it is compared with, in the same run. Fields may be added within a
version; none changes its meaning. `reuse` has ``trace`` and ``default_policy`` instead of ``setup``; a part of `gpu`
has what `PartReport` adds.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import kvmem
from kvmem.bench.text import BenchError

SCHEMA_VERSION = 1
_PACKAGES = ("kvmem", "torch", "numpy", "transformers")


def document(command: Sequence[str], **parts: Any) -> dict[str, Any]:
    """A document of this version with ``parts``: mostly ``setup`` and ``results``."""
    words = [_without_folder(word) for word in command]
    return {"schema_version": SCHEMA_VERSION, "environment": environment(), "command": words, **parts}


def _without_folder(word: str) -> str:
    """A document is published, so it must not name folders of a machine."""
    option, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    return f"{option}{equals}{Path(value).name if '/' in value else value}"


def without_paths(text: str) -> str:
    """``text`` with file names instead of paths, for the same reason."""
    return re.sub(r"(?<![\w.])(/[\w.+-]+)+/", "", text)


def environment() -> dict[str, str | int | float | None]:
    """Versions and facts of the machine, flat, JSON-ready; no host names, no paths. ``load_1min`` above ``cpus`` says
    that the timings were taken on a busy machine.
    """
    facts: dict[str, str | int | float | None] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "load_1min": os.getloadavg()[0],
    }
    versions = {name: version(name) for name in _PACKAGES}
    versions["kvmem"] = versions["kvmem"] or kvmem.__version__  # not installed, run from its folder
    return facts | versions | {"commit": _commit()}


def _commit() -> str | None:
    """The commit of the checkout that this file is in, marked ``-dirty`` when a tracked file differs. Outside of a
    checkout, the environment variable ``KVMEM_COMMIT``, or None.
    """
    folder = str(Path(__file__).parent)
    described = printed_by("git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    return described or os.environ.get("KVMEM_COMMIT")


def printed_by(*command: str) -> str:
    """The output of a command; empty where the command is absent or does not end."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name.*?:\s*(.*\S)", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor()


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_writable(json_path: Path | None, plot_path: Path | None = None) -> None:
    """Raises `BenchError` before the measurement instead of after it. Creates the folder of the plots."""
    if json_path is not None and (json_path.is_dir() or not json_path.resolve().parent.is_dir()):
        why = "a folder" if json_path.is_dir() else "its folder does not exist"
        raise BenchError(f"{json_path}: cannot write the JSON report: {why}")
    try:
        if plot_path is not None:
            plot_path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(f"{plot_path}: cannot make the folder of the plots: {error.strerror}") from error


def write_json(content: dict[str, Any], path: Path | None) -> None:
    """Writes all of it or nothing, so that a process that is killed leaves the previous file. None: writes nothing."""
    if path is None:
        return
    fresh = path if path.exists() and not path.is_file() else path.with_name(path.name + ".part")  # /dev/stdout
    try:
        fresh.write_text(json.dumps(content) + "\n", encoding="utf-8")
        if fresh != path:
            os.replace(fresh, path)
    except OSError as error:
        raise BenchError(f"{path}: cannot write the JSON report: {error.strerror}") from error


def part_path(folder: Path, part: str, device: str) -> Path:
    """``gpu_nvidia-h100-80gb-hbm3_vmm.json``: a name of letters, digits, '.', '_' and '-' alone."""
    return folder / f"gpu_{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}_{part}.json"


class PartReport:
    """The document of one part of `gpu`, written after every figure, so that a crash loses nothing measured.

    It adds ``gpu_part``, ``skipped`` (``case`` and ``why``), ``error`` (None or a text), ``complete`` and ``seconds``.
    ``facts``: of the device, flat; they join the environment's. ``path``: None writes nothing.
    """

    def __init__(self, part: str, facts: dict[str, Any], command: list[str], path: Path | None, **setup: Any) -> None:
        self.document = document(
            command, gpu_part=part, setup=setup, results={}, skipped=[], error=None, complete=False, seconds=0.0
        )
        self.document["environment"] |= facts
        self._path = path

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
        write_json(self.document, self._path)
