"""Drivers for tests: which ones there are, how to make a fresh one, how to look at their memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_python(code: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` in a fresh interpreter: for what may fork, crash, or use up a limit of the process."""
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True,
                          timeout=timeout, cwd=ROOT)


def assert_runs(code: str, timeout: float = 60) -> str:
    """``run_python`` that must succeed; returns what it printed."""
    done = run_python(code, timeout)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
