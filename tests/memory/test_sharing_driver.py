"""What sharing costs at the driver: nothing where a row is adopted, one ``set_access`` a run of shared pages, and memory
that the system counts once."""

from __future__ import annotations

import pytest
from lockstep_prefix import PrefixLockstep
from support import LAYOUTS, make_allocator, plain
from support_prefix import agree, cached, go_on, grow, take, text
from support_world import checked

import kvmem
from kvmem import _core

pytestmark = pytest.mark.core

PAGE = 4096
SHARING = [name for name in LAYOUTS if name not in ("encoder decoder", "two windows")]  # nothing is shared there


def pair_on(
    driver: _core.CheckedDriver | None, backend: str, layout: str = "kv G=1", **options: object
) -> PrefixLockstep:
    options = {
        "memory": 3000 * PAGE, "page_bytes": PAGE, "max_sequences": 24, "max_tokens": 1500, "record_ops": True,
        "interleave": LAYOUTS[layout].interleave,
    } | options  # fmt: skip
    return PrefixLockstep(make_allocator(LAYOUTS[layout].spec(16), backend, driver=driver, **options), plentiful=True)


@pytest.mark.parametrize("layout", SHARING)
def test_a_finished_row_is_adopted_at_no_driver_call(layout: str) -> None:
    """The next turn of a chat: its first tokens are what a freed row holds, and so is the room for some more."""
    driver = checked()
    pair = pair_on(driver, "virtual", layout)
    chat = text(320)
    for turn in range(4):
        handle = grow(pair, chat)
        pair.free([handle])
        take(pair)
        before = pair.alloc.stats().driver_calls
        chat = [*chat, *text(1, 50 + turn)]
        handle = pair.open(chat)
        size = pair.model.block_tokens  # groups of unequal blocks share what is whole in all of them
        assert cached(pair, handle) == (320 + 16 * turn) // size * size
        if pair.model.fixed:  # the state is copied from the snapshot, and nothing else is
            assert {op[0] for op in take(pair)} <= {"copy", "open", "bind", "length", "commit", "fence", "unbind"}
        else:
            assert pair.alloc.stats().driver_calls == before, "found and taken over"
        mapped = pair.alloc.stats().mapped_bytes
        go_on(pair, handle, chat)
        if pair.alloc.stats().mapped_bytes == mapped and not pair.model.fixed:
            assert pair.alloc.stats().driver_calls == before, "and room for the next token in its last page"
        agree(pair)
        chat += text(15, 60 + turn)
        go_on(pair, handle, chat)
        pair.free([handle])
    agree(pair)


def test_a_whole_block_hit_of_the_paged_backend_calls_no_driver() -> None:
    pair = pair_on(checked(), "paged")
    prompt = text(320)
    first = grow(pair, prompt)
    before = pair.alloc.stats().driver_calls
    assert cached(pair, pair.open([*prompt, 1])) == 320
    pair.free([first])
    assert cached(pair, pair.open([*prompt, 2])) == 320
    assert pair.alloc.stats().driver_calls == before
    agree(pair)


@pytest.mark.parametrize("layout", SHARING)
@pytest.mark.parametrize("readers", [1, 5])
def test_shared_pages_are_made_accessible_in_runs(layout: str, readers: int) -> None:
    """Virtual: a prefix of many pages costs one map a page and one set_access for each arena, not for each page."""
    driver = checked()
    pair = pair_on(driver, "virtual", layout, interleave=1)
    prompt = text(1280)
    grow(pair, prompt)
    arenas = sum(len(rules.token_bytes) for rules in pair.model.groups)
    for n in range(readers):
        before, mapped = driver.counters(), pair.alloc.stats().mapped_bytes
        handle = pair.open([*prompt, n])
        after = driver.counters()
        assert cached(pair, handle) == 1280
        pages = after.map - before.map
        assert pages >= sum(len(here) for held in pair.model.sequences[handle] for here in held.pieces)
        # A run of shared pages, the tail page at the scratch slot, and then at its place.
        assert after.set_access - before.set_access <= 3 * arenas
        assert after.unmap - before.unmap <= arenas, "the scratch slots"
        assert pair.alloc.stats().mapped_bytes - mapped <= 2 * arenas * PAGE
        agree(pair)


def test_the_system_holds_a_shared_prefix_once(backend: str) -> None:
    """By the memfd itself: ten readers of 1,024 tokens touch ten tails more. (RSS would count every alias.)"""
    pair = pair_on(None, backend)
    prompt = text(1024)
    grow(pair, prompt)
    one = pair.alloc.stats()
    assert one.physical_bytes >= one.used_bytes
    for n in range(10):
        handle = pair.open([*prompt, n])
        assert pair.append(handle, [n])
    ten = pair.alloc.stats()
    arenas = sum(len(rules.token_bytes) for rules in pair.model.groups)
    assert one.used_bytes > 20 * arenas * PAGE / 2, "the prefix is large beside the tails"
    assert ten.physical_bytes - one.physical_bytes <= 10 * 2 * arenas * PAGE
    agree(pair)


# ---- Somebody who does not follow ------------------------------------------------------------------


def reader_ops(backend: str) -> tuple[list[list[tuple[object, ...]]], int]:
    """What an allocator without a device decided: for a writer, and for a fork of it that goes on within its last piece."""
    alloc = make_allocator(
        plain(16), backend, device="meta", memory=100 * PAGE, page_bytes=PAGE, record_ops=True, debug=False
    )
    writer, steps = alloc.sequence(), []
    writer.extend(100)
    writer.commit(text(100))
    steps.append(alloc.take_ops())
    reader = alloc.sequence([*text(100), 1])
    assert reader.num_cached_tokens == 96
    steps.append(alloc.take_ops())
    reader.extend(30)
    steps.append(alloc.take_ops())
    reader.truncate(70)
    reader.extend(5)  # within what the writer still holds
    steps.append(alloc.take_ops())
    return steps, reader.id


def test_a_replica_follows_a_hit(backend: str) -> None:
    steps, handle = reader_ops(backend)
    replica = make_allocator(plain(16), backend, memory=100 * PAGE, page_bytes=PAGE)
    for ops in steps:
        replica.apply(ops)
        assert replica.check() == []
    assert replica.core.tokens(handle) == 75


def test_no_write_lands_where_two_read(backend: str) -> None:
    """Each record of a copy-on-write left out in turn: refused, or reported by check(), but never believed. What only
    moves bytes can be seen in the bytes alone, and is not among them."""
    steps, _ = reader_ops(backend)
    tampered = 0
    for number, ops in enumerate(steps):
        for left_out, op in enumerate(ops):
            if op[0] in ("copy", "zero", "fence") or number < 1:
                continue
            replica = make_allocator(plain(16), backend, memory=100 * PAGE, page_bytes=PAGE)
            for before in steps[:number]:
                replica.apply(before)
            try:
                replica.apply(ops[:left_out] + ops[left_out + 1 :])
                for after in steps[number + 1 :]:
                    replica.apply(after)
            except kvmem.KVMemError:
                tampered += 1
                continue
            state = sorted(replica.core.handles())
            problems = replica.check()
            # Leaving out a length or commit record, or an open, is a shorter but sound life; so is not giving up a page
            # behind the end, if nothing else is to be shown there.
            again = any(later[0] == "map" and later[1:3] == op[1:3] for later in ops[left_out:])
            if op[0] in ("map", "block", "bind") or (op[0] == "unmap" and again):
                assert problems, f"step {number}: without {op} nothing is reported, sequences {state}"
            tampered += 1
    assert tampered > 0
