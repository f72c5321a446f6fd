"""Results as tables: for a terminal, or as Markdown when the output goes to a file or a pipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvmem.arguments import format_bytes
from kvmem.bench.driver_costs import PUBLISHED
from kvmem.bench.generate import DYNAMIC_CACHE
from kvmem.bench.replay import ReplayResult
from kvmem.bench.results import Results, Setup
from kvmem.bench.reuse import ReuseReport, default_policy
from kvmem.bench.spread import Spread
from kvmem.bench.units import format_percent, format_seconds, format_us

__all__ = ["Report"]

_MOMENTS = 8


class Report:
    """Prints parts as they are done. ``console`` decides about colour and width, and honours ``NO_COLOR``."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def line(self, text: str = "") -> None:
        """Wrapped between words on a terminal; in a file as it is."""
        self.console.print(Text(text), soft_wrap=not self.console.is_terminal)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """The first column is text; the others are numbers, at the right edge. An empty row draws a line."""
        terminal = self.console.is_terminal
        table = Table(box=box.SIMPLE_HEAD if terminal else box.MARKDOWN, title_justify="left")
        for index, name in enumerate(columns):
            table.add_column(name, justify="right" if index else "left", no_wrap=not terminal)
        for row in rows:
            table.add_row(*row)
        self.line(title)
        self.console.print(table, soft_wrap=not terminal, crop=terminal)

    def setup(self, setup: Setup) -> None:
        tokens = f"{setup.input_tokens / 1e6:.1f} M prompt and {setup.output_tokens / 1e6:.2f} M output tokens"
        self.line(
            f"Trace  {setup.trace} ({setup.trace_format}): {setup.requests:,} requests in "
            f"{format_seconds(setup.trace_seconds)}, {tokens}"
        )
        weights = (
            f" - {format_bytes(setup.weight_bytes)} of weights"
            if setup.weight_bytes
            else " (weights not subtracted: --weights)"
        )
        room = setup.kv_bytes // setup.bytes_per_token
        self.line(
            f"Model  {setup.model}: {format_bytes(setup.bytes_per_token)} a token; "
            f"{format_bytes(setup.device_bytes)}{weights} = {format_bytes(setup.kv_bytes)} for KV = {room:,} tokens"
        )
        for note in setup.notes:
            self.line(f"Note   {note}")
        self.line()

    def all(self, results: Results) -> None:
        """Every part that was run."""
        parts: list[tuple[list[object], Callable[[Results], None]]] = [
            (list(results.replay), self.replay),
            (list(results.waste), self.waste),
            (list(results.steady), self.steady),
            (list(results.micro), self.micro),
            (list(results.attention), self.attention),
            (list(results.generate), self.generate),
        ]
        for rows, show in parts:
            if rows:
                show(results)
                self.line()

    def replay(self, results: Results) -> None:
        runs, setup = results.replay, results.setup
        rows = [[label, *(value(run) for run in runs)] for label, value in _REPLAY_ROWS]
        self.table(
            f"Replay on a simulated device, pages of {format_bytes(setup.page_bytes)}, at most "
            f"{setup.max_sequences} sequences of {setup.max_tokens:,} tokens, {setup.prefill} prefill, "
            f"prompts {'with' if setup.content else 'without'} content; "
            f"driver calls are counted; their seconds are those of an {PUBLISHED.device} ({PUBLISHED.source})",
            ["", *(run.pool for run in runs)],
            rows,
        )
        self.table("Over time: mapped / used", ["at", *(run.pool for run in runs)], _over_time(runs))

    def waste(self, results: Results) -> None:
        measured = {run.pool: run.end_waste for run in results.replay if run.pool != "static"}
        rows = [
            [
                row.layout,
                f"{row.page_tokens:,.0f}",
                format_percent(row.share_of_used),
                format_percent(row.share_of_mapped),
            ]
            for row in results.waste
        ]
        self.table(
            f"Rounding at request end, all {results.setup.requests:,} requests, "
            f"pages of {format_bytes(results.setup.page_bytes)}",
            ["address ranges", "tokens a page", "waste of used bytes", "of mapped bytes"],
            rows,
        )
        if measured:
            self.line(
                "Measured by the allocator in the replay (waste of used bytes): "
                + ", ".join(f"{pool} {format_percent(waste)}" for pool, waste in measured.items())
            )

    def steady(self, results: Results) -> None:
        first = results.steady[0]
        rows = [
            [
                row.pool,
                "nothing mapped" if row.batch == "first" else "parked rows",
                f"{row.admit_driver_calls:,}",
                f"{row.decode_driver_calls:,}",
            ]
            for row in results.steady
        ]
        self.table(
            f"Driver calls of a batch: {first.sequences} sequences, {first.prompt_tokens} prompt tokens, "
            f"{first.steps} decode steps",
            ["pool", "the batch finds", "at admission", "while decoding"],
            rows,
        )

    def micro(self, results: Results) -> None:
        backends = list(dict.fromkeys(row.backend for row in results.micro))
        found = {(row.case, row.backend): row for row in results.micro}
        cases = {row.case: row.unit for row in results.micro}
        rows = [
            [f"{case}, a {unit}", *(_spread(found[case, backend].us) for backend in backends)]
            for case, unit in cases.items()
        ]
        self.table(
            f"Real memory on the CPU, {results.micro[0].sequences} sequences: microseconds, median (p10 to p90)",
            ["", *backends],
            rows,
        )

    def attention(self, results: Results) -> None:
        rows = [[row.case, row.backend, _spread(row.us)] for row in results.attention]
        self.table(
            "Attention on the CPU: microseconds a layer and step, median (p10 to p90)", ["case", "memory", "time"], rows
        )

    def generate(self, results: Results) -> None:
        first = results.generate[0]
        rows = [
            [
                row.cache,
                "{:.1f} ({:.1f} to {:.1f})".format(*row.tokens_per_second),
                format_bytes(row.used_bytes),
                format_bytes(row.mapped_bytes),
                "yes" if row.same_tokens else "NO",
            ]
            for row in results.generate
        ]
        self.table(
            f"Greedy generation with {first.model} in float32 on one thread, {first.sequences} prompts, "
            f"{first.tokens} new tokens in all, {first.us.count} times; tokens a second, median (p10 to p90)",
            ["cache", "tokens/s", "used at the end", "mapped", f"same tokens as {DYNAMIC_CACHE}"],
            rows,
        )

    def reuse(self, report: ReuseReport) -> None:
        workload = report.workload
        trace = workload.trace
        self.line(
            f"Trace  {trace.name} ({trace.format}): {trace.num_requests:,} requests read {workload.blocks:,} blocks of "
            f"{trace.prefix_block_tokens} tokens, {workload.distinct:,} distinct"
        )
        self.line()
        policies = list(dict.fromkeys(row.policy for row in report.rows))
        found = {(row.capacity, row.policy): row for row in report.rows}
        rows = []
        for capacity in dict.fromkeys(row.capacity for row in report.rows):
            cells = [found[capacity, policy] for policy in policies]
            rows.append(
                [
                    capacity if isinstance(capacity, str) else f"{capacity:,}",
                    *(f"{format_percent(row.hit_rate)} ({row.share_of_belady:.0%})" for row in cells),
                    format_percent(cells[0].belady_hit_rate),
                ]
            )
        self.table(
            "Blocks read that were cached, by eviction policy (in brackets: of what Belady's rule finds, "
            "which knows the future)",
            ["capacity in blocks", *(_named(policy) for policy in policies), "Belady"],
            rows,
        )


