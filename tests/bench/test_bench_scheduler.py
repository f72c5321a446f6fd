"""The scheduler against a slow one that plans nothing, on random traces and pools that are far too small."""

from __future__ import annotations

import numpy as np
import pytest
from bench_model import ModelPool
from bench_reference import Reference
from support import Steps

from kvmem.bench.engine import Outcome, Scheduler, StepModel
from kvmem.bench.pools import StaticPool
from kvmem.bench.replay import Meter
from kvmem.bench.text import BenchError
from kvmem.bench.traces import Trace

TOKEN = 64  # bytes
CHUNK = StepModel().chunk_tokens


def make_trace(requests: list[tuple[float, int, int]]) -> Trace:
    """(arrival in seconds, input, output) of each request."""
    seconds, inputs, outputs = zip(*sorted(requests), strict=True)
    return Trace("made", "mooncake", np.array(seconds), np.array(inputs), np.array(outputs))


def random_trace(rng: np.random.Generator) -> Trace:
    n = int(rng.integers(1, 60))
    longest = int(rng.choice([20, 400, 2000]))
    return make_trace(
        [(float(rng.integers(0, 40)) / 10, int(rng.integers(1, longest)), int(rng.integers(0, 80))) for _ in range(n)]
    )


def run(trace: Trace, pool, *, max_sequences: int = 8, chunked: bool = False) -> tuple[Outcome, Meter]:
    meter = Meter(pool)
    scheduler = Scheduler(trace, meter, StepModel(chunked=chunked), max_sequences=max_sequences, bytes_per_token=TOKEN)
    return scheduler.run(), meter


