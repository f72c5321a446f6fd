"""What the allocator says it holds, against the byte ledger of the reference model and against the system's own
count."""

from __future__ import annotations

from functools import partial

import pytest
from conformance import filled
from lockstep import Lockstep
from support import LAYOUTS, i32, make_allocator, open_driver, plain

import kvmem

pytestmark = pytest.mark.core


def test_hand_worked_bytes(backend: str) -> None:
    """3 layers x (K + V) x 2 heads x 8 x 2 bytes = 192 bytes a token; pages of 4096 bytes hold 21.3 tokens."""
    alloc = make_allocator(plain(16), backend, page_bytes=4096)
    seq = alloc.sequence()
    seq.extend(100)
    seq.commit(count=100)
    stats = alloc.stats()
    assert stats.used_bytes == 19_200 and stats.shared_bytes == 0 and stats.num_sequences == 1
    # Virtual: 19,200 bytes in 5 pages. Paged: blocks 2 to 8 of 3,072 bytes end at 27,648: pages 1 to 6, page 1 half
    # block 1.
    assert stats.mapped_bytes == (5 if backend == "virtual" else 6) * 4096
    child = seq.fork()
    stats = alloc.stats()
    # Virtual: 4 whole pages are shared, and a fifth with 2,816 bytes copied. Paged: 6 blocks, and one with 4 tokens.
    assert stats.shared_bytes == (4 * 4096 if backend == "virtual" else 6 * 3072)
    assert stats.used_bytes == 19_200 + (2816 if backend == "virtual" else 4 * 192)
    child.extend(10)
    assert alloc.stats().used_bytes == stats.used_bytes + 1920
    seq.free()
    stats = alloc.stats()
    assert stats.used_bytes == 110 * 192 and stats.shared_bytes == 0, "shared no more"
    child.free()
    assert alloc.stats().used_bytes == 0 == alloc.stats().num_sequences


def test_the_ledger_of_a_tree_of_forks(backend: str) -> None:
    for layout in LAYOUTS.values():
        sizes = {"interleave": layout.interleave, "page_bytes": 4096}
        pair, (root,) = filled(partial(make_allocator, layout.spec(16), backend, **sizes), [150])
        for parent in (root, root, *pair.handles):
            child = pair.fork(parent)
            pair.extend({child: 21})
            pair.write([child])
            pair.commit({child: 13})
            pair.agree()
        for handle in pair.handles[::2]:
            pair.free([handle])
            pair.agree()
        pair.contents_agree()


