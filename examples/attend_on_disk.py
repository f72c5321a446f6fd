"""Shows a long context that stays on a disk while a model generates: a process beside the file attends, and only
queries and outputs cross. The newest tokens stay here, and both parts are merged exactly.

Asserts that the tokens are those of attention over everything, and what crossed the link against what was read.
"""

from __future__ import annotations

import tempfile

import torch

import kvmem
from kvmem.near import DiskAttention, HostAttention, SparF, merge

LAYERS, HEADS, GROUP, WIDTH, STORED, STEPS = 2, 2, 4, 64, 3000, 20
torch.set_num_threads(1)  # the tensors are small
torch.manual_seed(1)
embedding = torch.randn(512, LAYERS, HEADS * (GROUP + 2), WIDTH)  # the queries, keys and values of every token id
head = torch.randn(HEADS * GROUP * WIDTH, 512)


def qkv(tokens: list[int], layer: int) -> tuple[torch.Tensor, ...]:
    """In earnest: projections of the layer's input."""
    return embedding[tokens, layer].split([HEADS * GROUP, HEADS, HEADS], 1)


def next_token(outs: list[torch.Tensor]) -> int:
    return int((sum(out[-1].flatten() for out in outs) @ head).argmax())  # type: ignore[operator]


def reference(tokens: list[int]) -> int:
    outs = []
    for layer in range(LAYERS):
        q, k, v = (x.transpose(0, 1) for x in qkv(tokens, layer))
        outs.append(torch.nn.functional.scaled_dot_product_attention(q[:, -1:], k, v, enable_gqa=True).transpose(0, 1))
    return next_token(outs)


def main(folder: str) -> None:
    spec = kvmem.CacheSpec.kv(num_layers=LAYERS, num_kv_heads=HEADS, head_dim=WIDTH, dtype="float32")
    prompt = torch.randint(512, (STORED + 1,)).tolist()
    alloc = kvmem.Allocator(spec, device="cpu", memory="8MiB", max_sequences=1, max_tokens=4096)
    with DiskAttention(folder, spec, capacity="32MiB", k_channels_per_page=8) as disk, alloc.sequence() as newest:
        here = HostAttention(alloc)
        disk.open(0)
        for layer in range(LAYERS):  # a prefill pushes the K and V of each layer while the next one computes
            disk.append(layer, [0], *qkv(prompt[:-1], layer)[1:])
        disk.traffic.clear()
        tokens = prompt
        for _ in range(STEPS):
            newest.extend(1)
            outs = []
            for layer in range(LAYERS):
                q, k, v = qkv(tokens[-1:], layer)
                part = here.attend(layer, [newest], q, k, v)  # appends, and attends the newest tokens
                outs.append(merge([part, disk.attend(layer, [0], q)]).out)
            newest.commit(tokens[-1:])
            tokens = [*tokens, next_token(outs)]
            assert tokens[-1] == reference(tokens[:-1])
        seen = disk.traffic
        print(f"{STEPS} tokens: {seen['media_read_bytes']:,} bytes read, {seen['link_bytes']:,} crossed the link")
        delivered = seen["delivered_bytes"]  # against queries down and outputs up, of every step
        assert delivered == seen["link_bytes"] * STORED // GROUP
        seen.clear()
        sparse = disk.attend(0, [0], q, sparse=SparF(r=WIDTH // 8, k=STORED // 16))
        assert not sparse.exact and seen["delivered_bytes"] < delivered // (STEPS * LAYERS) // 7
        print(f"SparF: {seen['delivered_bytes']:,} bytes delivered, {seen['media_read_bytes']:,} read, in a layer")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
