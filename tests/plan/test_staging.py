"""Staging buffers: what is fetched, when a fetch is refused, and what is counted."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

import kvmem
from kvmem import OutOfMemory, SpecError, StaleHandle
from kvmem.kernels.reference import level_attention, oracle
from kvmem.kernels.write import write_kv
from kvmem.plan.module_step import ModuleStep
from kvmem.plan.staging import StagingRing

BLOCK = 4
SPEC = kvmem.CacheSpec.kv(num_layers=3, num_kv_heads=2, head_dim=8, dtype=torch.float32, block_size=BLOCK)


def open_host(backend: str, spec: kvmem.CacheSpec = SPEC, **changes: Any) -> kvmem.Allocator:
    sizes = {"memory": "1MiB", "page_bytes": 4096, "max_sequences": 8, "max_tokens": 64} | changes
    return kvmem.Allocator(spec, backend=backend, **({"device": "cpu"} | sizes))


def filled(alloc: kvmem.Allocator, lengths: list[int]) -> list[kvmem.Sequence]:
    """Sequences with random KV, of which the last token is not committed."""
    sequences = []
    for length in lengths:
        seq = alloc.sequence()
        seq.extend(length)
        batch = alloc.batch([seq])
        for layer in range(3):
            write_kv(alloc.kv(layer), batch, *(torch.randn(length, 2, 8) for _ in "kv"))
        seq.commit(count=length - 1)
        sequences.append(seq)
    return sequences


@pytest.mark.parametrize("interleave", ["all", "none", 1])
def test_a_buffer_has_what_the_sequences_have(backend: str, seed: int, interleave: Any) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    with open_host(backend, interleave=interleave) as alloc:
        lengths = [draw.randrange(1, 60) for _ in range(5)]
        sequences = filled(alloc, lengths)
        batch = alloc.batch(sequences)
        ring = StagingRing(alloc, blocks=batch.num_indices, buffers=2)
        part = ring.micro_batch(batch)
        q = torch.randn(5, 4, 8)
        for layer in range(3):
            staged = ring.fetch(layer, part)
            for cache, name in zip(staged.kv(), "kv", strict=True):
                assert cache.shape == (batch.num_indices, BLOCK, 2, 8)
                ends = batch.kv_indptr_cpu.tolist()
                for row, (seq, length) in enumerate(zip(sequences, lengths, strict=True)):
                    own = cache[ends[row] : ends[row + 1]].flatten(0, 1)[:length]
                    assert torch.equal(own, alloc.sequence_tensor(seq, layer, name)[:length])
            found = level_attention(q, staged.kv(), part.level, dtype=torch.float64)
            expected = oracle(q, alloc.kv(layer), batch)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
            staged.release()
        each = batch.num_indices * BLOCK * 2 * 8 * 4
        assert alloc.ledger.moved == {("k", "staging"): 3 * each, ("v", "staging"): 3 * each}


def test_a_fetch_is_refused_while_all_buffers_are_taken(backend: str) -> None:
    with open_host(backend) as alloc:
        ring = StagingRing(alloc, blocks=4, buffers=2)
        part = ring.micro_batch(alloc.batch(filled(alloc, [5])))
        first, second = ring.fetch(0, part), ring.fetch(1, part)
        moved = dict(alloc.ledger.moved)
        assert ring.try_fetch(2, part) is None
        with pytest.raises(OutOfMemory, match="all 2 buffers are taken"):
            ring.fetch(2, part)
        assert alloc.ledger.moved == moved and ring.used_bytes == ring.peak_bytes == ring.bytes
        kept = second.kv()[0].clone()
        first.release()
        third = ring.fetch(2, part)  # in the first one's buffer
        assert torch.equal(second.kv()[0], kept)
        for call in (first.kv, first.release, lambda: first.write(kept, kept)):
            with pytest.raises(StaleHandle, match="released"):
                call()
        second.release()
        third.release()
        assert (ring.used_bytes, ring.peak_bytes, alloc.ledger.held["staging", "staging"]) == (
            0,
            ring.bytes,
            ring.bytes,
        )
        ring.close()
        assert ("staging", "staging") not in alloc.ledger.held
        with pytest.raises(StaleHandle, match="closed"):
            ring.fetch(0, part)


def test_the_buffer_that_is_free_for_longest_is_taken(backend: str) -> None:
    """So that kernels that read the one released last have the most time to end."""
    with open_host(backend) as alloc:
        ring = StagingRing(alloc, blocks=4, buffers=3)
        part = ring.micro_batch(alloc.batch(filled(alloc, [5])))
        places = []
        for _ in range(6):
            staged = ring.fetch(0, part)
            places.append(staged.kv()[0].data_ptr())
            staged.release()
        assert places[:3] == places[3:] and len(set(places)) == 3


def test_new_tokens_may_be_written_after_the_fetch(backend: str) -> None:
    with open_host(backend) as alloc:
        batch = alloc.batch(filled(alloc, [1, 4, 5, 9]))
        ring = StagingRing(alloc, blocks=8)
        part = ring.micro_batch(batch)
        staged = ring.fetch(1, part)
        k, v = torch.randn(4, 2, 8), torch.randn(4, 2, 8)
        staged.write(k, v)
        q = torch.randn(4, 2, 8)
        found = level_attention(q, staged.kv(), part.level)[0]
        write_kv(alloc.kv(1), batch, k, v)
        torch.testing.assert_close(found, oracle(q, alloc.kv(1), batch, dtype=torch.float32)[0])


def test_what_cannot_be_staged(backend: str) -> None:
    with open_host(backend) as alloc, open_host(backend) as other:
        sequences = filled(alloc, [5, 9])
        ring = StagingRing(alloc, blocks=4)
        with pytest.raises(SpecError, match="has 5 blocks of 4 tokens; a staging buffer holds 4"):
            ring.micro_batch(alloc.batch(sequences))
        with pytest.raises(SpecError, match="ring's allocator"):
            ring.micro_batch(other.batch(filled(other, [3])))
        sequences[0].extend(1)
        with pytest.raises(SpecError, match="decode has one each"):
            ring.micro_batch(alloc.batch(sequences[:1]))
        part = ring.micro_batch(alloc.batch(sequences[1:]))
        sequences[1].free()
        with pytest.raises(StaleHandle):
            ring.fetch(0, part)
        assert ring.used_bytes == 0
        for sizes in ({"blocks": -1}, {"blocks": 4, "buffers": 0}, {"blocks": 4.5}, {"blocks": 4, "device": "meta"}):
            with pytest.raises(SpecError):
                StagingRing(alloc, **sizes)  # type: ignore[arg-type]


def test_allocators_that_cannot_be_staged(backend: str) -> None:
    window = kvmem.CacheSpec.kv(num_layers=3, num_kv_heads=2, head_dim=8, dtype=torch.float32, window_tokens=8)
    k_only = replace(SPEC, groups=(replace(SPEC.groups[0], components=SPEC.groups[0].components[:1]),))
    with (
        open_host(backend, device="meta", page_bytes=2 << 20, memory="64MiB") as alloc,
        pytest.raises(SpecError, match="cpu"),
    ):
        StagingRing(alloc, blocks=4)
    for spec, words in ((window, "no sliding window"), (k_only, "K and V")):
        with open_host(backend, spec) as alloc, pytest.raises(SpecError, match=words):
            StagingRing(alloc, blocks=4)


@pytest.mark.gpu
@pytest.mark.parametrize("omega", [0.0, 0.4])
def test_steps_through_a_gpu(backend: str, omega: float) -> None:
    """Copies and kernels overlap on two streams: many micro-batches through two buffers, whose reuse is fenced."""
    torch.manual_seed(0)
    with open_host(backend) as alloc:
        sequences = filled(alloc, [60, 41, 3, 57, 20])
        for seq in sequences:
            seq.commit(count=1)
        ring = StagingRing(alloc, blocks=16, buffers=2, device="cuda")
        for _ in range(3):
            with ModuleStep(ring, sequences, micro_batch=1, omega=omega) as step:
                for layer in range(3):
                    q, k, v = (torch.randn(5, heads, 8, device="cuda") for heads in (4, 2, 2))
                    out = step.attend(layer, q, k, v)
                    expected = oracle(q.cpu(), alloc.kv(layer), alloc.batch(sequences))[0]
                    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-4, atol=1e-4)
                step.commit([0] * 5)
