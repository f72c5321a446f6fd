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


def test_arguments_that_would_be_bent_or_belong_elsewhere_are_refused() -> None:
    spec = kvmem.CacheSpec.kv(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32")
    one, two = (kvmem.Allocator(spec, memory="1MiB", max_sequences=2, max_tokens=64) for _ in range(2))
    seq, foreign = one.sequence(), two.sequence()
    seq.extend(5)
    foreign.extend(3)
    for call in (
        lambda: one.batch([foreign]),
        lambda: one.sequence_tensor(foreign, 0, "k"),
        lambda: one.batch([seq], pad_to=-1),
        lambda: one.batch([seq], pad_to=True),
        lambda: one.make_batch(max_new_tokens=-4),
        lambda: kvmem.Allocator(spec, pool="x", max_sequences=1, max_tokens=5),  # type: ignore[arg-type]
    ):
        with pytest.raises(SpecError):
            call()
    with pytest.raises(kvmem.OutOfMemory, match="max_sequences is 2"):
        one.open_batch(10**12)
    assert (seq.num_tokens, one.stats().num_sequences, one.check()) == (5, 1, [])
