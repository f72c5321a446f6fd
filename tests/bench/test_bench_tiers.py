"""`python -m kvmem.bench tiers`: a row for every tier and call, a replay whose counts are known, and the command."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from kvmem.bench import tiers as bench
from kvmem.bench.__main__ import main
from kvmem.bench.reuse import TierReplayRow, Workload, replay_tiers
from kvmem.bench.text import BenchError
from kvmem.bench.tiers import BreakEvenRow, TierRow, VerificationRow
from kvmem.bench.timing import Ratio, Spread
from kvmem.bench.traces import Trace
from kvmem.tiers import Result, Status

pytest.importorskip("xxhash", reason="the disk tier needs the extra kvmem[tiers]")

HAS_REDIS = shutil.which("redis-server") is not None  # the command leaves Redis out without
CONFIG = {
    "model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64,
    "hidden_size": 128, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Blocks of 16 KiB."""
    path = tmp_path_factory.mktemp("model") / "small.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def few(config: str) -> list[str]:
    return ["tiers", "-q", "--config", config, "--runs", "2,3", "--repetitions", "1", "--requests", "40",
            "--device-blocks", "300", "--host-blocks", "50"]  # fmt: skip


def test_the_command(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    options = ["--prefill-tokens-per-second", "1000", "--json", str(path), "--plot", str(tmp_path / "plots")]
    assert main([*few(config), *options]) == 0
    report, out = json.loads(path.read_text()), capsys.readouterr().out
    parts = report["results"]
    stores = {"disk", "host, paged", "host, virtual"} | ({"redis"} if HAS_REDIS else set())
    assert {row["tier"] for row in parts["tiers"]} == stores == {row["tier"] for row in parts["break_even"]}
    of_tier = {(row["tier"], row["call"], row["blocks"]) for row in parts["tiers"]}
    assert len(parts["tiers"]) == len(of_tier) == 4 * len(stores)
    assert all(row["block_bytes"] == 16384 and row["us"]["median"] > 0 for row in parts["tiers"])
    assert [row["blocks"] for row in parts["verification"]] == [2, 3]
    assert len(parts["tier_replay"]) == 8
    kinds = {
        "tiers": TierRow,
        "verification": VerificationRow,
        "break_even": BreakEvenRow,
        "tier_replay": TierReplayRow,
    }
    for name, kind in kinds.items():
        assert all(set(row) == {f.name for f in fields(kind)} for row in parts[name])
    assert out.count("| host, paged ") == 5 and out.count("| density ") == 8
    assert (tmp_path / "plots" / "tiers.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--runs", "0,16"], "--runs: got '0,16'"),
        (["--runs", "16,16"], "--runs: got '16,16'"),
        (["--device-blocks", "3"], "--device-blocks is 3; the longest request has"),
        (["--redis-server", "/nowhere/redis-server"], "cannot start /nowhere/redis-server"),
        (["--redis-server", shutil.which("false") or "false"], "does not listen on port"),
        (["--folder", "/proc"], "--folder: cannot make a folder in /proc"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(config: str, capsys: pytest.CaptureFixture[str], more: list[str], says: str) -> None:
    assert main([*few(config), *more]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_a_tier_that_fails_ends_the_run() -> None:
    class Broken:
        name = "broken"

        def put(self, keys: list[bytes], buffers: list[memoryview]) -> list[Result]:
            return [Result(Status.OK, len(buffers[0])), Result(Status.FULL, 0, "there is no room")]

    with pytest.raises(BenchError, match="broken: there is no room"):
        bench._Store(Broken(), 2, 4096).put()  # type: ignore[arg-type]


def test_payloads_come_back_through_each_store(tmp_path: Path) -> None:
    """What is timed is what is claimed: bytes of the tier arrive in the buffers, and no two blocks are equal."""
    from kvmem.tiers.disk import DiskTier

    with DiskTier(tmp_path / "disk", capacity="1MiB", block_bytes=8192, fingerprint=bytes(32)) as tier:
        store = bench._Store(tier, 5, 8192)
        store.put()
        store.get()
        assert [bytes(b) for b in store.buffers] == [bytes(p) for p in store.payloads]
        assert len({bytes(b) for b in store.buffers}) == 5
    keys, payloads, buffers = bench._run_of(3, 4096)
    with bench._socket(payloads, buffers) as receive:
        receive()
        receive()
    assert [bytes(b) for b in buffers] == [bytes(p) for p in payloads] and len(set(keys)) == 3


def test_break_even() -> None:
    """100 us to start and 10 us a token, beside 1,000 and 200,000 tokens a second: from 1.1 tokens on, and never."""
    none = Ratio(1.0, 1.0, 1.0)

    def row(blocks: int, us: float) -> TierRow:
        spread = Spread(1, us, us, us, us, us)
        return TierRow("t", "get", blocks, 4096, spread, 1.0, "l", spread, 1.0, none, None)

    rows = [row(4, 100 + 10 * 4 * 16), row(1, 100 + 10 * 16), replace(row(1, 1.0), call="put")]
    (slow,), (fast,) = (bench.break_even(rows, 16, speed) for speed in (1_000.0, 200_000.0))
    assert slow.start_us == pytest.approx(100) and slow.tokens_per_second == pytest.approx(100_000)
    assert slow.least_tokens == 1 and fast.least_tokens is None
    assert bench.break_even(rows, 16, 50_000.0)[0].least_tokens == 11


def workload(seed: int) -> Workload:
    """Requests that share prefixes, of at most 12 blocks."""
    rng, made = random.Random(seed), list[list[int]]()
    for number in range(300):
        start = rng.choice(made)[: rng.randrange(12)] if made and rng.random() < 0.7 else []
        made.append([*start, *(1000 * number + i for i in range(rng.randrange(1, 13 - len(start))))])
    offsets = np.cumsum([0, *map(len, made)], dtype=np.int64)
    ids, tokens = np.array([i for one in made for i in one], np.int64), np.diff(offsets) * 512
    seconds = np.arange(len(made), dtype=np.float64)
    return Workload.of(Trace("made", "mooncake", seconds, tokens, tokens, ids, offsets, 512))


def test_a_device_with_host_memory_is_one_cache(seed: int) -> None:
    """With LRU in both, a small device and host memory hold what one device of their size holds, less the blocks that
    move between them at the time."""
    load = workload(seed)
    rows = {(row.backend, row.device_policy, row.host_policy): row for row in replay_tiers(load, 13, 300)}
    assert len(rows) == 8
    for row in rows.values():
        assert row.blocks == load.blocks and 0 < row.host_hits < row.hits <= row.blocks
        assert row.share == row.hits / row.one_cache_hits
    for backend in ("virtual", "paged"):
        assert rows[backend, "lru", "lru"].share > 0.97


def test_host_memory_adds_what_its_size_says(seed: int) -> None:
    """Host memory for everything finds every block that was read before."""
    load, seen, again = workload(seed), set[tuple[int, ...]](), 0
    for ids in (one.tolist() for one in load.requests):
        prefixes = [tuple(ids[: n + 1]) for n in range(len(ids))]
        again += sum(prefix in seen for prefix in prefixes)
        seen |= set(prefixes)
    for row in replay_tiers(load, 13, load.blocks):
        assert row.hits == row.one_cache_hits == again
