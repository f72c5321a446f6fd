"""Shows the cache in a decoder of your own: extend, write K and V, attend, commit. Asserts that both backends generate
the same tokens as the decoder without a cache."""

import torch
import torch.nn.functional as F

import kvmem
from kvmem.kernels import cpu, write

LAYERS, HEADS, KV_HEADS, WIDTH, VOCAB, HIDDEN = 3, 4, 2, 16, 97, 64  # HIDDEN is HEADS * WIDTH
torch.set_num_threads(1)  # the tensors are tiny


class TinyLlama:
    """Random weights, the structure of Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    def __init__(self, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        outputs = {"q": HIDDEN, "k": KV_HEADS * WIDTH, "v": KV_HEADS * WIDTH, "o": HIDDEN, "gate": 128, "up": 128}
        shapes = {**{name: (HIDDEN, width) for name, width in outputs.items()}, "down": (128, HIDDEN)}
        self.layers = [
            {name: torch.randn(shape, generator=draw) * shape[0] ** -0.5 for name, shape in shapes.items()}
            for _ in range(LAYERS)
        ]
        self.embed = torch.randn(VOCAB, HIDDEN, generator=draw)

    def logits(self, tokens, positions, attend):
        """tokens, positions: [T]. attend(layer, q [T, HEADS, WIDTH], k, v [T, KV_HEADS, WIDTH]) returns q's shape."""
        x = self.embed[tokens]
        for number, w in enumerate(self.layers):
            h = F.rms_norm(x, (HIDDEN,))
            q, k, v = ((h @ w[name]).unflatten(1, (-1, WIDTH)) for name in "qkv")
            x = x + attend(number, rotate(q, positions), rotate(k, positions), v).flatten(1) @ w["o"]
            h = F.rms_norm(x, (HIDDEN,))
            x = x + (F.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]
        return F.rms_norm(x, (HIDDEN,)) @ self.embed.T


def rotate(x, positions):
    angle = positions[:, None, None] / 10_000 ** (torch.arange(WIDTH // 2) / (WIDTH // 2))
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def without_cache(model, tokens, steps):
    def attend(layer, q, k, v):
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

    for _ in range(steps):
        tokens = [*tokens, int(model.logits(torch.tensor(tokens), torch.arange(len(tokens)), attend)[-1].argmax())]
    return tokens


def with_cache(model, tokens, steps, backend):
    spec = kvmem.CacheSpec.kv(num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=WIDTH, dtype=torch.float32)
    alloc = kvmem.Allocator(spec, backend=backend, device="cpu", memory="4MiB", max_sequences=4, max_tokens=256)
    with alloc.sequence() as seq:
        new = tokens
        for _ in range(steps):
            seq.extend(len(new))  # make room; OutOfMemory would change nothing
            batch = alloc.batch([seq])

            def attend(layer, q, k, v, batch=batch):
                write.write_kv(alloc.kv(layer), batch, k, v)
                return cpu.attention(q, alloc.kv(layer), batch)[0]

            logits = model.logits(torch.tensor(new), batch.positions, attend)
            seq.commit(new)  # their K and V are valid now
            new = [int(logits[-1].argmax())]
            tokens = [*tokens, *new]
    return tokens


model, prompt = TinyLlama(), [3, 14, 15, 92, 65, 35, 89]
expected = without_cache(model, prompt, steps=40)
for backend in ("virtual", "paged"):
    assert with_cache(model, prompt, 40, backend) == expected, backend
    print(f"{backend}: 40 tokens, the same as without a cache")
