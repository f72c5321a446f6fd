"""Shows a session that one process saves and another resumes, on the other backend: token ids, KV and who may share it.

Asserts that the tokens are those of a session that was never interrupted, that nothing was computed twice, that a
prompt with the same beginning finds the loaded tokens, and that a file of another model is refused.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import kvmem
from kvmem.chunks import Session, load, save
from kvmem.kernels.cpu import attention
from kvmem.kernels.write import write_kv
from kvmem.tiers import Identity

HEADS, WIDTH, PROMPT = 4, 64, list(range(3, 1003))
ME = Identity("toy, one layer, seed 1")  # in earnest: the weights and their revision
torch.set_num_threads(1)  # the tensors are small
draw, computed = torch.Generator().manual_seed(1), 0
embedding = torch.randn(2048, 3, HEADS, WIDTH, generator=draw)  # the q, k and v of every token id
head = torch.randn(HEADS * WIDTH, 2048, generator=draw)


def open_allocator(backend: str) -> kvmem.Allocator:
    spec = kvmem.CacheSpec.kv(num_layers=1, num_kv_heads=HEADS, head_dim=WIDTH, dtype="float32")
    return kvmem.Allocator(spec, backend=backend, memory="64MiB", max_sequences=4, max_tokens=4096)


def generate(alloc: kvmem.Allocator, seq: kvmem.Sequence, tokens: list[int], count: int) -> list[int]:
    """Compute what the sequence lacks of ``tokens``, then ``count`` tokens, and return all."""
    global computed
    for _ in range(count):
        new = tokens[seq.num_committed_tokens :]
        computed += len(new)
        seq.extend(len(new))
        batch = alloc.batch([seq])
        q, k, v = embedding[new].unbind(1)
        write_kv(alloc.kv(0), batch, k, v)
        out = attention(q, alloc.kv(0), batch)[0][-1]
        seq.commit(new)
        tokens = [*tokens, int((out.flatten() @ head).argmax())]
    return tokens


def resume(path: str) -> None:
    alloc = open_allocator("paged")
    (session,) = load(alloc, path, identity=ME)
    assert session.sequence is not None
    print(*generate(alloc, session.sequence, session.tokens.tolist(), 30))
    assert computed == 30  # the last token of the first process, and 29 of this one
    assert alloc.match([*PROMPT, 1], salt="tenant 7").num_tokens >= len(PROMPT) - 16
    assert alloc.match([*PROMPT, 1]).num_tokens == 0  # another tenant


def main(path: Path) -> None:
    alloc = open_allocator("virtual")
    seq = alloc.sequence(PROMPT, salt="tenant 7")
    tokens = generate(alloc, seq, PROMPT, 20)
    save(alloc, path, [Session(tokens, seq, salt="tenant 7")], identity=ME)
    print(f"saved {seq.num_committed_tokens} tokens in {path.stat().st_size:,} bytes")
    done = subprocess.run([sys.executable, __file__, str(path)], stdout=subprocess.PIPE, text=True, check=True)
    assert [int(token) for token in done.stdout.split()] == generate(alloc, seq, tokens, 30)
    print("another process went on from there: 30 tokens, the same as without an interruption")
    try:
        assert not load(alloc, path, identity=Identity("another model"))
    except kvmem.TierError as error:
        print(f"refused: {str(error).partition(': ')[2]}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        resume(sys.argv[1]) if len(sys.argv) > 1 else main(Path(folder) / "session")
