"""The GPU benchmark without a GPU: every part in tiny sizes on the CPU, FlashInfer's and the driver's stand-ins, parts
that die, goals from given numbers, and the page that shows it all.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import kernel_oracle_flashinfer as stand_ins
import numpy as np
import pytest
import torch
from support_drivers import ROOT, CudaStub, build_stub

from benchmarks.publish import load_documents, page
from kvmem.bench.__main__ import main
from kvmem.bench.document import part_path, without_paths, write_json
from kvmem.bench.gpu import admit, attention, decode, runner
from kvmem.bench.gpu.admit import AdmitRow
from kvmem.bench.gpu.attention import AttentionRow, LayoutRow, Verdict
from kvmem.bench.gpu.decode import DecodeRow
from kvmem.bench.gpu.device import BenchDevice
from kvmem.bench.gpu.elastic import ElasticRow
from kvmem.bench.gpu.measure import Part
from kvmem.bench.gpu.memory import open_cache
from kvmem.bench.gpu.prefetch import PrefetchRow
from kvmem.bench.gpu.runner import MODULE, PARTS, WARM_UP, run_part
from kvmem.bench.gpu.sizes import FULL, TINY, ModelShape
from kvmem.bench.gpu.tables import goals
from kvmem.bench.gpu.vmm import PageCost, RunCost
from kvmem.bench.model import BACKENDS, Backend
from kvmem.bench.timing import one_thread
from kvmem.errors import SpecError

ROWS = {
    "vmm": {"runs": RunCost, "pages": PageCost},
    "admit": {"admit": AdmitRow},
    "decode": {"decode": DecodeRow},
    "attention": {"attention": AttentionRow},
    "layout": {"layout": LayoutRow, "verdict": Verdict},
    "elastic": {"elastic": ElasticRow},
    "prefetch": {"prefetch": PrefetchRow},
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("gpu")
    return folder, {name: run_part(name, BenchDevice(), TINY, 100, folder, ["gpu", "--tiny"]) for name in ROWS}


def rows_of(reports: tuple[Path, dict[str, dict[str, Any]]], part: str) -> list[dict[str, Any]]:
    return next(iter(reports[1][part]["results"].values()))


def test_every_part_writes_the_documented_fields(reports):
    folder, documents = reports
    assert set(ROWS) == set(PARTS) - {WARM_UP}
    for part, document in documents.items():
        assert json.loads(part_path(folder, part, "cpu").read_text()) == json.loads(json.dumps(document))
        assert (document["complete"], document["error"], document["gpu_part"]) == (True, None, part)
        assert document["environment"]["kvmem"] and document["environment"]["device"] == "cpu"
        assert document["results"].keys() == ROWS[part].keys()
        for name, kind in ROWS[part].items():
            assert document["results"][name], part
            for row in document["results"][name]:
                assert row.keys() == {field.name for field in fields(kind)}
    assert len(list(folder.iterdir())) == len(ROWS) <= 8


def test_prefetch(reports):
    found = {(row["backend"], row["budget_bytes"]): row for row in rows_of(reports, "prefetch")}
    assert found.keys() == {(b, size) for b in BACKENDS for size in (0, *TINY.prefetch_budgets)}
    assert {row["layer_bytes"] for row in found.values()} == {3 * 39 * TINY.model.layer_bytes}  # without the newest


def test_decode(reports):
    found = {(row["phase"], row["memory"]): row for row in rows_of(reports, "decode")}
    assert found.keys() == {(p, m) for p in ("fresh", "parked") for m in ("static pool", "virtual", "paged")}
    assert found["fresh", "virtual"]["driver_calls"] > 0, "the mapper maps while sequences grow"
    for (phase, memory), row in found.items():
        assert (row["steps"], row["step_us"]["count"]) == (TINY.decode_steps,) * 2
        assert row["worst_difference"] < 1e-5
        assert (row["ratio"] is None) == (memory == "static pool")
        if phase == "parked":
            assert (row["driver_calls"], row["late_steps"]) == (0, 0), memory
        assert 0 < row["allocator_us"]["median"] < row["step_us"]["median"]


def test_admit(reports):
    found = {(row["way"], row["backend"]): row for row in rows_of(reports, "admit")}
    prompt = TINY.admit_prompts[0]
    for backend in ("virtual", "paged"):
        assert found["fresh", backend]["driver_calls"] > 0
        assert found["parked", backend]["driver_calls"] == 0
        assert found["fresh", backend]["cached_tokens"] == found["parked", backend]["cached_tokens"] == 0
        assert found["shared", backend]["cached_tokens"] == found["finished", backend]["cached_tokens"] == prompt
    assert found["shared", "virtual"]["driver_calls"] > 0, "pages are mapped under a second row"
    assert all(row["host_us"]["median"] <= row["ready_us"]["median"] for row in found.values())


def test_attention_and_layout(reports):
    for row in rows_of(reports, "attention"):
        assert row["worst_difference"] < 1e-4
        assert row["memory"] != "static" or row["ratio"]["median"] == 1.0
        assert row["new_tokens"] == (1 if row["phase"] == "decode" else min(16, row["tokens"]))
    memories = {"virtual", "static", "paged", "static pool"}
    assert {row["memory"] for row in rows_of(reports, "attention")} == memories
    verdicts = reports[1]["layout"]["results"]["verdict"]
    for backend in ("virtual", "paged"):
        of = [verdict for verdict in verdicts if verdict["backend"] == backend]
        assert [verdict["interleave"] for verdict in of] == [1, 2, 4]
        assert sum(verdict["recommended"] for verdict in of) == 1
        best = min(verdict["worst_ratio"] for verdict in of)
        good = [verdict for verdict in of if verdict["worst_ratio"] <= 1.02 * best]
        assert good[-1]["recommended"], "the largest of those within 2 % of the best"


def test_elastic_and_vmm(reports):
    for row in rows_of(reports, "elastic"):
        assert row["moved_bytes"] > 0 and row["driver_calls"] > 0 and row["admission_us"]["count"] > 0
    runs = {(row["page_bytes"], row["run_pages"], row["access"]) for row in rows_of(reports, "vmm")}
    assert runs == {(p, n, a) for p in TINY.vmm_pages for n, a in ((1, "run"), (4, "run"), (4, "page"))}
    assert reports[1]["vmm"]["skipped"][0]["case"] == "under running kernels"


class Books(BenchDevice):
    """An H100 of which only the books are kept: are the sizes that nobody can try here right?"""

    kind, name, torch_device = "cuda", "meta", torch.device("meta")

    def free_bytes(self) -> int:
        return 77 << 30


def grow_to(device: Books, model: ModelShape, backend: Backend, sequences: int, tokens: int, **options: Any) -> None:
    """OutOfMemory where the budget is too small for it."""
    allocator = open_cache(model, device, backend, sequences, tokens, **options)
    allocator.extend_batch(allocator.open_batch(sequences), np.full(sequences, tokens, dtype=np.int32))


@pytest.mark.parametrize("backend", ["virtual", "paged"])
def test_the_full_sizes_fit_an_h100(backend: Backend) -> None:
    device = Books()
    for case in FULL.attention_cases:
        model = attention._fitting(device, FULL, [(name, "all") for name in BACKENDS], *case)
        assert model.layers >= 12
        grow_to(device, model, backend, *case)
    for case in FULL.layout_cases:
        model = attention._fitting(device, FULL, [(backend, g) for g in (*FULL.layout_interleaves, "all")], *case)
        assert model.layers == 32, "the default of all layers is what is to be judged"
        for interleave in (*FULL.layout_interleaves, "all"):
            grow_to(device, model, backend, *case, interleave=interleave)
    tokens = FULL.decode_prompt + FULL.decode_steps + 2
    model = decode._fitting(device, FULL, FULL.decode_sequences, tokens)
    assert model.layers >= 12
    grow_to(device, model, backend, FULL.decode_sequences, tokens, map_ahead_tokens=FULL.map_ahead_tokens)
    part = Part("admit", device, replace(FULL, admit_prompts=(8192,)), 1e6, None, [])
    admit.admit(part)
    assert part.report.document["skipped"] == []
    fresh = {row["page_bytes"]: row["driver_calls"] for row in part.report.document["results"]["admit"]
             if (row["way"], row["backend"]) == ("fresh", backend)}  # fmt: skip
    assert fresh == {2 << 20: 512 + 1, 16 << 20: 64 + 1}, "a map for each page, one set_access for the run"


class PretendCuda(BenchDevice):
    """A CPU that takes the paths of CUDA, with what stands in for it."""

    kind = "cuda"

    def __init__(self, driver: Any = None) -> None:
        self._driver = driver

    def driver(self) -> Any:
        return self._driver or super().driver()


def test_vmm_through_the_cuda_driver_under_a_load(tmp_path: Path) -> None:
    """The driver of CUDA over the stand-in for libcuda; a load that is over once, as when a call waits for it."""

    class Load:
        tops, busy_calls = 0, 0

        def top_up(self) -> None:
            self.tops += 1

        def busy(self) -> bool:
            self.busy_calls += 1
            return self.busy_calls != 2

    load, driver = Load(), CudaStub(build_stub(), tmp_path).driver()
    device = PretendCuda(driver)
    device.load = lambda: load  # type: ignore[method-assign,assignment,return-value]
    document = run_part("vmm", device, TINY, 100, None, [])
    loaded = [row for row in document["results"]["runs"] if row["load"] == "kernels"]
    assert len(loaded) == len(document["results"]["runs"]) / 2 and load.tops > 0
    assert sum(row["drained"] for row in loaded) == 1
    assert driver.physical_bytes() == 0
    driver_calls = driver.counters()
    refused = driver_calls.unmap - driver_calls.map
    assert refused <= 1 and driver_calls.create == driver_calls.destroy, "the stand-in refuses to unmap a run, once"


class Decode(stand_ins.BatchDecodeWithPagedKVCacheWrapper):
    """As FlashInfer's, with the arguments that only the benchmark and the example give."""

    def __init__(self, workspace: torch.Tensor, kv_layout: str, **options: Any) -> None:
        super().__init__(workspace, kv_layout)
        graph = {name for name in options if name.endswith("_buffer")}
        assert options.keys() - graph <= {"use_cuda_graph", "use_tensor_cores", "backend"}
        assert len(graph) == (3 if options.get("use_cuda_graph") else 0)
        self.room = {name: options[name].numel() for name in graph}

    def plan(self, indptr, indices, last_page_len, *args, **kwargs) -> None:
        if self.room:
            assert self.room["paged_kv_indices_buffer"] >= len(indices)
            assert (self.room["paged_kv_indptr_buffer"], self.room["paged_kv_last_page_len_buffer"]) == (
                len(indptr), len(last_page_len),
            )  # fmt: skip
        super().plan(indptr, indices, last_page_len, *args, **kwargs)

    def run(self, q, cache, *, out=None, return_lse=False):
        assert not return_lse, "it would cost what is not measured"
        result = super().run(q, cache).to(q.dtype)
        return result if out is None else out.copy_(result)


