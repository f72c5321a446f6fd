"""Arrays of a caller's are read once, under Python's lock: another thread may write to them at any time."""

from __future__ import annotations

import contextlib
import threading

import numpy as np
import pytest
from support import i32, make_allocator, plain

import kvmem


def test_arrays_that_another_thread_writes_to(backend: str) -> None:
    alloc = make_allocator(plain(4), backend, memory="2MiB", page_bytes=4096, max_sequences=8, max_tokens=2000)
    good, stop = alloc.open_batch(4), threading.Event()
    ids, counts, tokens = good.copy(), i32(2, 2, 2, 2), np.arange(8, dtype=np.int32)

    def write() -> None:
        wrong = 0
        while not stop.is_set():
            wrong += 1
            counts[wrong % 4] = (2000, 1, 0, -5, 100_000)[wrong % 5]
            ids[wrong % 4] = (0, 2**31 - 1, -1, int(good[0]))[wrong % 4]
            tokens[wrong % 8] = -wrong
            tokens[:], counts[:], ids[:] = abs(tokens), 2, good

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for round in range(1500):
            for call in (
                lambda: alloc.extend_batch(ids, counts),
                lambda: alloc.commit_batch(ids, counts, tokens),
                lambda: alloc.match(tokens),
                lambda: alloc.cascade_order(ids),
                lambda: alloc.free_batch(ids),
            ):
                with contextlib.suppress(kvmem.KVMemError):
                    call()
            for handle in alloc.core.handles() if len(alloc.core.handles()) < 4 or round % 20 == 0 else []:
                kvmem.Sequence(alloc, handle).free()
            if not alloc.core.handles():
                good[:] = alloc.open_batch(4)
            assert round % 50 or alloc.check() == []
    finally:
        stop.set()
        thread.join()
    assert alloc.check() == []


@pytest.mark.parametrize("more", [0, 5])
def test_more_values_than_an_int32_counts(backend: str, more: int) -> None:
    """Never cut: addresses of so many ids are cheap, since nothing touches them."""
    alloc = make_allocator(plain(16), backend, device="meta", memory="8MiB", page_bytes=4096, max_sequences=4)
    for size in (2**31 + more, 2**32 + more):
        values = np.zeros(size, np.int32)
        sequence = alloc.sequence()
        sequence.extend(20)
        one = i32(sequence.id)
        for call in (
            lambda v=values: alloc.sequence(v),
            lambda v=values: alloc.admit_batch(v),
            lambda v=values: alloc.match(v),
            lambda v=values: alloc.pin(v),
            lambda v=values, s=sequence: s.commit(v),
            lambda v=values, s=sequence: s.step(tokens=v),
            lambda v=values, ids=one: alloc.commit_batch(ids, i32(5), v),
            lambda v=values: alloc.extend_batch(v, v),
            lambda v=values: alloc.free_batch(v),
        ):
            with pytest.raises(kvmem.SpecError, match=f"{size} int32; a call takes at most 2147483647"):
                call()
        assert (sequence.num_tokens, sequence.num_committed_tokens) == (20, 0) and alloc.check() == []
        sequence.free()


@pytest.mark.parametrize(
    "wrong",
    [
        np.full(2, 2**31), np.full(2, 2**63, np.uint64), np.full(2, 2**31, np.uint32), np.zeros(2, np.bool_),
        np.zeros(2), np.zeros((2, 1), np.int32), np.full(2, -1, ">i4"), [2**31, 0], [-1, 0], [True, 0],
    ],
    ids=lambda a: str(getattr(a, "dtype", a)),
)  # fmt: skip
def test_what_is_no_int32_array_changes_nothing(wrong: object) -> None:
    alloc = make_allocator(plain(16), "paged", device="meta", memory="8MiB", page_bytes=4096, max_sequences=4)
    ids = alloc.open_batch(2)
    for call in (
        lambda: alloc.extend_batch(ids, wrong),
        lambda: alloc.commit_batch(ids, wrong),
        lambda: alloc.free_batch(wrong),
    ):
        with pytest.raises(kvmem.KVMemError):
            call()
    assert [alloc.core.tokens(int(h)) for h in ids] == [0, 0] and alloc.check() == []
