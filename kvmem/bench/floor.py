"""The C++ floor: ``benchmarks/native/floor.cpp``, compiled when first needed, in this file's checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from kvmem.bench.errors import BenchError
from kvmem.bench.workload import Workload

__all__ = ["build_floor", "run_program"]

_CHECKOUT = Path(__file__).parents[2]
_SOURCES = ("floor.cpp", "workload.h")
_FLAGS = ("-O3", "-g", "-DNDEBUG", "-std=c++17")  # those of bench.mk and of the native module


def build_floor() -> Path:
    """The program, compiled anew where its source is newer. `BenchError` without a checkout or a compiler."""
    folder, program = _CHECKOUT / "benchmarks" / "native", _CHECKOUT / "build" / "bench" / "floor"
    if not folder.is_dir():
        raise BenchError("the C++ floor is part of the source checkout, not of the installed package: run it there")
    newest = max((folder / name).stat().st_mtime for name in _SOURCES)
    if program.exists() and program.stat().st_mtime >= newest:
        return program
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        raise BenchError("the C++ floor needs a C++17 compiler: install g++, or set CXX")
    program.parent.mkdir(parents=True, exist_ok=True)
    fresh = program.with_suffix(f".{os.getpid()}")
    done = subprocess.run(
        [compiler, *_FLAGS, str(folder / _SOURCES[0]), "-o", str(fresh)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BenchError(f"the C++ floor does not compile: {done.stderr.strip()[-500:]}")
    fresh.replace(program)
    return program


def run_program(program: Path, workload: Workload, *words: str, rounds: int = 2) -> dict[str, Any]:
    """What the program printed: nanoseconds by phase of all rounds but the first, and its own counts."""
    command = [str(program), *workload.arguments(), "--rounds", str(rounds), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"{program.name}: {done.stderr.strip()[-300:] or f'ended with {done.returncode}'}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result
