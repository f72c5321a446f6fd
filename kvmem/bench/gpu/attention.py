"""Decode and prefill attention over both backends and over static tensors: the same kernels, contents and metadata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvmem.bench.gpu.attend import FAILURES, Attended, attend
from kvmem.bench.gpu.device import BenchDevice
from kvmem.bench.gpu.kernels import Phase, kernels_of
from kvmem.bench.gpu.measure import Ratio, copy_bandwidth, spread_us
from kvmem.bench.gpu.memory import Managed, Memory, budget_bytes, fitting, static_layers, static_twin
from kvmem.bench.gpu.part import Budget, Report
from kvmem.bench.gpu.sizes import ModelShape, Sizes
from kvmem.bench.memory import BACKENDS
from kvmem.bench.spread import Spread

__all__ = ["AttentionRow", "attention"]

_TWINS = {"virtual": "static", "paged": "static pool"}
_CASE_SECONDS = 12.0
_MARGIN_BYTES = 2 << 30  # queries, results, workspaces


@dataclass(frozen=True)
class AttentionRow:
    """``us``: microseconds a layer of ``layers`` in a row. ratio: over the same kernel on contiguous static tensors
    (None where it did not run there); twin_ratio: over a static copy with the same metadata, which for the virtual
    backend is the same thing. bandwidth_share: KV bytes read a second, of what a copy on this device moves.
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


def attention(device: BenchDevice, sizes: Sizes, budget: Budget, report: Report) -> None:
    """Every case that the time allows, the most telling first; fewer layers where memory is short."""
    bandwidth = copy_bandwidth(device, sizes.copy_bytes, sizes.repetitions)
    device.give_back()
    report.note(copy_bytes_per_second=bandwidth, interleave="all")
    for sequences, tokens in sizes.attention_cases:
        if not budget.allows(_CASE_SECONDS if device.kind == "cuda" else 0):
            report.skip(f"{sequences} x {tokens}", "the part's time was up")
            continue
        try:
            _case(device, sizes, sequences, tokens, bandwidth, report)
        except FAILURES as error:  # memory, mostly
            report.skip(f"{sequences} x {tokens}", error)
        device.give_back()


def _case(
    device: BenchDevice, sizes: Sizes, sequences: int, tokens: int, bandwidth: float, report: Report
) -> None:  # fmt: skip
    model, memories = _memories(device, sizes, sequences, tokens)
    phases: tuple[tuple[Phase, int, int], ...] = (
        ("prefill", min(sizes.prefill_tokens, tokens), min(sizes.prefill_layers, model.layers)),
        ("decode", 1, model.layers),
    )
    for phase, new_tokens, layers in phases:
        _ask(memories, new_tokens)
        for kernel in kernels_of(device, phase):
            case = f"{phase}, {sequences} x {tokens}"
            done = attend(device, kernel, memories, model, layers, sizes.repetitions, report, case)
            if done is None:
                continue
            for name in done.us:
                row = _row(phase, kernel.name, name, done, (sequences, tokens, new_tokens, layers), model, bandwidth)
                report.add("attention", row)


def _memories(
    device: BenchDevice, sizes: Sizes, sequences: int, tokens: int
) -> tuple[ModelShape, list[Memory]]:  # fmt: skip
    model = _fitting(device, sizes, sequences, tokens)
    layers = static_layers(model, sequences * tokens, sizes.cold_bytes)
    memories: list[Memory] = []
    for backend in BACKENDS:
        ours = Managed(model, device, backend, sequences, tokens, page_bytes=sizes.page_bytes)
        memories += [ours, static_twin(ours, model, layers)]
    return model, memories


def _fitting(device: BenchDevice, sizes: Sizes, sequences: int, tokens: int) -> ModelShape:
    page = sizes.page_bytes or (2 << 20)

    def need(model: ModelShape) -> int:
        ours = (budget_bytes(model, backend, model.layers, sequences, tokens, page) for backend in BACKENDS)
        # The twin of rows has the guard and row 0 too: with one sequence, twice what it needs.
        static = 3 * static_layers(model, sequences * tokens, sizes.cold_bytes) * sequences * tokens * model.layer_bytes
        return sum(ours) + static + (_MARGIN_BYTES if device.kind == "cuda" else 0)

    return fitting(sizes.model, int(sizes.memory_share * device.free_bytes()), need)


def _ask(memories: Sequence[Memory], new_tokens: int) -> None:
    """Ours and their twins, which follow them, get one batch."""
    for memory in memories:
        if isinstance(memory, Managed):
            batch = memory.ask(new_tokens)
        memory.batch = batch


def _row(
    phase: Phase, kernel: str, name: str, done: Attended, shape: tuple[int, int, int, int], model: ModelShape,
    bandwidth: float,
) -> AttentionRow:  # fmt: skip
    sequences, tokens, new_tokens, layers = shape
    us = done.us[name]
    static, twin = done.us.get("static"), done.us.get(_TWINS.get(name, ""))
    read = sequences * tokens * model.layer_bytes
    return AttentionRow(
        phase, kernel, name, sequences, tokens, new_tokens, layers, spread_us(us),
        Ratio.of(us, static) if static else None, Ratio.of(us, twin) if twin else None,
        float(read / (np.median(us) / 1e6) / bandwidth), done.worst_difference,
    )  # fmt: skip
