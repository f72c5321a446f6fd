"""Results as tables: a list of rows with a title and units, shown by rich, or as Markdown.

Rows are in the JSON form of `kvmem.bench.document`, so a result and a document of it are shown by the same code.
"""

from __future__ import annotations

import string
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from kvmem.arguments import format_bytes
from kvmem.bench.replay import PUBLISHED
from kvmem.bench.text import format_percent, format_seconds, format_us

Row = Mapping[str, Any]
_FILE_WIDTH = 200
_MOMENTS = 8
_BY_ITSELF = "static"  # the pool whose bookkeeping is part of this benchmark, so its times compare with nothing


@dataclass(frozen=True)
class Table:
    """The first ``texts`` columns are words; numbers stand at the right edge."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1

    @classmethod
    def of(cls, title: str, spec: str, rows: Sequence[Row], texts: int = 1) -> Table:
        """``spec``: as for `columns`."""
        parts = columns(spec)
        return cls(title, list(parts), [[cell(form, row) for form in parts.values()] for row in rows], texts)

    @classmethod
    def turned(cls, title: str, spec: str, rows: Sequence[Row], names: Sequence[str]) -> Table:
        """A column for each of ``rows``, and a line for each part of ``spec`` that says something about one of them."""
        lines = {name: [cell(form, row) for row in rows] for name, form in columns(spec).items()}
        said = [[name, *(text or "-" for text in cells)] for name, cells in lines.items() if any(cells)]
        return cls(title, ["", *names], said)

    def show(self, to: Console) -> None:
        terminal = to.is_terminal
        table = RichTable(box=box.SIMPLE_HEAD if terminal else box.MARKDOWN, title_justify="left")
        for index, name in enumerate(self.columns):
            table.add_column(name.strip(), justify="right" if index >= self.texts else "left", no_wrap=not terminal)
        for row in self.rows:
            table.add_row(*row)
        say(to, self.title)
        to.print(table, soft_wrap=not terminal, crop=terminal)

    def markdown(self) -> list[str]:
        rule = ["---" if index < self.texts else "---:" for index in range(len(self.columns))]
        return [f"| {' | '.join(map(str.strip, line))} |" for line in (self.columns, rule, *self.rows)]


def columns(spec: str) -> dict[str, str]:
    """``"name={field:form}; ..."`` as name -> format; spaces at a name's end tell it from one with the same text."""
    parts = (part.partition("=") for part in spec.replace("\n", " ").split("; "))
    found: dict[str, str] = {}
    for name, _, form in parts:
        name = name.lstrip()
        while name in found:
            name += " "
        found[name] = form.strip()
    return found


def cell(form: str, row: Row) -> str:
    """``form`` is a format string over the row's fields, with the units of `_UNITS`; what is absent is empty."""
    return _Cell().vformat(form, (), row)


def each(form: str, rows: Sequence[Row]) -> str:
    """The `cell` of every row, with commas between them."""
    return ", ".join(cell(form, row) for row in rows)


class _Cell(string.Formatter):
    def get_field(self, name: str, args: Any, row: Any) -> tuple[Any, str]:
        first, *rest = name.replace("]", "").split("[")
        value = row.get(first)
        for key in rest:
            value = None if value is None else value[key]
        return value, name

    def format_field(self, value: Any, unit: str) -> str:
        return "" if value is None else _UNITS[unit](value) if unit in _UNITS else format(value, unit)


def _around(edges: Row) -> str:
    return f"{format_us(edges['median'])} ({format_us(edges['p10'])} to {format_us(edges['p90'])})"


_UNITS: dict[str, Callable[[Any], str]] = {
    "bytes": lambda count: format_bytes(int(count)),
    "share": format_percent,
    "time": format_seconds,
    "us": format_us,
    "spread": _around,
    "ratio": lambda edges: f"{edges['median']:.3f} ({edges['p10']:.3f} to {edges['p90']:.3f})",
    "yes": lambda value: "yes" if value else "NO",
    "mark": lambda value: "yes" if value else "",
}


