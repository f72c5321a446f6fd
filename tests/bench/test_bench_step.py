"""`benchmarks.step` and `benchmarks.instructions`: small runs of all of it, and what is absent is said."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import step as steps
from benchmarks.instructions import compare, instructions
from benchmarks.publish import load_documents, page
from benchmarks.step import cases, step
from benchmarks.workload import (
    FLOOR,
    ByRequest,
    OneByOne,
    Workload,
    heap_bytes,
    open_allocator,
    open_manager,
    run_floor,
    run_round,
)
from kvmem.bench.__main__ import main
from kvmem.bench.text import BenchError

SMALL = Workload(sequences=6, prompt=64, steps=33, pool=80)
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler")  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("cache", [False, True])
def test_the_floor_does_the_work_it_is_timed_on(cache: bool) -> None:
    """As many timings as the workload has calls, and blocks: all free again, or those that are cached."""
    workload = replace(SMALL, cache=cache, metadata=True, evict=True)
    printed = run_floor(workload)
    counts = {name: len(printed[f"{name}_ns"]) for name in ("admit", "step", "edge", "free")}
    assert counts == {"admit": 6, "step": 30, "edge": 3, "free": 6}
    # a round leaves 64 / 16 whole blocks of each prompt and those that 32 published tokens complete
    assert printed["blocks"] == (min(80, 2 * 6 * 6) if cache else 0)
    with pytest.raises(BenchError, match="floor: the pool is too small"):
        run_floor(replace(workload, pool=10))


@pytest.mark.parametrize(
    "name",
    [
        "paged",
        "virtual",
        "paged, cpu",
        "virtual, cpu",
        "paged, one by one",
        "paged, SchedulerCache",
        "virtual, SchedulerCache",
    ],
)
@pytest.mark.parametrize("cache", [False, True])
def test_kvmem_ends_a_round_as_it_began(name: str, cache: bool) -> None:
    workload = replace(SMALL, cache=cache)
    manager = open_manager(name, workload)
    assert isinstance(manager, OneByOne) == ("one by one" in name)
    assert isinstance(manager, ByRequest) == ("SchedulerCache" in name)
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


@pytest.mark.parametrize("backend", ["paged", "virtual"])
def test_a_table_kept_by_request_is_the_allocators(backend: str) -> None:
    """From what each answer of `SchedulerCache` changes alone, in a pool where prompts and answers are shared."""
    workload = replace(SMALL, cache=True, shared=64, metadata=True)
    manager = open_manager(f"{backend}, SchedulerCache", workload)
    assert isinstance(manager, ByRequest)
    prompts, answers = workload.prompts(1), workload.answers(1)
    answers[:] = answers[:, :1]  # all the same: blocks that one completes are there already for the next
    for i, prompt in enumerate(prompts):
        manager.admit(i, prompt)
    for number, tokens in enumerate(answers):
        manager.step(None if number == 0 else tokens)
    for i in range(workload.sequences):
        assert manager.table[i, : (64 + 33 + 15) // 16].tolist() == manager.cache.block_ids(i).tolist()
    assert np.array_equal(manager.read_table, manager.table)
    if backend == "paged":  # both blocks that the 32 published tokens complete
        assert (manager.table[:, :6] == manager.table[0, :6]).all() and len(set(manager.table[:, 6].tolist())) == 6


@needs_compiler
def test_step_prints_and_writes_every_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = [
        replace(case, workload=replace(case.workload, sequences=min(8, case.workload.sequences)))
        for case in cases(scale=0.02)[:5:2] + cases(scale=0.02)[-2:]
    ]
    path = tmp_path / "step.json"
    steps.run("", 1, path, True, small)
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

    monkeypatch.setattr("benchmarks.workload.build_floor", absent)
    rows, notes = step(cases(scale=0.02)[:1], 1)
    assert notes == ["no floor: no compiler here"]
    assert [row.manager for row in rows] == list(cases()[0].managers)
    assert main(["--case", "no such case"], steps.command) == 2


def test_compare_fails_from_a_tenth_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def write(name: str, **counts: int) -> str:
        path = tmp_path / name
        path.write_text(json.dumps({"instructions": counts}))
        return str(path)

    old = write("old.json", step=1000, admit=500)
    assert main([old, write("fine.json", step=1099, admit=100, new=7)], instructions) == 0
    assert main([old, write("slow.json", step=1100, admit=500)], instructions) == 1
    assert "TOO MUCH" in capsys.readouterr().out
    assert main([old, write("gone.json", step=1000)], instructions) == 1
    for text in ("{}", "[1]", '{"instructions": {}}', '{"instructions": {"step": 0}}', "not JSON"):
        (tmp_path / "bad.json").write_text(text)
        assert main([old, str(tmp_path / "bad.json")], instructions) == 2
    assert main([str(tmp_path / "absent.json"), old], instructions) == 2
    recorded = Path(__file__).parents[2] / "docs" / "results" / "instructions.json"
    assert not any(row.failed for row in compare(recorded, recorded))


def test_allocators_have_room_for_what_the_workload_holds() -> None:
    for backend in ("paged", "virtual"):
        allocator = open_allocator(SMALL, backend)  # type: ignore[arg-type]
        assert allocator.stats().budget_bytes >= SMALL.pool * 16 * allocator.spec.bytes_per_token
