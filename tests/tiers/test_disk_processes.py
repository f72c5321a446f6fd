"""Processes that share a folder: writers that are killed, readers beside a writer, and children that were forked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import LONG

KILLS, ROUNDS = (500, 4000) if LONG else (60, 400)


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each part of the program found, or its traceback."""
    program = Path(__file__).parent / "disk_processes.py"
    folder, seed = tmp_path_factory.mktemp("disks"), request.config.getoption("--seed")
    done = subprocess.run(
        [sys.executable, program, folder, str(KILLS), str(ROUNDS), str(seed)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_a_writer_is_killed(outcomes: dict[str, Any], seed: int) -> None:
    """60 times, half of them at a chosen system call; KVMEM_LONG=1: 500. Every block is then right or absent."""
    found = outcomes["kills"]
    assert isinstance(found, dict), found
    assert found["kills"] == KILLS and found["found"] > KILLS, found  # of seven blocks after each


def test_readers_beside_a_writer(outcomes: dict[str, Any], seed: int) -> None:
    """Every byte that two readers get, and all that the writer does, is verified. KVMEM_LONG=1: ten times as long."""
    found = outcomes["readers"]
    assert isinstance(found, dict), found
    assert found["rounds"] == ROUNDS and found["left"] > 0, found


def test_a_forked_child(outcomes: dict[str, Any]) -> None:
    """It cannot use the tier of its parent, and does not keep the lock."""
    assert isinstance(outcomes["forked"], dict), outcomes["forked"]
    assert "was opened by process" in outcomes["forked"]["said"]
