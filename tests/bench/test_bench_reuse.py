"""`reuse`: LRU to the last hit, Belady's optimum, the default beside LRU, and the command as its user meets it."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest

from kvmem import _core
from kvmem.bench.__main__ import main
from kvmem.bench.reuse import Belady, ReuseRow, Workload, default_policy, parse_capacities, replay, replay_tiers
from kvmem.bench.text import BenchError
from kvmem.bench.traces import EXCERPT, load_trace
from kvmem.tiers import Tiers

DENSITY = _core.eviction_policy_names()[0]
FULL = "mooncake_conversation.jsonl"
needs_traces = pytest.mark.skipif(
    not os.environ.get("KVMEM_TRACES"), reason="KVMEM_TRACES names no folder with the full traces"
)


@pytest.fixture(scope="module")
def excerpt() -> Workload:
    return Workload.of(load_trace(EXCERPT))


@pytest.fixture(scope="module")
def full() -> Workload:
    return Workload.of(load_trace(Path(os.environ["KVMEM_TRACES"]) / FULL))


def hash_ids(path: Path) -> list[list[int]]:
    return [json.loads(line)["hash_ids"] for line in path.read_text().splitlines()]


def lru_hits(requests: list[list[int]], capacity: int) -> int:
    """The leading run is hit; then all of the request is touched, leaf first, and the oldest go."""
    order: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for request in requests:
        for block in request:
            if block not in order:
                break
            hits += 1
        for block in reversed(request):
            order.pop(block, None)
            order[block] = None
        while len(order) > capacity:
            order.popitem(last=False)
    return hits


def best_hits(requests: list[list[int]], capacity: int) -> int:
    """The most hits any choice of what to keep gives: every choice is tried."""
    states = {frozenset(): 0}
    for request in requests:
        after: dict[frozenset[int], int] = {}
        for cached, hits in states.items():
            run = next((i for i, block in enumerate(request) if block not in cached), len(request))
            pool = sorted(cached | set(request))
            for mask in range(1 << len(pool)):
                kept = frozenset(block for i, block in enumerate(pool) if mask >> i & 1)
                if len(kept) <= capacity:
                    after[kept] = max(after.get(kept, 0), hits + run)
        states = after
    return max(states.values())


@pytest.mark.parametrize("capacity", [1, 12, 60, 250, 1000, 3000, 10_000])
def test_lru_through_the_allocator_is_lru(excerpt, capacity):
    (row,) = replay(excerpt, ["lru"], [capacity])
    requests = hash_ids(EXCERPT)
    assert row.hits == lru_hits(requests, capacity)
    assert row.hit_rate == row.hits / sum(map(len, requests))


def test_nothing_is_lost_without_a_limit(excerpt):
    """Every policy then finds whatever was ever there, which is also the best."""
    seen: set[int] = set()
    again = sum(sum(block in seen for block in request) + (seen.update(request) or 0) for request in hash_ids(EXCERPT))
    for row in replay(excerpt, _core.eviction_policy_names(), ["unlimited"]):
        assert (row.hits, row.share_of_belady, row.evicted_blocks) == (again, 1.0, 0)


def test_belady_is_the_best(rng):
    """Against every choice, on traffic small enough to try all."""
    for _ in range(30):
        chains = [[0, 1, 2], [0, 1, 3], [0, 4], [5, 6], [5, 7]]
        requests = [rng.choice(chains)[: rng.randint(1, 3)] for _ in range(7)]
        for capacity in (1, 2, 4):
            assert Belady(requests).hits(capacity) == best_hits(requests, capacity), (requests, capacity)


def test_no_policy_beats_belady_and_more_room_is_no_worse_for_it(excerpt):
    rows = replay(excerpt, _core.eviction_policy_names(), [300, 1000, 4000, "unlimited"])
    assert all(0 < row.hits <= row.belady_hit_rate * row.blocks + 1e-6 for row in rows)
    best = [row.belady_hit_rate for row in rows if row.policy == "lru"]
    assert all(less <= more for less, more in pairwise(best))


def test_the_new_policy_on_the_excerpt(excerpt):
    rows = {
        (row.policy, row.capacity): row.hits for row in replay(excerpt, ["lru", DENSITY], [1000, 2000, 4000, 10_000])
    }
    # With room for most of it nothing but a hundredth may be lost to LRU while the policy learns.
    for capacity, ratio in ((1000, 1.25), (2000, 1.4), (4000, 1.3), (10_000, 0.99)):
        assert rows[DENSITY, capacity] >= ratio * rows["lru", capacity], capacity


@needs_traces
def test_the_full_trace_gives_the_known_rates(full):
    """Figures of an independent simulation, to two decimals of a percent."""
    lru = {1000: 4.45, 5000: 11.18, 10_000: 21.16, 30_000: 32.57, 50_000: 35.46, 100_000: 36.37, "unlimited": 36.64}
    for row in replay(full, ["lru"], list(lru)):
        assert round(100 * row.hit_rate, 2) == lru[row.capacity], row
        best = {1000: 19.07, 5000: 34.12}.get(row.capacity, 36.64)
        assert round(100 * row.belady_hit_rate, 2) == best


@needs_traces
def test_the_new_policy_on_the_full_trace(full):
    """1.4 times LRU's hit rate where memory is short, and nowhere more than a hundredth below it."""
    capacities = [1000, 2000, 5000, 10_000, 20_000, 30_000, 40_000, 50_000, 70_000, 100_000, "unlimited"]
    rows = {(row.policy, row.capacity): row.hit_rate for row in replay(full, ["lru", DENSITY], capacities)}
    for capacity in capacities:
        ratio = rows[DENSITY, capacity] / rows["lru", capacity]
        assert ratio >= (1.4 if capacity in (1000, 2000, 5000) else 0.99), (capacity, ratio)