class Prefill(stand_ins.BatchPrefillWithPagedKVCacheWrapper):
    def __init__(self, workspace: torch.Tensor, kv_layout: str, *, backend: str) -> None:
        super().__init__(workspace, kv_layout)
        self.backend = backend

    def plan(self, *args: Any, **kwargs: Any) -> None:
        if self.backend == "fa3":
            raise MissingJITCacheError("not in the cache")
        super().plan(*args, **kwargs)

    def run(self, q, cache, *, return_lse=False):
        assert not return_lse
        return super().run(q, cache).to(q.dtype)


class MissingJITCacheError(RuntimeError):
    """As FlashInfer's, by name."""


FLASHINFER = SimpleNamespace(
    BatchDecodeWithPagedKVCacheWrapper=Decode,
    BatchPrefillWithPagedKVCacheWrapper=Prefill,
    append_paged_kv_cache=stand_ins.append_paged_kv_cache,
)


def test_the_paths_of_a_gpu_with_flashinfers_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", FLASHINFER)  # type: ignore[arg-type]
    monkeypatch.delenv("FLASHINFER_DISABLE_JIT", raising=False)

    def refuse(*_: Any) -> Any:  # the real one would, after importing half of torch
        raise SpecError("block tables need torch 2.12 or newer")

    monkeypatch.setattr("kvmem.kernels.torch_ops.planned", refuse)
    monkeypatch.setattr("kvmem.bench.gpu.attention._MARGIN_BYTES", 0)
    monkeypatch.setattr("kvmem.bench.gpu.decode._MARGIN_BYTES", 0)
    tiny = replace(TINY, attention_cases=((2, 40),), decode_steps=6, repetitions=1)
    document = run_part("attention", PretendCuda(), tiny, 1e6, None, [])
    measured = {(row["kernel"], row["phase"]) for row in document["results"]["attention"]}
    assert measured == {("FlashInfer decode, CUDA cores", "decode"), ("FlashInfer decode, tensor cores", "decode"),
                        ("FlashInfer prefill, fa2", "prefill")}  # fmt: skip
    why = {skipped["case"].split(", ", 2)[2]: skipped["why"] for skipped in document["skipped"]}
    assert "prebuilt" in why["FlashInfer prefill, fa3, virtual"]
    assert "fa3_fwd_interface is not installed" in why["fa3-fwd, virtual"]
    assert "torch flash, virtual" in why and "block tables" in why["torch flash, paged"]
    document = run_part("decode", PretendCuda(), tiny, 1e6, None, [])
    assert [row["worst_difference"] < 1e-5 for row in document["results"]["decode"]] == [True] * 6


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("decoder_gpu", ROOT / "examples" / "decoder_gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setitem(sys.modules, "decoder_gpu", module)  # dataclasses look themselves up
        spec.loader.exec_module(module)
    return module


def test_the_example_through_flashinfers_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the capture itself: the step is run again where the graph would be replayed."""
    example = load_example()
    example.flashinfer = FLASHINFER

    class Steps(example.FlashInferSteps):  # type: ignore[name-defined,misc]
        def capture(self) -> Any:
            out = torch.zeros_like(self.tokens)

            def replay() -> None:
                attend = self.attend(self.decode_wrapper, self.batch)
                out.copy_(self.model.logits(self.tokens, self.batch.positions, attend).argmax(-1))

            return SimpleNamespace(replay=replay), out

    with torch.inference_mode(), one_thread():
        _, model, prompts = example.random_llama()
        for backend in ("virtual", "paged"):
            expected, _ = example.generate(model, prompts, 12, backend)
            with monkeypatch.context() as patch:
                patch.setattr(example, "TorchSteps", Steps)
                assert example.generate(model, prompts, 12, backend)[0] == expected
        assert max(example.worst_gap(model, *pair) for pair in zip(prompts, expected, strict=True)) < 1e-4
    assert len({token for row in expected for token in row}) > 12, "tokens that say something"


def test_a_part_that_dies_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One crashes after its first figure, one never ends, one is healthy: each in a real process."""
    real = subprocess.run
    first = {"schema_version": 1, "gpu_part": "vmm", "environment": {"device": "cpu"}, "command": [], "setup": {},
             "results": {"runs": [{}]}, "skipped": [], "error": None, "complete": False, "seconds": 0.0}  # fmt: skip
    write_json(first, first_path := tmp_path / "first")
    codes = {
        "vmm": f"import os, shutil, sys; shutil.copy({str(first_path)!r}, {str(part_path(tmp_path, 'vmm', 'cpu'))!r});"
        "print('/some/where/file.py: an illegal memory access', file=sys.stderr, flush=True); os.abort()",
        "decode": "import time; time.sleep(60)",
    }

    def run(words: list[str], **options: Any) -> Any:
        code = codes.get(words[3]) if words[1:3] == ["-m", MODULE] else None
        if words[3:4] == ["decode"]:
            options["timeout"] = 0.3
        return real(words if code is None else [sys.executable, "-c", code], **options)

    monkeypatch.setattr(runner.subprocess, "run", run)
    said: list[str] = []
    parts = ["vmm", "admit", "decode"]
    documents = runner.run_all(
        parts, tmp_path, device="cpu", tiny=True, seconds=300, command=["gpu"], say=said.append
    )  # fmt: skip
    assert [documents[part]["complete"] for part in parts] == [False, True, False]
    assert documents["vmm"]["error"] == "exit code -6: file.py: an illegal memory access"
    assert documents["vmm"]["results"] == {"runs": [{}]}, "what it had measured is kept"
    assert documents["decode"]["error"].startswith("ended after")
    assert documents["admit"]["results"]["admit"] and documents["admit"]["command"] == ["gpu"]
    for part in parts:
        assert json.loads(part_path(tmp_path, part, "cpu").read_text()) == documents[part]
    assert [line.split(":")[0] for line in said] == parts


JUST_GOOD_ENOUGH = dict(calls=0, p99=49.0, step=1.01, fresh_p99=49.0, fresh_step=1.01, attention=1.02, fresh=999.0,
                        parked=49.0, speed=200.0)  # fmt: skip


def numbers(**worse: float) -> dict[str, Any]:
    """Documents with what the goals are read from, and with rows that they must not be read from."""
    n = JUST_GOOD_ENOUGH | worse
    decode = [
        {"phase": phase, "memory": memory, "sequences": 256, "driver_calls": calls, "allocator_us": {"p99": p99},
         "ratio": None if step is None else {"median": step}}
        for phase, memory, calls, p99, step in (
            ("fresh", "virtual", 99, n["fresh_p99"], n["fresh_step"]), ("fresh", "paged", 99, 1e6, 9.0),
            ("parked", "virtual", 0, 1.0, 1.0), ("parked", "paged", n["calls"], n["p99"], n["step"]),
            ("parked", "static pool", 9, 1e6, None),
        )
    ]  # fmt: skip
    rows = [
        {"memory": memory, "kernel": "k", "phase": "decode", "sequences": 1, "tokens": 1024, "ratio": {"median": ratio}}
        for memory, ratio in (("virtual", 1.0), ("virtual", n["attention"]), ("paged", 9.0))
    ]
    admit = [
        {"way": way, "backend": "virtual", "prompt_tokens": tokens, "page_bytes": size, "host_us": {"median": us}}
        for way, tokens, size, us in (("fresh", 8192, 16 << 20, n["fresh"]), ("fresh", 8192, 2 << 20, 5000.0),
                                      ("fresh", 32768, 2 << 20, 1.0), ("parked", 8192, 2 << 20, n["parked"]))
    ]  # fmt: skip
    runs = [
        {"page_bytes": size, "run_pages": run, "access": access, "load": load, "gib_per_second": value}
        for size, run, access, load, value in (
            (16 << 20, 64, "run", "none", n["speed"]), (16 << 20, 1, "run", "none", 1.0),
            (64 << 20, 64, "run", "none", 1e6), (16 << 20, 64, "page", "none", 1e6), (16 << 20, 64, "run", "kernels", 1e6),
        )
    ]  # fmt: skip
    results = {"decode": {"decode": decode}, "attention": {"attention": rows}, "admit": {"admit": admit},
               "vmm": {"runs": runs}}  # fmt: skip
    return {part: {"results": result} for part, result in results.items()}


@pytest.mark.parametrize(
    ("worse", "missed"),
    [
        ({}, None), ({"calls": 1}, 0), ({"p99": 50.0}, 1), ({"step": 1.0101}, 2), ({"fresh_p99": 50.0}, 3),
        ({"fresh_step": 1.0101}, 4), ({"attention": 1.0201}, 5), ({"fresh": 1000.0}, 6), ({"parked": 50.0}, 7),
        ({"speed": 199.9}, 8),
    ],
)  # fmt: skip
def test_goals(worse: dict[str, float], missed: int | None) -> None:
    found = goals(numbers(**worse))
    assert [goal.met for goal in found] == [index != missed for index in range(9)]
    if missed is None:
        assert "pages of 2 MiB: 5,000 us" in found[6].measured, "what other page sizes need is said too"


def test_goals_of_nothing_and_of_some() -> None:
    assert [(goal.met, goal.measured) for goal in goals({})] == [(None, "not measured")] * 9
    some = {"vmm": numbers()["vmm"], "decode": {"results": {}}}
    assert [goal.met for goal in goals(some)] == [None] * 8 + [True]


def test_the_page(reports, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, documents = reports
    text = page(load_documents(folder))
    assert "## cpu" in text and "| on a GPU | wanted | measured | met |" in text and "Not measured" not in text
    for part in ROWS:
        assert f"\n### {part}\n" in text
    row = rows_of(reports, "elastic")[0]
    assert f"| {row['direction']} |" in text
    assert "- not measured: under running kernels: a CPU has no stream to run them on" in text
    broken = documents["vmm"] | {"error": "exit code -11: ", "results": {}, "complete": False}
    write_json(broken, part_path(tmp_path, "vmm", "NVIDIA H100 80GB HBM3"))
    assert [path.name for path in tmp_path.iterdir()] == ["gpu_nvidia-h100-80gb-hbm3_vmm.json"]
    assert "Cut short: exit code -11" in page(load_documents(tmp_path))
    published = page(load_documents(ROOT / "docs" / "results"))
    assert ("## GPU\n\nNot measured" in published) == (not list((ROOT / "docs" / "results").glob("gpu_*.json")))


def test_bad_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for words, says in (
        (["--part", "vmm,nothing"], "--part: got 'vmm,nothing'; parts are vmm, admit"),
        (["--device", "tpu"], "--device: got 'tpu'"),
        (["--device", "cpu", "--out", str(tmp_path / "file" / "in")], "--out: cannot make"),
    ):
        (tmp_path / "file").write_text("")
        assert main(["gpu", "--out", str(tmp_path), *words]) == 2
        assert says in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["gpu", "--out", str(tmp_path)]) == 2
        assert "no CUDA device" in capsys.readouterr().err


def test_a_report_names_no_folder_of_a_machine() -> None:
    text = "File /home/me/x/part.py, line 3; 10 GiB/s; a/b; /opt/lib.so: no"
    assert without_paths(text) == "File part.py, line 3; 10 GiB/s; a/b; lib.so: no"
