"""Shows continuous batching: requests come and go in one batch, which is refilled in place. Asserts that each gets the
numbers that it gets alone, and that the driver is not called after the warm-up."""

import numpy as np
import torch

import kvmem
from kvmem.kernels import cpu, write

SPEC = kvmem.CacheSpec.kv(num_layers=2, num_kv_heads=2, head_dim=16, dtype=torch.float32)
SLOTS, STEPS, WARM_UP = 4, 60, 20
torch.set_num_threads(1)  # the tensors are tiny


def qkv(request, position, layer):
    """A stand-in for a model. Return q [4, 16], k, v [2, 16] of the token at `position` of request `request`."""
    draw = torch.Generator().manual_seed(request * 100_003 + position * 101 + layer)
    return torch.randn(8, 16, generator=draw).split([4, 2, 2])


def lengths(request):
    """Return how many tokens a request's prompt has, and how many tokens it generates."""
    return 5 + request * 7 % 20, 8 + request * 5 % 13


def step(alloc, batch, requests):
    """Do one step of all requests. Return the attention output of each row's last token, [rows, layers, 4, 16]."""
    results = []
    positions, rows = batch.positions.tolist(), batch.batch_indices.tolist()
    for layer in range(SPEC.num_layers):
        parts = [qkv(requests[row], position, layer) for row, position in zip(rows, positions, strict=True)]
        q, k, v = (torch.stack(part) for part in zip(*parts, strict=True))
        write.write_kv(alloc.kv(layer), batch, k, v)
        results.append(cpu.attention(q, alloc.kv(layer), batch)[0][batch.cu_seqlens_q[1:].long() - 1])
    return torch.stack(results, 1)


def one_at_a_time(alloc, request):
    prompt, count = lengths(request)
    with alloc.sequence() as seq:
        for new in [prompt] + [1] * (count - 1):
            seq.extend(new)
            result = step(alloc, alloc.batch([seq]), [request])
            seq.commit(count=new)
    return result[0]


def allocator(backend):
    return kvmem.Allocator(SPEC, backend=backend, device="cpu", memory="8MiB", max_sequences=SLOTS, max_tokens=64)


for backend in ("virtual", "paged"):
    alloc, alone = allocator(backend), allocator(backend)
    batch = alloc.make_batch(max_sequences=SLOTS, max_new_tokens=256)
    address = batch.full("block_table").data_ptr()
    live, arrived, finished, calls = {}, 0, 0, None  # live: handle -> (request, tokens still to generate)
    for number in range(STEPS):
        if number == WARM_UP:
            calls = alloc.stats().driver_calls
        joining = alloc.open_batch(SLOTS - len(live))
        new_tokens = dict.fromkeys(live, 1)
        for handle in joining.tolist():
            prompt, count = lengths(arrived)
            live[handle], new_tokens[handle] = (arrived, count), prompt
            arrived += 1
        ids, counts = (np.array(list(x), np.int32) for x in (new_tokens.keys(), new_tokens.values()))
        alloc.extend_batch(ids, counts)  # room for whole prompts and for single tokens, in one call
        alloc.fill(ids, batch)
        results = step(alloc, batch, [live[i][0] for i in ids.tolist()])
        alloc.commit_batch(ids, counts)
        live = {handle: (request, left - 1) for handle, (request, left) in live.items()}
        done = [handle for handle, (_, left) in live.items() if left == 0]
        for handle in done:
            request, _ = live.pop(handle)
            torch.testing.assert_close(results[ids.tolist().index(handle)], one_at_a_time(alone, request))
            finished += 1
        alloc.free_batch(np.array(done, np.int32))
    assert finished > 10 and alloc.stats().driver_calls == calls and batch.full("block_table").data_ptr() == address
    print(f"{backend}: {finished} requests in {STEPS} steps, equal to runs alone; no driver call after step {WARM_UP}")
