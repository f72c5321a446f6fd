"""`bench step`, `peers`, `instructions` and `compare`: small runs of all of it, and what is absent is said."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvmem.bench import peers as peers_module
from kvmem.bench import speed
from kvmem.bench.__main__ import main
from kvmem.bench.errors import BenchError
from kvmem.bench.floor import build_floor, run_program
from kvmem.bench.instructions import compare
from kvmem.bench.managers import ByRequest, OneByOne, heap_bytes, open_books, open_manager
from kvmem.bench.peers import PEERS, Peer
from kvmem.bench.step import FLOOR, cases, step
from kvmem.bench.tables import load_documents, page
from kvmem.bench.workload import Workload, run_round

SMALL = Workload(sequences=6, prompt=64, steps=33, pool=80)
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler")  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("cache", [False, True])
def test_the_floor_does_the_work_it_is_timed_on(cache: bool) -> None:
    """As many timings as the workload has calls, and blocks: all free again, or those that are cached."""
    workload = replace(SMALL, cache=cache, metadata=True, evict=True)
    printed = run_program(build_floor(), workload, rounds=2)
    counts = {name: len(printed[f"{name}_ns"]) for name in ("admit", "step", "edge", "free")}
    assert counts == {"admit": 6, "step": 30, "edge": 3, "free": 6}
    # a round leaves 64 / 16 whole blocks of each prompt and those that 32 published tokens complete
    assert printed["blocks"] == (min(80, 2 * 6 * 6) if cache else 0)
    with pytest.raises(BenchError, match="floor: the pool is too small"):
        run_program(build_floor(), replace(workload, pool=10))


@pytest.mark.parametrize("name", ["paged", "virtual", "paged, cpu", "virtual, cpu", "paged, one by one"])
@pytest.mark.parametrize("cache", [False, True])
def test_kvmem_ends_a_round_as_it_began(name: str, cache: bool) -> None:
    workload = replace(SMALL, cache=cache)
    manager = open_manager(name, workload)
    assert isinstance(manager, OneByOne) == ("one by one" in name)
    for number in range(2):
        ns = run_round(manager, workload, number)
        assert [len(ns[f"{phase}_ns"]) for phase in ("admit", "step", "edge", "free")] == [6, 30, 3, 6]
        assert min(min(values) for values in ns.values()) > 0
    stats = manager.allocator.stats()  # type: ignore[attr-defined]
    assert (stats.num_sequences, stats.used_bytes, stats.cached_blocks) == (0, 0, 0)


def test_a_full_pool_evicts_and_shared_prompts_are_found() -> None:
    full = replace(SMALL, cache=True, evict=True, pool=SMALL.blocks)
    manager = open_manager("paged", full)
    for number in range(3):
        run_round(manager, full, number)
    assert manager.allocator.stats().evicted_blocks >= SMALL.sequences * 6  # type: ignore[attr-defined]
    shared = replace(SMALL, cache=True, shared=32)
    other = open_manager("virtual", shared)
    run_round(other, shared, 1)
    assert other.allocator.stats().hit_tokens >= 5 * 32  # type: ignore[attr-defined]
    prompts = shared.prompts(7)
    assert (prompts[0, :32] == prompts[1:, :32]).all() and (prompts[0, 32:] != prompts[1, 32:]).any()
    assert np.array_equal(prompts, shared.prompts(7)) and not np.array_equal(prompts, shared.prompts(8))


@needs_compiler
def test_step_prints_and_writes_every_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = [
        replace(case, workload=replace(case.workload, sequences=min(8, case.workload.sequences)))
        for case in cases(scale=0.02)[:5:2] + cases(scale=0.02)[-2:]
    ]
    path = tmp_path / "step.json"
    speed.run_step("", 1, path, True, small)
    printed = capsys.readouterr().out
    report = json.loads(path.read_text())
    rows = report["results"]["step"]
    assert {row["case"] for row in rows} == {case.name for case in small}
    for case in small:
        assert case.name in printed
        assert [row["manager"] for row in rows if row["case"] == case.name] == [FLOOR, *case.managers]
    assert all(row["us"]["median"] > 0 for row in rows) and report["setup"]["notes"] == []
    assert "met" in printed and str(tmp_path) not in path.read_text()
    assert small[0].name in page(load_documents(tmp_path))
    if heap_bytes() is not None:
        assert all(row["heap_bytes"] > 0 for row in rows if row["case"].startswith("admit"))


def test_without_a_floor_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> Path:
        raise BenchError("no compiler here")

    monkeypatch.setattr("kvmem.bench.step.build_floor", absent)
    report = step(cases(scale=0.02)[:1], 1)
    assert report.notes == ["no floor: no compiler here"]
    assert [row.manager for row in report.results] == list(cases()[0].managers)
    assert main(["step", "--case", "no such case"]) == 2


def test_peers_that_are_absent_or_broken_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "peers.json"
    speed.run_peers(tmp_path, 1, path, True, SMALL)
    assert "vllm is absent; install it with: python -m pip install --no-deps --target" in capsys.readouterr().out
    assert {row["manager"] for row in json.loads(path.read_text())["results"]["peers"]} >= {"paged", "virtual"}

    (tmp_path / "vllm").mkdir()  # with nothing in it
    report = peers_module.peers(SMALL, tmp_path, 1, among=PEERS)
    assert [note for note in report.notes if note.startswith("vllm left out: its driver ended: ")]
    assert not report.versions and report.results


def test_a_peer_is_measured_by_its_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver as the real ones are, over a manager that does nothing."""
    drivers = tmp_path / "drivers"
    drivers.mkdir()
    shutil.copy(Path(peers_module.__file__).parent / "drivers" / "harness.py", drivers)
    (drivers / "idle_driver.py").write_text(
        "from harness import serve\n"
        "class Idle:\n"
        "    def __init__(self, workload): assert workload['sequences'] == 6\n"
        "    def admit(self, i, prompt): assert len(prompt) == 64 and isinstance(prompt[0], int)\n"
        "    def step(self, last): assert last is None or len(last) == 6\n"
        "    def release(self, i): pass\n"
        "    def forget(self): pass\n"
        "serve(Idle, '1.2')\n"
    )
    (tmp_path / "idle").mkdir()
    monkeypatch.setattr(peers_module, "_DRIVERS", drivers)
    report = peers_module.peers(SMALL, tmp_path, 1, among=[Peer("idle", "idle==1.2")])
    rows = [row for row in report.results if row.manager == "idle"]
    assert report.versions == {"idle": "1.2"} and len(rows) == 5 * 4 and not report.notes
    assert all(row.times_kvmem is not None and row.us.count > 0 for row in rows)


