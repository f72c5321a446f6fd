"""The pages of a pool: what every device refuses, `meta` refuses too."""

from __future__ import annotations

import pytest

import kvmem
from kvmem import PagePool, SpecError


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("page_bytes", [1, 1000, 4095, 4097, 6000, "5KiB"])
def test_a_page_that_no_device_can_map_is_refused(device: str, page_bytes: int | str) -> None:
    with pytest.raises(SpecError, match=r"multiples? of 4096"):
        PagePool(device=device, memory="1MiB", page_bytes=page_bytes)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("page_bytes", [0, -4096])
def test_a_page_has_bytes(device: str, page_bytes: int) -> None:
    with pytest.raises(SpecError, match="page_bytes"):
        PagePool(device=device, memory="1MiB", page_bytes=page_bytes)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("page_bytes", [4096, 3 * 4096, "64KiB"])
def test_the_budget_is_whole_pages(device: str, page_bytes: int | str) -> None:
    pool = PagePool(device=device, memory=1_000_000, page_bytes=page_bytes)
    assert pool.budget_bytes == 1_000_000 // pool.page_bytes * pool.page_bytes
    assert pool.mapped_bytes == 0


@pytest.mark.parametrize("bad", [[1.5], [True], [[1]], [2**40], ["1"]])
def test_lists_of_handles_and_counts_are_not_rounded(bad: list[object]) -> None:
    spec = kvmem.CacheSpec.kv(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32")
    alloc = kvmem.Allocator(spec, device="meta", memory="64MiB", max_sequences=2, max_tokens=64)
    seq = alloc.sequence()
    seq.extend(3)
    with pytest.raises(kvmem.SpecError, match="new_tokens"):
        alloc.batch([seq], new_tokens=bad)
    with pytest.raises(kvmem.SpecError, match="sequences"):
        alloc.batch(bad)
