"""What becomes of shared prefixes as sequences go on, go back and end. As conformance_prefix.py, which it belongs to."""

from __future__ import annotations

from lockstep_prefix import NO_ROOT
from support_prefix import Make, agree, cached, grow, text, world


def test_readers_and_the_writer_go_their_own_ways(make: Make) -> None:
    """Every reader of a prefix writes, goes back and writes again; no byte of another changes (compared each time)."""
    pair = world(make)
    size = pair.model.block_tokens
    prompt = text(3 * size)
    handles = [grow(pair, prompt)]
    handles += [pair.open(prompt[: 3 * size - n] + text(9, n)) for n in (0, 1, size // 2)]
    handles.append(pair.fork(handles[0]))
    for n, handle in enumerate(handles):
        assert pair.append(handle, text(size + n, 30 + n))
        agree(pair)
    for n, handle in enumerate(handles):
        tokens = pair.model.sequences[handle][pair.model.main].tokens
        pair.truncate(handle, max(pair.model.least_tokens(handle), min(tokens, size + 2 * n)))
        agree(pair)
        assert pair.append(handle, text(2 * size, 40 + n))
        agree(pair)
    pair.free(handles[::2])
    agree(pair)


def test_what_is_freed_is_still_found(make: Make) -> None:
    pair = world(make)
    size = pair.model.block_tokens
    prompt = text(3 * size)
    pair.free([grow(pair, prompt)])
    stats = pair.alloc.stats()
    assert stats.used_bytes == 0
    assert (stats.cached_bytes > 0) == pair.model.shares and stats.cached_bytes <= stats.mapped_bytes
    second = pair.open([*prompt, 1])
    assert cached(pair, second) == (3 * size if pair.model.shares else 0)
    agree(pair)
    pair.free([second])
    pair.clear_cache()
    assert pair.match([*prompt, 1]).num_tokens == 0 and pair.alloc.stats().cached_bytes == 0
    agree(pair)


def test_going_back_forgets_what_nobody_else_holds(make: Make) -> None:
    pair = world(make)
    size = pair.model.block_tokens
    prompt = text(4 * size)
    handle = grow(pair, prompt)
    back = max(2 * size + 1, pair.model.least_tokens(handle))
    pair.truncate(handle, back)
    assert pair.match([*prompt, 1]).num_tokens == pair.model.match(NO_ROOT, [*prompt, 1]) <= back
    assert pair.append(handle, prompt[back:])
    child = pair.fork(handle)
    pair.truncate(handle, max(2 * size + 1, pair.model.least_tokens(handle)))
    if not pair.model.fixed and pair.model.shares:
        assert pair.match([*prompt, 1]).num_tokens == 4 * size, "the fork keeps it"
    agree(pair)
    pair.free([child])
    assert pair.append(handle, text(2 * size, 8))
    agree(pair)
    grow(pair, [*prompt, 1])
    agree(pair)


def test_clearing_leaves_what_is_used_or_pinned(make: Make) -> None:
    pair = world(make)
    if not pair.model.shares:
        assert pair.alloc.clear_cache() == 0
        return
    size = pair.model.block_tokens
    used, pinned, neither = (text(2 * size, n) for n in (1, 2, 3))
    handle = grow(pair, used)
    pair.free([grow(pair, neither)])
    other = grow(pair, pinned)
    pair.pin(other)
    pair.free([other])
    pair.clear_cache()
    assert pair.match([*used, 1]).num_tokens == 2 * size
    assert pair.match([*pinned, 1]).num_tokens == 2 * size
    assert pair.match([*neither, 1]).num_tokens == 0
    again = pair.open([*pinned, 1])
    agree(pair)
    pair.free([handle, again])
    pair.unpin(0)
    pair.clear_cache()
    assert pair.alloc.stats().cached_bytes == 0 and pair.match([*pinned, 1]).num_tokens == 0
    agree(pair)


def test_off_is_off(make: Make) -> None:
    pair = world(make, prefix_cache=False)
    pair.model.stop_sharing()
    prompt = text(3 * pair.model.block_tokens)
    pair.free([grow(pair, prompt)])
    assert pair.match(prompt).reason == "off"
    assert cached(pair, grow(pair, prompt)) == 0
    assert pair.alloc.stats().cached_bytes == 0
    agree(pair)


def test_a_fixed_state_is_found_where_it_was_kept(make: Make) -> None:
    """A hybrid's hit ends at a snapshot, however much attention has; the state that comes with it is of that place."""
    pair = world(make)
    if not pair.model.fixed:
        return
    size = pair.model.block_tokens
    prompt = text(5 * size)
    handle = pair.open(prompt)
    assert pair.append(handle, prompt[: 2 * size])
    assert pair.match(prompt).num_tokens == 0 and pair.match(prompt).reason == "no snapshot"
    assert pair.snapshot(handle)
    assert pair.append(handle, prompt[2 * size : 3 * size])
    assert pair.snapshot(handle)
    assert pair.append(handle, prompt[3 * size :])
    for n, expected in ((5 * size, 3), (3 * size + 1, 3), (3 * size, 2), (2 * size + 1, 2), (2 * size, 0)):
        assert pair.match(prompt[:n]).num_tokens == expected * size
        reader = pair.open(prompt[:n])
        assert cached(pair, reader) == expected * size
        agree(pair)
        assert pair.append(reader, text(3, n))
        agree(pair)
        pair.free([reader])
    pair.free([handle])
    reader = pair.open([*prompt, 1])
    assert cached(pair, reader) == 3 * size
    agree(pair)


def test_a_state_that_has_seen_too_much_is_not_kept(make: Make) -> None:
    """After a truncation the state is of tokens that are gone; after the next ones its owner answers for it again."""
    pair = world(make)
    if not pair.model.fixed:
        return
    size = pair.model.block_tokens
    prompt = text(3 * size)
    handle = pair.open()
    assert pair.append(handle, prompt)
    pair.truncate(handle, 2 * size)
    child = pair.fork(handle)
    for stale in (handle, child):
        assert not pair.snapshot(stale)  # SpecError, asserted there
    assert pair.append(handle, prompt[2 * size :])
    assert pair.snapshot(handle)
    assert not pair.snapshot(child)
    assert pair.match([*prompt, 1]).num_tokens == 3 * size
    agree(pair)


def test_a_state_that_drafts_have_moved_is_not_kept(make: Make) -> None:
    """Drafts are reserved and run, never committed: neither a fork, nor its fork, nor who cuts them off keeps the state."""
    pair = world(make)
    if not pair.model.fixed:
        return
    size = pair.model.block_tokens
    prompt = text(3 * size)
    handle = pair.open()
    assert pair.append(handle, prompt[:size])
    assert pair.extend({handle: 3})
    pair.write([handle])
    child = pair.fork(handle)
    grandchild = pair.fork(child)
    pair.truncate(handle, size)
    for stale in (handle, child, grandchild):
        assert not pair.snapshot(stale)  # SpecError, asserted there
    assert pair.match(prompt).num_tokens == 0
    assert pair.append(grandchild, prompt[size : 2 * size])  # its owner has put the state back, and answers for it
    assert pair.snapshot(grandchild)
    assert pair.match(prompt).num_tokens == 2 * size
    pair.truncate(grandchild, 2 * size)  # nothing is cut off
    assert pair.snapshot(grandchild)
    assert pair.extend({child: 3 * size + 1})
    pair.truncate(child, 3 * size)  # cut off before the commit, as after a step of drafts: no harm
    pair.commit_ids({child: prompt[size:]})
    assert pair.snapshot(child)
    agree(pair)


def test_tokens_that_were_counted_have_moved_the_state_too(make: Make) -> None:
    pair = world(make)
    if not pair.model.fixed:
        return
    size = pair.model.block_tokens
    handle = pair.open()
    assert pair.append(handle, text(size))
    assert pair.extend({handle: size})
    pair.write([handle])
    pair.commit({handle: size})
    pair.truncate(handle, size)
    assert not pair.snapshot(handle)
    agree(pair)


def test_a_window_takes_over_what_it_needs(make: Make) -> None:
    """A sliding window group of a hit holds the window's blocks and no more; its length and front are as if computed."""
    pair = world(make)
    if not pair.model.windows:
        return
    size = pair.model.block_tokens
    prompt = text(600 // size * size)
    first = pair.open()
    for start in range(0, len(prompt), size):  # as decoding or chunked prefill would
        assert pair.append(first, prompt[start : start + size])
    agree(pair)
    for n in (len(prompt), len(prompt) // size // 2 * size, size):
        reader = pair.open([*prompt[:n], 1])
        for g in pair.model.windows:
            assert pair.alloc.core.first_token(reader, g) == pair.model.front(g, cached(pair, reader))
        agree(pair)
        assert pair.append(reader, text(2 * size, n))
        agree(pair)


def test_a_row_taken_over_leaves_what_others_read(make: Make) -> None:
    """A fork reads what a finished sequence held; whoever takes over its row, or blocks, writes elsewhere."""
    for pieces in ((314,), (23, 96, 195), (1, 100, 213)):
        for branch in (False, True):
            pair = world(make)
            prompt = text(400)
            if branch:
                grow(pair, prompt[:72] + text(30, 2))
            first = pair.open(prompt[: pieces[0]])
            for n in pieces:
                done = pair.model.sequences[first][pair.model.main].committed
                assert pair.append(first, prompt[done : done + n])
            pair.fork(first)
            pair.free([first])
            for n in (120, 192, 250, 300):
                reader = pair.open(prompt[:n])
                agree(pair)
                assert pair.append(reader, text(97, 5))
                agree(pair)
                if n != 192:
                    pair.free([reader])
