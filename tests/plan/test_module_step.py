"""Module batches from host memory give what a model without any cache gives, whatever is done where and how many at once."""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import kvmem
from kvmem import OutOfMemory, SpecError, StaleHandle
from kvmem.bench.near.modules import RandomMixtral
from kvmem.kernels.reference import sdpa
from kvmem.kernels.write import write_kv
from kvmem.plan.hardware import ModelShape
from kvmem.plan.module_step import ModuleStep, expert_batches
from kvmem.plan.staging import StagingRing

SHAPE = ModelShape(
    num_layers=2, hidden=32, num_query_heads=4, num_kv_heads=2, head_dim=8, num_experts=8, experts_per_token=2,
    expert_hidden=48, vocab=61, dtype=torch.float64,
)  # fmt: skip
MODEL = RandomMixtral(SHAPE)
BLOCK, B, STEPS = 4, 24, 16


def open_host(backend: str, dtype: Any = torch.float64, **sizes: Any) -> kvmem.Allocator:
    spec = kvmem.CacheSpec.kv(num_layers=2, num_kv_heads=2, head_dim=8, dtype=dtype, block_size=BLOCK)
    sizes = {"memory": "2MiB", "page_bytes": 4096, "max_sequences": 40, "max_tokens": 64, "interleave": "none"} | sizes
    return kvmem.Allocator(spec, backend=backend, device="cpu", **sizes)


def reference(tokens: list[int]) -> torch.Tensor:
    """Logits ``[T, vocab]`` by the definition: no cache, every expert computes every token."""
    x, n, model = MODEL.embedding[tokens], len(tokens), MODEL
    hidden = (SHAPE.hidden,)
    mask = torch.ones(n, n).tril().bool()
    for w in model.layers:
        q, k, v = (F.rms_norm(x, hidden) @ w["qkv"]).unflatten(1, (-1, SHAPE.head_dim)).split((4, 2, 2), 1)
        q, k = (model.rope.apply(part, torch.arange(n)) for part in (q, k))
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) * SHAPE.head_dim**-0.5
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        x = x + torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(2, 1)).flatten(1) @ w["o"]
        h = F.rms_norm(x, hidden)
        routed = (h @ w["router"]).softmax(-1)
        kept = routed.topk(2).indices
        routed = torch.zeros_like(routed).scatter(1, kept, routed.gather(1, kept))
        routed = routed / routed.sum(-1, keepdim=True)
        gate, up = torch.einsum("td,edi->eti", h, w["gate_up"]).chunk(2, -1)
        x = x + torch.einsum("te,eti,eid->td", routed, F.silu(gate) * up, w["down"])
    return F.rms_norm(x, hidden) @ model.head


def prefill(alloc: kvmem.Allocator, prompt: list[int], model: RandomMixtral = MODEL) -> kvmem.Sequence:
    seq = alloc.sequence(prompt)
    new = prompt[seq.num_cached_tokens :]
    seq.extend(len(new))
    batch = alloc.batch([seq])

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        write_kv(alloc.kv(layer), batch, k, v)
        return sdpa(q, alloc.kv(layer), batch)

    model.logits(torch.tensor(new), batch.positions, attend, be=64)
    seq.commit(new)
    return seq


def prompts_of(draw: random.Random, count: int = B) -> list[list[int]]:
    return [[draw.randrange(61) for _ in range(draw.randrange(1, 40))] for _ in range(count)]