def test_a_device_with_host_memory_finds_what_one_cache_finds(excerpt):
    rows = {(row.backend, row.device_policy, row.host_policy): row for row in replay_tiers(excerpt, 400, 1600)}
    for backend in ("virtual", "paged"):
        assert rows[backend, "lru", "lru"].share >= 0.97
        default = rows[backend, default_policy(), Tiers(host=1).policy]
        assert default.share >= 0.85 and default.hits > 1.3 * rows[backend, default_policy(), "lru"].hits


@needs_traces
def test_a_device_with_host_memory_on_the_full_trace(full):
    """With LRU in both, whose rate in one cache is known, and by default."""
    rows = replay_tiers(full, 1000, 9000)
    for row in rows:
        if (row.device_policy, row.host_policy) == ("lru", "lru"):
            assert row.share >= 0.97 and round(100 * row.one_cache_hits / row.blocks, 2) == 21.16
    # Hash keys are seeded, so that hits vary by a hundredth between runs: both backends together.
    default = [row for row in rows if (row.device_policy, row.host_policy) == (default_policy(), Tiers(host=1).policy)]
    assert sum(row.hits for row in default) >= 0.97 * sum(row.one_cache_hits for row in default)


def test_the_command(capsys, tmp_path):
    report = tmp_path / "reuse.json"
    arguments = ["reuse", "--requests", "200", "--capacity", "500,unlimited", "-q"]
    assert main([*arguments, "--json", str(report), "--plot", str(tmp_path / "plots")]) == 0
    out = capsys.readouterr().out
    assert "200 requests read" in out
    assert f"{default_policy()}, the default" in out
    assert (tmp_path / "plots" / "reuse.png").read_bytes().startswith(b"\x89PNG")
    document = json.loads(report.read_text())
    assert list(document) == ["schema_version", "environment", "command", "trace", "default_policy", "results"]
    assert document["default_policy"] in _core.eviction_policy_names()
    assert str(tmp_path) not in report.read_text()
    rows = document["results"]
    assert [set(row) for row in rows] == [{field.name for field in fields(ReuseRow)}] * len(rows)
    assert [(row["capacity"], row["policy"]) for row in rows] == [
        (capacity, policy) for capacity in (500, "unlimited") for policy in _core.eviction_policy_names()
    ]
    requests = hash_ids(EXCERPT)[:200]
    lru = next(row for row in rows if (row["capacity"], row["policy"]) == (500, "lru"))
    assert lru["hits"] == lru_hits(requests, 500)
    assert lru["hit_rate"] == lru["hits"] / lru["blocks"] == lru["hits"] / sum(map(len, requests))


def test_one_policy_and_capacities_by_default(capsys, excerpt):
    assert main(["reuse", "-q", "--requests", "50", "--policy", "lru"]) == 0
    assert DENSITY not in capsys.readouterr().out
    chosen = parse_capacities(None, excerpt)
    assert chosen[-1] == "unlimited"
    assert len(chosen) >= 4
    assert all(capacity >= excerpt.longest for capacity in chosen[:-1])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--capacity", "0"], ["'0'"]),
        (["--capacity", "many"], ["--capacity", "'many'", "unlimited"]),
        (["--capacity", "1000,-5"], ["'-5'"]),
        (["--capacity", "1000,"], ["''"]),
        (["--policy", "fifo"], ["--policy", "'fifo'", "density, lru"]),
        (["--trace", "{tmp}/azure.csv"], ["azure", "lengths only", "hash_ids", "Mooncake"]),
        (["--trace", "{tmp}/none.jsonl"], ["none", "hash_ids"]),
        (["--json", "{tmp}/absent/x.json"], ["x.json", "does not exist"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, tmp_path, arguments, says):
    (tmp_path / "azure.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,10,5\n")
    empty = {"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": []}
    (tmp_path / "none.jsonl").write_text(json.dumps(empty) + "\n")
    assert main(["reuse", "-q", *(argument.replace("{tmp}", str(tmp_path)) for argument in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert all(word in captured.err for word in says), captured.err


def test_a_trace_without_identities_is_refused(tmp_path):
    path = tmp_path / "azure.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,10,5\n")
    with pytest.raises(BenchError, match="lengths only"):
        Workload.of(load_trace(path))
