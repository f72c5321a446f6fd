"""What a number was measured on: versions and machine facts for the JSON report. No host names, no paths."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

__all__ = ["environment"]

_PACKAGES = ("kvmem", "torch", "numpy", "transformers")


def environment() -> dict[str, str | int | float | None]:
    """Flat, JSON-ready. ``load_1min`` above ``cpus`` says that the timings were taken on a busy machine."""
    facts: dict[str, str | int | float | None] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "load_1min": os.getloadavg()[0],
    }
    return facts | {name: _version(name) for name in _PACKAGES} | {"commit": _commit()}


def _commit() -> str | None:
    """Of the checkout that this file is in, marked ``-dirty`` when a tracked file differs; None outside of one."""
    command = ("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
