"""`benchmarks.peers`: ours and peers are measured by their drivers, one that is absent or broken is left out and said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support_peers import write_sglang

from benchmarks.peers import compare as peers_module
from benchmarks.peers.compare import PEERS, Peer, peer_tables, peers, workloads
from benchmarks.workload import Workload
from kvmem.bench.text import BenchError

SMALL = Workload(sequences=6, prompt=64, steps=33, pool=80)
DRIVERS = Path(peers_module.__file__).parent
IDLE = """
from harness import serve
class Idle:
    def __init__(self, workload): self.small, self.n = workload["pool"] == 6, workload["sequences"]
    def admit(self, i, prompt): assert len(prompt) == (32 if self.small else 64) and isinstance(prompt[0], int)
    def step(self, last): assert last is None or len(last) == self.n == (2 if self.small else 6)
    def release(self, i): pass
    def clear(self): pass
serve(Idle, "1.2")
"""
CASES = 4  # step, step at a block edge, admit, free


@pytest.fixture(autouse=True)
def one_workload(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each workload starts all processes anew, and each of these imports torch."""
    every = workloads

    def one(base: Workload) -> dict[str, Workload]:
        return {name: workload for name, workload in every(base).items() if name == "prefix cache, full pool"}

    monkeypatch.setattr(peers_module, "workloads", one)


def test_ours_and_a_peer_are_measured_by_their_drivers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of ours; a driver as the real ones are, over a manager that does nothing; one that fails; one not there."""
    drivers = tmp_path / "drivers"
    shutil.copytree(DRIVERS, drivers)
    (drivers / "idle_driver.py").write_text(IDLE)
    (drivers / "broken_driver.py").write_text("import no_such_module\n")
    (drivers / "short_driver.py").write_text(IDLE.replace("pass", "assert self.small, 'no room for ' + str(i)", 1))
    for name in ("idle", "broken", "short"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(peers_module, "_DRIVERS", drivers)
    among = [*(Peer(name, f"{name}==1.2") for name in ("idle", "broken", "short")), *PEERS]
    measured = peers(SMALL, tmp_path, 1, among=among)
    monkeypatch.setattr(peers_module, "peers", lambda *_: measured)
    path = tmp_path / "peers.json"
    peers_module.run(tmp_path, 1, path, True, SMALL)

    printed, report = capsys.readouterr().out, json.loads(path.read_text())
    assert all(column in printed for column in next(peer_tables([])).columns)
    notes = report["setup"]["notes"]
    for peer in PEERS:
        assert f"{peer.name} is absent; install it with: {peer.install(tmp_path)}" in printed
        assert f"pip install --no-deps --target {tmp_path / peer.name} {peer.requirement} " in printed
    assert "broken left out: its driver ended: ModuleNotFoundError: No module named 'no_such_module'" in notes
    assert [
        note for note in notes if note.startswith("short left out") and note.endswith("AssertionError: no room for 0")
    ]
    assert report["setup"]["versions"] == {"idle": "1.2", "short": "1.2"}

    rows = report["results"]["peers"]
    by_name = {name: [row for row in rows if row["manager"] == name] for name in (*peers_module.OURS, "idle")}
    assert all(len(found) == CASES for found in by_name.values())
    assert {row["manager"] for row in rows} - set(by_name) <= {"floor"}
    for number, row in enumerate(by_name["idle"]):
        best = min(by_name[name][number]["us"]["median"] for name in ("paged", "virtual"))
        by_request = by_name["paged, SchedulerCache"][number]["us"]["median"]
        assert row["times_kvmem"] == pytest.approx(row["us"]["median"] / best)
        assert row["times_by_request"] == pytest.approx(row["us"]["median"] / by_request)
    for name in peers_module.OURS:
        for row in by_name[name]:
            assert 0 <= row["peak_bytes"] < 64 << 20 and row["times_kvmem"] is None and row["us"]["count"] > 0


def test_one_of_ours_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kvmem_driver.py").write_text("raise SystemExit('out of order')\n")
    monkeypatch.setattr(peers_module, "_DRIVERS", tmp_path)
    with pytest.raises(BenchError, match="^virtual: its driver ended: out of order$"):
        peers(SMALL, tmp_path, 1, ours=["virtual"])


def test_stand_ins_take_whatever_an_import_does_with_them(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(
        "import colorsys, gone.deep as deep\n"
        "from gone import Base, jit, field\n"
        "from gone.other import CONSTANT\n"
        "class Derived(Base): x: Base[int] = field(default=3)\n"
        "@jit\ndef plain(): pass\n"
        "@jit(debug=True)\ndef with_arguments(): pass\n"
        "assert colorsys.rgb_to_hls(0, 0, 0)[1] == 0 and deep.a.b is deep.a.c and isinstance(Derived(), Base) and CONSTANT\n"
    )
    script = "from harness import stand_in; stand_in(['colorsys', 'gone']); import user; import gone.later"
    subprocess.run([sys.executable, "-c", script], env=_paths(DRIVERS, tmp_path), check=True)
    with pytest.raises(subprocess.CalledProcessError):  # what is installed is replaced only where it is asked for
        subprocess.run(
            [sys.executable, "-c", script.replace("'gone']", "'gone'], ['colorsys']")],
            env=_paths(DRIVERS, tmp_path),
            check=True,
            capture_output=True,
        )


def test_the_driver_of_sglang_reads_its_table(tmp_path: Path) -> None:
    """Against a small package with SGLang's names: what the driver gives its calls, and the page table it gathers."""
    write_sglang(tmp_path)
    script = """
import torch, sys
import sglang_driver as driver
workload = {"sequences": 3, "prompt": 20, "steps": 14, "block": 16, "pool": 9, "cache": True, "metadata": True}
manager = driver.SglangManager(workload)
for _ in range(2):
    for i in range(3):
        manager.admit(i, list(range(100 * i, 100 * i + 20)))
    manager.step(None)
    for step in range(1, 14):
        manager.step([step, 2 * step, 3 * step])
        rows = manager.rows.req_to_token[[request.kv.req_pool_idx for request in manager.requests]]
        pages = -(-(20 + step + 1) // 16)
        assert torch.equal(manager.table[:, :pages], rows[:, : 16 * pages : 16] // 16), step
        assert manager.lengths.tolist() == [21 + step] * 3 and manager.starts.tolist()[1:2] == [21 + step]
    assert len(manager.table[:, :3].unique()) == 9 and manager.tree.checkpoints == 3
    for i in range(3):
        manager.release(i)
    assert manager.tree.released == [33, 33, 33] and not manager.tree.locked
    manager.clear()
    assert manager.pages.free == list(range(1, 10)) and manager.tree.checkpoints == 0
"""
    subprocess.run([sys.executable, "-c", script], env=_paths(DRIVERS, tmp_path), check=True)


def _paths(*folders: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"}
