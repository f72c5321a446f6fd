"""Shows low-rank latents in place of K and V (Palu, arXiv:2407.21118) under one attention layer. Asserts half of the
bytes, the output of the layer whose weights are truncated, and a cheaper cache still with latents of four bits."""

import torch
import torch.nn.functional as F

import kvmem
from kvmem.layouts import LayoutCache, PlainKV
from kvmem.layouts.palu import Palu
from kvmem.layouts.rope import Rope

HIDDEN, HEADS, KV_HEADS, WIDTH, TOKENS = 128, 8, 4, 32, 300
torch.set_num_threads(1)  # the tensors are tiny
draw = torch.Generator().manual_seed(0)
rope = Rope.default(WIDTH)


def projection(rows: int, columns: int) -> torch.Tensor:
    """A weight as models have them: its singular values fall off."""
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=draw))[0] for n in (rows, columns))
    rank = min(rows, columns)
    return left[:, :rank] * torch.logspace(0.5, -1.5, rank) @ right[:rank]


w_q, w_o = projection(HIDDEN, HEADS * WIDTH), projection(HEADS * WIDTH, HIDDEN)
w_k, w_v = projection(HIDDEN, KV_HEADS * WIDTH), projection(HIDDEN, KV_HEADS * WIDTH)
x, positions = torch.randn(TOKENS, HIDDEN, generator=draw), torch.arange(TOKENS)
q = rope.apply((x @ w_q).view(TOKENS, HEADS, WIDTH), positions)


def truncated(weight: torch.Tensor, rank: int) -> torch.Tensor:
    left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
    return left[:, :rank] * sizes[:rank] @ right[:rank]


def without_cache(w_k: torch.Tensor, w_v: torch.Tensor) -> torch.Tensor:
    k, v = ((x @ w).view(TOKENS, KV_HEADS, WIDTH) for w in (w_k, w_v))
    heads = (t.transpose(0, 1) for t in (q, rope.apply(k, positions), v))
    return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(0, 1).flatten(1) @ w_o


def with_cache(layout, backend):
    """The layer's output, and the bytes that its tokens hold."""
    alloc = kvmem.Allocator(
        layout.spec, backend=backend, device="cpu", memory="4MiB", max_sequences=2, max_tokens=TOKENS
    )
    cache, outputs = LayoutCache(layout, alloc), []
    with alloc.sequence() as seq:
        for begin, end in ((0, TOKENS - 50), *((i, i + 1) for i in range(TOKENS - 50, TOKENS))):  # a prompt, 50 steps
            seq.extend(end - begin)
            batch = alloc.batch([seq])
            if isinstance(layout, Palu):
                cache.write(0, batch, x[begin:end])  # W_K and W_V are not needed any more
                latents, _ = cache.attend(q[begin:end], 0, batch)
                outputs.append(layout.project(0, latents))  # V is never rebuilt: its factor is in this W_O
            else:
                k, v = ((x[begin:end] @ w).view(-1, KV_HEADS, WIDTH) for w in (w_k, w_v))
                cache.write(0, batch, rope.apply(k, positions[begin:end]), v)
                outputs.append(cache.attend(q[begin:end], 0, batch)[0].flatten(1) @ w_o)
            seq.commit(count=end - begin)
        return torch.cat(outputs), sum(alloc.ledger.held.values())


shape = {"kv_heads": KV_HEADS, "head_dim": WIDTH, "group_heads": KV_HEADS, "rope": rope}
rank = KV_HEADS * WIDTH // 2
plain = PlainKV(kvmem.CacheSpec.kv(num_layers=1, num_kv_heads=KV_HEADS, head_dim=WIDTH, dtype="float32"))
half = Palu([(w_k, w_v, w_o)], rank, **shape, dtype="float32")
packed = Palu([(w_k, w_v, w_o)], rank, **shape, dtype="float16", bits=4, rotate_latents=True)
exact, near = without_cache(w_k, w_v), without_cache(truncated(w_k, rank), truncated(w_v, rank))
for backend in ("virtual", "paged"):
    (all_of_it, full), (latents, less), (low_bits, least) = (with_cache(y, backend) for y in (plain, half, packed))
    torch.testing.assert_close(all_of_it, exact)
    torch.testing.assert_close(latents, near)  # exactly the truncated layer
    assert full == 2 * less and less == TOKENS * 2 * rank * 4 and least == TOKENS * 2 * (rank // 2 + 4)
    lost = [float((out - exact).norm() / exact.norm()) for out in (latents, low_bits)]
    assert lost[0] < 0.15 and lost[1] < 0.2
    print(f"{backend}: {full:,} bytes; latents {less:,}, off by {lost[0]:.1%}; in 4 bits {least:,}, {lost[1]:.1%}")
