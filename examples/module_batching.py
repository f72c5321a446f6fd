"""Shows module batching (MoE-Gen): a mixture of experts generates while all of its KV lies in host memory.

Each layer's attention takes the sequences a few at a time, through staging buffers on the device, and leaves a share of
them to the CPU, where their KV lies; each expert computes its tokens of the whole batch at once. The sizes are planned
from a profile of this machine, where the device is the CPU too. Asserts that the logits are those of the sequences
generated one by one, and that no more bytes were staged than planned.
"""

import torch
import torch.nn.functional as F

import kvmem
from kvmem import plan
from kvmem.kernels.reference import sdpa
from kvmem.kernels.write import write_kv
from kvmem.layouts.rope import Rope

shape = plan.ModelShape(
    num_layers=3, hidden=64, num_query_heads=8, num_kv_heads=2, head_dim=16, num_experts=8, experts_per_token=2,
    expert_hidden=96, vocab=97, dtype=torch.float64,
)  # fmt: skip
torch.set_num_threads(1)  # the tensors are tiny
draw, rope = torch.Generator().manual_seed(0), Rope.default(shape.head_dim)
shapes = {"qkv": (64, 192), "o": (128, 64), "router": (64, 8), "up": (8, 64, 192), "down": (8, 96, 64)}
layers = [
    {name: torch.randn(size, generator=draw, dtype=torch.float64) * size[-2] ** -0.5 for name, size in shapes.items()}
    for _ in range(shape.num_layers)
]
embedding = torch.randn(97, 64, generator=draw, dtype=torch.float64)


def decoder(tokens, positions, attend, expert_batch):
    """Logits of tokens ``[T]``. attend: ``(layer, q, k, v) -> [T, heads, width]``."""
    x = embedding[tokens]
    for number, w in enumerate(layers):
        q, k, v = (F.rms_norm(x, (64,)) @ w["qkv"]).unflatten(1, (12, 16)).split((8, 2, 2), 1)
        x = x + attend(number, rope.apply(q, positions), rope.apply(k, positions), v).flatten(1) @ w["o"]
        h = F.rms_norm(x, (64,))
        scores, chosen = (h @ w["router"]).topk(shape.experts_per_token)
        for expert, rows, places in plan.expert_batches(chosen, expert_batch):  # on a GPU: copy the next one's weights
            gate, up = (h[rows] @ w["up"][expert]).chunk(2, -1)
            share = scores.softmax(-1)[rows, places, None]
            x.index_add_(0, rows, (F.silu(gate) * up) @ w["down"][expert] * share)
    return F.rms_norm(x, (64,)) @ embedding.T


def alone(alloc, seq, tokens):
    """Logits of the last of ``tokens``, the sequence's next ones, with nothing batched."""
    seq.extend(len(tokens))
    batch = alloc.batch([seq])

    def attend(layer, q, k, v):
        write_kv(alloc.kv(layer), batch, k, v)
        return sdpa(q, alloc.kv(layer), batch)

    logits = decoder(torch.tensor(tokens), batch.positions, attend, expert_batch=1)
    seq.commit(tokens)
    return logits[-1]


spec = kvmem.CacheSpec.kv(num_layers=3, num_kv_heads=2, head_dim=16, dtype=torch.float64)
prompts = [torch.randint(97, (n,), generator=draw).tolist() for n in range(1, 72, 6)]
profile = plan.profile("cpu", model=shape, context=96, repetitions=3)
chosen = plan.modules(spec, shape, profile, context=96, queries=12, grid=plan.Grid(omega=(0.25, 0.5), ba=(2, 4)))
sizes = {"memory": "16MiB", "page_bytes": 4096, "max_sequences": 48, "max_tokens": 96, "interleave": "none"}
for backend in ("paged", "virtual"):
    host = kvmem.Allocator(spec, backend=backend, device="cpu", **sizes)
    ring = plan.StagingRing(host, blocks=chosen.staging_blocks, buffers=chosen.staging_buffers)
    batch = [host.sequence() for _ in prompts]
    tokens = [int(alone(host, seq, prompt).argmax()) for seq, prompt in zip(batch, prompts, strict=True)]
    copies = [seq.fork() for seq in batch]
    for _ in range(16):
        with plan.ModuleStep(ring, batch, micro_batch=chosen.ba, omega=chosen.omega) as step:
            logits = decoder(torch.tensor(tokens), step.positions, step.attend, chosen.be)
            step.commit(tokens)
        expected = [alone(host, copy, [token]) for copy, token in zip(copies, tokens, strict=True)]
        assert (logits - torch.stack(expected)).abs().max() < 1e-10
        tokens = logits.argmax(-1).tolist()
    assert ring.peak_bytes <= chosen.staging_bytes
    print(f"{backend}: {chosen.cpu_rows} of {chosen.B} sequences in place, the others {chosen.ba} at a time, as alone")
