"""What a number was measured on: versions and machine facts for the JSON report. No host names, no paths."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import kvmem

__all__ = ["device_facts", "environment"]

_PACKAGES = ("kvmem", "torch", "numpy", "transformers")
_GPU_PACKAGES = ("flashinfer-python", "fa3-fwd", "triton")


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
    versions = {name: _version(name) for name in _PACKAGES}
    versions["kvmem"] = versions["kvmem"] or kvmem.__version__  # not installed, run from its folder
    return facts | versions | {"commit": _commit()}


def device_facts(kind: str) -> dict[str, str | int | float | None]:
    """Of the device that a part runs on: ``kind`` is torch's device type. Flat, JSON-ready."""
    if kind != "cuda":
        return {"device": "cpu"}
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": properties.name,
        "device_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "driver": _driver_version(),
        "cuda": torch.version.cuda,
        **{name: _version(name) for name in _GPU_PACKAGES},
    }


def _driver_version() -> str | None:
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next(iter(done.stdout.split()), None)


def _commit() -> str | None:
    """Of the checkout that this file is in, marked ``-dirty`` when a tracked file differs. Outside of one, as on a
    machine that got a copy of the tree, the environment variable ``KVMEM_COMMIT``, or None.
    """
    command = ("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return os.environ.get("KVMEM_COMMIT")
    return done.stdout.strip() or os.environ.get("KVMEM_COMMIT")


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
