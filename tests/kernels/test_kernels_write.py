"""Writing new K/V, and what the cache looks like to a kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import BACKENDS, BLOCK_SIZES, LAYOUTS, assert_close, make_case, one_thread

import kvmem
from kvmem.kernels import reference
from kvmem.kernels.checks import check_cache, flat_tokens, host
from kvmem.kernels.write import write_component, write_kv

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")


def written(case, k: torch.Tensor, v: torch.Tensor) -> None:
    """Each new token is where its row's table says, and nothing else has changed."""
    cache = [c.clone() for c in map(flat_tokens, case.cache)] if case.alloc.backend == "paged" else None
    write_kv(case.cache, case.batch, k, v)
    size, token = case.batch.block_size, 0
    for row, (begin, end) in enumerate(zip(case.batch.cu_seqlens_q, case.batch.cu_seqlens_q[1:], strict=False)):
        if row >= 5:  # padding goes to the write-trash block, the second one
            assert case.batch.slot_mapping[token] == size
            continue
        length = int(case.batch.seq_lens[row])
        for position in range(length - int(end - begin), length):
            block = int(case.batch.block_table[row, position // size])
            for cached, new in zip(case.cache, (k, v), strict=True):
                assert torch.equal(cached[block, position % size], new[token].to(cached.dtype))
            token += 1
    if cache is not None:
        untouched = torch.ones(len(cache[0]), dtype=torch.bool, device=cache[0].device)
        untouched[case.batch.slot_mapping] = False
        for before, after in zip(cache, map(flat_tokens, case.cache), strict=True):
            assert torch.equal(before[untouched].nan_to_num(7), after[untouched].nan_to_num(7))


@pytest.mark.parametrize("interleave", LAYOUTS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_write_kv(backend: str, block_size: int, interleave: int | str, seed: int) -> None:
    case = make_case(backend, "mixed", block_size=block_size, interleave=interleave, pad_to=7, seed=seed)
    qkv = torch.randn(case.batch.num_new_tokens, 4, 2, 16, generator=torch.Generator().manual_seed(seed)).double()
    written(case, qkv[:, 1], qkv[:, 2])  # strided, and of another dtype
    read_trash = case.cache[0][0]
    assert torch.equal(read_trash, torch.zeros_like(read_trash)), "padding must not reach the block that padding reads"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_eight_bits_are_scaled_and_saturate(backend: str, dtype: torch.dtype, seed: int) -> None:
    case = make_case(backend, "mixed", dtype=torch.bfloat16, kv_dtype=dtype, pad_to=7, seed=seed)
    k = torch.randn(case.batch.num_new_tokens, 2, 16, generator=torch.Generator().manual_seed(seed)).bfloat16()
    v = torch.full_like(k, 1e9)
    v[1], v[2] = -1e9, torch.nan
    write_kv(case.cache, case.batch, k, v, k_scale=0.5, v_scale=torch.tensor(2.0))
    slots, largest = case.batch.slot_mapping, torch.finfo(dtype).max
    kept_k, kept_v = (flat_tokens(c)[slots].float() for c in case.cache)
    assert torch.equal(kept_k[:-2], (k.float() / 0.5).to(dtype).float()[:-2])  # both padding rows write to one place
    assert (kept_v[0] == largest).all() and (kept_v[1] == -largest).all() and kept_v[2].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", ["decode", "mixed"])
def test_a_scaled_cache_is_read_as_the_documentation_says(backend: str, step: str, seed: int) -> None:
    case = make_case(backend, step, dtype=torch.float32, kv_dtype=torch.float8_e4m3fn, pad_to=7, seed=seed)
    k_scale, v_scale = case.scales.values()
    out, lse = reference.oracle(case.q, case.cache, case.batch, scale=16**-0.5 * k_scale)
    expected, expected_lse = case.expected()
    assert_close(out * v_scale, expected, torch.float64)
    assert_close(lse, expected_lse, torch.float64)
    plain = reference.sdpa(case.q, case.cache, case.batch, scale=16**-0.5 * k_scale)
    assert_close(plain * v_scale, expected, torch.float32)


def test_shapes_are_checked(seed: int) -> None:
    case = make_case("paged", "mixed", seed=seed)
    with pytest.raises(kvmem.SpecError, match=r"\(16, 2, 16\)"):
        write_component(case.cache[0], case.batch, torch.zeros(15, 2, 16))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("page_bytes", [4096, 65536])
def test_the_view_ends_where_blocks_end_though_the_last_page_goes_on(
    backend: str, block_size: int, page_bytes: int
) -> None:
    spec = kvmem.CacheSpec.kv(num_layers=3, num_kv_heads=1, head_dim=24, dtype=torch.float32, block_size=block_size)
    alloc = kvmem.Allocator(
        spec, backend=backend, device="cpu", memory="4MiB", max_sequences=2, max_tokens=50, page_bytes=page_bytes
    )
    seqs = [alloc.sequence(), alloc.sequence()]
    for seq in seqs:
        seq.extend(50)
    batch = alloc.batch(seqs)
    values = torch.arange(100.0).view(-1, 1, 1).expand(-1, 1, 24)
    for layer in range(3):
        k, v = alloc.kv(layer)
        assert len(k) > int(batch.block_table.max())
        write_kv((k, v), batch, values, -values)
    assert torch.equal(torch.cat([seq.kv(2)[0] for seq in seqs]), values)


@pytest.mark.parametrize("interleave", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_cache_passes_the_check_as_plain_tensors(backend: str, interleave: int | str, seed: int) -> None:
    case = make_case(backend, "decode", interleave=interleave, seed=seed)
    for given, checked in zip(case.cache, check_cache(*case.cache), strict=True):
        assert type(checked) is torch.Tensor
        assert (checked.data_ptr(), checked.stride()) == (given.data_ptr(), given.stride())


def test_each_rule_of_a_cache() -> None:
    good = torch.zeros(4, 16, 2, 8)
    assert check_cache(good, good.clone())[0].data_ptr() == good.data_ptr()
    far = torch.empty(0).as_strided((0, 1, 2, 8), (2**32, 16, 8, 1))
    for k, v, rule in [
        (good, good[:3], "one shape"),
        (good, good.half(), "dtype"),
        (good[0], good[0], "one shape"),
        (good, good.transpose(1, 2).contiguous().transpose(1, 2), "equal strides"),
        (good.mT.contiguous().mT, good.mT.contiguous().mT, "dense"),
        (far, far, "32 bits"),
        (good[:, :1].expand(-1, 16, -1, -1), good[:, :1].expand(-1, 16, -1, -1), "32 bits"),
    ]:
        with pytest.raises(kvmem.SpecError, match=rule):
            check_cache(k, v)


def test_host_copies_do_not_follow_the_batch(seed: int) -> None:
    case = make_case("virtual", "decode", seed=seed)
    taken = host(case.batch, "kv_indptr")
    assert torch.equal(taken, case.batch.kv_indptr_cpu) and not taken.is_pinned()
    assert taken.data_ptr() != case.batch.kv_indptr_cpu.data_ptr()


def test_another_allocators_cache_and_another_device_are_refused(backend: str) -> None:
    """A write by another's block table would land in tokens of other sequences, or outside what is mapped."""
    spec = kvmem.CacheSpec.kv(num_layers=1, num_kv_heads=2, head_dim=8, dtype="float32")
    sizes: dict[str, Any] = {"memory": "2MiB", "max_sequences": 4, "max_tokens": 1024}
    own, other = (kvmem.Allocator(spec, backend=backend, device="cpu", **sizes) for _ in range(2))
    seq, k = own.sequence(), torch.ones(3, 2, 8)
    seq.extend(3)
    batch = own.batch([seq])
    with pytest.raises(kvmem.SpecError, match="another allocator"):
        write_kv(other.kv(0), batch, k, k)
    with pytest.raises(kvmem.SpecError, match="another allocator"):
        write_component(other.tensor(0, "v"), batch, k)
    for wrong in (k.to("meta"), k.numpy(), None):
        with pytest.raises(kvmem.SpecError, match="k: got .*; must be a tensor on cpu"):
            write_kv(own.kv(0), batch, wrong, k)  # type: ignore[arg-type]
    write_kv(own.kv(0), batch, k, 2 * k)
    assert torch.equal(torch.stack(seq.kv(0)), torch.stack([k, 2 * k]))


@pytest.mark.parametrize("queries", [1, "another batch"])
def test_cascade_refuses_queries_of_other_rows(backend: str, queries: object) -> None:
    spec = kvmem.CacheSpec.kv(num_layers=1, num_kv_heads=2, head_dim=8, dtype="float32")
    alloc = kvmem.Allocator(spec, backend=backend, device="cpu", memory="2MiB", max_sequences=4, max_tokens=1024)
    one, two = alloc.sequence(), alloc.sequence()
    one.extend(3), two.extend(3)
    batch, other = alloc.batch([one]), alloc.batch([one, two])
    with pytest.raises(kvmem.SpecError, match="queries: got .*; must be another group's batch of the same 1 rows"):
        batch.cascade(queries=other if queries == "another batch" else queries)  # type: ignore[arg-type]
