"""A window of one token leaves a sequence with none of its group's tokens between two steps, which is no fault."""

from __future__ import annotations

import pytest
from support import make_allocator

import kvmem

pytestmark = pytest.mark.core


@pytest.mark.parametrize("tail", [0, 1])
def test_a_fork_holds_nothing_and_goes_on(backend: str, tail: int) -> None:
    parts = tuple(kvmem.Component(name, width=64, dtype="float32") for name in "kv")
    groups = (kvmem.Group("full", parts, (0,)), kvmem.Group("local", parts, (1,), window_tokens=1))
    spec = kvmem.CacheSpec(groups, block_size=4)
    options = {"page_bytes": 4096, "memory": "256KiB"}
    alloc = make_allocator(spec, backend, record_ops=True, **options)  # debug: every call is checked
    replica = make_allocator(spec, backend, prefix_cache=False, cached_rows=alloc.cached_rows, **options)
    one = alloc.sequence()
    one.extend(8 + tail)
    one.commit(count=8)
    two = one.fork()
    for sequence in (two, one):
        sequence.extend(5)
        sequence.commit(count=5)
        replica.apply(alloc.take_ops())
    one.free()
    two.free()
    replica.apply(alloc.take_ops())
    assert replica.stats().used_bytes == 0
