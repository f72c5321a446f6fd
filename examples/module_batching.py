"""Shows module batching (MoE-Gen): a mixture of experts generates while all of its KV lies in host memory.

Each layer's attention takes the sequences a few at a time, through staging buffers on the device, and leaves a share of
them to the CPU, where their KV lies; each expert computes its tokens of the whole batch at once. The sizes are planned
from a profile of this machine, where the device is the CPU too. Asserts that the logits are those of the sequences
generated one by one, and that no more bytes were staged than planned. The model is in kvmem/bench/near/modules.py.
"""

import torch

import kvmem
from kvmem import plan
from kvmem.bench.near.modules import RandomMixtral
from kvmem.kernels.reference import sdpa
from kvmem.kernels.write import write_kv

torch.set_num_threads(1)  # the tensors are tiny
shape = plan.ModelShape(
    num_layers=3, hidden=64, num_query_heads=8, num_kv_heads=2, head_dim=16, num_experts=8, experts_per_token=2,
    expert_hidden=96, vocab=97, dtype=torch.float64,
)  # fmt: skip
model, draw = RandomMixtral(shape), torch.Generator().manual_seed(1)


def alone(alloc, seq, tokens):
    """Logits of the last of ``tokens``, the sequence's next ones, with nothing batched."""
    seq.extend(len(tokens))
    batch = alloc.batch([seq])

    def attend(layer, q, k, v):
        write_kv(alloc.kv(layer), batch, k, v)
        return sdpa(q, alloc.kv(layer), batch)

    logits = model.logits(torch.tensor(tokens), batch.positions, attend, be=1)
    seq.commit(tokens)
    return logits[-1]


spec = kvmem.CacheSpec.kv(num_layers=3, num_kv_heads=2, head_dim=16, dtype=torch.float64)
prompts = [torch.randint(97, (n,), generator=draw).tolist() for n in range(1, 72, 6)]
profile = plan.profile("cpu", model=shape, device_bytes=1 << 24, host_bytes=1 << 24, context=96, repetitions=3)
chosen = plan.modules(spec, shape, profile, context=96, queries=12, grid=plan.Grid(omega=(0.25, 0.5), ba=(2, 4)))
sizes = {"memory": "16MiB", "page_bytes": 4096, "max_sequences": 48, "max_tokens": 96, "interleave": "none"}
for backend in ("paged", "virtual"):
    host = kvmem.Allocator(spec, backend=backend, device="cpu", **sizes)
    ring = plan.StagingRing(host, blocks=chosen.staging_blocks, buffers=chosen.staging_buffers)
    batch = [host.sequence() for _ in range(chosen.B)]
    tokens = [int(alone(host, seq, prompt).argmax()) for seq, prompt in zip(batch, prompts, strict=False)]
    copies = [seq.fork() for seq in batch]
    for _ in range(16):
        with plan.ModuleStep(ring, batch, micro_batch=chosen.ba, omega=chosen.omega) as step:
            logits = model.logits(torch.tensor(tokens), step.positions, step.attend, chosen.be)
            step.commit(tokens)
        expected = [alone(host, copy, [token]) for copy, token in zip(copies, tokens, strict=True)]
        assert (logits - torch.stack(expected)).abs().max() < 1e-10
        tokens = logits.argmax(-1).tolist()
    assert ring.peak_bytes <= chosen.staging_bytes
    print(f"{backend}: {chosen.cpu_rows} of {chosen.B} sequences in place, the others {chosen.ba} at a time, as alone")
