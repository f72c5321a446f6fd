"""What every allocator must do with memory: park it, give it back, zero it, guard it. As conformance.py, which it
belongs to."""

from __future__ import annotations

import pytest
import torch
from conformance import Make, filled
from contents import by_sequence, places

import kvmem


def test_parked_memory_is_adopted_without_a_driver_call(make: Make) -> None:
    alloc = make(map_ahead_tokens=0)
    seq = alloc.sequence()
    seq.extend(90)
    seq.commit(count=90)
    seq.free()
    before = alloc.stats()
    assert before.mapped_bytes > 0 and before.used_bytes == 0
    for _ in range(3):
        with alloc.sequence() as other:
            other.extend(40)
            other.commit(count=40)
            for _ in range(50):  # steady decode, within what the first sequence had
                other.extend(1)
                alloc.batch([other])
                other.commit(count=1)
            assert alloc.stats().driver_calls == before.driver_calls
    after = alloc.stats()
    assert after.driver_calls == before.driver_calls and after.mapped_bytes == before.mapped_bytes


def test_trim_gives_pages_back_to_the_system(make: Make) -> None:
    pair, (b, a) = filled(make, [30, 5000], max_tokens=6000)  # of `a`, some pages in every layout
    pair.free([a])
    before = pair.alloc.stats()
    pair.trim()
    after = pair.alloc.stats()
    assert after.created_bytes < before.created_bytes
    assert after.physical_bytes <= after.created_bytes, "the system holds no more than what was kept"
    assert pair.extend({b: 100})
    pair.write([b])
    pair.contents_agree()
    pair.agree()


def test_trim_of_some_bytes(make: Make) -> None:
    pair, (_, a) = filled(make, [30, 5000], max_tokens=6000)
    pair.free([a])
    page, before = pair.alloc.pool.page_bytes, pair.alloc.stats()
    given = pair.alloc.trim(1)
    after = pair.alloc.stats()
    assert page <= given <= before.parked_bytes + before.free_bytes
    assert before.created_bytes - after.created_bytes == given
    pair.agree()
    pair.contents_agree()


def test_memory_shrinks_and_grows_live(make: Make) -> None:
    pair, (a, b) = filled(make, [100, 60], max_tokens=5000)
    page = pair.alloc.pool.page_bytes
    pair.free([a])
    stats = pair.alloc.stats()
    least = (stats.mapped_bytes - stats.parked_bytes) // page
    if least > 1:
        pair.set_memory(least - 1)  # refused, checked there
    pair.set_memory(least)
    assert pair.alloc.stats().created_bytes == least * page
    pair.agree()
    pair.contents_agree()
    assert not pair.extend({b: 4900})
    pair.set_memory(400)
    assert pair.extend({b: 300})
    pair.write([b])
    pair.agree()
    pair.contents_agree()


def test_a_window_drops_what_it_no_longer_needs(make: Make) -> None:
    pair, (handle,) = filled(make, [1], max_tokens=2000)
    alloc, sliding = pair.alloc, [i for i, g in enumerate(pair.alloc.spec.groups) if g.window_tokens]
    for _ in range(15):
        assert pair.extend({handle: 100})
        pair.write([handle])
        pair.commit({handle: 100})
    pair.contents_agree()
    pair.trim()
    pair.agree()
    for g in sliding:
        rules, held = pair.model.groups[g], pair.model.sequences[handle][g]
        kept = held.tokens - held.first
        assert rules.window_tokens - 1 <= kept < rules.window_tokens + rules.window_guard_tokens + rules.unit_tokens
    if len(sliding) == len(alloc.spec.groups):
        stats, rules = alloc.stats(), pair.model.groups[0]
        bound = sum(
            (kept + rules.window_guard_tokens + 2 * rules.unit_tokens) * size + 2 * alloc.pool.page_bytes
            for size in rules.token_bytes
        )
        trash = (
            sum(
                -(-(2 * rules.block_tokens + rules.guard_tokens) * size // alloc.pool.page_bytes)
                for size in rules.token_bytes
            )
            * alloc.pool.page_bytes
        )
        assert stats.mapped_bytes <= bound + trash, "bounded by the window, whatever the length"
        batch = alloc.batch([handle])
        first = int(batch.first_tokens[0]) // batch.block_size
        assert batch.block_table[0, :first].eq(0).all() and batch.block_table[0, first].item() != 0
    if sliding:
        with pytest.raises(kvmem.SpecError, match="window"):
            alloc.core.truncate(handle, pair.model.least_tokens(handle) - 1)


def test_fresh_memory_reads_zero(make: Make) -> None:
    alloc = make(zero="fresh", max_sequences=2)
    with alloc.sequence() as seq:
        seq.extend(150)
        for g in range(len(alloc.spec.groups)):
            if alloc.core.tokens(seq.id, g):
                assert all(not found.any() for found in by_sequence(alloc, [seq.id], g))


def test_always_zero_hides_the_last_owner(make: Make) -> None:
    pair, (a, b) = filled(make, [150, 20], zero="always")
    pair.free([a])
    new = pair.open()
    assert pair.extend({new: 100})
    for g in range(len(pair.model.groups)):
        if pair.model.sequences[new][g].tokens:
            assert all(not found.any() for found in by_sequence(pair.alloc, [new], g))
    pair.free([b])
    pair.trim()
    assert pair.extend({new: 60})
    main = pair.model.main
    assert all(
        not found[pair.model.sequences[new][main].first + 100 :].any() for found in by_sequence(pair.alloc, [new], main)
    )


def test_the_guard_behind_a_sequence_can_be_read(make: Make) -> None:
    """Kernels load whole tiles: ``tail_guard_tokens`` past the length must be mapped and finite, also after sharing."""
    pair, (handle,) = filled(make, [120], tail_guard_tokens=64)
    child = pair.fork(handle)
    least = pair.model.least_tokens(child)
    for length in (119, 70, 33, 1):
        pair.truncate(child, max(length, least))
        pair.agree()
        if pair.virtual:
            end = pair.model.sequences[child][pair.model.main].tokens
            layer, name = places(pair.alloc.spec, pair.model.main)[0]
            row = pair.alloc.core.row(child, pair.model.main)
            assert pair.alloc.rows(layer, name)[row, end : end + 64].sum() is not None
    assert pair.extend({child: 1, handle: 1})
    pair.write([child, handle])
    pair.agree()
    pair.contents_agree()


def test_a_row_mapped_ahead_is_the_same_row(make: Make) -> None:
    pair, handles = filled(make, [1, 40], map_ahead_tokens=32)
    for _ in range(50):
        assert pair.extend(dict.fromkeys(handles, 1))
        pair.write(handles)
        pair.commit(dict.fromkeys(handles, 1))
    pair.contents_agree()
    pair.lengths_agree()
    assert pair.alloc.check() == []


def test_tensors_outlive_their_allocator(make: Make) -> None:
    alloc = make()
    seq = alloc.sequence()
    seq.extend(20)
    main = next(i for i, g in enumerate(alloc.spec.groups) if g.growth == "token")
    layer, name = places(alloc.spec, main)[0]
    first = int(alloc.batch([seq]).group(main).block_table[0, 0])
    block = alloc.tensor(layer, name)[first, :5]  # of a block, only the tokens that a sequence holds need be mapped
    block.copy_(torch.ones_like(block))
    del alloc, seq
    assert bool((block == 1).all())
