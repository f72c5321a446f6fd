"""Module batching on this machine: a plan from a measured profile, and what the planned steps really take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from time import thread_time, thread_time_ns

import torch
import torch.nn.functional as F

from kvmem import Allocator, CacheSpec
from kvmem.bench.model import Backend
from kvmem.bench.timing import Ratio, Spread, in_turn, one_thread
from kvmem.layouts.rope import Rope
from kvmem.plan import Grid, ModelShape, ModulePlan, ModuleStep, StagingRing, expert_batches, modules, profile
from kvmem.plan.measure import filled_sequences
from kvmem.spec.dtypes import parse_dtype

#: A model whose kernels take longer than the calls of them, on any machine.
SHAPE = ModelShape(
    num_layers=2, hidden=512, num_query_heads=8, num_kv_heads=2, head_dim=64, num_experts=8, experts_per_token=2,
    expert_hidden=1024, vocab=1000, dtype=torch.float32,
)  # fmt: skip
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class RandomMixtral:
    """A decoder of Mixtral's form with random weights."""

    def __init__(self, shape: ModelShape, seed: int = 0) -> None:
        draw, self.shape = torch.Generator().manual_seed(seed), shape
        dtype = parse_dtype(shape.dtype)

        def weights(*sizes: int) -> torch.Tensor:
            return torch.randn(sizes, generator=draw, dtype=torch.float64).mul_(sizes[-2] ** -0.5).to(dtype)

        width, inner, experts = shape.hidden, shape.expert_hidden, shape.num_experts
        self.layers = [
            {
                "qkv": weights(width, shape.qkv_width), "o": weights(shape.query_width, width),
                "router": weights(width, experts), "gate_up": weights(experts, width, 2 * inner),
                "down": weights(experts, inner, width),
            }
            for _ in range(shape.num_layers)
        ]  # fmt: skip
        self.embedding, self.head = weights(shape.vocab, width), weights(width, shape.vocab)
        self.rope = Rope.default(shape.head_dim)

    def logits(self, tokens: torch.Tensor, positions: torch.Tensor, attend: Attend, be: int) -> torch.Tensor:
        """``[T, vocab]`` of tokens ``[T]`` at ``positions``. attend: ``(layer, q, k, v) -> [T, Hq, D]``, q and k after
        rotation. be: tokens that an expert computes at once.
        """
        shape, x = self.shape, self.embedding[tokens]
        heads = [shape.num_query_heads, shape.num_kv_heads, shape.num_kv_heads]
        for layer, w in enumerate(self.layers):
            projected = (F.rms_norm(x, (shape.hidden,)) @ w["qkv"]).view(len(x), -1, shape.head_dim)
            q, k, v = torch.split(projected, heads, 1)
            q, k = (self.rope.apply(part, positions) for part in (q, k))
            x = x + attend(layer, q, k, v).flatten(1) @ w["o"]
            x = x + self._experts(F.rms_norm(x, (shape.hidden,)), w, be)
        return F.rms_norm(x, (shape.hidden,)) @ self.head

    def _experts(self, h: torch.Tensor, w: dict[str, torch.Tensor], be: int) -> torch.Tensor:
        scores, chosen = (h @ w["router"]).topk(self.shape.experts_per_token)
        shares, out = scores.softmax(-1), torch.zeros_like(h)
        for expert, rows, places in expert_batches(chosen, be):
            gate, up = (h[rows] @ w["gate_up"][expert]).chunk(2, -1)
            out.index_add_(0, rows, (F.silu(gate) * up) @ w["down"][expert] * shares[rows, places, None])
        return out


@dataclass(frozen=True)
class ModuleRow:
    """Decode steps of ``B`` sequences of ``context`` tokens, by a plan of this case.

    ``predicted_us``: by the plan, from the rates that were measured before. ``us``: the steps themselves. ``ratio``:
    predicted over measured, by repetition: 1 is right, less is too optimistic.
    """

    case: str
    backend: Backend
    context: int
    B: int
    ba: int
    be: int
    omega: float
    predicted_us: float
    us: Spread
    ratio: Ratio


#: By case, what the grid of the plan is restricted to.
CASES = {
    "planned": Grid(),
    "staged only": Grid(omega=(0.0,)),
    "in place only": Grid(omega=(1.0,)),
    "one sequence at a time": Grid(omega=(0.0,), ba=(1,)),
}


def module_batching(
    backend: Backend = "paged",
    *,
    batch: int = 32,
    context: int = 1024,
    repetitions: int = 10,
    shape: ModelShape = SHAPE,
) -> list[ModuleRow]:
    """A row for each of ``CASES``. Device and host are this CPU, on one thread, so no part of a step hides another.
    Times are that thread's, which other work on the machine lengthens little.
    """
    with one_thread():
        return _measured(backend, batch, context, repetitions, shape)


def _measured(backend: Backend, batch: int, context: int, repetitions: int, shape: ModelShape) -> list[ModuleRow]:
    spec = CacheSpec.kv(
        num_layers=shape.num_layers, num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim, dtype=shape.dtype
    )
    found = profile(
        "cpu", model=shape, device_bytes=1 << 30, host_bytes=1 << 30, context=context, repetitions=repetitions,
        clock=thread_time,
    )  # fmt: skip
    plans = {
        case: modules(spec, shape, found, context=context, grid=replace(grid, B=(batch,)))
        for case, grid in CASES.items()
    }
    memory = (batch + 4) * (context + 16) * spec.bytes_per_token + (8 << 20)
    with Allocator(
        spec, backend=backend, device="cpu", memory=memory, max_sequences=batch, max_tokens=context, interleave="none"
    ) as host:
        ids = filled_sequences(host, batch, context - 1).tolist()
        model = RandomMixtral(shape)
        rings = {
            case: StagingRing(host, blocks=plan.staging_blocks, buffers=plan.staging_buffers)
            for case, plan in plans.items()
        }
        steps = {case: partial(_step, rings[case], model, ids, plan) for case, plan in plans.items()}
        times = in_turn(steps, repetitions, clock=thread_time_ns)
    return [
        ModuleRow(
            case, backend, context, plan.B, plan.ba, plan.be, plan.omega, 1e6 * plan.step_seconds,
            Spread.of_ns(times[case]), Ratio.of([1e9 * plan.step_seconds] * len(times[case]), times[case]),
        )
        for case, plan in plans.items()
    ]  # fmt: skip


def _step(ring: StagingRing, model: RandomMixtral, ids: list[int], plan: ModulePlan) -> None:
    """A step that is not committed, so that the next one finds the same."""
    with ModuleStep(ring, ids[: plan.B], micro_batch=plan.ba, omega=plan.omega) as step:
        model.logits(torch.arange(plan.B) % model.shape.vocab, step.positions, step.attend, plan.be)
