"""Which cached prefixes stay when memory is short, and that nothing in use or pinned ever goes."""

from __future__ import annotations

import time

import pytest
from lockstep_prefix import NO_ROOT, PrefixLockstep
from support import LAYOUTS, i32, make_allocator
from support_prefix import agree, cached, go_on, grow, text

import kvmem

PAGE = 4096
LAYOUTS_HERE = ["kv interleaved", "kv G=1", "latent", "full and window", "window G=1", "recurrent"]


def small(backend: str, layout: str = "kv interleaved", pages: int = 60, **options: object) -> PrefixLockstep:
    options = {
        "memory": pages * PAGE, "page_bytes": PAGE, "max_sequences": 12, "max_tokens": 2000, "record_ops": True,
        "interleave": LAYOUTS[layout].interleave,
    } | options  # fmt: skip
    return PrefixLockstep(make_allocator(LAYOUTS[layout].spec(16), backend, **options))


def press(pair: PrefixLockstep) -> None:
    """Takes all memory there is for a while: what can be given up, is."""
    handles = []
    while len(pair.handles) < pair.alloc.max_sequences and (handle := pair.open()) >= 0:
        handles.append(handle)
        for n in (400, 100, 30, 8, 1):
            while pair.model.room_tokens(handle) >= n and pair.extend({handle: n}):
                pass
        if pair.model.room_tokens(handle) > 0:
            break
    assert pair.refusals > 0, "memory was never short"
    pair.free(handles)


@pytest.mark.parametrize("layout", LAYOUTS_HERE)
def test_cached_memory_is_given_up_before_anything_is_refused(backend: str, layout: str) -> None:
    pair = small(backend, layout)
    prompt = text(160)
    pair.free([grow(pair, prompt)])
    assert pair.match([*prompt, 1]).num_tokens == 160
    press(pair)
    found = pair.match([*prompt, 1])
    assert found.num_tokens == 0
    assert found.reason == "evicted" or (pair.model.windows and found.reason == "window passed")
    agree(pair)
    assert cached(pair, grow(pair, prompt)) == 0
    agree(pair)


@pytest.mark.parametrize("layout", LAYOUTS_HERE)
def test_a_pinned_prefix_survives_pressure(backend: str, layout: str) -> None:
    pair = small(backend, layout)
    prompt = text(160)
    first = grow(pair, prompt)
    pair.pin(first)
    pair.free([first])
    assert pair.pin_tokens(prompt)
    for _ in range(2):
        press(pair)
        assert pair.match([*prompt, 1]).num_tokens == 160
        reader = pair.open([*prompt, 1])
        assert cached(pair, reader) == 160
        agree(pair)
        go_on(pair, reader, [*prompt, 1, 2, 3])
        agree(pair)
        pair.free([reader])
        pair.unpin(0)  # the first time one pin is left
    press(pair)
    assert pair.match([*prompt, 1]).num_tokens == 0
    agree(pair)


def test_a_pin_covers_whole_blocks(backend: str) -> None:
    pair = small(backend)
    prompt = text(100)
    handle = grow(pair, prompt)
    for asked, expected in ((None, 96), (100, 96), (95, 80), (32, 32)):
        with pair.seqs[handle].pin(asked) as pin:
            assert pin.num_tokens == expected
    pair.pin(handle, 50)
    pair.free([handle])
    press(pair)
    found = pair.match(prompt).num_tokens
    assert found == 48 if backend == "paged" else 48 <= found < 96, "pages are kept whole"
    agree(pair)


def test_what_is_in_use_is_always_found(backend: str) -> None:
    pair = small(backend)
    prompt = text(160)
    handle = grow(pair, prompt)
    press(pair)
    assert pair.match([*prompt, 1]).num_tokens == 160
    reader = pair.open([*prompt, 1])
    agree(pair)
    pair.free([handle])
    press(pair)
    assert pair.match([*prompt, 1]).num_tokens >= cached(pair, reader) // 16 * 16
    agree(pair)


