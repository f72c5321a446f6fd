"""vLLM's scheduler over its own block manager and over kvmem's: the time of a step, and hits in a small pool.

Both schedulers are vLLM's, whole, without an engine and with a model that computes nothing (`vllm_drive`). They take
steps in turn. ``manager_us`` is the time inside calls of the block manager, the clock's own time included.
Needs vLLM: run it with the interpreter that `make test-vllm` has set up.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import click
import numpy as np

from kvmem.bench.__main__ import main
from kvmem.bench.cli import JSON
from kvmem.bench.document import check_writable, document, write_json
from kvmem.bench.render import Row, Table, cell, console, show
from kvmem.bench.timing import Ratio, Spread
from kvmem.bench.traces import EXCERPT, Trace, load_trace

_KINDS = ("stock", "kvmem")


@dataclass(frozen=True)
class Case:
    """``fill`` draws (name, prompt, tokens to generate); steps [first, first + steps) of a run are measured."""

    name: str
    sizes: dict[str, Any]
    fill: Callable[[np.random.Generator], list[tuple[str, list[int], int]]]
    first: int
    steps: int


@dataclass(frozen=True)
class TimeRow:
    """A step of ``case``: the block manager's part, and the scheduler's whole time (``schedule`` and
    ``update_from_output``). ``ratio``: this manager's time over vLLM's in the quietest tenth of the steps, by run:
    others on the machine disturb those least.
    """

    case: str
    manager: str
    steps: int
    manager_us: Spread
    step_us: Spread
    ratio: Ratio
    step_ratio: Ratio


@dataclass(frozen=True)
class HitRow:
    """A trace through the scheduler; ``hit_rate``: cached tokens of all tokens of prompts at their first admission."""

    manager: str
    policy: str
    pool_blocks: int
    requests: int
    hit_tokens: int
    prompt_tokens: int
    hit_rate: float
    preemptions: int
    steps: int


class Timed:
    """A block manager whose calls are timed, together."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.ns = inner, 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if callable(found):
            found = self._timed(found)
            setattr(self, name, found)
        elif name == "usage":  # a property that computes
            begin = perf_counter_ns()
            found = getattr(self._inner, name)
            self.ns += perf_counter_ns() - begin
        return found

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*words: Any, **names: Any) -> Any:
            begin = perf_counter_ns()
            result = call(*words, **names)
            self.ns += perf_counter_ns() - begin
            return result

        return timed

    def take(self) -> int:
        """Return the nanoseconds since the last call of this."""
        ns, self.ns = self.ns, 0
        return ns


def _prompts(count: int, tokens: int, new: int, shared: int = 0) -> Callable[..., list[tuple[str, list[int], int]]]:
    def fill(draw: np.random.Generator) -> list[tuple[str, list[int], int]]:
        start = draw.integers(0, 60_000, shared).tolist()
        # Lengths differ by up to a block, so that in each step some requests, and not all, take a new one.
        lengths = (tokens - shared + i % 16 for i in range(count))
        return [(f"{i}", start + draw.integers(0, 60_000, n).tolist(), new) for i, n in enumerate(lengths)]

    return fill


