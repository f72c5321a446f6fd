"""Processes that share a folder: writers that are killed, readers beside a writer, and children that were forked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from support import LONG

HERE = Path(__file__).parent


def run(program: str, folder: Path, count: int, seed: int) -> dict[str, int]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, HERE / "disk_processes.py", program, folder, str(count), str(seed)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=None if LONG else 100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_a_writer_is_killed(tmp_path: Path, seed: int) -> None:
    """60 times; KVMEM_LONG=1: 500."""
    found = run("kills", tmp_path / "disk", 500 if LONG else 60, seed)
    assert found["found"] > found["kills"], found  # of ten keys and seven slots


def test_readers_beside_a_writer(tmp_path: Path, seed: int) -> None:
    """Every byte that two readers get, and all that the writer does, is verified. KVMEM_LONG=1: ten times as long."""
    run("readers", tmp_path / "disk", 4000 if LONG else 400, seed)
