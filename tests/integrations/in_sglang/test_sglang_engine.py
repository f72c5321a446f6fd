"""A whole SGLang on the CPU, with kvmem's linker: the stock engine's tokens, also from what was loaded after a flush."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import standins
import torch
from support_sglang import need_sglang

from kvmem.bench.language_models import load_language_model
from kvmem.bench.text import BenchError

need_sglang()
pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]


def generate(model: Path, tier: dict[str, Any], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return what ``engine_run.py`` tells. Its whole process group ends here, whatever happens."""
    program, file = Path(__file__).parent / "engine_run.py", folder / "told.json"
    environ = os.environ | {"PYTHONPATH": standins.for_children(folder), "OMP_NUM_THREADS": "2"}
    with (folder / "log").open("w") as log:
        child = subprocess.Popen(
            [sys.executable, str(program), str(model), json.dumps(tier), str(file)],
            env=environ, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            child.wait(540)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait(10)
    assert file.exists(), (folder / "log").read_text()[-4000:]
    found: dict[str, list[dict[str, Any]]] = json.loads(file.read_text())
    return found


def check(told: dict[str, list[dict[str, Any]]], *warm: str) -> None:
    tokens = {name: [one["tokens"] for one in answers] for name, answers in told.items()}
    assert len({token for answer in tokens["stock"] for token in answer}) > 8, (
        "an output that repeats itself proves little"
    )
    assert all(found == tokens["stock"] for found in tokens.values()), tokens
    assert told["cold"][0]["cached"] == 0
    for name in warm:
        assert (told[name][0]["cached"], told[name][0]["host"]) == (400, 400), told
        assert told[name][1]["cached"] >= 200
    assert told["salted"][0]["cached"] == 0, "another salt finds nothing"


def test_random_weights_and_a_tier_that_fails(tmp_path: Path) -> None:
    """Three layers, random. Each second load fails: the prompt is computed, and nobody waits for it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=1000, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    told = generate(tmp_path / "model", {"type": "support_sglang:EachSecondLoadFails"}, tmp_path)
    check(told, "warm")
    assert told["warm again"][0]["cached"] == 0, "the load failed"


@pytest.mark.model
def test_smollm2_from_a_disk(tmp_path: Path) -> None:
    try:
        load_language_model("smollm2").model.save_pretrained(tmp_path / "model")
    except BenchError as absent:  # it says which package
        pytest.skip(str(absent))
    told = generate(tmp_path / "model", {"type": "disk", "path": str(tmp_path / "kv"), "capacity": "128MiB"}, tmp_path)
    check(told, "warm", "warm again")