def console() -> Console:
    """Standard output; as wide as a table needs where no terminal is."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH)


def say(to: Console, text: str = "") -> None:
    """Wrapped between words on a terminal; in a file as it is."""
    to.print(Text(text), soft_wrap=not to.is_terminal)


def show(to: Console, parts: Iterable[Table | str], end: str | None = None) -> None:
    """Tables and notes one after the other. ``end``: a line after each of them."""
    for part in parts:
        if isinstance(part, Table):
            part.show(to)
        else:
            say(to, part)
        if end is not None:
            say(to, end)


def setup_lines(setup: Row) -> Iterator[str]:
    """What a replay replays."""
    tokens = f"{setup['input_tokens'] / 1e6:.1f} M prompt and {setup['output_tokens'] / 1e6:.2f} M output tokens"
    yield cell("Trace  {trace} ({trace_format}): {requests:,} requests in {trace_seconds:time}, ", setup) + tokens
    weights = " - {weight_bytes:bytes} of weights" if setup["weight_bytes"] else " (weights not subtracted: --weights)"
    room = f" = {{kv_bytes:bytes}} for KV = {setup['kv_bytes'] // setup['bytes_per_token']:,} tokens"
    yield cell("Model  {model}: {bytes_per_token:bytes} a token; {device_bytes:bytes}" + weights + room, setup)
    yield from (f"Note   {note}" for note in setup["notes"])


def tables(setup: Row, parts: Mapping[str, Sequence[Row]]) -> Iterator[Table]:
    """Every part that was run."""
    for name in (*_PARTS, *_SPECS):
        if rows := parts.get(name):
            if name in _PARTS:
                yield from _PARTS[name](setup, parts)
            else:
                title, texts, spec = _SPECS[name]
                yield Table.of(title, spec, rows, texts)


_Parts = Mapping[str, Sequence[Row]]

_REPLAY = """sequences that fitted, at most={outcome[peak_running]:,}; sequences running, mean={mean_running:.1f};
requests completed={outcome[completed]:,}; requests refused (fit in no case)={outcome[refused]:,};
preemptions={outcome[preemptions]:,}; tokens computed again={outcome[recomputed_tokens]:,};
time to serve them all, simulated={simulated_seconds:time}; bytes mapped, mean={mean_mapped_bytes:bytes};
... parked for the next sequence, mean={mean_parked_bytes:bytes}; ... used, mean={mean_used_bytes:bytes};
waste of live sequences, mean={live_waste:share}; waste at request end={end_waste:share};
prompt tokens found in the cache={hit_rate:share}; driver calls={driver_calls:,}; ... map={map_calls:,};
... set_access={set_access_calls:,}; ... unmap={unmap_calls:,}; driver seconds={driver_seconds:.1f};
... an hour={driver_seconds_an_hour:.1f}; allocator, us a step: median={step_us[median]:us};
allocator, us a step: p99={step_us[p99]:us}; ... in steps that only grow: median={grow_us[median]:us};
... in steps that only grow: p99={grow_us[p99]:us}; admit a sequence, us: median={admit_us[median]:us};
free a sequence, us: median={free_us[median]:us}"""
_DRIVER = ("driver_calls", "map_calls", "set_access_calls", "unmap_calls", "driver_seconds", "driver_seconds_an_hour")
_CLOCKED = ("step_us", "grow_us", "admit_us", "free_us")


def replay_row(run: Row) -> dict[str, Any]:
    """``run`` with shares, and None for what has no meaning: a static pool's bookkeeping is part of this benchmark, and
    with content the times would include the making of prompts.
    """
    row = dict(run)
    row["end_waste"] = run["end_wasted_bytes"] / max(1, run["end_used_bytes"])
    row["hit_rate"] = run["hit_tokens"] / run["lookup_tokens"] if run["lookup_tokens"] else None
    row["driver_seconds_an_hour"] = run["driver_seconds"] * 3600 / (run["simulated_seconds"] or 1)
    if "mean_used_bytes" in run:
        row["live_waste"] = run["mean_wasted_bytes"] / max(1.0, run["mean_used_bytes"])
    if run["pool"] == _BY_ITSELF:
        row |= dict.fromkeys(_DRIVER)
    return row | dict.fromkeys(_CLOCKED) if run["pool"] == _BY_ITSELF or run["lookup_tokens"] else row


def _replay(setup: Row, parts: _Parts) -> Iterator[Table]:
    runs, content = parts["replay"], "with" if setup.get("content") else "without"
    names = [run["pool"] for run in runs]
    title = "Replay on a simulated device, pages of {page_bytes:bytes}, at most {max_sequences} sequences of "
    title += f"{{max_tokens:,}} tokens, {{prefill}} prefill, prompts {content} content; driver calls are counted; "
    title += f"their seconds are those of an {PUBLISHED.device} ({PUBLISHED.source})"
    yield Table.turned(cell(title, setup), _REPLAY, [replay_row(run) for run in runs], names)
    yield Table("Over time: mapped / used", ["at", *names], _over_time(runs))


def _over_time(runs: Sequence[Row]) -> list[list[str]]:
    """Rows at moments of the shortest replay, when all pools are busy."""
    end = min(run["samples"]["step"][-1] for run in runs)
    rows = []
    for moment in range(1, _MOMENTS + 1):
        step = end * moment // _MOMENTS
        row = [format_seconds(step * runs[0]["step_seconds"])]
        for run in runs:
            samples = run["samples"]
            at = min(range(len(samples["step"])), key=lambda i: abs(samples["step"][i] - step))
            row.append(f"{format_bytes(samples['mapped_bytes'][at])} / {format_bytes(samples['used_bytes'][at])}")
        rows.append(row)
    return rows


def _waste(setup: Row, parts: _Parts) -> Iterator[Table]:
    rows = []
    for row in parts["waste"]:
        lost = row["mapped_bytes"] - row["used_bytes"]
        rows.append({**row, "of_used": lost / row["used_bytes"], "of_mapped": lost / row["mapped_bytes"]})
    title = cell("Rounding at request end, all {requests:,} requests, pages of {page_bytes:bytes}", setup)
    measured = each("{pool} {end_waste:share}", [replay_row(r) for r in parts["replay"] if r["pool"] != _BY_ITSELF])
    title += f"; measured by the allocator in the replay (waste of used bytes): {measured}" if measured else ""
    spec = """address ranges={layout}; tokens a page={page_tokens:,.0f}; waste of used bytes={of_used:share};
    of mapped bytes={of_mapped:share}"""
    yield Table.of(title, spec, rows)


def _micro(setup: Row, parts: _Parts) -> Iterator[Table]:
    by_case: dict[str, dict[str, Any]] = {}
    for row in parts["micro"]:
        by_case.setdefault(f"{row['case']}, a {row['unit']}", {})[row["backend"]] = row["us"]
    backends = list(next(iter(by_case.values())))
    spec = "={case}; " + "; ".join(f"{name}={{{name}:spread}}" for name in backends)
    title = "Real memory on the CPU, {sequences} sequences: microseconds, median (p10 to p90)"
    rows = [{"case": case, **found} for case, found in by_case.items()]
    yield Table.of(cell(title, parts["micro"][0]), spec, rows)


def _layouts(setup: Row, parts: _Parts) -> Iterator[Table]:
    step = """Layouts on the {backend} backend, one layer of {heads} heads of {width}: a decode step of {sequences}
    sequences of {tokens:,} tokens, one thread, CPU time. Weights are random, W_K well conditioned as Slim needs it:
    errors (relative, of the output) compare formats, not models"""
    spec = """layout={name}; error relative to={error_of}; bytes a token={bytes_per_token:,.0f};
    bytes a step reads={read_bytes:bytes}; error={error:.1e}; us a step={step_us:spread};
    times plain fp16={step_ratio:ratio}"""
    yield Table.of(" ".join(cell(step, setup).split()), spec, parts["layouts"], 2)
    convert = """Conversion, one thread, CPU time: encode, which stores nothing, and derive into a scratch, beside a
    copy that reads and writes as many bytes ({convert_bytes:bytes} of K and V in fp16). Slim, Palu, GoldFinch and the
    encoder's output multiply by weights, and lanes are gathered: they have no ratio"""
    spec = """layout={name}; us to derive a token={derive_us:spread}; encode / copy={encode_ratio:ratio};
    derive / copy={derive_ratio:ratio}"""
    yield Table.of(" ".join(cell(convert, setup).split()), spec, parts["layouts"])


