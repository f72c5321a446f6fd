"""Sums and products of sizes that an int32 does not hold: 64 bits, or refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import make_allocator, plain

import kvmem
from kvmem import _core
from kvmem.kernels import flash_attention, flash_attention_4, flashinfer, flashinfer_mla, torch_ops
from kvmem.kernels.reference import sdpa
from kvmem.kernels.write import write_kv


def tiny() -> kvmem.CacheSpec:
    return kvmem.CacheSpec.kv(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32")


def last_row(**options: object) -> tuple[kvmem.Allocator, kvmem.Sequence]:
    """A sequence of 3 tokens in a row that begins past 2**31 tokens: those before it keep what finished ones held."""
    alloc = kvmem.Allocator(tiny(), memory="64MiB", max_sequences=256, max_tokens=2**23, **options)
    for i in range(258):
        with alloc.sequence([i] * 17) as seq:
            seq.extend(17)
            seq.commit([i] * 17)
    seq = alloc.sequence()
    seq.extend(3)
    return alloc, seq


def test_rows_past_an_int32_are_read_where_they_lie() -> None:
    alloc, seq = last_row()
    batch = alloc.batch([seq])
    assert batch.row_starts is not None and batch.row_starts.dtype == torch.int64
    start = int(batch.row_starts[0])
    assert start >= 2**31 and start == int(batch.slot_mapping[0]) and batch.cu_seqlens_k.dtype == torch.int32
    q, v = torch.randn(3, 1, 8), torch.randn(3, 1, 8)
    write_kv(alloc.kv(0), batch, torch.randn(3, 1, 8), v)
    torch.testing.assert_close(sdpa(q, alloc.kv(0), batch)[0], v[0])
    for call in (
        lambda: flash_attention.fa3_varlen_args(batch),
        lambda: flash_attention_4.fa4_varlen_args(batch, head_dim=8, dtype=torch.float16),
        lambda: torch_ops.flash_op_args(batch),
        lambda: torch_ops.varlen_args(batch),
    ):
        with pytest.raises(kvmem.SpecError, match="row_starts.*takes int32.*block tables.*cached_rows"):
            call()
    with pytest.raises(kvmem.SpecError, match="ragged wrapper takes int32.*prefill_plan"):
        flashinfer.ragged_plan(batch, num_query_heads=1, num_kv_heads=1, head_dim=8, dtype=torch.float32)
    assert flash_attention.fa3_args(batch, form="rows")["cache_batch_idx"] is not None  # takes numbers of rows


def test_lengths_that_add_up_past_an_int32() -> None:
    """Forks share memory, so their lengths may add up to more than there is."""
    alloc = kvmem.Allocator(
        tiny(), backend="paged", device="meta", memory="1GiB", max_sequences=300, max_tokens=2**23, prefix_cache=False
    )
    parent = alloc.sequence()
    parent.extend(2**23 - 16)
    parent.commit(count=2**23 - 16)
    sequences = [parent, *(parent.fork() for _ in range(270))]
    small = alloc.batch(sequences[:2])
    assert small.cu_seqlens_k.dtype == torch.int32
    flash = alloc.make_batch(max_sequences=271, max_new_tokens=271)
    alloc.fill(np.array([s.id for s in sequences], np.int32), flash)
    assert flash.cu_seqlens_k.dtype == torch.int64 and flash.cu_seqlens_k[-1] == 271 * (2**23 - 16)
    assert flash.kv_indptr[-1] == 271 * (2**19 - 1)


def test_a_batch_of_more_than_an_int32_counts_is_refused_by_name(backend: str) -> None:
    alloc = make_allocator(plain(16), backend, device="meta", memory="8MiB", page_bytes=4096, max_sequences=4)
    for sizes, field in [
        ({"max_new_tokens": 2**31}, "max_new_tokens: got 2147483648"),
        ({"max_new_tokens": 1, "max_sequences": 2**31}, "max_sequences: got 2147483648"),
        (
            {"max_new_tokens": 1, "max_sequences": 2**20, "max_tokens": 2**20},
            "max_sequences and max_tokens: got 68719476736",
        ),
    ]:
        with pytest.raises(kvmem.SpecError, match=field):
            alloc.make_batch(**sizes)
    with pytest.raises(kvmem.SpecError, match="max_indices: got 2147483648"):
        _core.BatchBuffers(max_sequences=1, max_new_tokens=1, max_blocks=1, max_indices=2**31)
    with pytest.raises(kvmem.SpecError, match="max_blocks: got -1"):
        _core.BatchBuffers(max_sequences=1, max_new_tokens=1, max_blocks=-1, max_indices=1)


def test_narrow_buffers_are_refused_before_anything_is_taken(backend: str) -> None:
    alloc = kvmem.Allocator(tiny(), backend=backend, device="meta", memory="1GiB", max_sequences=256, max_tokens=2**24)
    handles = alloc.open_batch(200)
    narrow = np.zeros(300, np.int32)
    field = {"virtual": "row_starts", "paged": "cu_seqlens_k"}[backend]
    buffers = _core.BatchBuffers(
        max_sequences=256, max_new_tokens=256, max_blocks=2**20, max_indices=2**28, **{field: narrow}
    )
    with pytest.raises(kvmem.SpecError, match=f"{field}.*int64"):
        alloc.core.step_batch(handles, None, None, -1, buffers)
    assert all(alloc.core.tokens(int(h)) == 0 for h in handles)


@pytest.mark.parametrize(
    ("version", "fits"), [((0, 6, 10), False), ((0, 6, 11), True), ((0, 7, 0), True), (None, True)]
)
def test_mla_reaches_what_the_installed_flashinfer_does(version: tuple[int, ...] | None, fits: bool) -> None:
    stride = 2**20
    blocks = torch.empty(2**33, device="meta").as_strided((2**12 + 1, 16, 1, 64), (stride, 64, 64, 1))
    if fits:
        flashinfer_mla._check_reach(blocks, version)
    else:
        with pytest.raises(kvmem.SpecError, match="block 4096 begins 4294967296.*0.6.11"):
            flashinfer_mla._check_reach(blocks, version)
    flashinfer_mla._check_reach(blocks[:-1], version)
