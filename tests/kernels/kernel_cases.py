"""Batches to attend over, with the K and V that every token was given kept aside in plain lists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import kernel_oracle
import pytest
import torch

import kvmem
from kvmem.kernels.base import Step
from kvmem.kernels.checks import as_bytes

#: name -> (tokens cached before the step, tokens the step computes), per sequence
STEPS = {
    "decode": ((37, 3, 300), (1, 1, 1)),
    "drafts": ((37, 3, 300), (4, 4, 4)),  # speculative decoding: equally many each
    "prefill": ((0, 0, 0), (37, 1, 270)),
    "mixed": ((37, 0, 12, 300, 0), (1, 9, 5, 1, 0)),  # decode, a fresh prompt, a chunk, decode, an empty sequence
    "long decode": ((1500, 3, 700), (1, 1, 1)),  # several pages of 2 MiB, and splits of the KV
}
FP8 = torch.float8_e4m3fn
#: Relative to the largest number. That of 8 bits is for kernels that compute in 8 bits too (FlashAttention 3 rounds the
#: softmax's weights to 3 bits of mantissa); those that convert K and V first are held to the dtype of their queries.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2, FP8: 6e-2}
#: What K and V of 8 bits are kept divided by in tests: two numbers, so that one taken for the other is seen.
FP8_SCALES = (0.5, 1.75)
LAYERS = 3
SPARE_TOKENS = 3

on_gpu = pytest.mark.gpu
BACKENDS = ["virtual", "paged"]
LAYOUTS = [1, "none", "all"]
BLOCK_SIZES = [1, 16, 256]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_layout = pytest.mark.parametrize("interleave", LAYOUTS)
every_block_size = pytest.mark.parametrize("block_size", BLOCK_SIZES)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tensors here are tiny: a second thread costs more than it computes, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class Case:
    alloc: kvmem.Allocator
    batch: kvmem.Batch
    layer: int
    q: torch.Tensor
    tokens: list[tuple[torch.Tensor, torch.Tensor]]  # per row of the batch: K and V of all its tokens, [n, H, D]
    window_tokens: int | None
    scales: dict[str, float]  # what the cache of 8-bit floats was divided by: for run(); empty for others
    names: tuple[str, str] = ("k", "v")
    padded: bool = False

    @property
    def cache(self) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = self.names
        return self.alloc.tensor(self.layer, first), self.alloc.tensor(self.layer, second)

    @property
    def device(self) -> torch.device:
        return self.alloc.device

    @property
    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.alloc.rows(self.layer, "k"), self.alloc.rows(self.layer, "v")

    @property
    def heads(self) -> dict[str, int | torch.dtype]:
        k = self.cache[0]
        return {
            "num_query_heads": self.q.shape[1], "num_kv_heads": k.shape[2], "head_dim": k.shape[3],
            "dtype": self.q.dtype, "kv_dtype": k.dtype,
        }  # fmt: skip

    def expected(self, *, causal: bool = True, scale: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """``(out, lse)`` from the numbers kept aside; the cache is not looked at."""
        left = -1 if self.window_tokens is None else self.window_tokens - 1
        cu, q = self.batch.cu_seqlens_q_cpu.tolist(), self.q.cpu()
        return kernel_oracle.pack([
            kernel_oracle.attend(q[a:b], k, v, causal=causal, scale=scale, left=left)
            for (a, b), (k, v) in zip(pairwise(cu), self.tokens, strict=True)
        ])  # fmt: skip


def make_case(
    backend: str, step: str, *, seed: int, block_size: int = 16, interleave: int | str = "all",
    window_tokens: int | None = None, pad_to: int | None = None, query_heads: int = 4, kv_heads: int = 2,
    head_dim: int = 16, device: str = "cpu", dtype: torch.dtype = torch.float32, kv_dtype: torch.dtype | None = None,
    layer: int = 1, tail_guard_tokens: int | None = None, poison: bool = True,
) -> Case:  # fmt: skip
    """Random K and V in layer ``layer``, the new tokens' included; NaN right behind each sequence (poison), and in the
    other layers.

    dtype: of the queries; kv_dtype: of the cache, default the same. What is kept aside of an 8-bit cache is what its
    bytes stand for, so that rounding to 8 bits is no error of the kernel's.
    """
    draw = torch.Generator().manual_seed(seed)
    kv_dtype = kv_dtype or dtype
    cached, new = STEPS[step]
    spec = kvmem.CacheSpec.kv(
        num_layers=LAYERS, num_kv_heads=kv_heads, head_dim=head_dim, dtype=kv_dtype, block_size=block_size,
        window_tokens=window_tokens,
    )  # fmt: skip
    alloc = kvmem.Allocator(
        spec, backend=backend, device=device, memory="256MiB" if device != "cpu" else "64MiB", max_sequences=8,
        max_tokens=512 if max(cached) < 500 else 2048, page_bytes=None if device != "cpu" else 4096,
        interleave=interleave, tail_guard_tokens=tail_guard_tokens,
    )  # fmt: skip
    seqs, kept = [alloc.sequence() for _ in cached], []
    scales = FP8_SCALES if kv_dtype == FP8 else (1.0, 1.0)
    scattered = alloc.sequence()
    for seq, before, count in zip(seqs, cached, new, strict=True):
        kv = torch.randn(2, before + count, kv_heads, head_dim, generator=draw).to(kv_dtype)
        kept.append(tuple(t if s == 1 else t.double() * s for t, s in zip(kv, scales, strict=True)))
        piece_tokens = 32 if before < 500 else 256
        for begin in range(0, before, piece_tokens):  # in pieces, so that windows move and blocks alternate
            piece = min(piece_tokens, before - begin)
            seq.extend(piece)
            _put(alloc, [seq], layer, kv[:, begin : begin + piece])
            seq.commit(count=piece)
            scattered.extend(1)
        if before + count:
            seq.extend(count + SPARE_TOKENS)
            spare = torch.full((2, SPARE_TOKENS, kv_heads, head_dim), torch.nan if poison else 0.0).to(kv_dtype)
            _put(alloc, [seq], layer, torch.cat([kv[:, before:], spare], 1))
    scattered.free()
    order = torch.randperm(len(seqs), generator=draw).tolist()
    batch = alloc.batch([seqs[i] for i in order], new_tokens=[new[i] for i in order], pad_to=pad_to)
    zero = torch.zeros(1, kv_heads, head_dim)
    tokens = [kept[i] for i in order] + [(zero, zero)] * (batch.num_rows - len(seqs))
    q = torch.randn(batch.num_new_tokens, query_heads, head_dim, generator=draw).to(dtype).to(device)
    named = dict(zip(("k_scale", "v_scale"), scales, strict=True)) if kv_dtype == FP8 else {}
    return Case(alloc, batch, layer, q, tokens, window_tokens, named, padded=pad_to is not None)


def step_of(case: Case, **more: Any) -> Step:
    """What a kernel is prepared with for a case."""
    given = {**case.heads, "window_tokens": case.window_tokens, "scales": case.scales} | more
    return Step(case.batch, **given)


def _put(alloc: kvmem.Allocator, seqs: list[kvmem.Sequence], layer: int, kv: torch.Tensor) -> None:
    """Writes by block and offset; the same slots of all other layers become NaN."""
    batch = alloc.batch(seqs)
    slots = batch.slot_mapping
    for other in range(LAYERS):
        for cache, values in zip(alloc.kv(other), kv, strict=True):
            values = values.to(cache.device)
            size = cache.shape[1]
            written = values if other == layer else torch.full_like(values, torch.nan)
            as_bytes(cache)[slots // size, slots % size] = as_bytes(written)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Within ``TOLERANCE`` of the largest number, and the same infinities; NaN is never close."""
    actual, expected = actual.detach().double().cpu(), expected.double().cpu()
    assert actual.shape == expected.shape
    infinite = expected.isinf()
    assert torch.equal(actual.isinf(), infinite) and torch.equal(actual[infinite], expected[infinite])
    error = (actual - expected)[~infinite].abs().max() if (~infinite).any() else torch.tensor(0.0)
    limit = TOLERANCE[dtype] * max(1.0, float(expected[~infinite].abs().max()) if (~infinite).any() else 1.0)
    assert error <= limit, f"off by {error:.3g}; {limit:.3g} is allowed"


def check_attention(case: Case, out: torch.Tensor, lse: torch.Tensor, dtype: torch.dtype, **how: object) -> None:
    """A kernel's output and natural log-sum-exp, against float64."""
    expected, expected_lse = case.expected(**how)
    assert_close(out, expected, dtype)
    assert_close(lse, expected_lse, dtype)