def test_a_window_and_a_truncation_in_one_shared_page(backend: str) -> None:
    """The parent's window has left the front of a page that the child was truncated in: what neither holds is not in
    use."""
    spec = kvmem.CacheSpec.kv(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float16", block_size=4, window_tokens=8)
    pair = Lockstep(make_allocator(spec, backend, page_bytes=4096))
    parent = pair.open()
    pair.extend({parent: 200})
    pair.commit({parent: 128})
    child = pair.fork(parent)
    pair.commit({parent: 60})
    pair.truncate(child, 127)
    pair.agree()


def test_created_bytes_stay_within_the_budget(backend: str) -> None:
    """Invariant 1, at the limit: as many sequences as fit, then one is refused, then one is freed and one fits."""
    pair = Lockstep(make_allocator(plain(16), backend, page_bytes=4096, memory=40 * 4096, max_sequences=64))
    while True:
        handle = pair.open()
        if not pair.extend({handle: 60}):
            break
        assert pair.alloc.stats().created_bytes <= 40 * 4096
    assert 10 <= len(pair.handles) - 1 <= 14
    pair.agree()
    pair.free(pair.handles[:1])
    assert pair.extend({handle: 60})
    pair.agree()


def test_physical_bytes_are_what_the_system_holds(backend: str) -> None:
    """CPU: pages of the memfd. trim() must reach the system, not only the books."""
    driver = open_driver("host", None)  # type: ignore[arg-type]
    pair = Lockstep(
        make_allocator(plain(16), backend, page_bytes=65536, memory="32MiB", max_tokens=20_000, driver=driver)
    )
    handles = [pair.open(), pair.open()]
    pair.extend(dict.fromkeys(handles, 20_000))
    pair.write(handles)
    full = pair.alloc.stats()
    assert full.physical_bytes == driver.physical_bytes() >= 2 * 20_000 * 192
    pair.free(handles[:1])
    assert pair.alloc.stats().physical_bytes == full.physical_bytes, "parked memory is kept"
    given = pair.alloc.trim()
    after = pair.alloc.stats()
    assert given >= 20_000 * 192 - 2 * 65536
    assert full.physical_bytes - after.physical_bytes >= given - 65536
    pair.commit({handles[1]: 20_000})
    pair.contents_agree()


def test_steady_decode_makes_no_driver_call(backend: str) -> None:
    """Within what rows and blocks have, and from one tenant to the next of the same size."""
    alloc = make_allocator(plain(16), backend, page_bytes=65536, max_sequences=8, max_tokens=300)
    handles = alloc.open_batch(8)
    alloc.extend_batch(handles, i32(*[300] * 8))
    alloc.free_batch(handles)
    calls, mapped = alloc.stats().driver_calls, alloc.stats().mapped_bytes
    assert calls > 0
    for _ in range(4):
        handles = alloc.open_batch(8)
        alloc.extend_batch(handles, i32(*[100] * 8))
        alloc.commit_batch(handles, i32(*[100] * 8))
        batch = alloc.make_batch(max_new_tokens=8)
        for _ in range(200):
            alloc.extend_batch(handles, i32(*[1] * 8))
            alloc.fill(handles, batch)
            alloc.commit_batch(handles, i32(*[1] * 8))
        alloc.free_batch(handles)
    assert (alloc.stats().driver_calls, alloc.stats().mapped_bytes) == (calls, mapped)


def test_set_memory_down_and_up(backend: str) -> None:
    pair = Lockstep(make_allocator(plain(16), backend, page_bytes=4096, memory=100 * 4096))
    handles = [pair.open(), pair.open()]
    pair.extend(dict.fromkeys(handles, 200))
    pair.write(handles)
    for pages in (100, 50, 22, 19, 18, 10, 200, 30):
        pair.set_memory(pages)
        pair.agree()
        pair.contents_agree()
    pair.free(handles)
    pair.set_memory(1)
    assert pair.alloc.stats().created_bytes <= 4096


def test_a_pool_moves_memory_between_allocators(backend: str) -> None:
    pool = kvmem.PagePool(memory=60 * 4096, page_bytes=4096)
    one, two = (
        kvmem.Allocator(plain(16), backend=kind, pool=pool, max_sequences=2, max_tokens=2000)
        for kind in (backend, "virtual")
    )
    first = one.sequence()
    first.extend(1000)
    assert not two.sequence().try_extend(1000), "47 of 60 pages are held next door"
    first.free()
    with two.sequence() as second:
        second.extend(1000)
        assert one.stats().mapped_bytes + two.stats().mapped_bytes <= pool.budget_bytes
        assert one.check() == [] == two.check()


def test_parked_pages_of_two_pools_tenants_are_not_counted_twice(backend: str) -> None:
    pool = kvmem.PagePool(memory="1MiB", page_bytes=4096)
    allocators = [
        kvmem.Allocator(plain(16), backend=backend, pool=pool, max_sequences=2, max_tokens=500) for _ in range(3)
    ]
    seqs = [alloc.sequence() for alloc in allocators]
    for seq in seqs:
        seq.extend(400)
        if seq is not seqs[0]:
            seq.free()
    stats = [alloc.stats() for alloc in allocators]
    assert sum(s.mapped_bytes for s in stats) == pool.mapped_bytes
    assert all(s.created_bytes == stats[0].created_bytes for s in stats), "created is the pool's"
    assert [s.used_bytes for s in stats] == [400 * 192, 0, 0]
    assert all(s.mapped_bytes == s.used_bytes + s.wasted_bytes + s.parked_bytes for s in stats)
