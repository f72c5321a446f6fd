"""A call that is refused changes nothing: neither what can be seen, nor which page, block, row or victim comes next.

The digest of all that the core knows says so (``Digest`` of support_world), and content does. Random programs over pools of a
few pages, with refusals in the middle of calls over many sequences; then the faults that such programs have found, each by itself."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from lockstep_prefix import PrefixLockstep
from prefix_walk import author, step
from support import LONG, i32
from support_world import PAGE, Digest, checked, mixed_spec

import kvmem
from kvmem import CacheSpec, Component, Group

pytestmark = pytest.mark.core

BLOCK = 8


def pair(width: int = 64, **kinds: Any) -> tuple[Component, Component]:
    return tuple(Component(n, heads=1, width=width, dtype=torch.float32, **kinds) for n in "kv")


def specs() -> dict[str, CacheSpec]:
    """A page of 4,096 bytes holds 16 tokens of one component."""
    state = Component("state", heads=1, width=64, dtype=torch.float32, growth="fixed")
    return {
        "plain": CacheSpec((Group("full", pair(), (0,)),), block_size=BLOCK),
        "window": CacheSpec(
            (Group("full", pair(), (0,)), Group("window", pair(), (1,), window_tokens=20)), block_size=BLOCK
        ),
        "narrow": CacheSpec((Group("window", pair(), (0,), window_tokens=2),), block_size=BLOCK),
        "state": CacheSpec((Group("full", pair(), (0,)), Group("state", (state,), (1,))), block_size=BLOCK),
    }


class WatchedCore:
    """A core each of whose calls either does something or leaves the digest of all it knows as it was."""

    def __init__(self, core: Any) -> None:
        self._core, self.refused = core, 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._core, name)

        def call(*given: Any, **named: Any) -> Any:
            before = Digest(self._core)
            try:
                return found(*given, **named)
            except kvmem.KVMemError:
                self.refused += 1
                assert Digest(self._core) == before, name
                raise

        return call if callable(found) else found


def step_all(pair: PrefixLockstep, rng: random.Random) -> None:
    """One call for all sequences, into buffers and memory that may be too small."""
    handles, model = [h for h in pair.handles if pair.model.room_tokens(h)], pair.model
    out = pair.alloc.make_batch(max_sequences=8, max_new_tokens=rng.choice([8, 200]), max_tokens=rng.choice([64, 200]))
    padding = rng.choice([None, 8])
    pair.write(handles)
    try:
        pair.alloc.step(i32(*handles), out, pad_to=padding)
    except kvmem.KVMemError:
        return
    for handle in handles:
        held = model.sequences[handle][model.main]
        model.commit(handle, held.tokens - held.committed)
        model.extend(handle, 1)
    if padding:
        model.trash.update(range(len(model.groups)))


@pytest.mark.parametrize("name", ["plain", "window", "narrow", "state"])
def test_random_programs_with_refusals(name: str, backend: str, rng: random.Random) -> None:
    refused = 0
    for _ in range(200 if LONG else 3):
        alloc = kvmem.Allocator(
            specs()[name], backend=backend, memory=rng.choice([12, 20, 40]) * PAGE, page_bytes=PAGE, interleave=1,
            max_sequences=6, max_tokens=200, policy=rng.choice(["lru", "density"]), tail_guard_tokens=rng.choice([0, 4]),
            cached_rows=rng.choice([0, 3, 18]), record_ops=backend == "virtual",  # which page a row shows
        )  # fmt: skip
        alloc.core = watched = WatchedCore(alloc.core)  # type: ignore[assignment]
        pair = PrefixLockstep(alloc)
        writer = author(pair, rng)
        for number in range(120):
            step_all(pair, rng) if rng.random() < 0.07 else step(pair, rng, writer)
            pair.agree()
            if number % 10 == 9:
                pair.contents_agree()
        refused += watched.refused
    assert refused > 10


# ---- one by one -----------------------------------------------------------------------------------


def small(backend: str, pages: int, name: str = "plain", **options: Any) -> kvmem.Allocator:
    return kvmem.Allocator(
        specs()[name], backend=backend, memory=pages * PAGE, page_bytes=PAGE, interleave=1, policy="lru", **options
    )


def test_a_parked_row_gives_way_to_a_write_in_the_page_that_it_shows(backend: str) -> None:
    """Without free pages, a row without content must not force a copy of a page that only it shares."""
    alloc = small(backend, 2, max_sequences=4, max_tokens=64, tail_guard_tokens=0)
    other, parent = alloc.sequence(), alloc.sequence()
    other.extend(BLOCK)
    parent.extend(BLOCK), parent.commit(count=BLOCK)  # a page each; no ids, so nothing is cached
    child = parent.fork()
    parent.free()
    child.truncate(1)
    child.extend(1)
    assert child.num_tokens == 2 and alloc.check() == []
    with pytest.raises(kvmem.OutOfMemory):
        child.extend(BLOCK)


def test_a_cut_block_that_is_cached_stays_marked_when_a_batch_is_refused(backend: str) -> None:
    """In the refused call another sequence gives the cached block up, so that nothing seems to be shared any more; the
    block comes back, and with it the mark that it is to be copied before the next write."""
    spec = CacheSpec.kv(num_layers=1, num_kv_heads=1, head_dim=64, dtype="float32", block_size=BLOCK)
    alloc = kvmem.Allocator(
        spec, backend=backend, memory=6 * PAGE, page_bytes=PAGE, max_sequences=6, max_tokens=8192, policy="lru"
    )
    ids = list(range(100, 116))

    def put(seq: kvmem.Sequence, begin: int, end: int, value: float) -> None:
        table, view = alloc.batch([seq]).block_table[0], alloc.kv(0)[0].as_subclass(torch.Tensor)
        for p in range(begin, end):
            view[int(table[p // BLOCK]), p % BLOCK] = value

    other, seq = alloc.sequence(), alloc.sequence()
    other.extend(1), other.commit(count=1)
    seq.extend(16), put(seq, 0, 16, 1.0), seq.commit(ids)
    fork = seq.fork()
    seq.truncate(12), fork.free()
    with alloc.sequence(salt="another") as cached:
        cached.extend(8), cached.commit(ids[:8])
    before = alloc.core.digest()
    with pytest.raises(kvmem.OutOfMemory):
        alloc.extend_batch(np.array([other.id, seq.id], np.int32), np.array([24, 9], np.int32))
    assert alloc.core.digest() == before and alloc.check() == []
    seq.extend(4), put(seq, 12, 16, 9.0)
    with alloc.sequence([*ids, 0]) as hit:
        assert hit.kv(0)[0][:, 0, 0].tolist() == [1.0] * hit.num_cached_tokens


def test_a_parked_row_that_shows_shared_pages_stays_marked_when_a_batch_is_refused() -> None:
    spec = CacheSpec.kv(num_layers=1, num_kv_heads=1, head_dim=64, dtype="float32", block_size=BLOCK)
    alloc = kvmem.Allocator(
        spec, memory=12 * PAGE, page_bytes=PAGE, max_sequences=5, max_tokens=8192, cached_rows=0, backend="virtual"
    )
    victim = alloc.sequence(salt="a")
    victim.extend(32)
    victim.kv(0)[0][:] = 1.0
    victim.commit(count=32)
    fork = victim.fork()
    fork.truncate(1)
    parked, busy = alloc.sequence(), alloc.sequence()
    for seq, n in ((parked, 8), (busy, 1)):
        seq.extend(n), seq.commit(count=n)
    fork.free(), parked.free()
    stranger = alloc.sequence(salt="b")
    before = alloc.core.digest()
    with pytest.raises(kvmem.OutOfMemory):
        alloc.extend_batch(np.array([busy.id, stranger.id], np.int32), np.array([56, 9], np.int32))
    assert alloc.core.digest() == before
    stranger.extend(1)
    stranger.kv(0)[0][:] = 7.0
    assert alloc.check() == [] and victim.kv(0)[0][:, 0, 0].tolist() == [1.0] * 32


def test_a_step_is_refused_for_any_group_before_it_is_taken(backend: str) -> None:
    """No memory for the padding of a second group, and a batch whose second group is too small."""
    alloc = small(backend, 40, "window", max_sequences=4, max_tokens=200)
    seq, ids = alloc.sequence(), np.empty(1, np.int32)
    ids[0] = seq.id
    seq.extend(9), seq.commit(count=7)
    alloc.trim()
    alloc.set_memory(alloc.stats().mapped_bytes)
    batch = alloc.make_batch(max_sequences=4, max_new_tokens=64)
    before = Digest(alloc.core)
    for call in (alloc.step, alloc.fill):
        with pytest.raises(kvmem.OutOfMemory):
            call(ids, batch, pad_to=3)
        assert Digest(alloc.core) == before and (seq.num_tokens, seq.num_committed_tokens) == (9, 7)
    spec = CacheSpec((Group("a", pair(), (0,), block_size=16), Group("b", pair(), (1,), block_size=4)))
    alloc = kvmem.Allocator(spec, backend=backend, memory="1MiB", page_bytes=PAGE, max_sequences=4, max_tokens=200)
    seq = alloc.sequence()
    seq.extend(4)
    batch, before = alloc.batch([seq]), Digest(alloc.core)
    with pytest.raises(kvmem.SpecError, match="the batch was made for"):
        alloc.step(np.array([seq.id], np.int32), batch)
    assert Digest(alloc.core) == before


def test_a_group_that_grows_with_the_tokens_has_no_count_of_its_own(backend: str) -> None:
    alloc = kvmem.Allocator(
        mixed_spec(), backend=backend, memory=80 * PAGE, page_bytes=PAGE, interleave=1, max_sequences=2, max_tokens=200
    )
    seq = alloc.sequence()
    for group, why in ((0, "grows with the tokens"), (1, "grows with the tokens"), (3, "one state of fixed size")):
        with pytest.raises(kvmem.SpecError, match=why):
            seq.extend(17, group=group)
        with pytest.raises(kvmem.SpecError, match=why):
            seq.commit(count=0, group=group)
    seq.extend(5, group=2), seq.commit(count=5, group=2)
    seq.extend(17), seq.truncate(16)
    assert alloc.check() == []


def test_admitting_many_that_fails_in_the_driver_admits_none(backend: str) -> None:
    failures = 0
    for nth in range(1, 60):
        driver = checked()
        alloc = small(backend, 40, max_sequences=4, max_tokens=200, driver=driver)
        with alloc.sequence() as seq:
            seq.extend(16), seq.commit(list(range(16)))
        before = Digest(alloc.core)
        driver.fail("", nth, 999)
        try:
            alloc.admit_batch(np.arange(96, dtype=np.int32), np.array([32, 32, 32], np.int32))
            break
        except kvmem.DeviceError:
            failures += 1
        assert Digest(alloc.core) == before and alloc.check() == []
        assert alloc.stats().num_sequences == 0
    assert failures > 3


@pytest.mark.parametrize("policy", ["density", "lru"])
def test_what_a_kept_block_leads_to_stands_where_it_stood(backend: str, policy: str) -> None:
    """The end of a cached chain is retained, so all of the chain is kept; a call that is refused looks at all of it."""
    spec = kvmem.CacheSpec.kv(num_layers=1, num_kv_heads=1, head_dim=512, dtype="float32", block_size=1)  # a page each
    alloc = kvmem.Allocator(
        spec, backend=backend, memory=8 * 4096, page_bytes=4096, max_sequences=3, max_tokens=64, policy=policy
    )
    ids = [5, 6, 7, 8]
    with alloc.sequence(ids) as sequence:
        sequence.extend(4)
        sequence.commit(ids)
        sequence.retain(3, 4, priority=51)
    new, before = alloc.sequence(), alloc.core.digest()
    with pytest.raises(kvmem.OutOfMemory):
        new.extend(60)
    assert alloc.core.digest() == before
    assert alloc.match([*ids, 1]).num_tokens == 4
