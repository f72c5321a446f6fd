"""Every example runs, in a process of its own; each asserts what it claims."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A whole model and a captured graph; models that are split over processes; engines, a router and a store.
LONGER = {"decoder_gpu.py": 270, "prefill_decode.py": 90, "router.py": 130, "tensor_parallel.py": 112}
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def test_there_are_examples_and_each_asserts_and_is_short() -> None:
    assert EXAMPLES
    for file in EXAMPLES:
        text = file.read_text()
        assert "assert" in text, f"{file.name} proves nothing"
        assert len(text.splitlines()) < LONGER.get(file.name, 80), f"{file.name} is too long for an example"


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_example(file: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment.pop("PYTHONOPTIMIZE", None)  # it would remove the assertions
    done = subprocess.run(
        [sys.executable, file], env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "an example says what it has shown"
