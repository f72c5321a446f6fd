"""Allocators with random bytes in them, and what their sequences hold."""

from __future__ import annotations

from typing import Any

import torch

import kvmem
from kvmem.allocator.prefix import Tokens
from kvmem.chunks import Chunk
from kvmem.kernels.blocks import scatter_tokens
from kvmem.tiers import Identity

ME = Identity("toy 1", rope="theta 1e4")
OTHER = {"virtual": "paged", "paged": "virtual"}
HALF = torch.float16


def make(spec: kvmem.CacheSpec, backend: str = "paged", **options: Any) -> kvmem.Allocator:
    sizes = dict(memory="4MiB", max_sequences=6, max_tokens=400, page_bytes=4096, debug=True)
    return kvmem.Allocator(spec, backend=backend, device="cpu", **(sizes | options))


def plain(dtype: Any = HALF, **options: Any) -> kvmem.CacheSpec:
    return kvmem.CacheSpec.kv(**(dict(num_layers=3, num_kv_heads=2, head_dim=8, dtype=dtype) | options))


def random_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Any bit patterns, NaN payloads too."""
    return torch.randint(256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8).view(dtype)


def write(alloc: kvmem.Allocator, seq: kvmem.Sequence, tokens: Tokens, values: Any = random_bytes) -> None:
    """Extend by the tokens, write all that the spec stores of them, commit. Encoders have 20 tokens."""
    seq.extend(len(tokens))
    prefill = [i for i, g in enumerate(alloc.spec.groups) if g.growth == "prefill" and not alloc.core.tokens(seq.id, i)]
    for index in prefill:
        seq.extend(20, group=index)
    batch = alloc.batch([seq])
    for index, group in enumerate(alloc.spec.groups):
        mine = batch.group(index)
        slots = mine.block_table[0, :1] if group.growth == "fixed" else mine.slot_mapping
        for layer in group.layers:
            for component in group.components:
                memory = alloc.tensor(layer, component.name)
                scatter_tokens(memory, slots, values((len(slots), *memory.shape[2:]), memory.dtype))
    for index in prefill:
        seq.commit(count=20, group=index)
    seq.commit(tokens)


def filled(spec: kvmem.CacheSpec, tokens: Tokens, backend: str = "paged", **options: Any) -> Any:
    """An allocator, and a sequence in it that has computed the tokens."""
    alloc = make(spec, backend, **options)
    seq = alloc.sequence()
    write(alloc, seq, tokens)
    return alloc, seq


def rows(alloc: kvmem.Allocator, seq: kvmem.Sequence, layer: int, component: str) -> torch.Tensor:
    """What a sequence holds of a component, ``[n, heads, width]``, as a copy."""
    return (
        alloc.sequence_tensor(seq, layer, component)
        .as_subclass(torch.Tensor)
        .clone(memory_format=torch.contiguous_format)
    )


def holds(alloc: kvmem.Allocator, seq: kvmem.Sequence) -> dict[tuple[int, str], bytes]:
    """The bytes of everything that a sequence holds."""
    found = {}
    for group in alloc.spec.groups:
        for layer in group.layers:
            for component in group.components:
                held = rows(alloc, seq, layer, component.name)
                found[layer, component.name] = held.view(torch.uint8).numpy().tobytes()
    return found


def same(a: Chunk, b: Chunk) -> bool:
    return len(a.sections) == len(b.sections) and all(map(torch.equal, a.sections, b.sections))