def blocks_for(ba: int, tokens: int = 40 + STEPS) -> int:
    return ba * -(-tokens // BLOCK)


@pytest.fixture(scope="module")
def run() -> tuple[list[list[int]], list[list[int]], torch.Tensor]:
    """Prompts, the tokens that follow, and their logits by step, ``[STEPS, B, vocab]``."""
    draw = random.Random(16)
    prompts = prompts_of(draw)
    follow = [[draw.randrange(61) for _ in range(STEPS)] for _ in prompts]
    return prompts, follow, torch.stack([reference(p + f)[len(p) :] for p, f in zip(prompts, follow, strict=True)], 1)


@pytest.mark.parametrize(("ba", "omega"), list(product((1, 5, 24), (0.0, 0.5, 1.0))))
def test_logits_are_those_of_the_model_alone(backend: str, run: Any, ba: int, omega: float) -> None:
    """16 steps of 24 sequences of unequal lengths; experts compute 1, 7 or 64 tokens at once."""
    prompts, follow, expected = run
    with open_host(backend, memory="4MiB", max_sequences=2 * B) as alloc:
        parents = [prefill(alloc, prompt) for prompt in prompts]
        ring = StagingRing(alloc, blocks=blocks_for(ba), buffers=3)
        declared = 3 * blocks_for(ba) * BLOCK * alloc.spec.bytes_per_token // 2
        for be in (1, 7, 64):
            sequences = [parent.fork() for parent in parents]
            for i in range(STEPS):
                tokens = [f[i] for f in follow]
                with ModuleStep(ring, sequences, micro_batch=ba, omega=omega) as step:
                    logits = MODEL.logits(torch.tensor(tokens), step.positions, step.attend, be)
                    step.commit(tokens)
                assert (logits - expected[i]).abs().max() < 1e-10, (be, i)
            for seq in sequences:
                seq.free()
        assert ring.used_bytes == 0 and ring.peak_bytes <= ring.bytes <= declared
        assert (ring.peak_bytes == 0) == (omega == 1)
        assert alloc.ledger.held["staging", "staging"] == ring.bytes
        assert alloc.check() == []


def test_sequences_that_end_are_replaced_between_steps(backend: str, seed: int) -> None:
    """A queue of 30 requests of different lengths through 7 places; each gives the logits that it gives alone."""
    draw = random.Random(seed)
    waiting = [(p, [draw.randrange(61) for _ in range(draw.randrange(1, 9))]) for p in prompts_of(draw, 30)]
    with open_host(backend, max_sequences=8) as alloc:
        ring = StagingRing(alloc, blocks=blocks_for(3), buffers=2)
        live: list[tuple[kvmem.Sequence, list[int], list[torch.Tensor]]] = []
        while waiting or live:
            while waiting and len(live) < 7:
                prompt, follow = waiting.pop()
                live.append((prefill(alloc, prompt), follow, list(reference(prompt + follow)[len(prompt) :])))
            tokens = [follow.pop(0) for _, follow, _ in live]
            with ModuleStep(ring, [seq for seq, _, _ in live], micro_batch=3, omega=draw.choice([0, 0.4])) as step:
                logits = MODEL.logits(torch.tensor(tokens), step.positions, step.attend, 5)
                step.commit(tokens)
            for row, (seq, follow, expected) in enumerate(live):
                assert (logits[row] - expected.pop(0)).abs().max() < 1e-10
                if not follow:
                    seq.free()
            live = [one for one in live if one[1]]
        assert alloc.stats().num_sequences == 0 and alloc.check() == []


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.06), (torch.float16, 0.01)])
def test_caches_of_other_dtypes(backend: str, seed: int, dtype: torch.dtype, tolerance: float) -> None:
    """Attention of a step, both shares, against float64 over the same values."""
    draw = torch.Generator().manual_seed(seed)
    with open_host(backend, dtype) as alloc:
        sequences, held = [], []
        for length in (1, 7, 33, 40, 2):
            seq = alloc.sequence()
            seq.extend(length)
            k, v = (torch.randn(length, 2, 8, generator=draw).to(dtype) for _ in "kv")
            write_kv(alloc.kv(0), alloc.batch([seq]), k, v)
            seq.commit(count=length)
            sequences.append(seq)
            held.append((k, v))
        ring = StagingRing(alloc, blocks=blocks_for(2), buffers=1)
        q, k, v = (torch.randn(5, heads, 8, generator=draw).to(dtype) for heads in (4, 2, 2))
        with ModuleStep(ring, sequences, micro_batch=2, omega=0.4) as step:
            assert step.cpu_rows == 2
            out = step.attend(0, q, k, v, scale=0.5)
        assert out.dtype == dtype
        for row, (old_k, old_v) in enumerate(held):
            keys, values = torch.cat([old_k, k[row : row + 1]]), torch.cat([old_v, v[row : row + 1]])
            grouped = q[row].double().view(2, 2, 8)
            weights = (torch.einsum("hgd,khd->hgk", grouped, keys.double()) * 0.5).softmax(-1)
            expected = torch.einsum("hgk,khd->hgd", weights, values.double()).reshape(4, 8)
            assert (out[row].double() - expected).abs().max() < tolerance


