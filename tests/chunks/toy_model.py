"""A decoder of four layers in float64, random weights: grouped queries, rotary positions, RMSNorm, SwiGLU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

import kvmem
from kvmem.chunks import Chunk, ChunkFile, compose, export
from kvmem.kernels.write import write_kv
from kvmem.layouts.rope import Rope
from kvmem.tiers import Identity

LAYERS, HEADS, KV_HEADS, WIDTH, VOCAB, HIDDEN = 4, 4, 2, 32, 211, 128
ME = Identity("toy of 4 layers, seed 0")
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Toy:
    def __init__(self, seed: int = 0, theta: float = 10_000.0) -> None:
        draw = torch.Generator().manual_seed(seed)
        outputs = {
            "q": HEADS * WIDTH,
            "k": KV_HEADS * WIDTH,
            "v": KV_HEADS * WIDTH,
            "o": HIDDEN,
            "gate": 256,
            "up": 256,
        }
        shapes = {**{name: (HIDDEN, width) for name, width in outputs.items()}, "down": (256, HIDDEN)}
        self.layers = [
            {name: torch.randn(shape, generator=draw, dtype=torch.float64) * shape[0] ** -0.5 for name, shape in shapes.items()}
            for _ in range(LAYERS)
        ]  # fmt: skip
        self.embed = torch.randn(VOCAB, HIDDEN, generator=draw, dtype=torch.float64)
        self.rope = Rope.default(WIDTH, theta=theta)

    def qkv(
        self, layer: int, x: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        h = F.rms_norm(x, (HIDDEN,))
        q, k, v = ((h @ self.layers[layer][name]).unflatten(1, (-1, WIDTH)) for name in "qkv")
        return self.rope.apply(q, positions), self.rope.apply(k, positions), v

    def rest(self, layer: int, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        w = self.layers[layer]
        x = x + attended.flatten(1) @ w["o"]
        h = F.rms_norm(x, (HIDDEN,))
        return x + (F.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (HIDDEN,)) @ self.embed.T

    def forward(self, tokens: Sequence[int], positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """attend(layer, q, k, v) stores k and v and returns q's shape."""
        x = self.embed[torch.as_tensor(tokens).long()]
        for layer in range(LAYERS):
            x = self.rest(layer, x, attend(layer, *self.qkv(layer, x, positions)))
        return self.logits(x)

    def full(self, tokens: Sequence[int]) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Logits of all tokens without a cache, and K and V of each layer."""
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        positions = torch.arange(len(tokens))

        def attend(_: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            kept.append((k, v))
            return attention(q, k, v, positions)

        return self.forward(tokens, positions, attend), kept


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Of rows at any positions over all tokens."""
    mask = torch.arange(len(k)) <= positions.unsqueeze(1)
    q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(0, 1)


def spec_of(**options: Any) -> kvmem.CacheSpec:
    return kvmem.CacheSpec.kv(
        **(dict(num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=WIDTH, dtype="float64") | options)
    )


def allocator(backend: str, **options: Any) -> kvmem.Allocator:
    sizes = dict(memory="32MiB", max_sequences=16, max_tokens=2048, page_bytes=4096)
    return kvmem.Allocator(spec_of(), backend=backend, device="cpu", **(sizes | options))


def run(model: Toy, alloc: kvmem.Allocator, seq: kvmem.Sequence, tokens: Sequence[int]) -> torch.Tensor:
    """Compute and commit tokens; return their logits."""
    seq.extend(len(tokens))
    batch = alloc.batch([seq])
    positions = batch.positions.long()

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        write_kv(alloc.kv(layer), batch, k, v)
        held = (t.as_subclass(torch.Tensor) for t in seq.kv(layer))
        return attention(q, *held, positions)

    found = model.forward(tokens, positions, attend)
    seq.commit(tokens)
    return found


def generate(model: Toy, alloc: kvmem.Allocator, seq: kvmem.Sequence, tokens: list[int], count: int) -> list[int]:
    """Greedy: compute what the sequence does not have of ``tokens``, then ``count`` more; return those."""
    new, found = tokens[seq.num_committed_tokens :], []
    for _ in range(count):
        new = [int(run(model, alloc, seq, new)[-1].argmax())]
        found += new
    return found


def computed(model: Toy, tokens: list[int], backend: str = "paged") -> Chunk:
    """A chunk of tokens that were computed alone."""
    alloc = allocator(backend)
    with alloc.sequence() as seq:
        run(model, alloc, seq, tokens)
        return export(alloc, seq, tokens, identity=ME)


def blend(
    model: Toy,
    alloc: kvmem.Allocator,
    seq: kvmem.Sequence,
    chunks: Sequence[Chunk | ChunkFile],
    question: list[int],
    **options: Any,
) -> tuple[torch.Tensor, int]:
    """Logits of the last token after one pass over chunks and question, and how many rows were computed behind the
    check layer."""
    with compose(alloc, seq, chunks, question, rope=model.rope, **options) as plan:
        x = model.embed[torch.as_tensor(plan.tokens).long()]
        for layer in range(LAYERS):
            plan.load(layer)
            q, k, v = model.qkv(layer, x, plan.positions[plan.rows])
            if layer == plan.check_layer:
                rows = plan.select(k)
                x, q, k, v = x[rows], q[rows], k[rows], v[rows]
            plan.write(layer, k=k, v=v)
            held = (plan.read(layer, name) for name in "kv")
            x = model.rest(layer, x, attention(q, *held, plan.positions[plan.rows]))
        plan.commit()
    return model.logits(x)[-1], len(plan.rows)
