"""Replays against the real allocator: what it counts and measures must equal the model pool and plain arithmetic."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from bench_model import ModelPool

from kvmem.bench.engine import StepModel
from kvmem.bench.model import BACKENDS, LLAMA_3_8B, Backend, Budget, Model, load_model, open_allocator
from kvmem.bench.pools import AllocatorPool, StaticPool
from kvmem.bench.replay import replay
from kvmem.bench.text import BenchError
from kvmem.bench.traces import EXCERPT, load_trace
from kvmem.bench.waste import rounding_sweep, rounding_table
from kvmem.errors import SpecError

PAGE = 2 << 20
LLAMA_TOKEN_BYTES = 2 * 32 * 8 * 128 * 2  # K and V, layers, heads, width, bytes


def open_pool(model: Model, backend: Backend, device: str, budget: Budget) -> AllocatorPool:
    return AllocatorPool(open_allocator(model, backend, device, budget), backend, budget.max_tokens)


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(None, dtype="bfloat16", block_size=16)


@pytest.fixture(scope="module")
def lengths() -> list[int]:
    """Tokens of every request of the excerpt at its end, read without the loader."""
    rows = [json.loads(line) for line in EXCERPT.read_text().splitlines()]
    return [row["input_length"] + row["output_length"] for row in rows]


def test_the_packaged_model(model):
    assert model.bytes_per_token == LLAMA_TOKEN_BYTES == 128 << 10
    assert model.layer_bytes == ((2048, 2048),) * 32
    assert model.max_tokens == 131_072
    assert model.ranges(32) == (128 << 10,)
    assert model.ranges(1) == (4096,) * 32
    assert model.ranges(0) == (2048,) * 64


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gib", [24, 65])
def test_the_allocator_decides_as_the_model_pool(model, backend, gib, chunked):
    """Short of memory: fitted, preempted and refused requests, tokens computed again and steps must all be equal."""
    trace = load_trace(EXCERPT).head(150)
    memory = gib << 30
    arguments = {"max_sequences": 256, "bytes_per_token": model.bytes_per_token, "page_bytes": PAGE}
    # The allocator keeps some pages for blocks that belong to nobody: the model pool is given what is left.
    pool = open_pool(model, backend, "meta", Budget(memory, 256, 131_072, PAGE))
    spare = pool.usage().mapped_bytes
    expected = replay(
        trace, ModelPool(memory - spare, model.bytes_per_token, PAGE), StepModel(chunked=chunked), **arguments
    )
    result = replay(trace, pool, StepModel(chunked=chunked), **arguments)
    assert result.outcome == expected.outcome
    assert (result.end_used_bytes, result.end_wasted_bytes) == (expected.end_used_bytes, expected.end_wasted_bytes)
    for mine, theirs in zip(result.samples, expected.samples, strict=True):
        assert (mine.step, mine.running, mine.waiting) == (theirs.step, theirs.running, theirs.waiting)
        assert mine.usage.used_bytes == theirs.usage.used_bytes
        assert mine.usage.mapped_bytes == mine.usage.used_bytes + mine.usage.wasted_bytes + mine.usage.parked_bytes
        assert mine.usage.wasted_bytes == theirs.usage.wasted_bytes + spare
        assert mine.usage.mapped_bytes <= memory
    assert pool.allocator.check() == []
    assert pool.usage().used_bytes == 0
    if gib == 24 and not chunked:
        assert result.outcome.preemptions > 0, "the case no longer tests a shortage"


@pytest.mark.parametrize("backend", BACKENDS)
def test_measured_waste_equals_the_arithmetic_and_the_promise(model, lengths, backend):
    """At most 0.2 % of the bytes in use at request end, on 2 MiB pages with all layers interleaved."""
    trace = load_trace(EXCERPT)
    pool = open_pool(model, backend, "meta", Budget(64 << 30, 256, 131_072, PAGE))
    result = replay(trace, pool, StepModel(), max_sequences=256, bytes_per_token=model.bytes_per_token, page_bytes=PAGE)
    assert result.outcome.completed == len(lengths)
    used = sum(lengths) * LLAMA_TOKEN_BYTES
    mapped = sum(math.ceil(length / 16) for length in lengths) * PAGE
    assert (result.end_used_bytes, result.end_wasted_bytes) == (used, mapped - used)
    assert result.end_wasted_bytes <= 0.002 * result.end_used_bytes
    interleaved, *_, apart = rounding_table(trace, model, PAGE)
    assert (interleaved.used_bytes, interleaved.mapped_bytes, interleaved.page_tokens) == (used, mapped, 16)
    in_thousands = sum(math.ceil(length / 1024) for length in lengths) * 1024 * LLAMA_TOKEN_BYTES
    assert (apart.used_bytes, apart.mapped_bytes, apart.page_tokens) == (used, in_thousands, 1024)
    assert 0.03 < 1 - apart.used_bytes / apart.mapped_bytes < 0.05


def test_the_sweep_counts_pages_of_every_size(model, lengths):
    rows = rounding_sweep(load_trace(EXCERPT), model)
    assert {row.page_bytes for row in rows} == {1 << shift for shift in range(16, 26)}
    layouts = {
        "all layers in one range": (1, 131072),
        "8 layers in a range": (4, 32768),
        "one range a layer": (32, 4096),
        "one range for each layer's K and V": (64, 2048),
    }
    for row in rows:
        ranges, size = layouts[row.layout]
        pages = sum(math.ceil(length * size / row.page_bytes) for length in lengths) * ranges
        assert row.mapped_bytes == pages * row.page_bytes
        assert row.page_tokens == row.page_bytes / size


@pytest.mark.skipif(not os.environ.get("KVMEM_TRACES"), reason="KVMEM_TRACES names no folder with the full traces")
@pytest.mark.parametrize(
    ("file", "interleaved", "eight", "apart"),
    [("mooncake_conversation.jsonl", 0.06, 0.12, 4.07), ("azure2023_code.csv", 0.37, 0.73, 21.87)],
)
def test_the_full_traces_waste_what_the_published_table_says(model, file, interleaved, eight, apart):
    """Percent of the mapped bytes for granules of 16, 32 and 1,024 tokens, to the table's two decimals."""
    trace = load_trace(Path(os.environ["KVMEM_TRACES"]) / file)
    table = {row.page_tokens: row for row in rounding_sweep(trace, model)}
    for tokens, percent in ((16, interleaved), (32, eight), (1024, apart)):
        assert round(100 - 100 * table[tokens].used_bytes / table[tokens].mapped_bytes, 2) == percent


