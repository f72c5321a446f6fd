"""Replays whose prompts have content: what is found again, and what the driver's calls come to."""

from __future__ import annotations

import numpy as np
import pytest

from kvmem.bench.engine import StepModel
from kvmem.bench.model import BACKENDS, Backend, Budget, Model, load_model, open_allocator
from kvmem.bench.pools import ContentPool, Totals
from kvmem.bench.render import replay_row
from kvmem.bench.replay import PUBLISHED, CallCosts, DriverCosts, ReplayResult, replay
from kvmem.bench.text import BenchError
from kvmem.bench.traces import EXCERPT, Trace, load_trace

PAGE = 2 << 20


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(None, dtype="bfloat16", block_size=16)


def run(trace: Trace, model: Model, backend: Backend, memory: int) -> tuple[ReplayResult, ContentPool]:
    allocator = open_allocator(model, backend, "meta", Budget(memory, 256, 131_072, PAGE))
    pool = ContentPool(allocator, backend, 131_072, trace)
    result = replay(trace, pool, StepModel(), max_sequences=256, bytes_per_token=model.bytes_per_token, page_bytes=PAGE)
    assert allocator.check() == [] and pool.usage().used_bytes == 0
    return result, pool


def shared_tokens(trace: Trace, one: int, other: int) -> int:
    """Of two prompts, from the trace's own block ids."""
    assert trace.prefix_ids is not None and trace.prefix_offsets is not None and trace.prefix_block_tokens is not None
    mine, theirs = (trace.prefix_ids[trace.prefix_offsets[i] : trace.prefix_offsets[i + 1]] for i in (one, other))
    most = min(len(mine), len(theirs))
    differ = np.flatnonzero(mine[:most] != theirs[:most])
    blocks = int(differ[0]) if len(differ) else most
    return min(blocks * trace.prefix_block_tokens, int(trace.input_tokens[one]), int(trace.input_tokens[other]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_memory_enough_all_that_is_equal_is_found(model: Model, backend: Backend) -> None:
    trace = load_trace(EXCERPT).head(70)
    result, _ = run(trace, model, backend, 4 << 40)
    assert result.outcome.preemptions == 0
    assert result.lookup_tokens == int((trace.input_tokens - 1).sum()), "the last token is always computed"
    found = 0
    for i in range(trace.num_requests):
        best = max((shared_tokens(trace, i, j) for j in range(i)), default=0)
        found += min(best, int(trace.input_tokens[i]) - 1)
    assert found > 0 and result.hit_tokens == found


def test_under_pressure_rows_are_taken_over_in_place(model: Model) -> None:
    """Memory for half of what runs: the hits of both backends, and the driver calls of the virtual one."""
    trace = load_trace(EXCERPT).head(600)
    (virtual, _), (paged, _) = (run(trace, model, backend, 65 << 30) for backend in BACKENDS)
    assert virtual.outcome.peak_running == paged.outcome.peak_running
    shares, others = (replay_row(result.as_row()) for result in (virtual, paged))
    assert shares["hit_rate"] >= 0.98 * others["hit_rate"] > 0
    assert shares["end_waste"] <= 0.0015
    assert shares["driver_seconds_an_hour"] <= 40
    assert virtual.driver_calls == virtual.map_calls + virtual.set_access_calls + virtual.unmap_calls
    pages = int(np.ceil(trace.total_tokens / 16).sum())
    assert virtual.map_calls < 0.7 * pages, "most pages should be where they are needed already"
    assert virtual.unmap_calls < 0.05 * pages, "pages should go in runs"


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_blocks_have_equal_ids_and_others_have_not(model: Model, backend: Backend) -> None:
    trace = load_trace(EXCERPT).head(30)
    _, pool = run(trace, model, backend, 65 << 30)
    for i in range(30):
        for j in range(i):
            shared = shared_tokens(trace, i, j)
            ends = [int(trace.total_tokens[r]) for r in (i, j)]
            mine, theirs = (pool.tokens(r, 0, end) for r, end in zip((i, j), ends, strict=True))
            assert mine.dtype == np.int32 and mine.min() >= 0
            same = mine[: min(ends)] == theirs[: min(ends)]
            assert same[:shared].all() and not same[shared : shared + 1].any()
            where = min(700, ends[0] - 1)
            assert (pool.tokens(i, where, ends[0]) == mine[where:]).all()


def test_a_trace_of_lengths_has_no_content(model: Model) -> None:
    trace = Trace("made", "azure", np.array([0.0]), np.array([10]), np.array([5]))
    allocator = open_allocator(model, "paged", "meta", Budget(1 << 30, 4, 4096, PAGE))
    with pytest.raises(BenchError, match="made: a trace of format azure has lengths only"):
        ContentPool(allocator, "paged", 4096, trace)


def test_a_request_that_names_no_block_has_tokens_of_its_own(model: Model) -> None:
    trace = Trace(
        "made", "mooncake", np.array([0.0, 1.0, 2.0]), np.array([600, 600, 600]), np.array([5, 5, 5]),
        prefix_ids=np.array([10**12, 10**12 + 5] * 2), prefix_offsets=np.array([0, 2, 2, 4]), prefix_block_tokens=512,
    )  # fmt: skip
    result, pool = run(trace, model, "virtual", 4 << 30)
    assert result.hit_tokens == 600 // 16 * 16, "the third is the first again"
    first, second, third = (pool.tokens(i, 0, 600) for i in range(3))
    assert (first == third).all() and not (first == second).any()


def test_seconds_are_counts_times_costs() -> None:
    costs = DriverCosts("made", "up", CallCosts(2 << 20, 1.0, 10.0, 100.0), CallCosts(4 << 20, 3.0, 20.0, 0.0))
    assert costs.seconds(Totals(map=10**6, set_access=10**5, unmap=10**4), 2 << 20) == 1 + 1 + 1
    assert costs.at(3 << 20) == CallCosts(3 << 20, 2.0, 15.0, 50.0)
    assert costs.at(8 << 20).unmap_us == 0.0, "no call takes less than no time"
    assert PUBLISHED.at(2 << 20) == PUBLISHED.small and PUBLISHED.at(112 << 20) == PUBLISHED.large
