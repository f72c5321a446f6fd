"""A run of one or several parts: the settings of the command line, and the rows that the parts fill."""
# ruff: noqa: RUF009 (what `_option` calls is `dataclasses.field`)

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmem.arguments import format_bytes, parse_bytes
from kvmem.bench.attention import attention, sdpa
from kvmem.bench.document import document
from kvmem.bench.engine import StepModel
from kvmem.bench.host import mapping, micro
from kvmem.bench.model import BACKENDS, LLAMA_3_8B_WEIGHT_BYTES, Backend, Budget, Model, load_model, open_allocator
from kvmem.bench.pools import AllocatorPool, ContentPool, Pool, StaticPool
from kvmem.bench.render import each, replay_row
from kvmem.bench.replay import ReplayResult, replay
from kvmem.bench.text import BenchError, progress
from kvmem.bench.traces import EXCERPT, Trace, load_trace
from kvmem.bench.waste import rounding_sweep, rounding_table
from kvmem.geometry.group_layout import GroupLayout, resolve_interleave
from kvmem.geometry.page_size import LEAST_PAGE_BYTES, choose_page_bytes

if TYPE_CHECKING:
    from rich.console import Console

#: In the order in which they are measured.
PARTS = ("replay", "waste", "waste_sweep", "micro", "mapping", "attention", "sdpa")
_MOST_SAMPLES = 200  # of a replay, in a document


def _option(default: Any, help: str, **more: Any) -> Any:
    """A field that is an option too: ``least``, ``choices`` and ``metavar`` of it."""
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class Settings:
    """What the command line asked for. Sizes are texts such as ``80GiB``."""

    trace: Path | None = _option(
        None, "Mooncake, Azure, BurstGPT or Qwen-Bailian file. Default: 1,000 packaged requests."
    )
    requests: int | None = _option(None, "Only the first requests of the trace.", least=1)
    config: Path | None = _option(None, "Model config.json or its folder. Default: Llama 3 8B.")
    assume: str | None = _option(None, "Model type whose rules apply to an unknown one.", metavar="MODEL_TYPE")
    dtype: str = _option("bfloat16", "Type of the stored KV.")
    memory: str = _option("80GiB", "Memory of the simulated device.")
    weights: str | None = _option(None, "Bytes of it for weights. Default: 15.0 GiB for Llama 3 8B, 0 with --config.")
    backend: str = _option("both", "Backends to measure.", choices=("both", *BACKENDS))
    page: str = _option("2MiB", "Bytes of a physical page; 'auto': as the virtual backend chooses.")
    block_size: int = _option(16, "Tokens of a block.", least=1)
    max_sequences: int = _option(256, "Sequences at once.", least=1)
    max_tokens: int | None = _option(None, "Longest sequence. Default: what the model is made for.", least=1)
    content: bool = _option(False, "Prompts have the content that the trace's block ids give, and hit the cache.")
    chunked: bool = _option(False, "Prompts take memory chunk by chunk instead of whole.")
    real_memory: str = _option("512MiB", "Real memory for `micro` and `attention`, for each backend.")
    repetitions: int = _option(20, "Of each timing on real memory.", least=1)
    quiet: bool = _option(False, "No progress.", short="-q")