def test_compare_fails_from_a_tenth_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def write(name: str, **counts: int) -> str:
        path = tmp_path / name
        path.write_text(json.dumps({"instructions": counts}))
        return str(path)

    old = write("old.json", step=1000, admit=500)
    assert main(["compare", old, write("fine.json", step=1099, admit=100, new=7)]) == 0
    assert main(["compare", old, write("slow.json", step=1100, admit=500)]) == 1
    assert "TOO MUCH" in capsys.readouterr().out
    assert main(["compare", old, write("gone.json", step=1000)]) == 1
    for text in ("{}", "[1]", '{"instructions": {}}', '{"instructions": {"step": 0}}', "not JSON"):
        (tmp_path / "bad.json").write_text(text)
        assert main(["compare", old, str(tmp_path / "bad.json")]) == 2
    assert main(["compare", str(tmp_path / "absent.json"), old]) == 2
    recorded = Path(__file__).parent.parent / "docs" / "results" / "instructions.json"
    assert not any(row.failed for row in compare(recorded, recorded))


def test_books_have_room_for_what_the_workload_holds() -> None:
    for backend in ("paged", "virtual"):
        allocator = open_books(SMALL, backend)  # type: ignore[arg-type]
        assert allocator.stats().budget_bytes >= SMALL.pool * 16 * allocator.spec.bytes_per_token
