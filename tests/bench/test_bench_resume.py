"""The part `resume`: a second session loads the prompt from each store and goes on with the same tokens. With the tiny
random model, and both sessions in this process; examples/share_through_redis.py has two.
"""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs the extra kvmem[transformers]")
pytest.importorskip("xxhash", reason="needs the extra kvmem[tiers]")

from benchmarks import resume as module
from benchmarks.resume import PREFILL, command, compute, open_stores, resume
from kvmem.bench.__main__ import main
from kvmem.bench.text import BenchError
from kvmem.tiers import Result, Status

TOKENS, NEW = 100, 6
FULL = Result(Status.FULL, 0, "asked to be full")
STORES = ["disk", *(["redis"] if shutil.which("redis-server") else [])]  # the command leaves Redis out without


def session(stores: dict[str, str]) -> Any:
    return module._Session("tiny", TOKENS, stores)


def test_the_prompt_is_loaded_and_the_tokens_are_the_same() -> None:
    with ExitStack() as stack:
        stores = open_stores(stack, STORES)
        assert list(stores) == STORES
        expected = compute(session(stores), NEW)
        rows = resume(session(stores), expected, 1)
        assert [row.source for row in rows] == [PREFILL, *STORES]
        assert all(row.same_tokens and row.us.count == 1 and row.new_tokens == NEW for row in rows)
        assert [row.loaded_tokens for row in rows] == [0, *([96] * len(STORES))]  # whole blocks of 16
        wrong = [*expected[:-1], (expected[-1] + 1) % 512]
        rows = resume(session({"disk": stores["disk"]}), wrong, 1)
        assert [row.same_tokens for row in rows] == [False, False]


def test_a_store_that_keeps_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        stores = open_stores(stack, ["disk"])
        monkeypatch.setattr("kvmem.tiers.disk.DiskTier.put", lambda self, keys, buffers: [FULL] * len(keys))
        with pytest.raises(BenchError, match="disk: has 0 of 6 blocks"):
            compute(session(stores), NEW)


@pytest.mark.parametrize(("same", "code"), [(True, 0), (False, 1)])
def test_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, same: bool, code: int
) -> None:
    spread = dict.fromkeys(("count", "p10", "median", "p90", "p99", "largest"), 1.0)
    ratio = dict.fromkeys(("p10", "median", "p90"), 1.0)
    row = {"model": "m", "source": "disk", "prompt_tokens": 64, "loaded_tokens": 48, "new_tokens": 2, "us": spread,
           "ratio": ratio, "same_tokens": same}  # fmt: skip
    asked: list[tuple[str, dict[str, Any]]] = []

    def process(part: str, job: dict[str, Any]) -> Any:
        asked.append((part, job))
        return [7, 8] if part == "compute" else [row]

    monkeypatch.setattr(module, "_in_a_process", process)
    monkeypatch.setattr(module, "STORES", ("disk",))
    path = tmp_path / "out.json"
    assert main(["--model", "tiny", "--prompt-tokens", "64", "--json", str(path)], command, "resume") == code
    assert [part for part, _ in asked] == ["compute", "resume"] and asked[1][1]["expected"] == [7, 8]
    assert ("yes" if same else "NO") in capsys.readouterr().out
    assert json.loads(path.read_text())["results"]["resume"] == [row]


def test_a_text_that_is_too_short_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    class Tokenizer:
        def __call__(self, text: str, return_tensors: str) -> dict[str, torch.Tensor]:
            return {"input_ids": torch.zeros(1, 40, dtype=torch.int64)}

    model = module.LanguageModel("m", None, {}, Tokenizer())
    assert module._prompt(model, 40).shape == (1, 40)
    with pytest.raises(BenchError, match="--prompt-tokens is 41; the text has 40"):
        module._prompt(model, 41)
