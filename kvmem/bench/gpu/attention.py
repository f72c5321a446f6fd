"""Decode and prefill attention over both backends and over static tensors, with the same kernels, contents and
metadata: `attention` at the default layout; `layout` by how many layers lie side by side in a page, which settles the
default ``interleave`` of a device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from kvmem.bench.attention import at_once
from kvmem.bench.gpu.device import BenchDevice
from kvmem.bench.gpu.kernels import Kernel, Phase, Run, kernels_of
from kvmem.bench.gpu.measure import FAILURES, Part, copy_bandwidth, interleave, spread_us
from kvmem.bench.gpu.memory import Interleave, Managed, Memory, budget_bytes, fitting, static_layers, static_twin
from kvmem.bench.gpu.sizes import ModelShape, Sizes
from kvmem.bench.model import BACKENDS, Backend
from kvmem.bench.text import BenchError
from kvmem.bench.timing import Ratio, Spread

_TWINS = {"virtual": "static", "paged": "static pool"}
_ATTENTION_SECONDS, _LAYOUT_SECONDS, _MOST_SECONDS = 12.0, 14.0, 1.5  # of a case, and of one kernel's calls
_MARGIN_BYTES = 2 << 30  # queries, results, workspaces
_TOLERANCE = 2e-2  # bfloat16 inputs and outputs of order one
_WORTH = 1.02  # a layout this much slower than the fastest is not worth its finer granularity


@dataclass(frozen=True)
class AttentionRow:
    """``us``: microseconds a layer of ``layers`` in a row. ratio: over the same kernel on contiguous static tensors
    (None where it did not run there); twin_ratio: over a static copy with the same metadata, which for the virtual
    backend is the same thing. bandwidth_share: KV bytes read a second, of what a copy on this device moves.
    worst_difference: between memories, and from float32 attention.
    """

    phase: Phase
    kernel: str
    memory: str
    sequences: int
    tokens: int
    new_tokens: int
    layers: int
    us: Spread
    ratio: Ratio | None
    twin_ratio: Ratio | None
    bandwidth_share: float
    worst_difference: float


@dataclass(frozen=True)
class LayoutRow:
    """``us``: microseconds a layer. ratio: over static tensors of one layer each, contiguous rows or a pool of
    blocks.
    """

    phase: Phase
    kernel: str
    backend: str
    interleave: int
    sequences: int
    tokens: int
    layers: int
    us: Spread
    ratio: Ratio


@dataclass(frozen=True)
class Verdict:
    """worst_ratio: the largest median over all kernels, phases and contexts that every interleave ran in. recommended:
    whether it is the largest interleave that is within 2 % of the best.
    """

    backend: str
    interleave: int
    worst_ratio: float
    cases: int
    recommended: bool


def attention(part: Part) -> None:
    """Every case that the time allows, the most telling first; fewer layers where memory is short."""
    bandwidth = copy_bandwidth(part.device, part.sizes.copy_bytes, part.sizes.repetitions)
    part.device.give_back()
    part.report.note(copy_bytes_per_second=bandwidth, interleave="all")
    for sequences, tokens in part.sizes.attention_cases:
        run = partial(_attention_case, part, sequences, tokens, bandwidth)
        part.attempt(f"{sequences} x {tokens}", _ATTENTION_SECONDS, run)


def _attention_case(part: Part, sequences: int, tokens: int, bandwidth: float) -> None:
    device, sizes = part.device, part.sizes
    model = _fitting(device, sizes, [(backend, "all") for backend in BACKENDS], sequences, tokens)
    layers = static_layers(model, sequences * tokens, sizes.cold_bytes)
    memories: list[Memory] = []
    for backend in BACKENDS:
        ours = Managed(model, device, backend, sequences, tokens, page_bytes=sizes.page_bytes)
        memories += [ours, static_twin(ours, model, layers)]
    read = sequences * tokens * model.layer_bytes
    for done in _phases(part, memories, model, f"{sequences} x {tokens}", tokens):
        for name, us in done.us.items():
            static, twin = done.us.get("static"), done.us.get(_TWINS.get(name, ""))
            row = AttentionRow(
                done.phase, done.kernel, name, sequences, tokens, done.new_tokens, done.layers, spread_us(us),
                Ratio.of(us, static) if static else None, Ratio.of(us, twin) if twin else None,
                float(read / (np.median(us) / 1e6) / bandwidth), done.worst_difference,
            )  # fmt: skip
            part.report.add("attention", row)


def layout(part: Part) -> None:
    """Each backend at each context: all interleaves and a static twin, in turn."""
    for backend in BACKENDS:
        worst: dict[int, list[float]] = defaultdict(list)
        for sequences, tokens in part.sizes.layout_cases:
            run = partial(_layout_case, part, backend, sequences, tokens, worst)
            part.attempt(f"{backend}, {sequences} x {tokens}", _LAYOUT_SECONDS, run)
        for verdict in _verdicts(backend, worst):
            part.report.add("verdict", verdict)


def _layout_case(
    part: Part, backend: Backend, sequences: int, tokens: int, worst: dict[int, list[float]]
) -> None:  # fmt: skip
    device, sizes = part.device, part.sizes
    choices: list[Interleave] = [*sizes.layout_interleaves, "all"]
    model = _fitting(device, sizes, [(backend, choice) for choice in choices], sequences, tokens)
    caches = {
        model.layers if g == "all" else g: Managed(
            model, device, backend, sequences, tokens, interleave=g, page_bytes=sizes.page_bytes
        )
        for g in choices
        if g == "all" or g < model.layers
    }
    twin = static_twin(caches[model.layers], model, static_layers(model, sequences * tokens, sizes.cold_bytes))
    for interleaved, cache in caches.items():
        cache.name = f"interleave {interleaved}"
    ratios: dict[int, list[float]] = defaultdict(list)
    for done in _phases(part, [twin, *caches.values()], model, f"{backend}, {sequences} x {tokens}", tokens):
        if twin.name not in done.us:
            continue
        for interleaved, cache in caches.items():
            us = done.us[cache.name]
            ratio = Ratio.of(us, done.us[twin.name])
            ratios[interleaved].append(ratio.median)
            shape = (backend, interleaved, sequences, tokens, model.layers)
            part.report.add("layout", LayoutRow(done.phase, done.kernel, *shape, spread_us(us), ratio))
    for interleaved, values in ratios.items():
        worst[interleaved] += values


def _verdicts(backend: str, ratios: dict[int, list[float]]) -> list[Verdict]:
    """``ratios``: by interleave, over the same cases. The model's layers may differ from case to case, and with them
    what "all" means; then only interleaves of the most cases are compared.
    """
    most = max(map(len, ratios.values()), default=0)
    worst = {interleaved: max(values) for interleaved, values in ratios.items() if len(values) == most}
    good = [interleaved for interleaved, ratio in worst.items() if ratio <= _WORTH * min(worst.values())]
    return [Verdict(backend, g, ratio, most, g == max(good)) for g, ratio in sorted(worst.items())]


def _fitting(
    device: BenchDevice, sizes: Sizes, contenders: Sequence[tuple[Backend, Interleave]], sequences: int, tokens: int
) -> ModelShape:  # fmt: skip
    """The model with as many layers as fit for all ``contenders`` and a twin for each backend, at once."""

    def need(model: ModelShape) -> int:
        # A number of layers that is all of them is "all".
        chosen = [(backend, g) for backend, g in contenders if g == "all" or g < model.layers]
        ours = sum(budget_bytes(model, backend, g, sequences, tokens, sizes.page_bytes) for backend, g in chosen)
        layers = static_layers(model, sequences * tokens, sizes.cold_bytes)
        # The twin of rows has the guard and row 0 too: with one sequence, twice what it needs.
        twins = 3 * len({backend for backend, _ in chosen}) * layers * sequences * tokens * model.layer_bytes // 2
        return ours + twins + (_MARGIN_BYTES if device.kind == "cuda" else 0)

    return fitting(sizes.model, int(sizes.memory_share * device.free_bytes()), need)


@dataclass(frozen=True)
class _Attended:
    """``us``: microseconds a layer, by memory."""

    phase: Phase
    kernel: str
    new_tokens: int
    layers: int
    us: dict[str, list[float]]
    worst_difference: float


def _phases(
    part: Part, memories: Sequence[Memory], model: ModelShape, case: str, tokens: int
) -> Iterator[_Attended]:  # fmt: skip
    """Every kernel of both phases that can be compared."""
    sizes = part.sizes
    phases: tuple[tuple[Phase, int, int], ...] = (
        ("prefill", min(sizes.prefill_tokens, tokens), min(sizes.prefill_layers, model.layers)),
        ("decode", 1, model.layers),
    )
    for phase, new_tokens, layers in phases:
        for memory in memories:
            if isinstance(memory, Managed):
                memory.ask(new_tokens)
        for kernel in kernels_of(part.device, phase):
            done = _attend(part, kernel, memories, model, layers, f"{phase}, {case}, {kernel.name}")
            if done is not None:
                yield _Attended(phase, kernel.name, new_tokens, layers, *done)


def _attend(
    part: Part, kernel: Kernel, memories: Sequence[Memory], model: ModelShape, layers: int, case: str
) -> tuple[dict[str, list[float]], float] | None:  # fmt: skip
    """One kernel over memories that hold the same, checked against each other, then timed in turn: a loop over
    ``layers`` layers, captured where the device captures. None where nothing can be compared; what a kernel cannot
    read, cannot do, or does wrong is skipped, and the report says why.
    """
    device, runs, results = part.device, dict[str, Run](), dict[str, torch.Tensor]()
    try:
        q = queries(model, memories[0])
        for memory in memories:
            try:
                run = kernel.prepare(memory, model)
                results[memory.name] = run(q, 0)
                runs[memory.name] = run
            except FAILURES as error:
                part.report.skip(f"{case}, {memory.name}", _text(error))
        if not runs:
            return None
        difference = _worst_difference(q, results, memories)
        if not difference < _TOLERANCE:
            raise BenchError(f"WRONG: results differ by {difference}; at most {_TOLERANCE} is rounding")
        loops = {name: device.capture(partial(_attend_layers, run, q, layers)) for name, run in runs.items()}
        times = interleave(device, loops, part.sizes.repetitions, _MOST_SECONDS)
    except FAILURES as error:
        part.report.skip(case, _text(error))
        return None
    return {name: [us / layers for us in times[name]] for name in times}, difference


def queries(model: ModelShape, memory: Memory) -> torch.Tensor:
    """Random ``[new tokens, query heads, width]``."""
    device = memory.caches[0][0].device
    generator = torch.Generator(device).manual_seed(memory.batch.num_new_tokens)
    shape = (memory.batch.num_new_tokens, model.query_heads, model.head_dim)
    return torch.randn(shape, generator=generator, device=device, dtype=model.dtype)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:500]}"


def _attend_layers(run: Run, q: torch.Tensor, layers: int) -> None:
    for layer in range(layers):
        run(q, layer)


def _worst_difference(q: torch.Tensor, results: dict[str, torch.Tensor], memories: Sequence[Memory]) -> float:
    first = next(iter(results.values())).float()
    worst = max(float((result.float() - first).abs().max()) for result in results.values())
    plain = next((memory for memory in memories if memory.rows is not None and memory.name in results), None)
    if plain is None:
        return worst
    return max(worst, float((first[0] - _first_token(q, plain)).abs().max()))


def _first_token(q: torch.Tensor, memory: Memory) -> torch.Tensor:
    """What the first query of the batch gets, ``[Hq, D]``, computed in float32 over its row."""
    assert memory.rows is not None and memory.batch.rows is not None
    row = int(memory.batch.rows[0])
    tokens = int(memory.batch.seq_lens_cpu[0]) - int(memory.batch.cu_seqlens_q_cpu[1]) + 1  # those it sees
    k, v = (t[row : row + 1, :tokens].float() for t in memory.rows[0])
    return at_once(q[:1].float(), k, v)[0]