def _named(policy: str) -> str:
    return f"{policy}, the default" if policy == default_policy() else policy


def _spread(us: Spread) -> str:
    return f"{format_us(us.median)} ({format_us(us.p10)} to {format_us(us.p90)})"


def _timed(value: Callable[[ReplayResult], str]) -> Callable[[ReplayResult], str]:
    return lambda run: "-" if run.pool == "static" else value(run)  # its bookkeeping here is no peer's


def _clocked(value: Callable[[ReplayResult], str]) -> Callable[[ReplayResult], str]:
    # With content, making the ids of prompts would be timed too.
    return lambda run: "-" if run.lookup_tokens else _timed(value)(run)


_REPLAY_ROWS: list[tuple[str, Callable[[ReplayResult], str]]] = [
    ("sequences that fitted, at most", lambda run: f"{run.outcome.peak_running:,}"),
    ("sequences running, mean", lambda run: f"{run.mean_running:.1f}"),
    ("requests completed", lambda run: f"{run.outcome.completed:,}"),
    ("requests refused (fit in no case)", lambda run: f"{run.outcome.refused:,}"),
    ("preemptions", lambda run: f"{run.outcome.preemptions:,}"),
    ("tokens computed again", lambda run: f"{run.outcome.recomputed_tokens:,}"),
    ("time to serve them all, simulated", lambda run: format_seconds(run.simulated_seconds)),
    ("bytes mapped, mean", lambda run: format_bytes(int(run.mean_mapped_bytes))),
    ("... parked for the next sequence, mean", lambda run: format_bytes(int(run.mean_parked_bytes))),
    ("... used, mean", lambda run: format_bytes(int(run.mean_used_bytes))),
    (
        "waste of live sequences, mean",
        lambda run: format_percent(run.mean_wasted_bytes / max(1.0, run.mean_used_bytes)),
    ),
    ("waste at request end", lambda run: format_percent(run.end_waste)),
    ("prompt tokens found in the cache", lambda run: format_percent(run.hit_rate) if run.lookup_tokens else "-"),
    ("driver calls", _timed(lambda run: f"{run.driver_calls:,}")),
    ("... map", _timed(lambda run: f"{run.map_calls:,}")),
    ("... set_access", _timed(lambda run: f"{run.set_access_calls:,}")),
    ("... unmap", _timed(lambda run: f"{run.unmap_calls:,}")),
    ("driver seconds", _timed(lambda run: f"{run.driver_seconds:.1f}")),
    ("... an hour", _timed(lambda run: f"{run.driver_seconds_an_hour:.1f}")),
    ("allocator, us a step: median", _clocked(lambda run: format_us(run.step_us.median))),
    ("allocator, us a step: p99", _clocked(lambda run: format_us(run.step_us.p99))),
    ("... in steps that only grow: median", _clocked(lambda run: format_us(run.grow_us.median))),
    ("... in steps that only grow: p99", _clocked(lambda run: format_us(run.grow_us.p99))),
    ("admit a sequence, us: median", _clocked(lambda run: format_us(run.admit_us.median))),
    ("free a sequence, us: median", _clocked(lambda run: format_us(run.free_us.median))),
]


def _over_time(runs: Sequence[ReplayResult]) -> list[list[str]]:
    """Rows at moments of the shortest replay, when all pools are busy."""
    end = min(run.samples[-1].step for run in runs)
    rows = []
    for moment in range(1, _MOMENTS + 1):
        step = end * moment // _MOMENTS
        row = [format_seconds(step * runs[0].step_seconds)]
        for run in runs:
            sample = min(run.samples, key=lambda sample: abs(sample.step - step))
            use = sample.usage
            row.append(f"{format_bytes(use.mapped_bytes)} / {format_bytes(use.used_bytes)}")
        rows.append(row)
    return rows