def test_a_prefix_outlives_its_extensions(backend: str) -> None:
    """Of one chat the last blocks go first: what is found is shorter each time, from the start on."""
    pair = small(backend, pages=40)
    prompt = text(480)
    pair.free([grow(pair, prompt)])
    found = [480]
    other = pair.open()
    while pair.extend({other: 16}):
        found.append(pair.match([*prompt, 1]).num_tokens)
        agree(pair)
    assert found == sorted(found, reverse=True) and found[-1] < 480
    if backend == "paged":
        assert len(set(found)) > 5, "block by block"


def test_what_was_used_last_goes_last(backend: str) -> None:
    pair = small(backend, pages=60, max_sequences=8)
    prompts = [text(160, n) for n in range(4)]
    for prompt in prompts:
        pair.free([grow(pair, prompt)])
    pair.free([pair.open([*prompts[0], 1])])  # found again: the first is the last now
    for prompt in prompts[1:]:
        pair.match([*prompt, 1])  # asking is no use
    left = [True] * 4
    other, order = pair.open(), []
    while pair.extend({other: 16}):
        for n, prompt in enumerate(prompts):
            if left[n] and pair.match([*prompt, 1]).num_tokens == 0:
                left[n] = False
                order.append(n)
    agree(pair)
    assert order[:3] == [1, 2, 3][: len(order[:3])] and len(order) >= 2


def test_priorities_decide_before_recency(backend: str) -> None:
    pair = small(backend, pages=60, max_sequences=8)
    prompts = {90: text(160, 1), 50: text(160, 2), 10: text(160, 3)}  # the oldest has the highest
    for priority, prompt in prompts.items():
        handle = grow(pair, prompt)
        pair.seqs[handle].retain(priority=priority)
        pair.free([handle])
    order, other = [], pair.open()
    while pair.extend({other: 16}):
        for priority, prompt in prompts.items():
            if priority not in order and pair.match([*prompt, 1]).num_tokens == 0:
                order.append(priority)
    agree(pair)
    assert order == [10, 50, 90][: len(order)] and len(order) >= 2


@pytest.mark.parametrize("layout", LAYOUTS_HERE)
def test_opening_never_runs_out_of_memory(backend: str, layout: str) -> None:
    """With every page taken by the living a hit is what can be shared as it is; the copy of a tail has to do without."""
    pair = small(backend, layout)
    prompt = text(160)
    grow(pair, prompt)
    filler = pair.open()
    for n in (400, 100, 30, 8, 1):
        while pair.extend({filler: n}):
            pass
    for n in (160, 155, 150, 100, 17, 3):
        pair.open([*prompt[:n], 50_001])  # compared with the model
        agree(pair)
    pair.free([filler])
    agree(pair)


def test_rows_run_out_before_memory_does(backend: str) -> None:
    """More finished chats than there are rows: the oldest are forgotten, the rest is right."""
    pair = small(backend, pages=2000, max_sequences=4)
    prompts = [text(100, n) for n in range(20)]
    for prompt in prompts:
        pair.free([grow(pair, prompt)])
        agree(pair)
    assert pair.match([*prompts[-1], 1]).num_tokens == 96
    for prompt in reversed(prompts):
        handle = pair.open([*prompt, 1])
        agree(pair)
        pair.free([handle])
    handles = [pair.open(prompt) for prompt in prompts[-4:]]
    assert len(handles) == 4
    agree(pair)


def test_a_batch_that_fails_keeps_what_was_cached(backend: str) -> None:
    """Nothing is given up for a call that is refused."""
    pair = small(backend)
    prompt = text(320)
    pair.free([grow(pair, prompt)])
    a, b = pair.open(), pair.open()
    before = pair.match([*prompt, 1]).num_tokens
    assert before == 320
    with pytest.raises(kvmem.OutOfMemory):
        pair.alloc.extend_batch(i32(a, b), i32(1900, 1900))
    assert pair.match([*prompt, 1]).num_tokens == before
    agree(pair)