def test_a_step_that_fails_changes_nothing(backend: str) -> None:
    with open_host(backend) as alloc:
        sequences = [prefill(alloc, [1, 2, 3]), prefill(alloc, [4, 5])]
        ring = StagingRing(alloc, blocks=blocks_for(1), buffers=1)

        def lengths() -> list[tuple[int, int]]:
            return [(seq.num_tokens, seq.num_committed_tokens) for seq in sequences]

        q, k, v = (torch.ones(2, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
        before = lengths()
        with ModuleStep(ring, sequences, micro_batch=1) as step:
            assert lengths() != before
            for wrong in (
                (1, q, k, v),
                (0, q[:1], k, v),
                (0, q, k[:1], v),
                (0, q[:, :3], k, v),
                (0, q[..., :4], k, v),
                (0, q, None, v),
                (0, q, k, v.to("meta")),
            ):
                with pytest.raises(SpecError):
                    step.attend(*wrong)
            with pytest.raises(SpecError, match="0 of 2 layers"):
                step.commit([1, 2])
            for omega in (0, 1):
                with pytest.raises(SpecError, match="ring: is in use"):
                    ModuleStep(ring, [prefill(alloc, [6])], micro_batch=1, omega=omega)
            step.attend(0, q, k, v)  # after all that, it still works
        assert lengths() == before and ring.used_bytes == 0

        def broken(*args: object) -> torch.Tensor:
            raise RuntimeError("kernel")

        with (
            pytest.raises(RuntimeError, match="kernel"),
            ModuleStep(ring, sequences, micro_batch=1, attend=broken) as step,
        ):
            step.attend(0, q, k, v)
        assert lengths() == before and ring.used_bytes == 0
        with pytest.raises(SpecError, match="the step has ended"):
            step.attend(0, q, k, v)

        with pytest.raises(StaleHandle), ModuleStep(ring, sequences, micro_batch=1) as step:
            sequences[1].free()  # within a step
            step.attend(0, q, k, v)
        assert sequences[0].num_tokens == 3 and ring.used_bytes == 0 and alloc.check() == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"micro_batch": 0}, "micro_batch"),
        ({"omega": 1.1}, "omega"),
        ({"omega": -0.1}, "omega"),
        ({"omega": float("nan")}, "omega"),
        ({"sequences": []}, "one or more"),
        ({"sequences": [0, 0]}, "each once"),
        ({"sequences": [2]}, "not committed"),
        ({"micro_batch": 2}, "a staging buffer holds 1"),
    ],
)
def test_what_a_step_refuses(backend: str, changes: dict[str, Any], words: str) -> None:
    with open_host(backend) as alloc:
        sequences = [prefill(alloc, [1]), prefill(alloc, [2]), prefill(alloc, [3])]
        sequences[2].extend(1)
        ring = StagingRing(alloc, blocks=1, buffers=2)
        values: dict[str, Any] = {"sequences": [0, 1], "micro_batch": 1} | changes
        chosen = [sequences[i] for i in values.pop("sequences")]
        with pytest.raises(SpecError, match=words):
            ModuleStep(ring, chosen, **values)
        assert [seq.num_tokens for seq in sequences] == [1, 1, 2] and ring.used_bytes == 0


def test_no_room_for_the_new_tokens(backend: str) -> None:
    with open_host(backend, max_tokens=4) as alloc:
        sequences = [prefill(alloc, [1, 2, 3]), prefill(alloc, [1, 2, 3, 4])]
        with pytest.raises((OutOfMemory, SpecError)):
            ModuleStep(StagingRing(alloc, blocks=9), sequences, micro_batch=1)
        assert [seq.num_tokens for seq in sequences] == [3, 4]


def test_tokens_by_expert(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for tokens, each, most in ((0, 2, 3), (1, 1, 1), (40, 2, 7), (40, 3, 1000)):
        chosen = torch.stack(
            [torch.randperm(8, generator=draw)[:each] for _ in range(tokens)] or [torch.zeros(0, each)]
        )
        chosen = chosen.long().view(tokens, each)
        seen, experts = torch.zeros_like(chosen), []
        for expert, rows, places in expert_batches(chosen, most):
            assert 0 < len(rows) <= most and (chosen[rows, places] == expert).all()
            seen[rows, places] += 1
            experts.append(expert)
        assert (seen == 1).all() and experts == sorted(experts)
        assert len(experts) == sum(-(-int((chosen == e).sum()) // most) for e in range(8))
    for wrong in (torch.zeros(3), torch.zeros(3, 2)):
        with pytest.raises(SpecError, match="chosen"):
            next(expert_batches(wrong, 1))
    with pytest.raises(SpecError, match="most"):
        next(expert_batches(torch.zeros(3, 2, dtype=torch.int64), 0))