@pytest.mark.skipif(not os.environ.get("KVMEM_TRACES"), reason="KVMEM_TRACES names no folder with the full traces")
def test_the_full_trace_without_a_limit_peaks_where_the_published_table_says():
    """83 live sequences; 1.34 M live tokens when every request is counted at its full length from the start."""
    trace = load_trace(Path(os.environ["KVMEM_TRACES"]) / "mooncake_conversation.jsonl")
    result = replay(
        trace, StaticPool(1 << 50, 1, 1 << 17, 256), StepModel(), max_sequences=256, bytes_per_token=1, page_bytes=PAGE
    )
    assert (result.outcome.completed, result.outcome.peak_running, result.outcome.preemptions) == (12_031, 83, 0)
    assert 1.30e6 < result.outcome.peak_tokens < 1.34e6


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_with_parked_rows_makes_no_driver_call(model, backend):
    """A batch decodes to its end and is freed; the next one, just like it, finds all of its memory."""
    pool = open_pool(model, backend, "meta", Budget(8 << 30, 64, 4096, PAGE))

    def driver_calls() -> tuple[int, int]:
        """At admission and while decoding."""
        prompt, one = (np.full(16, tokens, dtype=np.int32) for tokens in (100, 1))
        calls, ids = [pool.usage().driver_calls], pool.open(16)
        for steps in (1, 200):
            for _ in range(steps):
                counts = prompt if steps == 1 else one
                assert pool.try_extend(ids, counts)
                pool.commit(ids, counts)
            calls.append(pool.usage().driver_calls)
        pool.free(ids)
        return calls[1] - calls[0], calls[2] - calls[1]

    assert min(driver_calls()) > 0, "the first batch must have mapped, or zero below proves nothing"
    assert driver_calls() == (0, 0)


def test_timings_cover_every_step_and_request(model):
    trace = load_trace(EXCERPT).head(40)
    done: list[int] = []
    pool = open_pool(model, "virtual", "meta", Budget(65 << 30, 256, 131_072, PAGE))
    result = replay(
        trace,
        pool,
        StepModel(),
        max_sequences=256,
        bytes_per_token=model.bytes_per_token,
        page_bytes=PAGE,
        progress=done.append,
    )
    assert result.admit_us.count == 40
    assert result.step_us.count > result.grow_us.count > 1000
    assert (
        0
        < result.grow_us.p10
        <= result.grow_us.median
        <= result.grow_us.p90
        <= result.grow_us.p99
        <= result.grow_us.largest
    )
    assert len(result.cdf_us) == 101
    assert done == sorted(done)
    assert done[-1] == 40
    assert json.dumps(asdict(result))


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"num_hidden_layers": 2, "hidden_size": 64}, SpecError, "num_attention_heads"),
        ([1], BenchError, "a model config is a JSON object"),
        (None, BenchError, "not a JSON file"),
    ],
)
def test_configs_that_describe_no_cache(tmp_path, config, error, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config) if config is not None else LLAMA_3_8B.read_text()[:40])
    for given in (path, tmp_path):
        with pytest.raises(error, match=message) as caught:
            load_model(given, dtype="bfloat16", block_size=16)
        assert str(tmp_path) in str(caught.value)
    with pytest.raises(BenchError, match="No such file"):
        load_model(tmp_path / "absent.json", dtype="bfloat16", block_size=16)


def test_samples_of_a_static_pool_add_up():
    pool = StaticPool(1000, 1, 100, 8)
    ids = pool.open(2)
    assert pool.try_extend(ids, np.array([10, 20], dtype=np.int32))
    usage = pool.usage()
    assert (usage.used_bytes, usage.wasted_bytes, usage.parked_bytes, usage.mapped_bytes) == (30, 170, 600, 800)
    assert not pool.try_extend(ids, np.array([91, 0], dtype=np.int32))
    assert pool.usage() == usage
