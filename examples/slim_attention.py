"""Shows Slim attention in a decoder of your own: only K is cached, and V is derived from it. Asserts that it holds half
the bytes of K and V, and that both backends generate the same tokens as with K and V."""

import torch
import torch.nn.functional as F

import kvmem
from kvmem.layouts import LayoutCache, PlainKV
from kvmem.layouts.rope import Rope
from kvmem.layouts.slim import Projection, SlimK

LAYERS, HEADS, WIDTH, VOCAB, HIDDEN = 3, 4, 16, 97, 64  # HIDDEN is HEADS * WIDTH: each head has a K of its own
torch.set_num_threads(1)  # the tensors are tiny
rope = Rope.default(WIDTH)


class TinyDecoder:
    """Random weights: RMSNorm, rotary positions, multi-head attention, an MLP."""

    def __init__(self, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        shapes = {**dict.fromkeys("qkvo", (HIDDEN, HIDDEN)), "up": (HIDDEN, 128), "down": (128, HIDDEN)}
        self.layers = [
            {name: torch.randn(shape, generator=draw) * shape[0] ** -0.5 for name, shape in shapes.items()}
            for _ in range(LAYERS)
        ]
        self.embed = torch.randn(VOCAB, HIDDEN, generator=draw)

    def logits(self, tokens, positions, attend):
        """tokens, positions: [T]. attend(layer, q, k, v) takes q after rotation and k before it, [T, HEADS, WIDTH]."""
        x = self.embed[tokens]
        for number, w in enumerate(self.layers):
            h = F.rms_norm(x, (HIDDEN,))
            q, k, v = ((h @ w[name]).unflatten(1, (HEADS, WIDTH)) for name in "qkv")
            x = x + attend(number, rope.apply(q, positions), k, v).flatten(1) @ w["o"]
            x = x + F.silu(F.rms_norm(x, (HIDDEN,)) @ w["up"]) @ w["down"]
        return F.rms_norm(x, (HIDDEN,)) @ self.embed.T


def generate(model, layout, stored, tokens, steps, backend):
    """stored(k, v, positions): what the layout encodes. Returns tokens, and the bytes that the ledger shows held."""
    alloc = kvmem.Allocator(layout.spec, backend=backend, device="cpu", memory="4MiB", max_sequences=4, max_tokens=256)
    cache = LayoutCache(layout, alloc)
    with alloc.sequence() as seq:
        new = tokens
        for _ in range(steps):
            seq.extend(len(new))
            batch = alloc.batch([seq])

            def attend(layer, q, k, v, batch=batch):
                cache.write(layer, batch, *stored(k, v, batch.positions))
                return cache.attend(q, layer, batch)[0]

            logits = model.logits(torch.tensor(new), batch.positions, attend)
            seq.commit(new)
            new = [int(logits[-1].argmax())]
            tokens = [*tokens, *new]
        return tokens, sum(alloc.ledger.held.values())


model, prompt = TinyDecoder(), [3, 14, 15, 92, 65, 35, 89]
spec = kvmem.CacheSpec.kv(num_layers=LAYERS, num_kv_heads=HEADS, head_dim=WIDTH, dtype=torch.float32)
projections = [Projection(w["k"], w["v"]) for w in model.layers]
slim = SlimK(projections, num_heads=HEADS, head_dim=WIDTH, rope=rope, dtype=torch.float32)
print(slim.report())
for backend in ("virtual", "paged"):
    expected, full = generate(
        model, PlainKV(spec), lambda k, v, at: (rope.apply(k, at), v), prompt, steps=40, backend=backend
    )
    tokens, held = generate(model, slim, lambda k, v, at: (k,), prompt, steps=40, backend=backend)
    assert tokens == expected, backend
    assert 2 * held == full, (held, full)
    print(f"{backend}: 40 tokens, the same as with K and V, in {held:,} bytes of {full:,}")
