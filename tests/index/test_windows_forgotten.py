"""What is forgotten of blocks that windows have passed: the same on both backends, and with it the pages."""

from __future__ import annotations

import pytest
from support import LAYOUTS, compute, make_allocator
from support_prefix import text

import kvmem

pytestmark = pytest.mark.core

PROMPT = text(160)  # ten blocks; a window of 48 tokens then needs the last four


def windows_only(backend: str, block_size: int = 16) -> kvmem.Allocator:
    """64 tokens lie on a page of each of two arenas."""
    layout = LAYOUTS["window G=1"]
    return make_allocator(layout.spec(block_size), backend, interleave=layout.interleave, page_bytes=4096)


def found(alloc: kvmem.Allocator, tokens: list[int]) -> int:
    return alloc.match([*tokens, 0]).num_tokens


def test_a_cut_forgets_what_lies_behind_blocks_that_are_gone(backend: str) -> None:
    """Blocks of which no window has anything lead to others, which a prefix that is cut off takes with it."""
    alloc = windows_only(backend)
    first = compute(alloc, PROMPT)
    alloc.clear_cache()
    first.free()
    assert found(alloc, PROMPT) == 160 and found(alloc, PROMPT[:16]) == 0
    second = compute(alloc, PROMPT[:17])
    second.truncate(5)
    assert found(alloc, PROMPT) == 0
    assert alloc.check() == []


def test_the_reason_looks_at_memory_not_at_places_in_a_row(backend: str) -> None:
    alloc = windows_only(backend)
    first = compute(alloc, PROMPT)
    alloc.clear_cache()
    assert alloc.match([*PROMPT, 0], salt="other").reason == "other salt"  # its end is there, though not its start
    assert alloc.match([*PROMPT[:48], 0], salt="other").reason == "never seen"
    first.free()
    alloc.clear_cache()
    assert alloc.match([*PROMPT, 0], salt="other").reason == "never seen"
    for end in (16, 96, 160):  # whether its memory went alone, or with that of the last blocks
        assert alloc.match([*PROMPT[:end], 0]).reason == "evicted"


@pytest.mark.parametrize("needed", ["by nobody", "by a sequence", "by a pin"])
def test_clearing_forgets_a_block_that_only_a_cut_end_refers_to(backend: str, needed: str) -> None:
    alloc = windows_only(backend)
    compute(alloc, PROMPT)
    cut = compute(alloc, PROMPT[:17])
    assert cut.num_cached_tokens == 16
    keeps = {"by a sequence": lambda: alloc.sequence(PROMPT[:17]), "by a pin": lambda: alloc.pin(PROMPT[:16])}
    cut.truncate(6)
    kept = keeps[needed]() if needed in keeps else None
    assert found(alloc, PROMPT[:16]) == 16
    alloc.clear_cache()
    assert found(alloc, PROMPT[:16]) == (0 if kept is None else 16)
    cut.extend(10)
    cut.commit(PROMPT[6:16])
    assert found(alloc, PROMPT[:16]) == 16
    assert alloc.check() == []


@pytest.mark.parametrize("cleared", [False, True])
def test_a_page_goes_that_known_and_unknown_tokens_share(cleared: bool) -> None:
    """Virtual: the known block ends within a page. The window passes the rest of it later, or at once."""
    alloc = windows_only("virtual", block_size=96)
    sequence = alloc.sequence()
    sequence.extend(150)
    sequence.commit(PROMPT[:98])
    sequence.commit(count=52)
    if cleared:
        alloc.clear_cache()
    sequence.extend(195)
    sequence.commit(count=195)
    alloc.trim()
    stats = alloc.stats()
    assert stats.parked_bytes == stats.free_bytes == 0
    assert alloc.check() == []


def test_a_page_goes_on_which_lies_what_others_need_elsewhere() -> None:
    """Virtual: two have computed the same block, and the window of one has passed it."""
    alloc = windows_only("virtual")
    long, short = alloc.sequence(), alloc.sequence()
    for sequence, tokens in ((long, PROMPT), (short, PROMPT[:17])):
        sequence.extend(len(tokens))
        sequence.commit(tokens)
    alloc.trim()
    stats = alloc.stats()
    assert stats.parked_bytes == stats.free_bytes == 0
    assert found(alloc, PROMPT[:16]) == 16
    assert alloc.check() == []