def _thinned(samples: dict[str, list[int]]) -> dict[str, list[int]]:
    every = -(-len(samples.get("step", ())) // _MOST_SAMPLES) or 1
    return {name: column[::every] for name, column in samples.items()}


class Run:
    """Inputs, which are checked before anything is measured, and the parts that measure.

    ``setup``: what is measured: the model's cache, the simulated device, the trace. ``rows``: by part, in their JSON
    form, filled part by part; ``waste`` is at the page size asked for, ``waste_sweep`` over page sizes.
    """

    def __init__(self, settings: Settings, status: Console) -> None:
        self.settings, self.status = settings, status
        self.model = load_model(
            settings.config, dtype=settings.dtype, block_size=settings.block_size, assume=settings.assume
        )
        trace = load_trace(settings.trace or EXCERPT)
        self.trace = trace if settings.requests is None else trace.head(settings.requests)
        self.page_bytes = _page_bytes(settings, self.model, self.trace)
        self.real_bytes = parse_bytes("--real-memory", settings.real_memory)
        if not self.page_bytes:
            raise BenchError("--page is 0; a page holds at least one byte: 2MiB is what stock drivers map")
        self.backends = tuple(backend for backend in BACKENDS if settings.backend in ("both", backend))
        if settings.content and settings.chunked:
            raise BenchError("--content with --chunked: a prompt with content takes its memory whole; leave one out")
        self.setup = _setup(settings, self.model, self.trace, self.page_bytes)
        sizes = (self.setup[name] for name in ("kv_bytes", "max_sequences", "max_tokens", "page_bytes"))
        self.budget = Budget(*sizes)
        self.rows: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}

    def _add(self, part: str, results: Iterable[Any]) -> None:
        self.rows[part] += [row.as_row() if isinstance(row, ReplayResult) else asdict(row) for row in results]

    def to_dict(self, command: list[str]) -> dict[str, Any]:
        rows = self.rows | {"replay": [run | {"samples": _thinned(run["samples"])} for run in self.rows["replay"]]}
        return document(command, setup=self.setup, results=rows)

    def _budget(self, pool: str) -> Budget:
        """With ``--page auto`` each backend has its own default."""
        own = self.settings.page == "auto" and pool == "paged"
        return replace(self.budget, page_bytes=LEAST_PAGE_BYTES) if own else self.budget

    def replay(self) -> None:
        model = StepModel(chunked=self.settings.chunked)
        for name, make in self._pools().items():
            try:
                pool = make()
            except BenchError as error:  # not even one reserved sequence fits, which is the result for this pool
                self.status.print(f"{name} pool left out: {error}", highlight=False, markup=False, soft_wrap=True)
                continue
            with progress(self.status, f"replay, {name}", self.trace.num_requests, self.settings.quiet) as done:
                run = replay(
                    self.trace, pool, model, max_sequences=self.budget.max_sequences,
                    bytes_per_token=self.model.bytes_per_token, page_bytes=self._budget(name).page_bytes, progress=done,
                )  # fmt: skip
            self._add("replay", [run])
        self._add("waste", rounding_table(self.trace, self.model, self.page_bytes))
        self._add("waste_sweep", rounding_sweep(self.trace, self.model))

    def micro(self) -> None:
        self._on_real_memory("micro", micro, "calls on real memory")
        self._add("mapping", mapping())

    def attention(self) -> None:
        self._on_real_memory("attention", attention, "attention")
        self._add("sdpa", sdpa(repetitions=self.settings.repetitions))

    def _on_real_memory(self, part: str, measure: Callable[..., list[Any]], what: str) -> None:
        repetitions = self.settings.repetitions
        with progress(self.status, what, repetitions, self.settings.quiet) as done:
            rows = measure(
                self.model, self.backends, memory_bytes=self.real_bytes, page_bytes=self.page_bytes,
                repetitions=repetitions, progress=done,
            )  # fmt: skip
        self._add(part, rows)

    def _pools(self) -> dict[str, Callable[[], Pool]]:
        budget, model = self.budget, self.model

        def managed(backend: Backend) -> Pool:
            own = self._budget(backend)
            allocator = open_allocator(model, backend, "meta", own)
            if self.settings.content:
                return ContentPool(allocator, backend, own.max_tokens, self.trace)
            return AllocatorPool(allocator, backend, own.max_tokens)

        def static() -> Pool:
            return StaticPool(budget.memory_bytes, model.bytes_per_token, budget.max_tokens, budget.max_sequences)

        return {backend: lambda backend=backend: managed(backend) for backend in self.backends} | {"static": static}


def _kv_bytes(settings: Settings) -> tuple[int, int]:
    """The device's memory, and what its weights take of it."""
    packaged = LLAMA_3_8B_WEIGHT_BYTES if settings.config is None else 0
    weights = packaged if settings.weights is None else parse_bytes("--weights", settings.weights)
    return parse_bytes("--memory", settings.memory), weights


