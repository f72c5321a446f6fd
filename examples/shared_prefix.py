"""Shows prefix sharing: ten requests hold the memory of their common system prompt once.

Asserts that, that the prompt is still cached when they have ended, and that another tenant does not find it.
"""

from __future__ import annotations

import sys

import torch

import kvmem
from kvmem.kernels.cpu import attention
from kvmem.kernels.write import write_kv

HEADS, WIDTH, SYSTEM_TOKENS = 4, 64, 1024


def answer(alloc: kvmem.Allocator, seq: kvmem.Sequence, prompt: list[int], embedding: torch.Tensor) -> torch.Tensor:
    """Compute what is not cached. Return the attention output of the last token."""
    new = prompt[seq.num_cached_tokens :]
    seq.extend(len(new))
    batch = alloc.batch([seq])
    q, k, v = embedding[new].unbind(1)
    write_kv(alloc.kv(0), batch, k, v)
    out, _ = attention(q, alloc.kv(0), batch)
    seq.commit(new)
    return out[-1]


def main(backend: str) -> None:
    torch.manual_seed(1)
    embedding = torch.randn(2048, 3, HEADS, WIDTH)  # a toy model: the q, k and v of every token id
    spec = kvmem.CacheSpec.kv(num_layers=1, num_kv_heads=HEADS, head_dim=WIDTH, dtype="float32")
    alloc = kvmem.Allocator(spec, backend=backend, memory="64MiB", max_sequences=16, max_tokens=2048)
    system = torch.randint(2048, (SYSTEM_TOKENS,)).tolist()

    live, outputs = [], []
    for user in range(10):
        prompt = [*system, user, user + 1]
        live.append(alloc.sequence(prompt))
        outputs.append(answer(alloc, live[-1], prompt, embedding))
    once = spec.bytes_per_token * SYSTEM_TOKENS
    used = alloc.stats().used_bytes
    assert once <= used < 1.1 * once, (once, used)
    print(f"{backend}: ten sequences of {SYSTEM_TOKENS + 2} tokens hold {used / once:.2f} times one system prompt")

    for seq in live:
        seq.free()
    prompt = [*system, 3, 4]
    with alloc.sequence(prompt) as seq:  # after the first ones have ended
        print(f"{backend}: {seq.num_cached_tokens} of {len(prompt)} tokens were still cached")
        assert seq.num_cached_tokens >= SYSTEM_TOKENS
        torch.testing.assert_close(answer(alloc, seq, prompt, embedding), outputs[3])
    with alloc.sequence(prompt, salt="another tenant") as seq:
        assert seq.num_cached_tokens == 0
    assert alloc.check() == []


if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are small
    for chosen in sys.argv[1:] or ["virtual", "paged"]:
        main(chosen)
