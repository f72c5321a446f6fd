"""``python -m kvmem.bench near``: its parts run, their rows are shown and written, and wrong options are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="the bench needs the extra kvmem[bench]")

from kvmem.bench.__main__ import main

FAST = ["near", "--tokens", "96", "--repetitions", "1", "-q"]


def test_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each kernel is held against float64 while it is timed."""
    file = tmp_path / "near.json"
    assert main([*FAST, "--part", "attend", "--threads", "1,2", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["results"]["attend"]
    assert len(rows) == 2 * 3 * 2 * 5  # dtypes, heads, threads, kernels
    assert {row["kernel"] for row in rows} == {
        "sum", "SDPA, contiguous", "SDPA, gathered", "kvmem, virtual", "kvmem, paged",
    }  # fmt: skip
    assert all((row["goal"] == 0.8) == row["kernel"].startswith("kvmem") for row in rows)
    assert all(row["of_sum"]["median"] == 1 for row in rows if row["kernel"] == "sum")
    assert "Decode attention on the CPU" in capsys.readouterr().out


def test_decode(tmp_path: Path) -> None:
    """The caches lead to the same tokens, or the part fails."""
    pytest.importorskip("transformers", minversion="5.23", reason="needs the extra kvmem[transformers]")
    file = tmp_path / "near.json"
    assert main([*FAST, "--part", "decode", "--model", "tiny", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["results"]["decode"]
    assert [(row["context"], row["cache"]) for row in rows] == [
        (context, cache)
        for context in (128, 1024)
        for cache in ("DynamicCache, sdpa", "virtual, sdpa", "virtual, kvmem", "paged, sdpa", "paged, kvmem")
    ]


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [("--part", "attend,gpu", "--part gpu: must be of attend"), ("--threads", "0", "--threads: got '0'"),
     ("--tokens", "1,,2", "--tokens: got '1,,2'"), ("--vllm-library", "/nowhere.so", "--vllm-library /nowhere.so")],
)  # fmt: skip
def test_wrong_options(option: str, value: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FAST, "--part", "attend", option, value]) == 2
    assert words in capsys.readouterr().err
