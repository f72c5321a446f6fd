"""The command line as a user meets it: every part, tables and JSON, exit codes, one clear line for bad input."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from rich.console import Console

from kvmem.bench.__main__ import main
from kvmem.bench.attention import AttentionResult, SdpaResult, attention
from kvmem.bench.document import SCHEMA_VERSION
from kvmem.bench.host import MappingResult, MicroResult, micro
from kvmem.bench.model import BACKENDS, load_model
from kvmem.bench.replay import ReplayResult
from kvmem.bench.run import PARTS
from kvmem.bench.traces import EXCERPT
from kvmem.bench.waste import Rounding

SMALL = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 131072}  # fmt: skip
OF_OURS = SMALL | {"model_type": "of_ours"}
FAST = ["--requests", "40", "--repetitions", "2", "-q"]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.json"
    path.write_text(json.dumps(SMALL))
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_as_a_program_with_no_terminal():
    """In a process of its own: no colour codes, plain progress lines, Markdown tables that are not cut."""
    done = subprocess.run(
        [sys.executable, "-m", "kvmem.bench", "replay", "--requests", "60"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stderr.count("\x1b"), done.stdout.count("\x1b")) == (0, 0, 0)
    assert "replay, virtual: 60 of 60" in done.stderr
    assert "| sequences that fitted, at most" in done.stdout
    assert "…" not in done.stdout
    for word in (
        "preemptions",
        "mapped / used",
        "driver calls",
        "us a step: median",
        "us a step: p99",
        "static",
    ):
        assert word in done.stdout


def test_no_argument_runs_every_part(capsys):
    code, out, err = run(capsys, *FAST)
    assert (code, err) == (0, "")
    for title in (
        "Replay on a simulated device",
        "Rounding at request end",
        "Real memory on the CPU",
        "Mapping a run of pages",
        "Attention on the CPU",
        "One SDPA call",
    ):
        assert title in out
    assert "40 requests" in out


def test_a_whole_run_ends_with_what_it_found(capsys, tmp_path):
    code, out, _ = run(capsys, *FAST, "--plot", tmp_path)
    served, cost, attention = out.splitlines()[-3:]
    assert code == 0 and (tmp_path / "bytes_over_time.png").is_file()
    assert served.startswith("Of the trace's 40 requests") and all(
        f"{pool} in " in served for pool in (*BACKENDS, "static")
    )
    assert "a batch that finds parked memory makes no driver calls." in cost and "%" in cost
    assert f"; the memory over time is drawn in {tmp_path / 'bytes_over_time.png'}." in attention
    assert all(f" over the {backend} backend" in attention for backend in BACKENDS)
    code, out, _ = run(capsys, "replay", *FAST)
    assert code == 0 and "Of the trace's" not in out, "a part alone ends as it did"
    code, out, _ = run(capsys, *FAST)
    assert code == 0 and "where plain tensors take 1." in out.splitlines()[-1], "no picture is named where none is"


def test_a_terminal_of_80_columns(monkeypatch, tmp_path):
    """Nothing is wider, and no table is cut."""
    text = io.StringIO()
    narrow = Console(file=text, force_terminal=True, color_system=None, width=80, highlight=False)
    monkeypatch.setattr("kvmem.bench.cli.console", lambda: narrow)
    assert main([*FAST, "--plot", str(tmp_path)]) == 0
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    long_names = [line for line in lines if str(tmp_path) in line]
    assert max(len(line) for line in lines if line not in long_names) <= 80
    assert "…" not in text.getvalue() and len(lines) > 60


def test_json_has_the_documented_form(capsys, tmp_path, small):
    path = tmp_path / "out.json"
    code, _, err = run(capsys, *FAST, "--config", small, "--json", path, "--memory", "1GiB")
    assert (code, err) == (0, "")
    report = json.loads(path.read_text())
    assert list(report) == ["schema_version", "environment", "command", "setup", "results"]
    assert report["schema_version"] == SCHEMA_VERSION == 1
    assert {"python", "torch", "numpy", "cpu", "cpus", "load_1min"} <= set(report["environment"])
    assert {"model", "bytes_per_token", "kv_bytes", "page_bytes", "max_tokens", "trace", "notes"} <= set(
        report["setup"]
    )
    assert tuple(report["results"]) == PARTS
    rows = {
        "replay": ReplayResult,
        "waste": Rounding,
        "waste_sweep": Rounding,
        "micro": MicroResult,
        "mapping": MappingResult,
        "attention": AttentionResult,
        "sdpa": SdpaResult,
    }
    for part, row in rows.items():
        assert report["results"][part], part
        for entry in report["results"][part]:
            assert set(entry) == {field.name for field in fields(row)}
    samples = report["results"]["replay"][0]["samples"]
    assert {"step", "running", "waiting", "mapped_bytes", "used_bytes", "wasted_bytes", "parked_bytes"} <= set(samples)
    assert len({len(column) for column in samples.values()}) == 1
    assert report["setup"]["bytes_per_token"] == 2 * 4 * 2 * 16 * 2


def test_plots_are_pictures(capsys, tmp_path):
    folder = tmp_path / "new" / "plots"
    code, out, err = run(capsys, "replay", *FAST, "--plot", folder)
    assert (code, err) == (0, "")
    assert sorted(path.name for path in folder.iterdir()) == [
        "bytes_over_time.png",
        "latency.png",
        "waste_by_page_size.png",
    ]
    for path in folder.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
        assert str(path) in out


@pytest.mark.parametrize(("part", "title"), [("micro", "Real memory"), ("attention", "Attention on the CPU")])
def test_a_part_alone(capsys, small, part, title):
    code, out, err = run(capsys, part, "--config", small, *FAST)
    assert (code, err) == (0, "")
    assert out.startswith(title)
    assert "Replay" not in out


def test_options_before_and_after_the_part_mean_the_same(capsys):
    outs = [run(capsys, *order) for order in (["--requests", 7, "-q", "replay"], ["replay", "--requests", 7, "-q"])]
    assert all(code == 0 and "7 requests in" in out for code, out, _ in outs)
    code, out, _ = run(capsys, "-q", "--requests", 9, "replay", "--requests", 7)
    assert (code, "7 requests in" in out) == (0, True)


def test_one_backend(capsys):
    code, out, _ = run(capsys, "replay", *FAST, "--backend", "paged")
    assert (code, "virtual" in out, "paged" in out, "static" in out) == (0, False, True, True)


def test_a_static_pool_that_holds_nobody_is_left_out_with_the_reason(capsys):
    code, out, err = run(capsys, "replay", "--requests", 3, "-q", "--memory", "24GiB")
    assert code == 0
    assert "static pool left out: a static pool reserves 131,072 tokens = 16 GiB" in err
    assert "static" not in out


def test_requests_too_long_for_the_model_are_noted_and_refused(capsys, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL | {"max_position_embeddings": 8192}))
    code, out, _ = run(capsys, "replay", *FAST, "--config", path)
    lengths = [json.loads(line) for line in EXCERPT.read_text().splitlines()[:40]]
    long = sum(row["input_length"] + row["output_length"] > 8192 for row in lengths)
    assert long > 0
    assert f"{long} of 40 requests are longer than the 8,192 tokens" in out
    row = next(line for line in out.splitlines() if "requests refused" in line)
    assert [cell.strip() for cell in row.split("|")[2:-1]] == [str(long)] * 3
    assert code == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--trace", "{tmp}/absent"], ["absent", "No such file"]),
        (["--trace", "{tmp}/half"], ["half", "line ", "cut"]),
        (["--trace", "{tmp}/empty"], ["empty", "at least one request"]),
        (["--config", "{tmp}/no_heads.json"], ["no_heads.json", "num_attention_heads", "missing"]),
        (["--config", "{tmp}/named.json"], ["named.json: model_type: got 'of_ours'", "pass --assume='llama'"]),
        (["--config", "{tmp}/named.json", "--assume", "lama"], ["assume: got 'lama'", "'llama'"]),
        (["--assume", "llama"], ["--assume='llama'", "--config"]),
        (["--config", "{tmp}/absent.json"], ["absent.json", "No such file"]),
        (["--memory", "much"], ["--memory", "'much'", "20GiB"]),
        (["--memory", "10GiB"], ["10 GiB", "15 GiB of weights", "--weights"]),
        (["--page", "0"], ["--page is 0", "2MiB"]),
        (["--dtype", "int99"], ["int99", "bfloat16"]),
        (["--requests", "0"], ["--requests", "x>=1"]),
        (["--backend", "slow"], ["--backend", "virtual", "paged"]),
        (["--what"], ["--what"]),
        (["nothing"], ["nothing"]),
        (["micro", "--real-memory", "1MiB"], ["MiB of real memory", "1 MiB", "--real-memory"]),
        (["attention", "--real-memory", "1MiB"], ["of real memory", "--real-memory"]),
        (["replay", "--json", "{tmp}/absent/x.json"], ["x.json", "does not exist"]),
        (["replay", "--json", "{tmp}"], ["a folder"]),
        (["replay", "--plot", "{tmp}/empty"], ["empty", "folder"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0][:1] in "-nmar" else "",
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(capsys, tmp_path, arguments, says):
    (tmp_path / "half").write_text(EXCERPT.read_text()[: EXCERPT.stat().st_size // 2])
    (tmp_path / "empty").write_text("")
    (tmp_path / "no_heads.json").write_text('{"hidden_size": 64, "num_hidden_layers": 2}')
    (tmp_path / "named.json").write_text(json.dumps(OF_OURS))
    code, out, err = run(capsys, *(argument.replace("{tmp}", str(tmp_path)) for argument in arguments), "-q")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert all(word in err for word in says), err


def test_a_config_of_a_family_that_is_not_known(capsys, tmp_path):
    """``--assume`` reads it as that of a family that is."""
    (tmp_path / "named.json").write_text(json.dumps(OF_OURS))
    (tmp_path / "llama.json").write_text(json.dumps({**OF_OURS, "model_type": "llama"}))
    read = [
        load_model(tmp_path / "named.json", dtype="float32", block_size=16, assume="llama"),
        load_model(tmp_path / "llama.json", dtype="float32", block_size=16),
    ]
    assert read[0].spec == read[1].spec
    code, out, err = run(capsys, "replay", "--config", tmp_path / "named.json", "--assume", "llama", *FAST)
    assert (code, err) == (0, "") and "named" in out


def test_help(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for word in ("replay", "micro", "attention", "--trace", "--config", "--memory", "--backend", "--json", "--plot"):
        assert word in out


def test_micro_measures_what_it_says(small):
    model = load_model(small, dtype="float32", block_size=16)
    results = micro(model, BACKENDS, memory_bytes=8 << 20, page_bytes=64 << 10, sequences=4, repetitions=3)
    assert {row.backend for row in results} == set(BACKENDS)
    counts = {row.case: row.us.count for row in results if row.backend == "virtual"}
    assert counts == {
        "map": 3,
        "admit": 3,
        "extend": 3 * 45,
        "extend at an edge": 3 * 3,
        "batch": 3 * 48,
        "free": 3,
        "unmap": 3,
    }
    assert all(row.us.median > 0 for row in results)
    calls = {(row.case, row.backend): row.driver_calls for row in results}
    for backend in BACKENDS:
        assert calls["map", backend] > 0 and calls["unmap", backend] > 0
        assert all(calls[case, backend] == 0 for case in ("admit", "extend", "extend at an edge", "batch", "free"))


def test_attention_over_both_backends_is_right(small):
    model = load_model(small, dtype="float32", block_size=16)
    results = attention(
        model, BACKENDS, memory_bytes=8 << 20, page_bytes=64 << 10, sequences=3, tokens=70, repetitions=2
    )
    assert [row.backend for row in results] == ["plain tensors", *BACKENDS]
    assert all(row.worst_error < 1e-5 for row in results)
    assert len({row.worst_error for row in results}) == 1, "the same kernel over the same numbers"
