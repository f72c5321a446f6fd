"""Everything that needs a GPU, where one is lent for some minutes and nothing can be installed: part after part, each in a
process of its own with a time limit, so that none costs the others. kvmem is built in place first.

    python tests/gpu/gpu_session.py [--seconds 580] [--out FOLDER] [PART ...]      the parts: --list

FOLDER gets ``session.log``, all that was printed, and ``tables.txt``, what the kernels and the driver were found to do,
both written as the parts end. The last lines say how each part ended; the exit status is 1 if one did not end well.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Warnings of whatever torch is there must not fail a test here; every file is named, since others need what may be absent.
PYTEST = ("-m", "pytest", "-q", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider")
#: What a part has to put an end to itself once it is interrupted; then it is killed with all that it started.
GRACE_SECONDS = 12.0


@dataclass(frozen=True)
class Part:
    """command: words after ``python``, or a whole command where ``program`` is set. limit: seconds."""

    name: str
    limit: int
    command: tuple[str, ...]
    program: str = ""


def _pytest(name: str, limit: int, *words: str) -> Part:
    return Part(name, limit, (*PYTEST, *words))


#: In the order of their worth. Four at a time where a test is many short calls: a worker that dies is replaced.
PARTS = (
    Part("build", 180, ("setup.py", "-q", "build_ext", "--inplace")),
    Part("rules", 150, ("tests/gpu/gpu_rules.py",)),
    _pytest("device", 120, "tests/gpu/test_cuda_gpu.py"),
    _pytest("driver", 120, "-n", "2", "tests/conformance/test_driver_conformance.py"),
    _pytest("stress", 90, "tests/gpu/test_gpu_stress.py"),
    _pytest("conformance", 240, "-n", "4", "tests/conformance/test_conformance.py", "tests/conformance/test_prefix_conformance.py"),
    _pytest("staging", 60, "tests/plan/test_staging.py"),
    _pytest("blocks", 90, "-n", "2", "tests/kernels/test_kernels_blocks.py"),
    _pytest("kernels", 480, "tests/gpu/test_gpu_kernels.py"),
    Part("decoder", 120, ("examples/decoder_gpu.py",)),
    Part(
        "sanitize", 120, ("--tool", "memcheck", "--error-exitcode", "1", sys.executable, "tests/gpu/gpu_stress.py", "--seconds", "20"),
        "compute-sanitizer",
    ),
)  # fmt: skip
BY_NAME = {part.name: part for part in PARTS}


@dataclass(frozen=True)
class Ended:
    part: Part
    how: str  # "ok", "status 1", "signal 9", "interrupted after 90 s", "not started: ..."
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return self.how == "ok"


def words_of(part: Part) -> list[str]:
    if not part.program:
        return [sys.executable, *part.command]
    places = (shutil.which(part.program), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/{part.program}")
    found = next((place for place in places if place and Path(place).exists()), None)
    if found is None:
        raise FileNotFoundError(f"{part.program} is not installed")
    return [found, *part.command]


def run(part: Part, limit: float, log: Path, tables: Path) -> Ended:
    """Its output goes to the end of ``log``. At ``limit`` it is interrupted, which lets pytest tell what it has."""
    begin = time.monotonic()
    report = tables.with_name(f".{part.name}.tables")
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1", "KVMEM_GPU_REPORT": str(report),
        # A kernel that hangs must leave time for the tables; what waits for the compiler is most of the kernels' time.
        "KVMEM_GPU_TIMEOUT": os.environ.get("KVMEM_GPU_TIMEOUT", "400"),
        "KVMEM_GPU_JOBS": os.environ.get("KVMEM_GPU_JOBS", str(max(2, (os.cpu_count() or 2) // 2))),
    }  # fmt: skip
    try:
        words = words_of(part)
    except FileNotFoundError as missing:
        return Ended(part, f"not started: {missing}")
    with log.open("ab") as out:
        out.write(f"\n==== {part.name}: {' '.join(words[1:])}\n".encode())
        out.flush()
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=_heed_interrupts,
        )  # fmt: skip
        how = _end_of(process, limit)
    if report.exists():
        with tables.open("a") as all_tables:
            all_tables.write(report.read_text() + "\n")
        report.unlink()
    return Ended(part, how, time.monotonic() - begin)


def _heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job inherits that it is ignored


def _end_of(process: subprocess.Popen[bytes], limit: float) -> str:
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):  # it does not listen
            process.wait(GRACE_SECONDS)
        _kill_group(process)
        return f"interrupted after {limit:.0f} s"
    _kill_group(process)  # what it may have left running would be in the way of the others
    return "ok" if status == 0 else f"signal {-status}" if status < 0 else f"status {status}"


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):  # all of it has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_all(parts: Sequence[Part], seconds: float, out: Path) -> list[Ended]:
    out.mkdir(parents=True, exist_ok=True)
    end, ended = time.monotonic() + seconds, []
    for part in parts:
        left = end - time.monotonic() - GRACE_SECONDS
        ended.append(
            run(part, min(part.limit, left), out / "session.log", out / "tables.txt")
            if left > 5
            else Ended(part, "not started: no time was left")
        )
        print(f"{part.name}: {ended[-1].how}, {ended[-1].seconds:.0f} s", flush=True)
    return ended


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all, in this order")
    parser.add_argument("--list", action="store_true", help="the parts and their limits")
    parser.add_argument("--seconds", type=float, default=580)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    given = parser.parse_args()
    if unknown := set(given.parts) - set(BY_NAME):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(BY_NAME)}")
    chosen = [part for part in PARTS if not given.parts or part.name in given.parts]
    if given.list:
        print("\n".join(f"{part.name:<12} {part.limit:>4} s  {' '.join(part.command)}" for part in chosen))
        return 0
    ended = run_all(chosen, given.seconds, given.out)
    tables = given.out / "tables.txt"
    print(tables.read_text() if tables.exists() else "", end="")
    print("; ".join(f"{one.part.name}: {one.how}" for one in ended))
    return int(not all(one.good for one in ended))


if __name__ == "__main__":
    sys.exit(main())