def _max_tokens(settings: Settings, model: Model, trace: Trace) -> int:
    return settings.max_tokens or model.max_tokens or -(-int(trace.total_tokens.max()) // 256) * 256


def _page_bytes(settings: Settings, model: Model, trace: Trace) -> int:
    if settings.page != "auto":
        return parse_bytes("--page", settings.page)
    memory, weights = _kv_bytes(settings)
    together = resolve_interleave("all", model.spec.num_layers)
    layouts = [GroupLayout(group, together) for group in model.spec.groups]
    tokens = _max_tokens(settings, model, trace)
    return choose_page_bytes(layouts, max_tokens=tokens, memory_bytes=max(0, memory - weights))


def _setup(settings: Settings, model: Model, trace: Trace, page_bytes: int) -> dict[str, Any]:
    memory, weights = _kv_bytes(settings)
    if memory - weights < page_bytes:
        raise BenchError(
            f"--memory {format_bytes(memory)} less {format_bytes(weights)} of weights leaves no page of "
            f"{format_bytes(page_bytes)} for KV; give more --memory, or smaller --weights"
        )
    max_tokens = _max_tokens(settings, model, trace)
    return {
        "model": model.name, "bytes_per_token": model.bytes_per_token, "device_bytes": memory, "weight_bytes": weights,
        "kv_bytes": memory - weights, "page_bytes": page_bytes, "block_size": settings.block_size,
        "max_sequences": settings.max_sequences, "max_tokens": max_tokens,
        "prefill": "chunked" if settings.chunked else "whole", "content": settings.content, "trace": trace.name,
        "trace_format": trace.format, "requests": trace.num_requests, "trace_seconds": float(trace.arrival_seconds[-1]),
        "input_tokens": int(trace.input_tokens.sum()), "output_tokens": int(trace.output_tokens.sum()),
        "notes": list(_notes(settings, trace, max_tokens)),
    }  # fmt: skip


def _notes(settings: Settings, trace: Trace, max_tokens: int) -> Iterable[str]:
    yield from trace.notes
    longest = int(trace.total_tokens.max())
    if longest > max_tokens:
        too_long = int((trace.total_tokens > max_tokens).sum())
        yield (
            f"{too_long} of {trace.num_requests} requests are longer than the {max_tokens:,} tokens of a sequence, "
            f"the longest {longest:,}; they are refused. --max-tokens raises the limit"
        )
    if settings.page == "auto" and settings.backend != "virtual":
        yield f"the paged backend has pages of {format_bytes(LEAST_PAGE_BYTES)}, its default"
    if trace.failed_requests:
        yield f"{trace.failed_requests} requests of the trace had failed when it was recorded; they are left out"


def sentences(run: Run, pictures: Sequence[Path]) -> list[str]:
    """What a run with all parts has found: what was served, what it cost, what attention takes."""
    replays, rows = [replay_row(row) for row in run.rows["replay"]], run.rows["attention"]
    served = "{pool} in {simulated_seconds:time} with up to {outcome[peak_running]} at once"
    # With memory parked: see `kvmem.bench.host`.
    again = [row for row in run.rows["micro"] if row["case"] in ("admit", "extend", "extend at an edge")]
    calls = sum(row["driver_calls"] for row in again) or "no"
    plain = {row["case"]: row["us"]["median"] for row in rows if row["backend"] not in BACKENDS}
    ours = [row | {"ratio": row["us"]["median"] / plain[row["case"]]} for row in rows if row["backend"] in BACKENDS]
    over = "{ratio:.2f} over the {backend} backend"
    drawn = f"; the memory over time is drawn in {pictures[0]}" if pictures else ""
    return [
        f"Of the trace's {run.setup['requests']:,} requests all that fit were served: {each(served, replays)}.",
        f"Memory held beyond the tokens in it, at the end of requests: {each('{pool} {end_waste:share}', replays)}; a "
        f"batch that finds parked memory makes {calls} driver calls.",
        f"Attention on this CPU takes {each(over, ours)}, where plain tensors take 1{drawn}.",
    ]
