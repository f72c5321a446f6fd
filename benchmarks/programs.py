"""The programs in ``benchmarks/native``: the C++ baseline is compiled when first needed, the others by the Makefile."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from kvmem.bench.text import BenchError

_CHECKOUT = Path(__file__).parents[1]
PROGRAMS = _CHECKOUT / "build" / "bench"
_SOURCES = ("floor.cpp", "workload.h")
_FLAGS = ("-O3", "-g", "-DNDEBUG", "-std=c++17")  # those of bench.mk and of the native module


def build_floor() -> Path:
    """The C++ baseline, compiled anew where its source is newer. `BenchError` without a compiler."""
    folder, program = _CHECKOUT / "benchmarks" / "native", PROGRAMS / "floor"
    newest = max((folder / name).stat().st_mtime for name in _SOURCES)
    if program.exists() and program.stat().st_mtime >= newest:
        return program
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        raise BenchError("the C++ baseline needs a C++17 compiler: install g++, or set CXX")
    program.parent.mkdir(parents=True, exist_ok=True)
    fresh = program.with_suffix(f".{os.getpid()}")
    words = [compiler, *_FLAGS, str(folder / _SOURCES[0]), "-o", str(fresh)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"the C++ baseline does not compile: {done.stderr.strip()[-500:]}")
    fresh.replace(program)
    return program


def run_program(program: Path, *words: str) -> dict[str, Any]:
    """What the program printed."""
    done = subprocess.run([str(program), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"{program.name}: {done.stderr.strip()[-300:] or f'ended with {done.returncode}'}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result
