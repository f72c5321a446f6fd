"""What every allocator must do, whatever its backend, device and layout. Functions here are tests, collected by the
modules that
import them with a ``make`` fixture: ``make(**options) -> Allocator``. Numbers are those of the design's invariants."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from contents import places, write_row
from lockstep import Lockstep
from support import i32

import kvmem

Make = Callable[..., kvmem.Allocator]


def filled(make: Make, lengths: list[int], **options: object) -> tuple[Lockstep, list[int]]:
    """A lockstep with sequences of these lengths, every token written and committed."""
    pair = Lockstep(make(**options))
    handles = [pair.open() for _ in lengths]
    for handle, n in zip(handles, lengths, strict=True):
        assert pair.extend({handle: n})
        for g, rules in enumerate(pair.model.groups):
            if rules.growth == "prefill" and n:
                assert pair.prefill(handle, min(n, 50), g)
        pair.write([handle])
        pair.commit({handle: n})
        for g, rules in enumerate(pair.model.groups):
            if rules.growth == "prefill" and n:
                pair.commit({handle: min(n, 50)}, g)
    return pair, handles


def test_a_new_allocator_is_empty(make: Make) -> None:
    alloc = make()
    stats = alloc.stats()
    assert (stats.mapped_bytes, stats.used_bytes, stats.parked_bytes, stats.num_sequences) == (0, 0, 0, 0)
    assert stats.reserved_bytes > 0 and alloc.check() == []
    with alloc.sequence() as seq:
        assert (seq.num_tokens, seq.num_committed_tokens, seq.num_cached_tokens) == (0, 0, 0)
        seq.commit(count=0)
        seq.truncate(0)
    assert alloc.stats().mapped_bytes == 0, "an empty sequence costs no memory"


def test_tokens_keep_what_was_written(make: Make) -> None:
    pair, handles = filled(make, [1, 33, 130])
    for step in range(20):  # decode, all together; every page and block boundary is crossed
        assert pair.extend(dict.fromkeys(handles, 1 + step % 3))
        pair.write(handles)
        pair.commit(dict.fromkeys(handles, 1 + step % 3))
    pair.agree()
    pair.contents_agree()


def test_rows_and_blocks_show_the_same_memory(make: Make) -> None:
    pair, (handle,) = filled(make, [40])
    alloc = pair.alloc
    if not pair.virtual:
        with pytest.raises(kvmem.SpecError, match="rows"):
            alloc.rows(*places(alloc.spec, 0)[0])
        return
    assert pair.extend({handle: 9})
    for g, rules in enumerate(pair.model.groups):
        if rules.growth != "token":
            continue
        row, positions = alloc.core.row(handle, g), np.arange(40, 49)
        write_row(alloc, g, row, 40, np.full(9, 77), positions)
        pair.model.write(handle, g, 40, 9, 77)
        assert int(alloc.batch([handle]).group(g).rows[0]) == row
    pair.contents_agree()


def test_a_fork_shares_and_then_diverges(make: Make) -> None:
    pair, (parent,) = filled(make, [123])
    assert pair.extend({parent: 5})  # reserved, not committed: stays with the parent
    pair.write([parent])
    child = pair.fork(parent)
    grandchild = pair.fork(child)
    pair.agree()
    pair.contents_agree()
    assert pair.extend({child: 7, grandchild: 30})
    pair.write([parent, child, grandchild])
    pair.commit({parent: 5, child: 7, grandchild: 30})
    pair.agree()
    pair.contents_agree()
    pair.free([parent])
    pair.agree()
    pair.contents_agree()
    pair.free([grandchild])
    assert pair.extend({child: 20})
    pair.write([child])
    pair.agree()
    pair.contents_agree()


def test_truncating_into_shared_memory_leaves_the_others_alone(make: Make) -> None:
    pair, (parent,) = filled(make, [140])
    children = [pair.fork(parent), pair.fork(parent)]
    least = pair.model.least_tokens(parent)
    for handle, tokens in zip([parent, *children], [max(least, 17), max(least, 90), 139], strict=True):
        pair.truncate(handle, tokens)
        pair.agree()
        pair.contents_agree()
    for n in (1, 40):
        assert pair.extend(dict.fromkeys([parent, *children], n))
        pair.write([parent, *children])
        pair.commit(dict.fromkeys([parent, *children], n))
        pair.agree()
        pair.contents_agree()


def test_a_rejected_draft_is_written_again(make: Make) -> None:
    """Speculative decoding: five tokens drafted, some accepted, the rest given back, every step."""
    pair, (handle,) = filled(make, [60])
    for step in range(10):
        assert pair.extend({handle: 5})
        pair.write([handle])
        pair.commit({handle: step % 5})
        pair.truncate(handle, pair.model.sequences[handle][pair.model.main].committed)
        pair.agree()
    pair.contents_agree()


def test_invariant_5_a_batch_that_fails_changes_nothing(make: Make) -> None:
    pair, handles = filled(make, [30, 20, 10], max_tokens=12_000)
    pair.set_memory(pair.alloc.stats().mapped_bytes // pair.alloc.pool.page_bytes)
    before = pair.alloc.stats()
    counts = {handles[0]: 1, handles[1]: 9000, handles[2]: 11_000}
    with pytest.raises(kvmem.OutOfMemory) as error:
        pair.alloc.extend_batch(i32(*counts), i32(*counts.values()))
    assert "set_memory" in str(error.value), "the message says what to change"
    assert not pair.alloc.try_extend_batch(i32(*counts), i32(*counts.values()))
    after = pair.alloc.stats()
    assert (after.used_bytes, after.shared_bytes, after.num_sequences) == (before.used_bytes, before.shared_bytes, 3)
    assert after.created_bytes <= after.budget_bytes
    pair.agree()
    pair.contents_agree()


def test_invariant_5_bad_arguments_change_nothing(make: Make) -> None:
    pair, (a, b) = filled(make, [30, 20])
    core = pair.alloc.core
    stale = pair.open()
    pair.free([stale])
    for refused, call in [
        (kvmem.SpecError, lambda: core.extend_batch(i32(a, b, a), i32(1, 1, 1))),  # one sequence twice
        (kvmem.SpecError, lambda: core.extend_batch(i32(a, b), i32(1, -1))),
        (kvmem.SpecError, lambda: core.extend_batch(i32(a, b), i32(1, 100_000))),
        (kvmem.SpecError, lambda: core.extend_batch(i32(a, b), i32(1))),
        (kvmem.StaleHandle, lambda: core.extend_batch(i32(a, stale), i32(1, 1))),
        (kvmem.StaleHandle, lambda: core.extend_batch(i32(a, -1), i32(1, 1))),
        (kvmem.StaleHandle, lambda: core.extend_batch(i32(a, 2**31 - 1), i32(1, 1))),
        (kvmem.SpecError, lambda: core.commit_batch(i32(a, b), i32(0, 1))),
        (kvmem.SpecError, lambda: core.truncate(a, 31)),
        (kvmem.SpecError, lambda: core.truncate(a, -1)),
        (kvmem.SpecError, lambda: core.extend(a, 1, 9)),
        (kvmem.StaleHandle, lambda: core.free_batch(i32(a, b, stale))),
        (kvmem.SpecError, lambda: core.free_batch(i32(a, a))),
        (kvmem.StaleHandle, lambda: core.fork(stale)),
    ]:
        with pytest.raises(refused):
            call()
        pair.agree()
    pair.contents_agree()


def test_invariant_8_a_freed_handle_stays_stale(make: Make) -> None:
    alloc = make()
    seq = alloc.sequence()
    seq.extend(3)
    seq.free()
    seen = {seq.id}
    for call in (
        seq.free,
        seq.fork,
        lambda: seq.extend(1),
        lambda: seq.commit(count=1),
        lambda: seq.truncate(0),
        lambda: seq.num_tokens,
    ):
        with pytest.raises(kvmem.StaleHandle):
            call()
    with pytest.raises(kvmem.StaleHandle):
        alloc.batch([seq])
    for _ in range(50):  # the place is taken again; the handle is not
        other = alloc.sequence()
        assert other.id not in seen
        seen.add(other.id)
        other.free()
    assert alloc.check() == []


def test_sequences_run_out_and_come_back(make: Make) -> None:
    alloc = make(max_sequences=3)
    handles = alloc.open_batch(3)
    assert len(set(handles.tolist())) == 3
    with pytest.raises(kvmem.OutOfMemory, match="max_sequences"):
        alloc.sequence()
    with pytest.raises(kvmem.OutOfMemory):
        alloc.core.fork(int(handles[0]))
    alloc.free_batch(handles)
    with pytest.raises(kvmem.OutOfMemory):
        alloc.open_batch(4)
    assert alloc.stats().num_sequences == 0, "all of them or none"
    assert len(alloc.open_batch(3)) == 3


def test_invariant_6_addresses_never_change(make: Make) -> None:
    pair, (handle,) = filled(make, [1])
    alloc = pair.alloc
    known = [(*place, g) for g in range(len(alloc.spec.groups)) for place in places(alloc.spec, g)]

    def addresses() -> list[int]:
        # torch gives a tensor of no elements no address, and with nothing mapped there are none.
        views = [alloc.tensor(layer, name) for layer, name, _ in known]
        return [view.data_ptr() if len(view) else first for view, first in zip(views, before, strict=True)]

    before = [alloc.tensor(layer, name).data_ptr() for layer, name, _ in known]
    assert pair.model.groups[0].growth == "token" and before[0] != 0
    for step in range(12):
        assert pair.extend({handle: 25})
        if step % 3 == 0:
            pair.fork(handle)
            pair.trim()
        assert addresses() == before
    pair.free(pair.handles)
    pair.trim()
    pair.set_memory(2 * alloc.pool.budget_bytes // alloc.pool.page_bytes)
    assert addresses() == before


def test_views_end_at_the_last_mapped_block(make: Make) -> None:
    pair, handles = filled(make, [5, 70])
    alloc = pair.alloc
    batch = alloc.batch(handles)
    for g, group in enumerate(alloc.spec.groups):
        fields = batch.group(g)
        for layer, name in places(alloc.spec, g):
            view = alloc.tensor(layer, name)
            where = alloc._layouts[g].slice(layer, name)
            assert view.shape[1:] == (group.block_size, where.heads, where.width) and view.stride(-1) == 1
            token = alloc._layouts[g].token_bytes[where.arena]
            end = alloc.core.mapped_extent_bytes(g, where.arena)
            assert int(fields.kv_indices.max()) < len(view)
            assert (len(view) - 1) * token * group.block_size < end, "no block lies wholly past the last mapped page"
            assert str(view).startswith("CacheTensor(") and f"{view}" == repr(view)


def test_random_calls_agree_with_the_model(make: Make, rng: random.Random) -> None:
    """A short walk for each combination; tests/conformance/test_model.py has the long ones."""
    pair = Lockstep(make(max_sequences=4))
    pair.prepare_padding()
    for _ in range(40):
        step(pair, rng)
        pair.agree()
    pair.contents_agree()


def step(pair: Lockstep, walk: random.Random) -> None:
    """One random call, valid or not."""
    handles, model = pair.handles, pair.model
    kind = walk.choice(["open", "open", "extend", "extend", "extend", "batch", "commit", "commit", "prefill",
    "truncate", "fork",
                        "free", "free all", "trim", "memory", "compact"])  # fmt: skip
    if kind == "open" or not handles:
        pair.open()
        return
    handle = walk.choice(handles)
    held = model.sequences[handle][model.main]
    if kind == "extend":
        pair.extend({handle: walk.choice([0, 1, 2, 15, 16, 17, 64, 130, 401])})
    elif kind == "batch":
        pair.extend({h: walk.choice([0, 1, 1, 1, 33]) for h in walk.sample(handles, len(handles))})
    elif kind == "commit":
        pair.write(handles)
        free = {h: (t := model.sequences[h][model.main]).tokens - t.committed for h in handles}
        pair.commit({h: walk.choice([0, n, walk.randint(0, n)]) for h, n in free.items()})
    elif kind == "prefill":
        for g, rules in enumerate(model.groups):
            if rules.growth == "prefill" and pair.prefill(handle, walk.randint(0, 51), g):
                pair.write([handle])
                pair.commit({handle: model.sequences[handle][g].tokens - model.sequences[handle][g].committed}, g)
    elif kind == "truncate":
        pair.truncate(
            handle, walk.choice([0, held.committed, held.tokens, held.tokens + 1, walk.randint(0, held.tokens)])
        )
    elif kind == "fork":
        pair.fork(handle)
    elif kind.startswith("free"):
        pair.free(handles if kind == "free all" else [handle])
    elif kind == "trim":
        pair.trim()
    elif kind == "compact":
        pair.compact(walk.choice([None, 1, 20_000]))
    else:
        pair.set_memory(walk.choice([4, 10, 25, 60, 200]))
