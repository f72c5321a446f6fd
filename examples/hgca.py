"""Shows HGCA's form of decoding (arXiv:2507.03153): the newest tokens stay on the device, older ones move to the host
in whole blocks, where each KV head chooses what it attends to; both parts merge by their lse. Asserts that it is dense
attention when all blocks are chosen, and that a choice by Quest loses far less than leaving older tokens out."""

import torch

from kvmem import Allocator, CacheSpec
from kvmem.kernels import cpu
from kvmem.kernels.blocks import gather
from kvmem.kernels.merge import merge
from kvmem.kernels.reference import sdpa_lse
from kvmem.kernels.write import write_kv
from kvmem.selectors import Chooser, Quest

HEADS, KV_HEADS, WIDTH, BLOCK, RECENT, PROMPT, STEPS = 8, 2, 64, 16, 128, 1500, 64
DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
draw = torch.Generator().manual_seed(0)
k, v = torch.randn(2, PROMPT + STEPS, KV_HEADS, WIDTH, generator=draw)
# Neighbouring tokens are alike, and each query looks for the keys of some older token, as in text that refers back.
k = torch.cat((k, k[:7])).unfold(0, 8, 1).mean(-1) * 8**0.5
looked_for = torch.randint(PROMPT - RECENT, (STEPS,), generator=draw)
q = (k[looked_for] * 1.5).repeat_interleave(HEADS // KV_HEADS, 1) + torch.randn(STEPS, HEADS, WIDTH, generator=draw)

shape = {"num_layers": 1, "num_kv_heads": KV_HEADS, "head_dim": WIDTH, "dtype": torch.float32, "block_size": BLOCK}
sizes = {"memory": "64MiB", "max_sequences": 1, "max_tokens": 2048, "prefix_cache": False}
quest = Quest()
device = Allocator(CacheSpec.kv(**shape, window_tokens=RECENT + BLOCK), device=DEVICE, **sizes)
host = Allocator(quest.extend(CacheSpec.kv(**shape)), device="cpu", interleave="none", **sizes)
chooser, near, far = Chooser(quest, host), device.sequence(), host.sequence()


def append(alloc, sequence, keys, values):
    sequence.extend(len(keys))
    batch = alloc.batch([sequence])
    write_kv(alloc.kv(0), batch, keys, values)
    return batch


def move(keys, values):
    """Append tokens that leave the device to the host's sequence, with their summaries."""
    chooser.update(0, append(host, far, keys, values))
    far.commit(count=len(keys))


def attend(query, step, budget):
    """The device's part and the host's, joined. The window of the device is what the host does not hold."""
    recent = near.num_tokens - far.num_tokens
    out, lse = sdpa_lse(query.to(DEVICE), device.kv(0), step, window_tokens=recent)
    if budget == 0:
        return out.cpu()
    held = host.batch([far], new_tokens=[0])
    chosen = chooser.select(query, 0, held, budget_tokens=budget, per_head=True, queries=step)
    part = cpu.attention(chosen.queries(query), chosen.cache(*host.kv(0)), chosen, causal=False)
    return merge(out, lse, *(chosen.outputs(x).to(DEVICE) for x in part))[0].cpu()


first = (PROMPT - RECENT) // BLOCK * BLOCK
append(device, near, k[:PROMPT].to(DEVICE), v[:PROMPT].to(DEVICE))
near.commit(count=PROMPT)
move(k[:first], v[:first])
errors = {0: [], 128: [], 256: [], 10_000: []}
for n in range(STEPS):
    at = slice(PROMPT + n, PROMPT + n + 1)
    if near.num_tokens + 1 - far.num_tokens > RECENT + BLOCK:  # before the window drops it
        begin = far.num_tokens
        move(*(gather(device, near, 0, c, start=begin, end=begin + BLOCK).cpu() for c in "kv"))
    step = append(device, near, k[at].to(DEVICE), v[at].to(DEVICE))
    keys, values = (x[: at.stop].repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    dense = torch.einsum("hk,khd->hd", torch.einsum("hd,khd->hk", q[n], keys).mul(WIDTH**-0.5).softmax(-1), values)
    for budget in errors:
        errors[budget].append(float((attend(q[n : n + 1], step, budget)[0] - dense).norm() / dense.norm()))
    near.commit(count=1)
means = {budget: sum(found) / STEPS for budget, found in errors.items()}
assert max(errors[10_000]) < 1e-5, "all blocks chosen: dense attention"
assert far.num_tokens > first and means[256] < means[128] < means[0] / 2
print(
    f"error of the output over {STEPS} steps, by tokens chosen on the host:", {b: f"{e:.2g}" for b, e in means.items()}
)