def cases(scale: float = 1.0) -> list[Case]:
    """All of them. ``scale`` below 1 shrinks the numbers of requests and steps, for tests."""
    many, steps = max(2, round(256 * scale)), max(4, round(96 * scale))
    decode, large = _prompts(many, 200, 400), {"num_blocks": 64 * many, "max_num_batched_tokens": 1 << 17}
    crowd = {"num_blocks": max(80, 12 * many), "max_num_batched_tokens": 1 << 17}
    return [
        Case(f"decode, {many} requests", large, decode, 2, steps),
        Case(f"decode, {many} requests, blocks of 128", large | {"block_size": 128}, decode, 2, steps),
        Case(f"decode, {many} requests, no prefix cache", large | {"prefix_caching": False}, decode, 2, steps),
        Case(f"decode, {many} requests, a window of 128", large | {"window": 128}, decode, 2, steps),
        Case("decode, 1 request", large, _prompts(1, 200, 400), 2, steps),
        Case(f"first step of {many} prompts", large, _prompts(many, 400, 4), 0, 1),
        Case(f"first step of {many} prompts that begin alike", large, _prompts(many, 400, 4, shared=320), 0, 1),
        Case("prompts of 8,192 tokens in chunks of 1,024", large | {"max_num_batched_tokens": 1024},
             _prompts(max(2, many // 64), 8192, 2), 0, max(2, many // 64) * 8),
        Case(f"{many} requests in a pool for half of them", crowd, _prompts(many, 200, 100), 2, steps),
    ]  # fmt: skip


def measure(case: Case, runs: int) -> list[TimeRow]:
    """Both managers, step by step in turn, ``runs`` times from the start."""
    from benchmarks import vllm_drive as drive

    spent: dict[str, list[list[tuple[float, float]]]] = {kind: [] for kind in _KINDS}
    for run in range(runs):
        schedulers = {kind: drive.open_scheduler(kind, drive.Sizes(**case.sizes)) for kind in _KINDS}
        for scheduler in schedulers.values():
            scheduler.kv_cache_manager = Timed(scheduler.kv_cache_manager)
            for name, prompt, new in case.fill(np.random.default_rng(run)):
                scheduler.add_request(
                    drive.make_request(name, prompt, new, block_size=case.sizes.get("block_size", 16))
                )
        gc.collect()
        gc.disable()  # a collection in the time of one of them would say nothing about it
        try:
            times = _steps(drive, schedulers, case)
        finally:
            gc.enable()
        for kind in _KINDS:
            spent[kind].append(times[kind])
    return list(_rows(case, spent))


def _steps(drive: Any, schedulers: dict[str, Any], case: Case) -> dict[str, list[tuple[float, float]]]:
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in schedulers}
    for step in range(case.first + case.steps):
        for kind, scheduler in schedulers.items():
            scheduler.kv_cache_manager.take()
            begin = perf_counter_ns()
            output = scheduler.schedule()
            middle = perf_counter_ns()
            update = drive.prepare(scheduler, output, lambda name, done: done % 60_000)
            second = perf_counter_ns()
            update()
            whole = middle - begin + perf_counter_ns() - second
            if step >= case.first:
                times[kind].append((scheduler.kv_cache_manager.take(), whole))
    return times


def _rows(case: Case, spent: dict[str, list[list[tuple[float, float]]]]) -> Iterator[TimeRow]:
    def totals(kind: str, part: int) -> list[float]:
        return [float(np.percentile([step[part] for step in run], 10)) for run in spent[kind]]

    for kind in _KINDS:
        manager, whole = ([step[part] for run in spent[kind] for step in run] for part in (0, 1))
        ratios = [Ratio.of(totals(kind, part), totals("stock", part)) for part in (0, 1)]
        yield TimeRow(case.name, kind, case.steps, Spread.of_ns(manager), Spread.of_ns(whole), *ratios)


@dataclass
class _Arrivals:
    """A trace as requests of vLLM's: a prefix block of the trace is one block, and a new text follows it."""

    trace: Trace
    most_new: int = 16
    prompts: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        ids, offsets = self.trace.prefix_ids, self.trace.prefix_offsets
        assert ids is not None and offsets is not None
        for i in range(len(offsets) - 1):
            blocks = ids[offsets[i] : offsets[i + 1]].tolist()
            self.prompts.append([token for block in blocks for token in self.tokens(block)] + [i % 60_000])

    @staticmethod
    def tokens(block: int) -> list[int]:
        """The 16 tokens of a prefix block, equal for equal ids."""
        return [(block * 16 + i) % 65_521 for i in range(15)] + [block % 65_519]

    @property
    def blocks(self) -> int:
        assert self.trace.prefix_ids is not None
        return len(set(self.trace.prefix_ids.tolist()))


def hits(trace: Trace, shares: Sequence[float], requests: int) -> list[HitRow]:
    """The trace's first ``requests``, one arriving a step, in pools of ``shares`` of its distinct blocks."""
    arrivals = _Arrivals(trace)
    prompts = arrivals.prompts[:requests]
    longest = max(map(len, prompts)) // 16 + 4
    rows = []
    for share in shares:
        pool = max(round(share * arrivals.blocks), longest) + 2
        for kind, policy in (("stock", "lru"), ("kvmem", "lru"), ("kvmem", "density")):
            rows.append(_hit_row(kind, policy, pool, prompts, arrivals.most_new))
    return rows


def _hit_row(kind: str, policy: str, pool: int, prompts: Sequence[list[int]], new: int) -> HitRow:
    from benchmarks import vllm_drive as drive

    longest = max(map(len, prompts)) + new
    sizes = drive.Sizes(num_blocks=pool, max_num_seqs=16, max_num_batched_tokens=4096, max_model_len=longest)
    scheduler = drive.open_scheduler(kind, sizes, options={"policy": policy} if kind == "kvmem" else None)
    found = asked = preempted = steps = 0
    waiting = [(f"{i}", prompt) for i, prompt in enumerate(prompts)][::-1]
    while waiting or scheduler.has_unfinished_requests():
        if waiting and scheduler.get_request_counts()[1] < 4:
            name, prompt = waiting.pop()
            scheduler.add_request(drive.make_request(name, prompt, new))
        output = scheduler.schedule()
        stats = drive.prepare(scheduler, output, lambda name, done: (int(name) * 31 + done) % 60_000)()
        cached = stats.prefix_cache_stats
        found, asked = found + cached.hits, asked + cached.queries
        preempted, steps = preempted + len(output.preempted_req_ids or ()), steps + 1
    assert scheduler.reset_prefix_cache()
    return HitRow(kind, policy, pool, len(prompts), found, asked, found / asked, preempted, steps)


def time_tables(rows: Sequence[Row], setup: Mapping[str, Any]) -> Iterator[Table]:
    title = (
        "A step of the scheduler of vLLM {vllm}: time in calls of its block manager, and of the whole step, without "
    )
    title += "a model; {runs} runs in turn, ratios of the quietest tenth of the steps of each"
    spec = """case={case}; manager={manager}; manager us={manager_us:spread}; times stock={ratio:ratio};
    step us={step_us:spread}; step times stock={step_ratio:ratio}"""
    yield Table.of(cell(title, setup), spec, rows, 2)


def hit_tables(rows: Sequence[Row], setup: Mapping[str, Any]) -> Iterator[Table]:
    title = (
        "Prompt tokens found cached by the scheduler of vLLM {vllm}: {trace}, {requests:,} requests, a prefix block "
    )
    title += "of the trace as one block of 16 tokens"
    spec = """manager={manager}; policy={policy}; pool blocks={pool_blocks:,}; hit rate={hit_rate:share};
    hit tokens={hit_tokens:,}; of={prompt_tokens:,}; preemptions={preemptions:,}; steps={steps:,}"""
    yield Table.of(cell(title, setup), spec, rows, 2)


@click.command()
@click.option(
    "--runs", type=click.IntRange(min=1), default=5, show_default=True, help="Runs of each case, interleaved."
)
@click.option("--scale", type=float, default=1.0, show_default=True, help="Below 1: fewer requests and steps.")
@click.option(
    "--requests", type=click.IntRange(min=0), default=1000, show_default=True, help="Of the trace; 0: no trace."
)
@JSON
def command(runs: int, scale: float, requests: int, json_path: Path | None) -> None:
    """vLLM's scheduler over its own block manager and over kvmem's."""
    from kvmem.integrations.vllm.names import vllm_version

    check_writable(json_path)
    setup = {"vllm": vllm_version(), "runs": runs, "trace": EXCERPT.stem, "requests": requests}
    timed = [asdict(row) for case in cases(scale) for row in measure(case, runs)]
    show(console(), time_tables(timed, setup))
    found = [asdict(row) for row in hits(load_trace(EXCERPT), (0.05, 0.1, 0.2, 0.4), requests)] if requests else []
    show(console(), hit_tables(found, setup))
    results = {"vllm_time": timed, "vllm_hits": found}
    write_json(document(["vllm_scheduler", *sys.argv[1:]], setup=setup, results=results), json_path)


if __name__ == "__main__":
    sys.exit(main(None, command, "python -m benchmarks.vllm_scheduler"))
