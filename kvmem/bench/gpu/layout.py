"""Attention time by how many layers lie side by side in a page: what settles the default ``interleave`` of a device."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

from kvmem.bench.gpu.attend import FAILURES, attend
from kvmem.bench.gpu.device import BenchDevice
from kvmem.bench.gpu.kernels import Phase, kernels_of
from kvmem.bench.gpu.measure import Ratio, spread_us
from kvmem.bench.gpu.memory import Managed, Memory, budget_bytes, fitting, static_layers, static_twin
from kvmem.bench.gpu.part import Budget, Report
from kvmem.bench.gpu.sizes import ModelShape, Sizes
from kvmem.bench.memory import BACKENDS, Backend
from kvmem.bench.spread import Spread

__all__ = ["LayoutRow", "Verdict", "layout"]

_CASE_SECONDS = 14.0
_MARGIN_BYTES = 2 << 30
_WORTH = 1.02  # a layout this much slower than the fastest is not worth its finer granularity


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


def layout(device: BenchDevice, sizes: Sizes, budget: Budget, report: Report) -> None:
    """Each backend at each context: all interleaves and a static twin, in turn."""
    worst: dict[Backend, dict[int, list[float]]] = {}
    for backend in BACKENDS:
        for sequences, tokens in sizes.layout_cases:
            if not budget.allows(_CASE_SECONDS if device.kind == "cuda" else 0):
                report.skip(f"{backend}, {sequences} x {tokens}", "the part's time was up")
                continue
            try:
                ratios = _case(device, sizes, backend, sequences, tokens, report)
            except FAILURES as error:  # memory, mostly
                report.skip(f"{backend}, {sequences} x {tokens}", error)
                ratios = {}
            for interleave, values in ratios.items():
                worst.setdefault(backend, defaultdict(list))[interleave] += values
            device.give_back()
    for backend, by_interleave in worst.items():
        for verdict in _verdicts(backend, by_interleave):
            report.add("verdict", verdict)


def _case(
    device: BenchDevice, sizes: Sizes, backend: Backend, sequences: int, tokens: int, report: Report
) -> dict[int, list[float]]:
    model = _fitting(device, sizes, backend, sequences, tokens)
    choices: list[int | Literal["all"]] = [g for g in sizes.layout_interleaves if g < model.layers]
    caches = {
        model.layers if g == "all" else g: Managed(
            model, device, backend, sequences, tokens, interleave=g, page_bytes=sizes.page_bytes
        )
        for g in [*choices, "all"]
    }  # fmt: skip
    twin = static_twin(caches[model.layers], model, static_layers(model, sequences * tokens, sizes.cold_bytes))
    for interleave, cache in caches.items():
        cache.name = f"interleave {interleave}"
    memories: list[Memory] = [twin, *caches.values()]
    ratios: dict[int, list[float]] = defaultdict(list)
    phases: tuple[tuple[Phase, int, int], ...] = (
        ("prefill", min(sizes.prefill_tokens, tokens), min(sizes.prefill_layers, model.layers)),
        ("decode", 1, model.layers),
    )
    for phase, new_tokens, layers in phases:
        for cache in caches.values():
            cache.ask(new_tokens)
        twin.batch = caches[model.layers].batch
        for kernel in kernels_of(device, phase):
            case = f"{phase}, {backend}, {sequences} x {tokens}"
            done = attend(device, kernel, memories, model, layers, sizes.repetitions, report, case)
            if done is None or twin.name not in done.us:
                continue
            for interleave, cache in caches.items():
                us = done.us[cache.name]
                ratio = Ratio.of(us, done.us[twin.name])
                ratios[interleave].append(ratio.median)
                shape = (backend, interleave, sequences, tokens, model.layers)
                report.add("layout", LayoutRow(phase, kernel.name, *shape, spread_us(us), ratio))
    return ratios


def _fitting(device: BenchDevice, sizes: Sizes, backend: Backend, sequences: int, tokens: int) -> ModelShape:
    page = sizes.page_bytes or (2 << 20)

    def need(model: ModelShape) -> int:
        choices = [g for g in sizes.layout_interleaves if g < model.layers] + [model.layers]
        ours = sum(budget_bytes(model, backend, g, sequences, tokens, page) for g in choices)
        layers = static_layers(model, sequences * tokens, sizes.cold_bytes)
        static = 3 * layers * sequences * tokens * model.layer_bytes // 2
        return ours + static + (_MARGIN_BYTES if device.kind == "cuda" else 0)

    return fitting(sizes.model, int(sizes.memory_share * device.free_bytes()), need)


def _verdicts(backend: str, ratios: dict[int, list[float]]) -> list[Verdict]:
    """``ratios``: by interleave, over the same cases. The model's layers may differ from case to case, and with them
    what "all" means; then only interleaves of the most cases are compared.
    """
    most = max(len(values) for values in ratios.values())
    worst = {interleave: max(values) for interleave, values in ratios.items() if len(values) == most}
    good = [interleave for interleave, ratio in worst.items() if ratio <= _WORTH * min(worst.values())]
    return [Verdict(backend, g, ratio, most, g == max(good)) for g, ratio in sorted(worst.items())]
