"""The reference against numbers that were never in a cache."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import BACKENDS, BLOCK_SIZES, LAYOUTS, STEPS, assert_close, make_case, one_thread

import kvmem
from kvmem.kernels import reference
from kvmem.kernels.merge import merge

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("interleave", LAYOUTS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_oracle_and_sdpa(backend: str, step: str, block_size: int, interleave: int | str, seed: int) -> None:
    case = make_case(backend, step, block_size=block_size, interleave=interleave, pad_to=7, seed=seed)
    expected, expected_lse = case.expected()
    out, lse = reference.oracle(case.q, case.cache, case.batch)
    assert out.dtype == lse.dtype == torch.float64
    assert_close(out, expected, torch.float64)
    assert_close(lse, expected_lse, torch.float64)
    fast = reference.sdpa(case.q, case.cache, case.batch)
    assert fast.dtype == case.q.dtype
    assert_close(fast, expected, torch.float32)
    out, lse = reference.sdpa_lse(case.q, case.cache, case.batch)
    assert out.dtype == case.q.dtype and lse.dtype == torch.float32
    assert_close(out, expected, torch.float32)
    assert_close(lse, expected_lse, torch.float32)


@pytest.mark.parametrize("window_tokens", [1, 20, 1000])
@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("step", ["decode", "drafts", "mixed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sliding_window(backend: str, step: str, block_size: int, window_tokens: int, seed: int) -> None:
    case = make_case(backend, step, block_size=block_size, window_tokens=window_tokens, seed=seed)
    assert bool(case.batch.first_tokens.any()) == (window_tokens < 300)
    # Take away all that may be taken away: a read of a dropped token now faults or meets another's.
    case.alloc.set_memory(case.alloc.stats().used_bytes + (1 << 20))
    case.alloc.trim()
    expected, expected_lse = case.expected()
    out, lse = reference.oracle(case.q, case.cache, case.batch, window_tokens=window_tokens)
    assert_close(out, expected, torch.float64)
    assert_close(lse, expected_lse, torch.float64)
    assert_close(reference.sdpa(case.q, case.cache, case.batch, window_tokens=window_tokens), expected, torch.float32)


@pytest.mark.parametrize(("query_heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_and_scale(backend: str, query_heads: int, kv_heads: int, seed: int) -> None:
    case = make_case(backend, "mixed", query_heads=query_heads, kv_heads=kv_heads, seed=seed)
    expected, expected_lse = case.expected(scale=0.3)
    out, lse = reference.oracle(case.q, case.cache, case.batch, scale=0.3)
    assert_close(out, expected, torch.float64)
    assert_close(lse, expected_lse, torch.float64)
    assert_close(reference.sdpa(case.q, case.cache, case.batch, scale=0.3), expected, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cross_attention_takes_queries_of_another_group(backend: str, seed: int) -> None:
    case = make_case(backend, "mixed", seed=seed)
    expected, expected_lse = case.expected(causal=False)
    out, lse = reference.oracle(case.q, case.cache, case.batch, causal=False, queries=case.batch)
    assert_close(out, expected, torch.float64)
    assert_close(lse, expected_lse, torch.float64)
    assert_close(reference.sdpa(case.q, case.cache, case.batch, causal=False), expected, torch.float32)
    # The keys of one batch, the queries of another: each sequence's single query looks at all that is cached.
    other = make_case(backend, "decode", seed=seed + 1)
    keys = make_case(backend, "drafts", seed=seed)
    out, _ = reference.oracle(other.q, keys.cache, keys.batch, causal=False, queries=other.batch)
    keys.q, keys.batch = other.q, other.batch
    assert_close(out, keys.expected(causal=False)[0], torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_k_and_v_of_different_width(backend: str, seed: int) -> None:
    k = kvmem.Component("k", heads=2, width=16, dtype=torch.float32)
    v = kvmem.Component("v", heads=2, width=8, dtype=torch.float32)
    spec = kvmem.CacheSpec(components=[k, v], num_layers=2)
    alloc = kvmem.Allocator(spec, backend=backend, device="cpu", memory="4MiB", max_sequences=2, max_tokens=64)
    seq = alloc.sequence()
    seq.extend(21)
    batch = alloc.batch([seq])
    draw = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(21, 2, 16, generator=draw), torch.randn(21, 2, 8, generator=draw)
    from kvmem.kernels.write import write_kv

    write_kv(alloc.kv(1), batch, keys, values)
    q = torch.randn(21, 4, 16, generator=draw)
    from kernel_oracle import attend

    expected, _ = attend(q, keys, values)
    assert expected.shape == (21, 4, 8)
    assert_close(reference.oracle(q, alloc.kv(1), batch)[0], expected, torch.float64)
    assert_close(reference.sdpa(q, alloc.kv(1), batch), expected, torch.float32)


def test_virtual_slices_and_does_not_copy(seed: int) -> None:
    case = make_case("virtual", "decode", seed=seed)
    taken = reference._tokens(
        case.cache[0], case.batch, next(reference._parts(case.q, case.cache[0], case.batch, case.batch, True, None))
    )
    base = case.cache[0]
    end = base.data_ptr() + base.stride(0) * base.shape[0] * base.element_size()
    assert base.data_ptr() <= taken.data_ptr() < end


def test_refusals(seed: int) -> None:
    case = make_case("paged", "decode", seed=seed)
    with pytest.raises(kvmem.SpecError, match="3 new tokens"):
        reference.sdpa(case.q[:2], case.cache, case.batch)
    with pytest.raises(kvmem.SpecError, match="window"):
        reference.oracle(case.q, case.cache, case.batch, causal=False, window_tokens=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_merging_two_parts_gives_the_whole(dtype: torch.dtype, seed: int) -> None:
    from kernel_oracle import attend

    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(n, h, 8, generator=draw) for n, h in ((3, 4), (40, 2), (40, 2)))
    whole, whole_lse = attend(q, k, v, causal=False)
    a, b = attend(q, k[:13], v[:13], causal=False), attend(q, k[13:], v[13:], causal=False)
    out, lse = merge(a[0].to(dtype), a[1], b[0].to(dtype), b[1])
    assert out.dtype == dtype
    assert_close(out, whole, dtype)
    assert_close(lse, whole_lse, torch.float64)
    nothing = torch.zeros_like(whole), torch.full_like(whole_lse, -torch.inf)
    assert_close(merge(*nothing, whole, whole_lse)[0], whole, torch.float64)
    out, lse = merge(*nothing, *nothing)
    assert torch.equal(out, nothing[0]) and torch.equal(lse, nothing[1])
