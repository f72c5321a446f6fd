"""`python -m kvmem.bench layouts`: a row for every layout, exact bytes, errors that can be seen, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from kvmem.bench import layouts as bench
from kvmem.bench.__main__ import main
from kvmem.bench.layouts import PLAIN, Case, LayoutResult, Model
from kvmem.layouts.registry import LAYOUTS

SEQUENCES, TOKENS = 2, 256
KEPT = round(0.372 * TOKENS)
#: Bytes that a token keeps; what KIVI and AlignedKV hold of the newest blocks as they were written comes on top.
BYTES = {
    PLAIN: 2048, "Slim, K in fp16": 1024, "Slim, K in fp32": 2048, "Slim, X in fp16": 1024,
    "encoder output in fp16": 1024, "Palu, 50 % rank": 1024, "Palu, 25 % rank": 512,
    "Palu, 50 % rank, int4, rotated": 4 * (128 // 2 + 4), "GoldFinch, c in fp16": 32 * 2 + 4, "fp8 e4m3": 1024,
    "int8 by token": 1024 + 8 * 2 * 4, "int4 KIVI, groups of 32": 512 + 8 * 2 * 64 // 32 * 4,
    "int2 KIVI, groups of 32": 256 + 8 * 2 * 64 // 32 * 4, "AlignedKV, guard 1": 2048 + 2 * 512 // 64,
    "lanes, 37.2% kept": 2048 * KEPT / TOKENS,
}  # fmt: skip
TAILS = {"int4 KIVI, groups of 32": 32, "int2 KIVI, groups of 32": 32, "AlignedKV, guard 1": 128}
#: The least and the most error; by default that of rounding to fp16, which is half of 2**-10 at most in each element.
ROUNDING = dict.fromkeys(BYTES, (1e-5, 2e-3)) | {
    "Slim, K in fp32": (1e-8, 1e-5), "fp8 e4m3": (0.01, 0.2), "int8 by token": (1e-3, 0.05),
    "int4 KIVI, groups of 32": (0.02, 0.3), "int2 KIVI, groups of 32": (0.3, 1.0),
    "Palu, 50 % rank, int4, rotated": (0.02, 0.3), "AlignedKV, guard 1": (1e-4, 0.01),
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(SEQUENCES, TOKENS)


@pytest.fixture(scope="module")
def cases(model: Model) -> dict[str, Case]:
    return bench.cases(model, "paged")


@pytest.fixture(scope="module", params=["virtual", "paged"])
def rows(request: pytest.FixtureRequest, model: Model) -> dict[str, LayoutResult]:
    done: list[int] = []
    found = bench.layouts(model, bench.cases(model, request.param), request.param, 1, 1 << 20, done.append)
    assert done == list(range(1, len(found) + 1))
    return {row.name: row for row in found}


def test_every_layout_of_the_registry_has_a_row(rows: dict[str, LayoutResult]) -> None:
    assert {row.layout for row in rows.values()} == {entry.name for entry in LAYOUTS}


def test_bytes_are_exact(rows: dict[str, LayoutResult]) -> None:
    tails = {name: 1024 * TAILS.get(name, 0) / TOKENS for name in BYTES}
    assert {name: row.bytes_per_token for name, row in rows.items()} == {n: BYTES[n] + tails[n] for n in BYTES}
    read = {name: row.read_bytes / SEQUENCES for name, row in rows.items()}
    aligned = read.pop("AlignedKV, guard 1")
    assert 1024 * TOKENS < aligned < 2048 * TOKENS, "it leaves out a part of the planes"
    assert read == {name: BYTES[name] * TOKENS for name in read}


def test_errors_are_those_of_the_format(rows: dict[str, LayoutResult]) -> None:
    outside = {n: row.error for n, row in rows.items() if not ROUNDING[n][0] <= row.error <= ROUNDING[n][1]}
    assert not outside
    assert all(row.error_of.startswith(("the layer", "what it derives")) for row in rows.values())


def test_only_elementwise_layouts_are_compared_with_a_copy(rows: dict[str, LayoutResult]) -> None:
    compared = {row.layout for row in rows.values() if row.encode_ratio and row.derive_ratio}
    assert compared == {"plain", "quantised", "aligned"}
    assert all((row.encode_ratio is None) == (row.layout not in compared) for row in rows.values())
    assert all(row.derive_us.median > 0 < row.step_us.median for row in rows.values())


@pytest.mark.parametrize("name", list(BYTES))
def test_another_reference_is_an_error(model: Model, cases: dict[str, Case], name: str) -> None:
    """Beside twice its V, half of each output is wrong: an error would be seen."""
    case = cases[name]
    opened = (bench._lanes if case.window else bench._fill)(case, model, "paged")
    assert bench._check(replace(case, v=2 * case.v), model, opened)[2] == pytest.approx(0.5, abs=0.2)


def test_w_k_is_as_said(model: Model) -> None:
    """Well conditioned, and K has two outlier channels in each head."""
    assert torch.linalg.cond(model.w_k) < 100
    size = model.k.abs().mean((0, 1))
    assert (size.topk(2).indices.sort().values == torch.tensor([28, 63])).all()
    assert (size.topk(3).values[:, 1] > 3 * size.topk(3).values[:, 2]).all()
    assert torch.equal(Model(SEQUENCES, TOKENS).k, model.k), "the seed is fixed"


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path, few = tmp_path / "out.json", ["--tokens", "64", "--sequences", "1", "--repetitions", "1", "--convert", "1MiB"]
    assert main(["layouts", *few, "-q", "--json", str(path), "--plot", str(tmp_path / "plots")]) == 0
    out = capsys.readouterr().out
    assert all(out.count(f"| {name} ") == 2 for name in BYTES), "a row in each table"
    assert (tmp_path / "plots" / "layouts.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads(path.read_text())
    assert [set(row) for row in report["results"]["layouts"]] == [{f.name for f in fields(LayoutResult)}] * len(BYTES)
    assert report["setup"]["convert_bytes"] == 1 << 20 and report["setup"]["tokens"] == 64


@pytest.mark.parametrize(("word", "says"), [("0", "--convert is 0"), ("much", "--convert: got 'much'")])
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], word: str, says: str) -> None:
    assert main(["layouts", "-q", "--convert", word]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_the_command_line_imports_no_layout() -> None:
    code = "import sys, kvmem.bench.cli; assert not any(name.startswith('kvmem.layouts') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
