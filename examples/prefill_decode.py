"""Prefill in one process, decode in another: a prompt's blocks move by sockets, NIXL or Mooncake (the first argument).

The first process computes a prompt and exposes its blocks; the second reads them, computes the rest of the prompt and
generates the tokens of one process. Then the first is killed: the next prompt is a miss, and is computed here.
"""

import importlib
import multiprocessing as mp
import sys

import torch

import kvmem
from kvmem.kernels import cpu, write
from kvmem.tiers import Identity, Tiers, largest_block_bytes
from kvmem.transport import ExposedTier, PeerTier

LAYERS, HEADS, WIDTH, VOCAB, HIDDEN, STEPS = 2, 2, 16, 97, 32, 30
SPEC = kvmem.CacheSpec.kv(num_layers=LAYERS, num_kv_heads=HEADS, head_dim=WIDTH, dtype=torch.float32, block_size=16)
PROMPTS = [[(7 * i * i + shift) % VOCAB for i in range(150)] for shift in (3, 5)]
KINDS = {"sockets": "SocketTransport", "nixl": "NixlTransport", "mooncake": "MooncakeTransport"}
torch.set_num_threads(1)


def transport(kind):
    return getattr(importlib.import_module(f"kvmem.transport.{kind}"), KINDS[kind])()


def allocator(backend, *lower):
    tiers = Tiers(host="4MiB", lower=lower, identity=Identity("random weights, seed 0"))
    sizes = {"memory": "8MiB", "max_sequences": 4, "max_tokens": 256}
    return kvmem.Allocator(SPEC, backend=backend, device="cpu", tiers=tiers, **sizes)


def generate(alloc, prompt, steps):
    """Return ``steps`` tokens of a decoder that is attention alone, and how many of the prompt were cached."""
    draw = torch.Generator().manual_seed(0)
    layers = [torch.randn(4, HIDDEN, HIDDEN, generator=draw) * HIDDEN**-0.5 for _ in range(LAYERS)]
    embed, place, head = (torch.randn(n, HIDDEN, generator=draw) for n in (VOCAB, 256, VOCAB))
    with alloc.sequence(prompt, load="all") as seq:
        assert seq.wait(60)
        tokens, new = [], prompt[seq.num_cached_tokens :]
        for _ in range(steps):
            seq.extend(len(new))
            batch = alloc.batch([seq])
            x = embed[torch.tensor(new)] + place[batch.positions]
            for layer, weights in enumerate(layers):
                q, k, v = (torch.tanh(x @ w).unflatten(1, (HEADS, WIDTH)) for w in weights[:3])
                write.write_kv(alloc.kv(layer), batch, k, v)
                x = x + 4 * cpu.attention(q, alloc.kv(layer), batch)[0].flatten(1) @ weights[3]
            seq.commit(new)
            new = [int((x[-1] @ head.T).argmax())]
            tokens += new
        return tokens, seq.num_cached_tokens


def prefill(kind, pipe):
    """The first process, with a paged cache; the other's is virtual: blocks travel in one form."""
    exposed = ExposedTier(transport(kind), capacity="4MiB", block_bytes=largest_block_bytes(SPEC))
    with allocator("paged", exposed) as alloc:
        pipe.send(exposed.address)
        while True:
            generate(alloc, prompt := pipe.recv(), 1)
            alloc.store(prompt)
            pipe.send(alloc.flush(60))


def main(kind="sockets"):
    mine, theirs = mp.Pipe()
    other = mp.get_context("fork").Process(target=prefill, args=(kind, theirs), daemon=True)  # spawn, on a GPU
    other.start()
    expected = [generate(allocator("virtual"), prompt, STEPS)[0] for prompt in PROMPTS]
    assert min(len({*tokens}) for tokens in expected) > 5, "a text that says little"
    with PeerTier(transport(kind), mine.recv()) as peer, allocator("virtual", peer) as alloc:
        for number, cached in enumerate((144, 0)):
            mine.send(PROMPTS[number])
            assert mine.recv()
            if number == 1:
                other.kill()
                other.join()
            assert generate(alloc, PROMPTS[number], STEPS) == (expected[number], cached)
    print(f"{kind}: 144 of 150 tokens came from the other process; once it was killed, none; all texts are right")


if __name__ == "__main__":
    main(*sys.argv[1:])
