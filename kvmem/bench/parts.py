"""The parts of a run, from the settings of the command line to filled `Results`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from kvmem.arguments import format_bytes, parse_bytes
from kvmem.bench.attention import attention
from kvmem.bench.content import ContentPool
from kvmem.bench.errors import BenchError
from kvmem.bench.generate import generate
from kvmem.bench.language_models import load_language_model
from kvmem.bench.memory import BACKENDS, Backend, Budget, open_allocator, open_pool
from kvmem.bench.micro import micro
from kvmem.bench.model import LLAMA_3_8B_WEIGHT_BYTES, Model, load_model
from kvmem.bench.pools import Pool, StaticPool
from kvmem.bench.progress import progress
from kvmem.bench.replay import replay
from kvmem.bench.results import Results, Setup
from kvmem.bench.scheduler import StepModel
from kvmem.bench.steady import steady
from kvmem.bench.traces import EXCERPT, Trace, load_trace
from kvmem.bench.waste import rounding_sweep, rounding_table
from kvmem.layouts.page_size import LEAST_PAGE_BYTES, choose_page_bytes
from kvmem.layouts.plain import GroupLayout, resolve_interleave

__all__ = ["Run", "Settings"]

_REPETITIONS = 20
_GENERATIONS = 5


@dataclass(frozen=True)
class Settings:
    """What the command line asked for. Sizes are texts such as ``80GiB``."""

    trace: Path | None = None
    config: Path | None = None
    assume: str | None = None
    requests: int | None = None
    memory: str = "80GiB"
    weights: str | None = None
    page: str = "2MiB"
    block_size: int = 16
    dtype: str = "bfloat16"
    backend: str = "both"
    max_sequences: int = 256
    max_tokens: int | None = None
    chunked: bool = False
    content: bool = False
    real_memory: str = "512MiB"
    real_sequences: int = 32
    repetitions: int | None = None
    model: str = "auto"
    new_tokens: int = 64
    quiet: bool = False


class Run:
    """Inputs that were checked before anything is measured, and the parts that measure."""

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
        self.backends: tuple[Backend, ...] = (
            BACKENDS if settings.backend == "both" else tuple(b for b in BACKENDS if b == settings.backend)
        )
        if settings.content and settings.chunked:
            raise BenchError(
                "--content with --chunked: a prompt with content takes its memory whole; leave one of them out"
            )
        self.results = Results(_setup(settings, self.model, self.trace, self.page_bytes))

    @property
    def budget(self) -> Budget:
        setup = self.results.setup
        return Budget(setup.kv_bytes, setup.max_sequences, setup.max_tokens, setup.page_bytes)

    def _budget(self, pool: str) -> Budget:
        """With ``--page auto`` each backend has its own default."""
        own = self.settings.page == "auto" and pool == "paged"
        return replace(self.budget, page_bytes=LEAST_PAGE_BYTES) if own else self.budget

    def replay(self) -> None:
        model = StepModel(chunked=self.settings.chunked)
        for name, make in self._pools().items():
            try:
                pool = make()
            except BenchError as error:  # memory for not even one reserved sequence: that is the answer for this pool
                self.status.print(f"{name} pool left out: {error}", highlight=False, markup=False, soft_wrap=True)
                continue
            with progress(self.status, f"replay, {name}", self.trace.num_requests, self.settings.quiet) as done:
                self.results.replay.append(
                    replay(
                        self.trace,
                        pool,
                        model,
                        max_sequences=self.budget.max_sequences,
                        bytes_per_token=self.model.bytes_per_token,
                        page_bytes=self._budget(name).page_bytes,
                        progress=done,
                    )
                )

    def waste(self) -> None:
        self.results.waste.extend(rounding_table(self.trace, self.model, self.page_bytes))
        self.results.waste_sweep.extend(rounding_sweep(self.trace, self.model))

    def steady(self) -> None:
        budget, prompt, steps = self.budget, 1024, 512
        most = budget.memory_bytes // 2 // ((prompt + steps) * self.model.bytes_per_token)
        sequences = max(1, min(64, budget.max_sequences, most))
        for backend in self.backends:
            pool = open_pool(self.model, backend, "meta", self._budget(backend))
            self.results.steady.extend(steady(pool, sequences=sequences, prompt_tokens=prompt, steps=steps))

    def micro(self) -> None:
        repetitions = self.settings.repetitions or _REPETITIONS
        with progress(self.status, "calls on real memory", repetitions, self.settings.quiet) as done:
            self.results.micro.extend(
                micro(
                    self.model,
                    self.backends,
                    memory_bytes=self.real_bytes,
                    page_bytes=self.page_bytes,
                    sequences=self.settings.real_sequences,
                    repetitions=repetitions,
                    progress=done,
                )
            )

    def attention(self) -> None:
        repetitions = self.settings.repetitions or _REPETITIONS
        with progress(self.status, "attention", repetitions, self.settings.quiet) as done:
            self.results.attention.extend(
                attention(
                    self.model,
                    self.backends,
                    memory_bytes=self.real_bytes,
                    page_bytes=self.page_bytes,
                    repetitions=repetitions,
                    progress=done,
                )
            )

    def generate(self) -> None:
        repetitions = self.settings.repetitions or _GENERATIONS
        language_model = load_language_model(self.settings.model)
        with progress(self.status, f"generate, {language_model.name}", repetitions, self.settings.quiet) as done:
            self.results.generate.extend(
                generate(
                    language_model,
                    self.backends,
                    memory_bytes=self.real_bytes,
                    new_tokens=self.settings.new_tokens,
                    repetitions=repetitions,
                    progress=done,
                )
            )

    def _pools(self) -> dict[str, Callable[[], Pool]]:
        budget, model = self.budget, self.model

        def managed(backend: Backend) -> Callable[[], Pool]:
            own = self._budget(backend)
            if not self.settings.content:
                return lambda: open_pool(model, backend, "meta", own)
            return lambda: ContentPool(open_allocator(model, backend, "meta", own), backend, own.max_tokens, self.trace)

        pools: dict[str, Callable[[], Pool]] = {backend: managed(backend) for backend in self.backends}
        pools["static"] = lambda: StaticPool(
            budget.memory_bytes, model.bytes_per_token, budget.max_tokens, budget.max_sequences
        )
        return pools


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


def _setup(settings: Settings, model: Model, trace: Trace, page_bytes: int) -> Setup:
    memory, weights = _kv_bytes(settings)
    if memory - weights < page_bytes:
        raise BenchError(
            f"--memory {format_bytes(memory)} less {format_bytes(weights)} of weights leaves no page of "
            f"{format_bytes(page_bytes)} for KV; give more --memory, or smaller --weights"
        )
    if settings.max_sequences < 1 or (settings.max_tokens is not None and settings.max_tokens < 1):
        raise BenchError("--max-sequences and --max-tokens must be 1 or more")
    longest = int(trace.total_tokens.max())
    max_tokens = _max_tokens(settings, model, trace)
    notes = list(trace.notes)
    if longest > max_tokens:
        too_long = int((trace.total_tokens > max_tokens).sum())
        notes.append(
            f"{too_long} of {trace.num_requests} requests are longer than the {max_tokens:,} tokens of a sequence, "
            f"the longest {longest:,}; they are refused. --max-tokens raises the limit"
        )
    if settings.page == "auto" and settings.backend != "virtual":
        notes.append(f"the paged backend has pages of {format_bytes(LEAST_PAGE_BYTES)}, its default")
    if trace.failed_requests:
        notes.append(
            f"{trace.failed_requests} requests of the trace had failed when it was recorded; they are left out"
        )
    return Setup(
        model=model.name,
        bytes_per_token=model.bytes_per_token,
        device_bytes=memory,
        weight_bytes=weights,
        kv_bytes=memory - weights,
        page_bytes=page_bytes,
        block_size=settings.block_size,
        max_sequences=settings.max_sequences,
        max_tokens=max_tokens,
        prefill="chunked" if settings.chunked else "whole",
        content=settings.content,
        trace=trace.name,
        trace_format=trace.format,
        requests=trace.num_requests,
        trace_seconds=float(trace.arrival_seconds[-1]),
        input_tokens=int(trace.input_tokens.sum()),
        output_tokens=int(trace.output_tokens.sum()),
        notes=tuple(notes),
    )
