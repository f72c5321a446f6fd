"""The measured numbers in the documents are those of the reports beside them, and the reports name no folder."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks.publish import BEGIN, END, command, insert, load_documents, page, summary
from kvmem.bench.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"


def publish(*words: str) -> int:
    return main([*words], command)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    trace, config = f"--trace={tmp_path}/t.jsonl", f"{tmp_path}/model"  # what the report says was asked for
    monkeypatch.setattr(sys, "argv", ["bench", "replay", trace, "--config", config, "-q"])
    path = tmp_path / "results"
    path.mkdir()
    assert main(["replay", "--requests", "30", "-q", "--json", str(path / "cpu_replay.json")]) == 0
    return path


def test_a_report_has_no_folders_and_few_samples(folder: Path, tmp_path: Path) -> None:
    text = (folder / "cpu_replay.json").read_text()
    assert str(tmp_path) not in text
    report = json.loads(text)
    assert report["command"] == ["replay", "--trace=t.jsonl", "--config", "model", "-q"]
    assert all(len(run["samples"]["step"]) <= 200 for run in report["results"]["replay"])
    assert re.fullmatch(r"[0-9a-f]{12,40}(-dirty)?", report["environment"]["commit"] or "0" * 12)


def test_the_command_writes_the_page_and_the_short_table(folder: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    report = json.loads((folder / "cpu_replay.json").read_text())
    report["command"] = ["replay"]
    report["results"]["replay"][0]["driver_calls"] = 987654321
    (folder / "cpu_replay.json").write_text(json.dumps(report))
    assert publish(str(folder), "--readme", str(readme)) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{BEGIN}\n") and text.endswith(f"\n{END}\nafter\n")
    assert "987,654,321 /" in text and "old" not in text
    assert "| 987,654,321 |" in (folder / "README.md").read_text()
    assert sum(line.startswith("|") for line in text.splitlines()) <= 2 + 12


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("notes.txt", "", "no report"),
        ("a.json", "{", "not a report"),
        ("a.json", "{}", "not a report"),
        ("a.json", '{"schema_version": 99}', "version 99"),
    ],
)
def test_bad_reports(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    assert publish(str(tmp_path)) == 2
    assert says in capsys.readouterr().err


def test_missing_markers(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("nothing here")
    assert publish(str(folder), "--readme", str(readme)) == 2
    assert BEGIN in capsys.readouterr().err
    assert readme.read_text() == "nothing here"


def test_the_documents_say_what_the_reports_say() -> None:
    documents = load_documents(RESULTS)
    assert (RESULTS / "README.md").read_text() == page(documents), "run: python -m benchmarks.publish docs/results"
    readme = (ROOT / "README.md").read_text()
    assert readme == insert(readme, summary(documents), "README.md"), (
        "run: python -m benchmarks.publish docs/results --readme README.md"
    )


def test_published_waste_meets_its_goal() -> None:
    """Rounding at most 0.2 % (Mooncake) and under 0.5 % (Azure) of the bytes in use, in both backends."""
    goals = {"mooncake_conversation": 0.002, "azure2023_code": 0.005}
    runs = {
        (document.setup["trace"], run["pool"]): run["end_wasted_bytes"] / run["end_used_bytes"]
        for document in load_documents(RESULTS)
        for run in document.parts["replay"]
    }
    for trace, goal in goals.items():
        assert all(runs[trace, pool] < goal for pool in ("virtual", "paged")), trace


def test_published_reports_name_no_folder_of_a_machine() -> None:
    for path in RESULTS.iterdir():
        assert not re.search(r"(?<![\w.])/(home|root|tmp|work|usr|opt|mnt)\b", path.read_text()), path.name
        assert path.stat().st_size < 200_000
