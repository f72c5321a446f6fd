"""The session on a lent GPU, with parts that go wrong, and what its parts may need."""

from __future__ import annotations

import ast
import os
import sys
import time
from pathlib import Path

import gpu_jobs
import gpu_session
import pytest
from gpu_session import PARTS, Part, run_all

TESTS = Path(__file__).resolve().parents[1]
HERE = TESTS / "gpu"
MODULES = {file.stem: file for file in TESTS.rglob("*.py")}
WRITES = "import os, pathlib; pathlib.Path(os.environ['KVMEM_GPU_REPORT']).write_text({!r}); "
#: What a GPU machine of ours has beside torch and what pytest needs.
THERE = {"torch", "numpy", "pytest", "hypothesis", "triton", "kvmem", *sys.stdlib_module_names, *MODULES}  # fmt: skip


def test_no_part_costs_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_session, "GRACE_SECONDS", 4.0)  # a part that writes its table needs some of it
    deaf = "import signal, subprocess, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('said', flush=True); "
    child = "import sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    parts = [
        Part("one", 20, ("-c", WRITES.format("table one") + "print('first')")),
        Part("two", 20, ("-c", "raise SystemExit(3)")),
        Part("three", 20, ("-c", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")),
        Part("four", 2, ("-c", deaf + child + "print('child', p.pid, flush=True); time.sleep(60)")),
        Part("five", 20, (), "no-such-program"),
        Part("six", 4, ("-c", "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: " + WRITES.format("table six"))),
    ]  # fmt: skip
    ended = run_all(parts, 30, tmp_path)
    assert [one.how for one in ended] == [
        "ok", "status 3", "signal 11", "interrupted after 2 s", "not started: no-such-program is not installed",
        "interrupted after 4 s",
    ]  # fmt: skip
    log = (tmp_path / "session.log").read_text()
    assert "first" in log and "said" in log and "==== six" in log
    assert (tmp_path / "tables.txt").read_text().split("\n") == ["table one", "table six", ""]
    assert len(list(tmp_path.iterdir())) == 2 and capsys.readouterr().out.count("\n") == len(parts)
    child_id = int(next(line for line in log.splitlines() if line.startswith("child")).split()[1])
    with pytest.raises(ProcessLookupError):
        os.kill(child_id, 0)
    assert run_all(parts[:1], 3, tmp_path)[0].how == "not started: no time was left"


def gpu_files() -> list[Path]:
    marks = ("mark.gpu", "gpu_cases(")
    files = [file for file in TESTS.rglob("test_*.py") if any(mark in file.read_text() for mark in marks)]
    return [file for file in files if file.name != Path(__file__).name]


def test_every_file_with_a_gpu_test_is_in_a_part() -> None:
    named = {word for part in PARTS for word in part.command if word.endswith(".py")}
    rules = {"tests/gpu/test_gpu_rules.py"}  # its probes are a part of their own, without pytest
    assert {f"tests/{file.relative_to(TESTS)}" for file in gpu_files()} - rules == {
        name for name in named if "/test_" in name
    }
    assert all((TESTS.parent / name).exists() for name in named)


def test_what_runs_on_a_gpu_needs_no_package_that_is_not_there() -> None:
    """At the top of a file: one such import, and pytest runs nothing at all of what it was asked for."""
    seen: set[Path] = set()
    queue = [*gpu_files(), TESTS / "conftest.py", HERE / "gpu_rules.py", HERE / "gpu_stress.py", HERE / "gpu_worker.py"]
    while queue:
        file = queue.pop()
        if file in seen:
            continue
        seen.add(file)
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in (name.split(".")[0] for name in names):
                assert name in THERE, f"{file.name} imports {name}"
                if name in MODULES:
                    queue.append(MODULES[name])
    assert len(seen) > 20


def test_an_interrupt_ends_the_workers_and_keeps_what_they_said() -> None:
    said = '{"what": "one", "status": "ok", "error": 0.1, "allowed": 1.0}'
    code = f"print('''{said}''', flush=True)\nimport time; time.sleep(60)"
    pool = gpu_jobs.Pool(
        ["kvmem sdpa"], 0, lambda name, seed: gpu_jobs.run_worker(name, seed, command=[sys.executable, "-c", code])
    )
    while not gpu_jobs._running:
        time.sleep(0.01)
    time.sleep(0.5)
    pool.close()
    (report,) = pool.done()
    assert [r.what for r in report.records] == ["one"] and report.ended.startswith("ended with signal 9")