def pools(rng: np.random.Generator, trace: Trace):
    """The same pool twice: a model of whole pages with room for a few requests, or a static one."""
    room = int(trace.total_tokens.max() * rng.choice([0.5, 1.1, 2.5, 6.0])) + 1
    if rng.random() < 0.25:
        return [StaticPool(room * TOKEN, TOKEN, max(1, room // 2), 8) for _ in "ab"]
    page = int(rng.choice([TOKEN, 16 * TOKEN, 100 * TOKEN, 1000]))
    longest = int(rng.choice([500, 1 << 20]))
    return [ModelPool(room * TOKEN, TOKEN, page, max_tokens=longest) for _ in "ab"]


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
def test_planning_ahead_changes_nothing(chunked, seed):
    rng = np.random.default_rng(seed)
    seen = np.zeros(3, dtype=int)
    loop = Steps(60)
    while case := loop.next((seen > 50).all()):
        trace = random_trace(rng)
        mine, theirs = pools(rng, trace)
        limit = int(rng.integers(1, 9))
        expected = Reference(trace, theirs, StepModel(chunked=chunked), limit, TOKEN).run()
        outcome, meter = run(trace, mine, max_sequences=limit, chunked=chunked)
        assert outcome == expected, f"case {case}"
        assert outcome.completed + outcome.refused == trace.num_requests
        assert mine.usage().used_bytes == theirs.usage().used_bytes == 0
        assert meter.finished_used_bytes == completed_tokens(trace, outcome, meter)
        seen += [outcome.completed, outcome.refused, outcome.preemptions]


def completed_tokens(trace: Trace, outcome: Outcome, meter: Meter) -> int:
    """Bytes that completed requests held at their end; known exactly when none was refused."""
    return meter.finished_used_bytes if outcome.refused else int(trace.total_tokens.sum()) * TOKEN


def test_one_request_takes_its_prefill_and_its_decode_steps():
    outcome, meter = run(make_trace([(0.0, 2 * CHUNK + 1, 7)]), ModelPool(1 << 30, TOKEN, TOKEN))
    assert outcome == Outcome(1, 0, 0, 0, steps=3 + 7, peak_running=1, peak_tokens=2 * CHUNK + 8)
    spent, running, grew_only = meter.steps.T
    assert len(spent) == 10 and spent.min() >= 0
    assert running.tolist() == [1] * 10
    assert grew_only.tolist() == [False] + [True] * 8 + [False]  # admission in the first, the end in the last


def test_a_chunked_prompt_takes_memory_as_it_is_computed():
    pool = ModelPool(1 << 30, TOKEN, TOKEN)
    held = []
    pool_commit = pool.commit
    pool.commit = lambda ids, counts: (pool_commit(ids, counts), held.append(int(counts.sum())))[0]
    run(make_trace([(0.0, 2 * CHUNK + 1, 2)]), pool, chunked=True)
    assert held == [CHUNK, CHUNK, 1, 1, 1]


def test_arrivals_are_kept_and_idle_time_is_skipped():
    outcome, meter = run(make_trace([(0.0, 1, 1), (3000.0, 1, 1)]), ModelPool(1 << 30, TOKEN, TOKEN))
    assert outcome.steps == 100_000 + 2
    assert len(meter.steps) == 4


def test_the_youngest_is_preempted_and_finishes_last():
    """Two requests of 100 + 50 tokens in room for 250: both are admitted, 50 steps later one must go."""
    freed = []
    pool = ModelPool(250 * TOKEN, TOKEN, TOKEN)
    pool_free = pool.free
    pool.free = lambda ids: (freed.extend(ids.tolist()), pool_free(ids))[1]
    outcome, _ = run(make_trace([(0.0, 100, 50), (0.03, 100, 50)]), pool)
    # From 125 + 124 tokens both cannot grow: the second goes. The first grows to 126, so the second's 124 fit once
    # more, and go again in the next step. Then they do not fit (handle 3) before the first ends.
    assert freed == [1, 2, 3, 0, 4]
    assert (outcome.completed, outcome.preemptions, outcome.refused) == (2, 2, 0)
    assert (outcome.peak_tokens, outcome.recomputed_tokens) == (250, 124)


def test_a_request_that_fits_in_no_case_is_refused_and_the_rest_is_served():
    trace = make_trace([(0.0, 10, 5), (0.0, 300, 5), (0.0, 95, 50), (0.0, 10, 5)])
    outcome, _ = run(trace, ModelPool(100 * TOKEN, TOKEN, TOKEN))
    assert (outcome.completed, outcome.refused) == (2, 2)  # 300 cannot be admitted, 95 + 50 cannot grow to its end


def test_requests_longer_than_a_sequence_may_be_are_refused_at_once():
    outcome, _ = run(
        make_trace([(0.0, 90, 5), (0.0, 100, 1), (0.0, 99, 1)]), ModelPool(1 << 30, TOKEN, TOKEN, max_tokens=100)
    )
    assert (outcome.completed, outcome.refused, outcome.preemptions) == (2, 1, 0)


def test_no_more_sequences_than_allowed():
    trace = make_trace([(0.0, 10, 10)] * 20)
    for limit in (1, 3, 20):
        outcome, meter = run(trace, ModelPool(1 << 30, TOKEN, TOKEN), max_sequences=limit)
        assert (outcome.peak_running, outcome.completed) == (limit, 20)
        assert meter.steps[:, 1].max() == limit


def test_samples_show_running_waiting_and_bytes_and_stay_few():
    trace = make_trace([(0.0, 10, 4000)] * 5)
    meter = Meter(ModelPool(1 << 30, TOKEN, 16 * TOKEN), sample_steps=1)
    Scheduler(trace, meter, StepModel(), max_sequences=2, bytes_per_token=TOKEN).run()
    assert 500 <= len(meter.samples) <= 1000
    steps = [sample.step for sample in meter.samples]
    assert steps == sorted(set(steps))
    first = meter.samples[0]
    assert (first.running, first.waiting) == (2, 3)
    assert (first.usage.used_bytes, first.usage.mapped_bytes) == (20 * TOKEN, 32 * TOKEN)
    for sample in meter.samples:
        assert sample.usage.mapped_bytes == sample.usage.used_bytes + sample.usage.wasted_bytes


def test_a_static_pool_holds_as_many_as_it_has_slots():
    pool = StaticPool(450 * TOKEN, TOKEN, 100, 8)
    outcome, _ = run(make_trace([(0.0, 10, 10)] * 9), pool)
    assert pool.num_slots == 4
    assert (outcome.peak_running, outcome.preemptions, outcome.completed) == (4, 0, 9)
    assert pool.usage().mapped_bytes == 400 * TOKEN
    assert pool.usage().parked_bytes == 400 * TOKEN


def test_a_static_pool_too_small_for_one_sequence_says_what_fits():
    with pytest.raises(BenchError, match=r"1,000 tokens = 62\.5 KiB.*hold 999 tokens"):
        StaticPool(1000 * TOKEN - 1, TOKEN, 1000, 8)


def test_a_step_that_computes_no_token_is_refused():
    with pytest.raises(BenchError, match="less than one token"):
        StepModel(step_seconds=1e-5)
    with pytest.raises(BenchError, match="a step of -1"):
        StepModel(step_seconds=-1)