def test_shrinking_memory_gives_up_the_cache(backend: str) -> None:
    pair = small(backend)
    prompt, live = text(320), text(100, 2)
    handle = grow(pair, live)
    pair.free([grow(pair, prompt)])
    stats = pair.alloc.stats()
    pair.set_memory((stats.mapped_bytes - stats.parked_bytes) // PAGE)
    assert pair.match([*prompt, 1], NO_ROOT).num_tokens == 0
    assert pair.match([*live, 1]).num_tokens == 96
    agree(pair)
    pair.set_memory(60)
    go_on(pair, handle, live + text(100, 3))
    agree(pair)


@pytest.mark.parametrize("layout", ["full and window", "window G=1"])
def test_what_a_window_has_passed_goes_first(backend: str, layout: str) -> None:
    """A chat goes on and its window moves: what lies behind is cached, until memory is short. Then its end is still found,
    its middle is not, though full attention has all of it."""
    pair = small(backend, layout, pages=100)
    prompt = text(640)
    handle = pair.open(prompt)
    for start in range(0, 640, 16):
        assert pair.append(handle, prompt[start : start + 16])
    assert pair.match([*prompt[:320], 1]).num_tokens == 320
    press(pair)
    found = pair.match([*prompt[:320], 1])
    assert (found.num_tokens, found.reason) == (0, "window passed")
    assert pair.match([*prompt, 1]).num_tokens == 640
    reader = pair.open([*prompt, 1])
    assert cached(pair, reader) == 640
    agree(pair)


@pytest.mark.parametrize("layout", ["full and window", "window G=1"])
def test_another_that_begins_like_what_a_window_has_passed_is_found(backend: str, layout: str) -> None:
    """A block is known but gone; of another that only begins like it, the memory is there."""
    pair = small(backend, layout, pages=100)
    prompt = text(640)
    handle = pair.open()
    for start in range(0, 640, 16):
        assert pair.append(handle, prompt[start : start + 16])
    press(pair)
    pair.free([grow(pair, prompt[:324] + text(12, 9))])
    for end in (320, 336, 352, 400):
        found = pair.match([*prompt[:end], 1])
        assert (found.num_tokens, found.reason) == ((320, "complete") if end == 320 else (324, "window passed"))
    branch = pair.open([*prompt[:400], 1])
    assert cached(pair, branch) == 324
    go_on(pair, branch, [*prompt[:400], 1])
    agree(pair)


@pytest.mark.parametrize("layout", ["full and window", "window G=1"])
def test_an_ended_sequence_keeps_no_window_from_those_that_live(backend: str, layout: str) -> None:
    """A fork goes on and its window moves away from what its parent left behind; that is given up before anybody is
    refused anything (the lockstep asserts it)."""
    pair = small(backend, layout, pages=100)
    prompt = text(640)
    parent = pair.open()
    for start in range(0, 320, 16):
        assert pair.append(parent, prompt[start : start + 16])
    child = pair.fork(parent)
    pair.free([parent])
    for start in range(320, 640, 16):
        assert pair.append(child, prompt[start : start + 16])
    press(pair)
    agree(pair)


@pytest.mark.parametrize("layout", ["full and window", "window G=1"])
def test_the_last_to_hold_a_window_gives_it_up_though_others_use_its_tokens(backend: str, layout: str) -> None:
    """A sequence goes on past what its fork still holds; then the fork ends, or a pin does (trim() is checked by the
    lockstep)."""
    for ends in ("fork", "pin"):
        pair = small(backend, layout, pages=100)
        prompt = text(640)
        parent = pair.open()
        for start in range(0, 640, 16):
            assert pair.append(parent, prompt[start : start + 16])
            if start + 16 == 320 and ends == "fork":
                child = pair.fork(parent)
            elif start + 16 == 320:
                pair.pin(parent)
        press(pair)
        if ends == "fork":
            pair.free([child])
        else:
            pair.unpin(0)
        pair.trim()
        press(pair)
        agree(pair)


@pytest.mark.parametrize("layout", ["full and window", "window G=1"])
def test_a_truncated_tail_that_a_window_has_passed_elsewhere_is_given_up(backend: str, layout: str) -> None:
    """A fork is cut within its first block, which it then holds without publishing it, and which the window of the other
    passes meanwhile. It ends, or grows into a copy; or a third sequence takes over what lies before its window."""
    for ends in ("free", "grow", "adopt"):
        pair = small(backend, layout, pages=100)
        prompt = text(640)
        parent = pair.open()
        assert pair.append(parent, prompt[:16])
        child = pair.fork(parent)
        pair.truncate(child, 8)
        for start in range(16, 640, 16):
            assert pair.append(parent, prompt[start : start + 16])
        if ends == "free":
            pair.free([child])
        elif ends == "grow":
            assert pair.append(child, text(8, seed=5))
        else:
            pair.free([child])
            pair.open(prompt)
        pair.trim()
        press(pair)
        pair.trim()
        agree(pair)


@pytest.mark.parametrize("layout", ["full and window", "window G=1"])
def test_what_a_window_has_passed_may_be_retained_in_vain(backend: str, layout: str) -> None:
    """A range may begin with blocks that are gone, or that one commit completes and passes at once."""
    pair = small(backend, layout, pages=100)
    handle = pair.open()
    pair.seqs[handle].retain(priority=90)
    assert pair.append(handle, text(640))
    pair.seqs[handle].retain(priority=10, ttl=5)
    press(pair)
    pair.seqs[handle].retain(0, 100, priority=70)
    agree(pair)
    pair.free([handle])
    press(pair)
    agree(pair)


def test_a_time_to_live_ends(backend: str) -> None:
    """Kept above all for a moment after the release; then as any other, and so before what is kept a little for ever."""
    for ttl, first in ((100.0, 2), (0.001, 1)):
        pair = small(backend, pages=60, max_sequences=8)
        prompts = {1: text(160, 1), 2: text(160, 2)}
        for n, prompt in prompts.items():
            handle = grow(pair, prompt)
            pair.seqs[handle].retain(priority=(90, 60)[n - 1], ttl=(ttl, None)[n - 1])
            pair.free([handle])
        time.sleep(0.05)
        other, gone = pair.open(), []
        while not gone and pair.extend({other: 16}):
            gone = [n for n, prompt in prompts.items() if pair.match([*prompt, 1]).num_tokens == 0]
        assert gone == [first]
        agree(pair)


@pytest.mark.parametrize("layout", ["full and window", "window G=1"])
def test_a_pin_keeps_what_a_window_has_passed(backend: str, layout: str) -> None:
    """Pinned while its window blocks are still cached: they are kept, too, for the prefix is of no use without them."""
    pair = small(backend, layout, pages=100)
    prompt = text(640)
    handle = pair.open(prompt)
    for start in range(0, 640, 16):
        assert pair.append(handle, prompt[start : start + 16])
    pair.pin(handle, 320)
    press(pair)
    assert pair.match([*prompt[:320], 1]).num_tokens == 320
    pair.free([handle])
    press(pair)
    reader = pair.open([*prompt[:320], 1])
    assert cached(pair, reader) == 320
    agree(pair)


@pytest.mark.parametrize(
    ("layout", "zero"), [(layout, "fresh") for layout in LAYOUTS_HERE] + [("kv G=1", "always"), ("recurrent", "always")]
)
def test_a_hit_does_not_give_up_what_it_takes_over(backend: str, layout: str, zero: str) -> None:
    """Memory is full but for what is cached, and the copy of a tail needs some: nothing that the hit itself stands on."""
    for cut in (328, 320, 41):
        for finished in (False, True):
            pair = small(backend, layout, pages=100, zero=zero)
            prompt = text(640)
            first = pair.open(prompt)
            for start in range(0, 640, 16):
                assert pair.append(first, prompt[start : start + 16])
                if start + 16 in (320, 144) and pair.model.fixed:
                    pair.snapshot(first)
            if finished:
                pair.free([first])
            filler = pair.open()
            while pair.match([*prompt[:320], 1]).num_tokens == 320 and pair.extend({filler: 1}):
                stats = pair.alloc.stats()
                if stats.created_bytes == stats.budget_bytes and stats.free_bytes == 0:
                    break
            pair.open([*prompt[:cut], 50_001, 7])
            agree(pair)
            pair.open([*prompt[:cut], 50_002, 7])
            agree(pair)
