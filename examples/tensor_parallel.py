"""Two ranks, each with half of the heads, generate what one process does: rank 0 decides, RankGroup tells the other.

Rank 0 opens sequences, shares their prefix, evicts and samples. The other rank calls follow() in a loop, and knows
nothing but the message: ids of sequences and tokens. Prints how many bytes a step took.
"""

import json
import socket
from statistics import mean

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import kvmem
from kvmem.distributed import RankGroup
from kvmem.kernels import cpu, write

RANKS, LAYERS, HEADS, KV_HEADS, WIDTH, VOCAB, HIDDEN, MLP = 2, 3, 4, 2, 16, 97, 64, 128
SHAPES = {"q": (HEADS * WIDTH, HIDDEN), "k": (KV_HEADS * WIDTH, HIDDEN), "v": (KV_HEADS * WIDTH, HIDDEN)}
SHAPES |= {"o": (HIDDEN, HEADS * WIDTH), "gate": (MLP, HIDDEN), "up": (MLP, HIDDEN), "down": (HIDDEN, MLP)}
STEM = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 79, 50]
PROMPTS = [[*STEM, 2, 88], [*STEM, 41, 96, 7], [27, 18, 28, 18, 28]]


class Decoder:
    """A Llama with random weights, of which this rank has its share of heads and of the MLP."""

    def __init__(self, rank: int, ranks: int) -> None:
        draw = torch.Generator().manual_seed(0)
        whole = [{n: torch.randn(s, generator=draw) * s[1] ** -0.5 for n, s in SHAPES.items()} for _ in range(LAYERS)]
        share = {name: 1 if name in ("o", "down") else 0 for name in SHAPES}  # rows, but columns of what sums up
        self.layers = [{n: w.chunk(ranks, share[n])[rank].T.contiguous() for n, w in one.items()} for one in whole]
        self.embed, self.ranks = torch.randn(VOCAB, HIDDEN, generator=draw), ranks
        heads = {"num_kv_heads": KV_HEADS // ranks, "head_dim": WIDTH}
        self.spec = kvmem.CacheSpec.kv(num_layers=LAYERS, dtype=torch.float32, block_size=16, **heads)

    def summed(self, x):
        if self.ranks > 1:
            dist.all_reduce(x)
        return x

    def logits(self, alloc, ids, tokens):
        """Write K and V of the tokens of all sequences, and return the logits of the last token of each."""
        batch, x = alloc.batch(ids), self.embed[torch.tensor(tokens)]
        for number, w in enumerate(self.layers):
            h = F.rms_norm(x, (HIDDEN,))
            q, k, v = ((h @ w[name]).unflatten(1, (-1, WIDTH)) for name in "qkv")
            write.write_kv(alloc.kv(number), batch, rotate(k, batch.positions), v)
            attended = cpu.attention(rotate(q, batch.positions), alloc.kv(number), batch)[0]
            x = x + self.summed(attended.flatten(1) @ w["o"])
            h = F.rms_norm(x, (HIDDEN,))
            x = x + self.summed((F.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"])
        return (F.rms_norm(x, (HIDDEN,)) @ self.embed.T)[batch.cu_seqlens_q[1:].long() - 1]


def rotate(x, positions):
    angle = positions[:, None, None] / 10_000 ** (torch.arange(WIDTH // 2) / (WIDTH // 2))
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def generate(model, alloc, group, steps):
    """Rank 0, or the only process; returns the texts and the bytes of each step."""
    texts, sizes, live, new = [list(prompt) for prompt in PROMPTS], [], [], []
    for step in range(steps):
        if step < len(PROMPTS):  # a request a step; the second finds the first one's block
            live.append(alloc.sequence(texts[step]))
            new.append(texts[step][live[step].num_cached_tokens :])
        for seq, tokens in zip(live, new, strict=True):
            seq.extend(len(tokens))
        ids, flat = [seq.id for seq in live], [token for tokens in new for token in tokens]
        if group is not None:
            group.lead(json.dumps([ids, flat]).encode())
            sizes.append(group.step_bytes)
        best = model.logits(alloc, ids, flat).argmax(-1).tolist()
        for number, seq in enumerate(live):
            seq.commit(new[number])
            new[number] = [best[number]]
            texts[number].append(best[number])
    assert [seq.num_cached_tokens for seq in live] == [0, 16, 0]
    return texts, sizes


def allocator(model, **options):
    sizes = {"memory": "4MiB", "max_sequences": 4, "max_tokens": 256}
    return kvmem.Allocator(model.spec, backend="virtual", device="cpu", **sizes, **options)


def rank_main(rank, port):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    model = Decoder(rank, RANKS)
    with allocator(model, record_ops=rank == 0) as alloc, RankGroup(alloc, timeout_seconds=60) as group:
        if rank == 0:
            texts, sizes = generate(model, alloc, group, steps=20)
            assert texts == generate(one := Decoder(0, 1), allocator(one), None, steps=20)[0]
            print(f"{RANKS} ranks: the tokens of one process; a decode step took {mean(sizes[3:]):.0f} bytes")
        else:
            while (message := group.follow()) is not None:
                model.logits(alloc, *json.loads(message))
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(rank_main, (port,), nprocs=RANKS, start_method="fork")  # spawn, on a GPU
