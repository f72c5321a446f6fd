"""Which parked rows go, and whose memory, when the virtual backend is short of pages. A page is 16 tokens here."""

from __future__ import annotations

import numpy as np
import pytest

import kvmem

PAGE = 65536
TOKENS = 16  # of a page, and of a block


def spec(window: int | None = None) -> kvmem.CacheSpec:
    pair = tuple(kvmem.Component(name, width=512, dtype="float32") for name in "kv")
    groups = [kvmem.Group("full", pair, (0,))]
    if window is not None:
        groups.append(kvmem.Group("window", pair, (1,), window_tokens=window))
    return kvmem.CacheSpec(tuple(groups), block_size=TOKENS)


def allocator(pages: int, **how) -> kvmem.Allocator:
    sizes = {"device": "meta", "page_bytes": PAGE} if "pool" not in how else {}
    return kvmem.Allocator(
        how.pop("spec", spec()), memory=pages * PAGE, max_sequences=8, max_tokens=40_000, debug=True, **sizes, **how
    )


def prompt(number: int, pages: int) -> np.ndarray:
    return np.arange(pages * TOKENS, dtype=np.int32) + number * 1_000_000


def cache(alloc: kvmem.Allocator, tokens: np.ndarray) -> None:
    with alloc.sequence(tokens) as seq:
        found = seq.num_cached_tokens
        seq.extend(len(tokens) - found)
        seq.commit(tokens[found:])


@pytest.mark.parametrize("found", [99, 95, 80, 50, 5])
@pytest.mark.parametrize("ahead", [0, 64])
def test_a_hit_costs_others_what_it_lacks_only(found: int, ahead: int) -> None:
    """20 prompts of 100 pages are cached and 10 pages are free; a prompt begins with `found` pages of one of them,
    which a live sequence shows too, so that its row cannot be taken over."""
    alloc = allocator(3000, map_ahead_tokens=ahead)
    for number in range(20):
        cache(alloc, prompt(number, 100))
    user = alloc.sequence(prompt(7, 100))
    alloc.trim(alloc.stats().parked_bytes - alloc.stats().cached_bytes)
    alloc.set_memory(alloc.stats().mapped_bytes + 10 * PAGE)
    before = alloc.stats().cached_blocks
    again = np.concatenate([prompt(7, found), prompt(99, 100 - found)])
    only = alloc.sequence(again)
    assert only.num_cached_tokens >= (found - 1) * TOKENS
    assert before - alloc.stats().cached_blocks <= 2, "a sequence that asks for no room takes none"
    only.free()
    before = alloc.stats().cached_blocks
    handles, cached = alloc.admit_batch(again)
    lacking = 100 - int(cached[0]) // TOKENS + ahead // TOKENS * 2
    assert before - alloc.stats().cached_blocks <= lacking + lacking // 4 + 1
    alloc.free_batch(handles)
    user.free()
    assert alloc.check() == []


@pytest.mark.parametrize("ahead", [0, 64])
def test_who_is_at_its_own_limit_takes_nothing_of_others(ahead: int) -> None:
    pool = kvmem.PagePool(device="meta", memory=PAGE * 4000, page_bytes=PAGE)
    mine, theirs = (allocator(pages, pool=pool, map_ahead_tokens=ahead) for pages in (600, 3000))
    cache(theirs, prompt(0, 500))
    parked = theirs.sequence()
    parked.extend(300 * TOKENS)
    parked.free()
    before = theirs.stats()
    cache(mine, prompt(1, 100))
    seq = mine.sequence()
    for _ in range(580):
        seq.extend(TOKENS)
    after = theirs.stats()
    assert (after.mapped_bytes, after.cached_blocks) == (before.mapped_bytes, before.cached_blocks)
    assert mine.stats().mapped_bytes <= 600 * PAGE


def test_what_others_have_parked_goes_before_what_is_cached() -> None:
    pool = kvmem.PagePool(device="meta", memory=PAGE * 1000, page_bytes=PAGE)
    mine, theirs = (allocator(1000, pool=pool, prefix_cache=on) for on in (True, False))
    cache(mine, prompt(0, 500))
    parked = theirs.sequence()
    parked.extend(400 * TOKENS)
    parked.free()
    with mine.sequence() as seq:
        seq.extend(250 * TOKENS)
        assert mine.stats().cached_blocks == 500
        assert theirs.stats().mapped_bytes < 400 * PAGE


def test_a_window_beside_full_attention_lets_all_of_a_long_row_go() -> None:
    """A row of 2,000 pages of which the window shows the last 8 is given up as far as asked, a run at a time."""
    alloc = allocator(5000, spec=spec(window=8 * TOKENS))
    cache(alloc, prompt(0, 2000))
    alloc.set_memory(alloc.stats().mapped_bytes)
    before = alloc.stats()
    with alloc.sequence() as seq:
        seq.extend(400 * TOKENS)
        lost = before.cached_blocks - alloc.stats().cached_blocks
        assert lost <= 800 + 8
    assert alloc.trim() > 0 and alloc.stats().cached_blocks == 0
    assert alloc.check() == []


def test_blocks_that_begin_alike_count_their_common_pages_once() -> None:
    """A block of 16 pages, and four that begin with 12 of them: the others' 4 last pages are their own."""
    block, page = 64, 4096  # a token is 1 KiB
    alloc = kvmem.Allocator(
        kvmem.CacheSpec.kv(num_layers=1, num_kv_heads=1, head_dim=128, dtype="float32", block_size=block),
        device="meta", memory=400 * page, page_bytes=page, max_sequences=4, max_tokens=256, debug=True,
    )  # fmt: skip
    first = np.arange(block + 1, dtype=np.int32)
    cache(alloc, first)
    for number in range(1, 5):
        other = first.copy()
        other[48:] += 1000 * number
        cache(alloc, other)
    stats = alloc.stats()
    assert stats.cached_blocks == 5 and stats.cached_bytes == (16 + 4 * 4) * page <= stats.mapped_bytes


@pytest.mark.parametrize("policy", ["lru", "density"])
def test_what_windows_show_twice_goes_before_content(policy: str) -> None:
    """Two requests compute the same 30 blocks at once and go on differently, so neither row lies in the other."""
    group = kvmem.Group("window", spec().groups[0].components, (0,), window_tokens=320)
    window = kvmem.CacheSpec((group,), block_size=TOKENS)
    alloc = allocator(400, spec=window, policy=policy, zero="never")
    prompts = [np.concatenate([prompt(0, 30), prompt(number, 10)]) for number in (1, 2)]
    twins = [alloc.sequence(tokens) for tokens in prompts]
    for twin, tokens in zip(twins, prompts, strict=True):
        assert twin.num_cached_tokens == 0
        twin.extend(len(tokens))
        twin.commit(tokens)
    for twin in twins:
        twin.free()
    alloc.set_memory(alloc.stats().mapped_bytes)
    seq = alloc.sequence()
    seq.extend(30 * TOKENS)
    assert alloc.stats().evicted_blocks == 0
    assert [alloc.match(tokens).num_tokens for tokens in prompts] == [40 * TOKENS - 1] * 2
    assert alloc.match(np.concatenate([prompt(0, 30), prompt(9, 1)])).num_tokens == 30 * TOKENS
