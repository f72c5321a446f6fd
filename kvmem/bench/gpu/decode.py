"""A batch that decodes: the whole step, and the allocator's part of it, against a static pool.

A step commits, makes room for a token of each sequence and fills the metadata (`Allocator.step`), plans the kernel, and
writes and attends in every layer (one captured graph on CUDA); then it waits for the device, as a decoder does that
needs the tokens. There is no other work in it, no matrix product, so the allocator's share is larger here than in a
model. Contenders take turns of some steps each, so that the mapper has no more time than in a decoder alone.

Two phases: in ``fresh`` the pages are mapped while the sequences grow, by the mapper; in ``parked`` a second batch
finds the rows of the first. Prompts differ by a token from each other, so that block and page edges are spread over the
steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvmem.bench.gpu.decoders import Decoder, ManagedDecoder, StaticDecoder, StepTimes
from kvmem.bench.gpu.device import BenchDevice
from kvmem.bench.gpu.measure import Part
from kvmem.bench.gpu.memory import budget_bytes, fitting, open_cache
from kvmem.bench.gpu.sizes import ModelShape, Sizes
from kvmem.bench.model import BACKENDS
from kvmem.bench.text import BenchError
from kvmem.bench.timing import WARM_UP, Ratio, Spread

_MARGIN_BYTES = 3 << 30
_TOLERANCE = 2e-2
_PHASE_SECONDS = 25.0


@dataclass(frozen=True)
class DecodeRow:
    """``step_us``: a whole step by the host's clock. ratio: over the static pool's step of the same number.

    allocator_us: of `Allocator.step`, one call; for the static pool, of filling its metadata. plan_us: of the kernel's.
    driver_calls: by any thread, the mapper's included; most_driver_calls: in one step. calls_meanwhile: those that
    happened while `Allocator.step` ran. The core does not tell threads apart, so they are an upper bound of the calls
    in the step path: some are the mapper's.
    late_steps: steps at whose start the mapper had not yet done what earlier steps had decided; most_lag_steps: how
    many steps back the oldest of that was decided, most_lag_pages: how many pages it was.
    """

    phase: str
    memory: str
    sequences: int
    prompt_tokens: int
    steps: int
    layers: int
    step_us: Spread
    ratio: Ratio | None
    allocator_us: Spread
    plan_us: Spread
    driver_calls: int
    most_driver_calls: int
    calls_meanwhile: int
    late_steps: int
    most_lag_steps: int
    most_lag_pages: int
    worst_difference: float


def decode(part: Part) -> None:
    """Both phases, or the first alone where the time does not allow the second."""
    device, sizes = part.device, part.sizes
    sequences, tokens = sizes.decode_sequences, sizes.decode_prompt + WARM_UP + sizes.decode_steps
    model = _fitting(device, sizes, sequences, tokens)
    part.report.note(
        layers=model.layers, layers_of_the_model=sizes.model.layers, map_ahead_tokens=sizes.map_ahead_tokens,
        captured=device.captures,
        why_fewer_layers=None if model == sizes.model else "three caches and a static pool are held at once",
    )  # fmt: skip
    decoders: list[Decoder] = [StaticDecoder(device, model, sequences, tokens)]
    for backend in BACKENDS:
        allocator = open_cache(
            model, device, backend, sequences, tokens, page_bytes=sizes.page_bytes,
            map_ahead_tokens=sizes.map_ahead_tokens,
        )  # fmt: skip
        decoders.append(ManagedDecoder(device, model, allocator, sequences, tokens))
    for phase in ("fresh", "parked"):
        if part.allows(phase, _PHASE_SECONDS):
            for row in _phase(phase, decoders, sizes, model):
                part.report.add("decode", row)


def _fitting(device: BenchDevice, sizes: Sizes, sequences: int, tokens: int) -> ModelShape:
    def need(model: ModelShape) -> int:
        longest = tokens + sizes.map_ahead_tokens
        ours = sum(budget_bytes(model, name, model.layers, sequences, longest, sizes.page_bytes) for name in BACKENDS)
        return ours + sequences * tokens * model.token_bytes + (_MARGIN_BYTES if device.kind == "cuda" else 0)

    return fitting(sizes.model, int(sizes.memory_share * device.free_bytes()), need)


def _phase(phase: str, decoders: list[Decoder], sizes: Sizes, model: ModelShape) -> list[DecodeRow]:
    sequences, steps = sizes.decode_sequences, sizes.decode_steps
    lengths = (sizes.decode_prompt - np.arange(sequences) % min(32, sizes.decode_prompt)).astype(np.int32)
    times: dict[str, list[StepTimes]] = {decoder.name: [] for decoder in decoders}
    for decoder in decoders:
        decoder.begin(lengths)
        for _ in range(WARM_UP):  # the first captures the graph
            decoder.step()
    for first in range(0, steps, sizes.decode_turn):
        for decoder in decoders:
            for _ in range(min(sizes.decode_turn, steps - first)):
                times[decoder.name].append(decoder.step())
    difference = _worst_difference(decoders)
    for decoder in decoders:
        decoder.end()
    static = [step.whole for step in times["static pool"]]
    return [_row(phase, decoder.name, times[decoder.name], static, sizes, model, difference) for decoder in decoders]


def _worst_difference(decoders: list[Decoder]) -> float:
    """The largest difference of the last step's results from the static pool's; all have the same content."""
    expected = decoders[0].out.float()
    worst = max(float((decoder.out.float() - expected).abs().max()) for decoder in decoders)
    if not worst < _TOLERANCE:
        raise BenchError(f"decode: results differ by {worst}; at most {_TOLERANCE} is rounding")
    return worst


def _row(
    phase: str, name: str, times: list[StepTimes], static: list[int], sizes: Sizes, model: ModelShape, worst: float
) -> DecodeRow:
    whole, allocator, plan = (
        np.array([getattr(step, part) for step in times]) for part in ("whole", "allocator", "plan")
    )
    return DecodeRow(
        phase, name, sizes.decode_sequences, sizes.decode_prompt, len(times), model.layers, Spread.of_ns(whole),
        None if name == "static pool" else Ratio.of(whole.tolist(), static), Spread.of_ns(allocator),
        Spread.of_ns(plan), sum(step.driver_calls for step in times), max(step.driver_calls for step in times),
        sum(step.calls_meanwhile for step in times), sum(step.lag_pages > 0 for step in times),
        max(step.lag_steps for step in times), max(step.lag_pages for step in times), worst,
    )  # fmt: skip
