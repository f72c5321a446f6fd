"""examples/prefill_decode.py over the transports that need a package: the tokens of one process, and a miss once it dies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transport_peers import KINDS, need

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("kind", KINDS[1:])  # tests/repository/test_examples.py runs it over sockets
def test_the_example_runs_over(kind: str) -> None:
    need(kind)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    program = [sys.executable, str(ROOT / "examples" / "prefill_decode.py"), kind]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{kind}: 144 of 150 tokens came from the other process" in done.stdout
