"""The page size that the virtual backend chooses where nobody names one."""

from __future__ import annotations

import pytest

import kvmem
from kvmem.geometry.group_layout import GroupLayout, resolve_interleave
from kvmem.geometry.page_size import LEAST_PAGES, MOST_WASTE, choose_page_bytes

MIB, GIB = 1 << 20, 1 << 30


def llama(layers: int = 32) -> kvmem.CacheSpec:
    return kvmem.CacheSpec.kv(num_layers=layers, num_kv_heads=8, head_dim=128, dtype="bfloat16")


def chosen(spec: kvmem.CacheSpec, interleave: int | str, **how: int) -> int:
    together = resolve_interleave(interleave, spec.num_layers)
    return choose_page_bytes([GroupLayout(group, together) for group in spec.groups], **how)


def test_long_sequences_get_large_pages_and_waste_no_more_than_said() -> None:
    assert chosen(llama(), "all", max_tokens=131_072, memory_bytes=65 * GIB) == 16 * MIB
    for tokens in (1, 500, 4_000, 13_000, 100_000):
        for layers in (1, 8, 32):
            for interleave in ("all", 1, "none"):
                page = chosen(
                    llama(layers), interleave, max_tokens=1 << 20, memory_bytes=80 * GIB, expected_tokens=tokens
                )
                ranges = {"all": 1, 1: layers, "none": 2 * layers}[interleave]
                held = tokens * layers * 4096
                assert page == 2 * MIB or ranges * page / 2 <= MOST_WASTE * held
                larger = 2 * page
                assert larger * LEAST_PAGES > 80 * GIB or ranges * larger / 2 > MOST_WASTE * held


def test_windows_count_what_they_hold_only() -> None:
    full, short = (
        kvmem.CacheSpec.kv(num_layers=32, num_kv_heads=8, head_dim=128, dtype="bfloat16", window_tokens=window)
        for window in (None, 512)
    )
    sizes = [chosen(spec, "all", max_tokens=1 << 20, memory_bytes=80 * GIB) for spec in (full, short)]
    assert sizes[0] > sizes[1] == 2 * MIB


@pytest.mark.parametrize(
    ("backend", "how", "page"),
    [
        ("virtual", {}, 16 * MIB),
        ("paged", {}, 2 * MIB),
        ("virtual", {"max_tokens": 2048}, 2 * MIB),
        ("virtual", {"memory": "2GiB"}, 2 * MIB),
        ("virtual", {"page_bytes": 4 * MIB}, 4 * MIB),
        ("virtual", {"interleave": 1}, 2 * MIB),
    ],
)
def test_an_allocator_takes_it(backend: str, how: dict, page: int) -> None:
    sizes = {"memory": "65GiB", "max_tokens": 131_072, "max_sequences": 64, **how}
    alloc = kvmem.Allocator(llama(), backend=backend, device="meta", **sizes)
    assert alloc.pool.page_bytes == page


def test_states_count_what_their_last_page_holds_empty() -> None:
    state = kvmem.Component("state", width=96 << 10, dtype="float32", growth="fixed")
    only = kvmem.CacheSpec((kvmem.Group("state", (state,), (0,)),), block_size=16)
    assert chosen(only, "all", max_tokens=131_072, memory_bytes=65 * GIB) == 2 * MIB, "it never grows"
    hybrid = kvmem.CacheSpec((*llama().groups, kvmem.Group("state", (state,), (32,))), block_size=16)
    page = chosen(hybrid, "all", max_tokens=131_072, memory_bytes=65 * GIB)
    held = 13_107 * (128 << 10) + (384 << 10)
    assert page / 2 + (-(384 << 10)) % page <= MOST_WASTE * held < page + (-(384 << 10)) % (2 * page)
