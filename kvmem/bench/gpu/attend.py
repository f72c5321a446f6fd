"""One kernel over several memories that hold the same: checked against each other, then timed in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kvmem.bench.errors import BenchError
from kvmem.bench.gpu.device import BenchDevice, Call
from kvmem.bench.gpu.kernels import Kernel, Run
from kvmem.bench.gpu.measure import interleave
from kvmem.bench.gpu.memory import Memory
from kvmem.bench.gpu.part import Report
from kvmem.bench.gpu.sizes import ModelShape
from kvmem.errors import KVMemError

__all__ = ["FAILURES", "Attended", "attend", "queries"]

#: What one kernel or one case may die of without the others: ours, torch's and FlashInfer's, and calls that another
#: version of a package does not take.
FAILURES = (KVMemError, RuntimeError, TypeError, ValueError, AttributeError)

_TOLERANCE = 2e-2  # bfloat16 inputs and outputs of order one
_MOST_SECONDS = 1.5


@dataclass(frozen=True)
class Attended:
    """``us``: microseconds a layer, by memory. ``worst_difference``: between memories, and from float32 attention."""

    us: dict[str, list[float]]
    worst_difference: float


def queries(model: ModelShape, memory: Memory) -> torch.Tensor:
    """Random ``[new tokens, query heads, width]``."""
    device = memory.caches[0][0].device
    generator = torch.Generator(device).manual_seed(memory.batch.num_new_tokens)
    shape = (memory.batch.num_new_tokens, model.query_heads, model.head_dim)
    return torch.randn(shape, generator=generator, device=device, dtype=model.dtype)


def attend(
    device: BenchDevice, kernel: Kernel, memories: Sequence[Memory], model: ModelShape, layers: int, repetitions: int,
    report: Report, case: str,
) -> Attended | None:  # fmt: skip
    """A loop over ``layers`` layers, captured where the device captures; None where nothing can be compared. What a
    kernel cannot read, cannot do, or does wrong is skipped, and ``report`` says why.
    """
    case = f"{case}, {kernel.name}"
    runs: dict[str, Run] = {}
    results: dict[str, torch.Tensor] = {}
    try:
        q = queries(model, memories[0])
        for memory in memories:
            try:
                run = kernel.prepare(memory, model)
                results[memory.name] = run(q, 0)
                runs[memory.name] = run
            except FAILURES as error:
                report.skip(f"{case}, {memory.name}", _text(error))
        if not runs:
            return None
        difference = _worst_difference(q, results, memories, model)
        if not difference < _TOLERANCE:
            raise BenchError(f"WRONG: results differ by {difference}; at most {_TOLERANCE} is rounding")
        loops = {name: device.capture(_loop(run, q, layers)) for name, run in runs.items()}
        times = interleave(device, loops, repetitions, _MOST_SECONDS)
    except FAILURES as error:
        report.skip(case, _text(error))
        return None
    return Attended({name: [us / layers for us in times[name]] for name in times}, difference)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:500]}"


def _loop(run: Run, q: torch.Tensor, layers: int) -> Call:
    def loop() -> None:
        for layer in range(layers):
            run(q, layer)

    return loop


def _worst_difference(
    q: torch.Tensor, results: dict[str, torch.Tensor], memories: Sequence[Memory], model: ModelShape
) -> float:
    first = next(iter(results.values())).float()
    worst = max(float((result.float() - first).abs().max()) for result in results.values())
    plain = next((memory for memory in memories if memory.rows is not None and memory.name in results), None)
    if plain is None:
        return worst
    expected = _first_token(q, plain, model)
    return max(worst, float((first[0] - expected).abs().max()))


def _first_token(q: torch.Tensor, memory: Memory, model: ModelShape) -> torch.Tensor:
    """What the first query of the batch gets, ``[Hq, D]``, computed in float32 over its row."""
    assert memory.rows is not None and memory.batch.rows is not None
    row = int(memory.batch.rows[0])
    tokens = int(memory.batch.seq_lens_cpu[0]) - int(memory.batch.cu_seqlens_q_cpu[1]) + 1  # those it sees
    k, v = (t[row, :tokens].float().transpose(0, 1)[None] for t in memory.rows[0])
    grouped = q[0].float().view(1, model.kv_heads, -1, model.head_dim)
    return F.scaled_dot_product_attention(grouped, k, v).view(model.query_heads, model.head_dim)