_PARTS: dict[str, Callable[[Row, _Parts], Iterator[Table]]] = {
    "replay": _replay, "waste": _waste, "micro": _micro, "layouts": _layouts,
}  # fmt: skip
_SDPA = """sequences x tokens={sequences} x {tokens:,}; memory={memory}; us={us:spread}; times plain={ratio:ratio}"""
#: Of the other parts the title, how many columns are words, and the columns.
_SPECS = {
    "mapping": (
        "Mapping a run of pages on the CPU; no page is touched", 2,
        """run={run_pages} x {page_bytes:bytes}; way={way}; us a run={us:spread}; times bare={times_bare:.2f};
        driver calls={driver_calls:g}""",
    ),
    "attention": (
        "Attention on the CPU: microseconds a layer and step, median (p10 to p90)", 2,
        "case={case}; memory={backend}; time={us:spread}",
    ),
    "tiers": (
        "Tiers beside their plain limits in turn; host memory in CPU time of one thread, others by the clock", 3,
        """tier={tier}; call={call}; limit={limit}; run={blocks} x {block_bytes:bytes}; us a run={us:spread};
        bytes/s={bytes_per_second:bytes}; ... of the limit={limit_bytes_per_second:bytes};
        share of the limit={share:ratio}; goal={goal:g}""",
    ),
    "verification": (
        "Verification: the checksums of a run beside the disk's get of it, which includes them", 1,
        "run={blocks} x {block_bytes:bytes}; us a run={us:spread}; share of get={share:ratio}; goal, at most={goal:g}",
    ),
    "break_even": (
        "Loading beside computing again", 1,
        """tier={tier}; before the first block, us={start_us:us}; tokens/s={tokens_per_second:,.0f};
        prefill, tokens/s={prefill_tokens_per_second:,.0f}; faster from tokens on (empty: never)={least_tokens:,}""",
    ),
    "tier_replay": (
        "A trace replayed with blocks in host memory, beside one cache of as many blocks with the device's policy", 3,
        """backend={backend}; device's policy={device_policy}; host's policy={host_policy};
        blocks, device + host={device_blocks:,} + {host_blocks:,}; prompt blocks found={hits:,};
        ... in host memory={host_hits:,}; one cache finds={one_cache_hits:,}; share={share:share}; goal={goal:share}""",
    ),
    "attend": (
        "Decode attention on the CPU, one layer, heads of 128; one thread: CPU time, more: wall time", 3,
        """kernel={kernel}; dtype={dtype}; threads={threads}; KV heads={heads}; query heads={query_heads};
        tokens={tokens:,}; us={us:spread}; bytes/s={bytes_per_second:bytes}; of the sum's speed={of_sum:ratio};
        goal={goal:g}; error={error:.1e}""",
    ),
    "decode": (
        "A decode step of a whole model, one thread, CPU time", 2,
        """model={model}; cache={cache}; context={context:,}; us={us:spread};
        times as fast as DynamicCache={speed:ratio}""",
    ),
    "near": (
        "Attention where the bytes are beside a copy to the device and attention there", 1,
        """place={place}; context={context:,}; us in place={us:spread}; us copied={copy_us:spread};
        times as fast={speedup:ratio}; over the link={link_bytes:bytes}; read from the medium={media_read_bytes:bytes};
        delivered={delivered_bytes:bytes}; copied otherwise={copied_bytes:bytes}""",
    ),
    "near_crossover": (
        "From which context on attention in place is faster (empty: not in those measured)", 1,
        "place={place}; context={context:,}",
    ),
    "selectors": (
        "Blocks chosen by a selector beside the blocks with most attention mass", 1,
        """selector={selector}; for each KV head={per_head}; budget, tokens={budget_tokens:,}; recall={recall:share};
        mass={mass:share}; error={error:.3f}; bytes read, of all={read_share:share}""",
    ),
    "modules": (
        "Decode steps in module batches, device and host on one thread: the plan beside the step", 2,
        """case={case}; backend={backend}; context={context:,}; sequences={B}; micro-batch={ba}; expert batch={be};
        share of the CPU={omega:share}; us planned={predicted_us:us}; us={us:spread};
        planned / measured={ratio:ratio}""",
    ),
    "prefetch": (
        "Reads behind the all-reduces of two ranks beside reads after them", 1,
        """from={medium}; windows={windows}; bytes of each={window_bytes:bytes}; us, all-reduces={collective_us:spread};
        ... reads after={after_us:spread}; ... reads behind={behind_us:spread}; behind / after={share:ratio};
        us by the virtual clock={predicted_us:us}; its error={error:share}""",
    ),
    **dict.fromkeys(  # the second is the name that `sdpa` had
        ("sdpa", "rectangle"), ("One SDPA call for a batch, one layer's decode step, one thread, CPU time", 2, _SDPA)
    ),
}  # fmt: skip


def reuse_tables(facts: Row, default_policy: str, rows: Sequence[Row]) -> Iterator[Table]:
    """``facts``: of the trace."""
    found = {(row["capacity"], row["policy"]): row for row in rows}
    policies, capacities = (list(dict.fromkeys(row[name] for row in rows)) for name in ("policy", "capacity"))
    cells = []
    for capacity in capacities:
        here = [found[capacity, policy] for policy in policies]
        known = not isinstance(capacity, str)
        tokens = f"{capacity * facts['block_tokens'] / 1e6:.1f} M" if known else "all"
        rates = [cell("{hit_rate:share} ({share_of_belady:.0%})", row) for row in here]
        cells.append(
            [f"{capacity:,}" if known else capacity, tokens, *rates, format_percent(here[0]["belady_hit_rate"])]
        )
    named = [f"{policy}, the default" if policy == default_policy else policy for policy in policies]
    title = "Blocks read that were cached, by eviction policy (in brackets: of what Belady's rule finds, "
    yield Table(title + "which knows the future)", ["capacity in blocks", "tokens", *named, "Belady"], cells)
