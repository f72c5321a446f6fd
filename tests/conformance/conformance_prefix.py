"""What prefix sharing must do on every backend, device and layout: what is found, held once, and kept apart. As
conformance.py, which it belongs to: each function is a test, and everything it does is compared with the reference model
on the way, every byte of every token included."""

from __future__ import annotations

from lockstep_prefix import NO_ROOT
from support_prefix import Make, agree, cached, go_on, grow, take, text, world

# ---- Finding ---------------------------------------------------------------------------------------


def test_a_prompt_is_found_again(make: Make) -> None:
    pair = world(make)
    size = pair.model.block_tokens
    prompt = text(3 * size + 3)
    first = grow(pair, prompt)
    second = pair.open(prompt)
    assert cached(pair, first) == 0
    assert cached(pair, second) == (3 * size if pair.model.shares else 0), "the whole blocks; a tail is not published"
    seq = pair.seqs[second]
    assert seq.num_tokens == seq.num_committed_tokens == seq.num_cached_tokens
    agree(pair)
    go_on(pair, second, prompt)
    agree(pair)


def test_at_least_one_token_is_left_to_compute(make: Make) -> None:
    pair = world(make)
    size = pair.model.block_tokens
    prompt = text(2 * size)
    grow(pair, prompt)
    for n in (2 * size, 2 * size + 1, size + 1, size, size - 1, 2, 1, 0):
        handle = pair.open(prompt[:n] + text(n - 2 * size, 5))
        assert cached(pair, handle) <= max(0, n - 1)
        if pair.model.partial_reuse and pair.model.shares:
            assert cached(pair, handle) == min(max(0, n - 1), 2 * size), "all but one"
        agree(pair)
        pair.free([handle])
    agree(pair)


def test_without_partial_reuse_only_whole_blocks_are_found(make: Make) -> None:
    pair = world(make, partial_reuse=False)
    size = pair.model.block_tokens
    prompt = text(3 * size)
    grow(pair, prompt)
    for n in (3 * size, 3 * size - 1, 2 * size + 1, 2 * size, size):
        handle = pair.open(prompt[:n])
        assert cached(pair, handle) % size == 0
        agree(pair)


def test_the_tail_of_a_block_is_copied(make: Make) -> None:
    """A prompt that leaves a cached block half way takes over the equal half, and goes on without disturbing it."""
    pair = world(make)
    size = pair.model.block_tokens
    prompt = text(2 * size)
    first = grow(pair, prompt)
    branch = prompt[: size + size // 2] + text(size, 9)
    second = pair.open(branch)
    if pair.model.partial_reuse and pair.model.shares:
        assert cached(pair, second) == size + size // 2
    go_on(pair, second, branch)
    agree(pair)
    third = pair.open([*prompt, 1])
    if pair.model.partial_reuse and pair.model.shares:
        assert cached(pair, third) == 2 * size
    pair.free([first])
    agree(pair)


def test_of_many_continuations_the_nearest_is_copied(make: Make) -> None:
    pair = world(make)
    size = pair.model.block_tokens
    start = text(size)
    if not (pair.model.partial_reuse and pair.model.shares):
        return  # nothing is copied: the layout has a fixed state, or shares nothing
    for same in (1, 3, 2):
        pair.free([grow(pair, start + text(size, 2)[:same] + text(size - same, 10 + same))])
    handle = pair.open(start + text(size, 2) + [1])
    assert cached(pair, handle) == size + 3
    agree(pair)


def test_why_a_match_is_not_longer(make: Make) -> None:
    pair = world(make)
    size = pair.model.block_tokens
    prompt, other = text(2 * size), text(3 * size, 2)
    grow(pair, prompt)
    reasons = {
        "complete": prompt[:1],
        "never seen": [*other, 1],
        "shorter than a block": [*prompt, 50_001, 2],
        "other salt": [*prompt, 1],
    }
    for reason, tokens in reasons.items():
        found = pair.match(tokens, ("x", None) if reason == "other salt" else NO_ROOT)
        assert found.reason == reason or not pair.model.shares, (reason, found)
        assert found.reason == "off" or pair.model.shares
    assert pair.match([]).num_tokens == 0


def test_nothing_published_is_nothing_found(make: Make) -> None:
    """Tokens that are counted, not named, are nobody's prefix; nor is anything after them."""
    pair = world(make)
    size = pair.model.block_tokens
    prompt = text(4 * size)
    handle = pair.open()
    assert pair.append(handle, prompt[:size])
    assert pair.extend({handle: size})
    pair.write([handle])
    pair.commit({handle: size})
    assert pair.append(handle, prompt[2 * size :])
    if not pair.model.fixed:
        assert pair.match(prompt).num_tokens == (size if pair.model.shares else 0)
    agree(pair)
    if pair.model.least_tokens(handle) <= size:
        pair.truncate(handle, size)  # back to where everything is known
        assert pair.append(handle, prompt[size:])
        if not pair.model.fixed:
            assert pair.match([*prompt, 1]).num_tokens == (4 * size if pair.model.shares else 0)
    agree(pair)


def test_a_block_is_published_when_it_is_full(make: Make) -> None:
    """Token by token, as decoding does: found after the last one of the block, not before."""
    pair = world(make)
    size = pair.model.block_tokens
    prompt = text(2 * size + 1)
    handle = pair.open()
    for n, token in enumerate(prompt[:-1], 1):
        assert pair.append(handle, [token])
        if n % size in (0, 1, size - 1):
            found = pair.match([*prompt[:n], 1]).num_tokens
            if pair.model.fixed or not pair.model.shares:
                assert found == 0
            else:
                assert n // size * size >= found == pair.model.match(NO_ROOT, [*prompt[:n], 1])
    agree(pair)


def test_batches_publish_as_single_calls_do(make: Make) -> None:
    pair = world(make)
    size = pair.model.block_tokens
    prompts = [text(2 * size + n, 20 + n) for n in range(3)]
    handles = [pair.open(prompt) for prompt in prompts]
    assert pair.extend({h: len(p) for h, p in zip(handles, prompts, strict=True)})
    pair.commit_ids(dict(zip(handles, prompts, strict=True)))
    for prompt in prompts:
        pair.match(prompt)
    agree(pair)


# ---- Holding the bytes once ------------------------------------------------------------------------


def test_ten_sequences_hold_a_common_prefix_once(make: Make) -> None:
    pair = world(make)
    if not pair.model.shares:
        return  # a layout with cross attention, where the encoder's output is part of the prefix
    size, page = pair.model.block_tokens, pair.alloc.pool.page_bytes
    prompt = text(-(-1024 // size) * size)
    grow(pair, prompt)
    one = pair.alloc.stats()
    for n in range(9):
        handle = pair.open([*prompt, n])
        assert cached(pair, handle) == len(prompt)
        assert pair.append(handle, [n])
    ten = pair.alloc.stats()
    agree(pair)
    tails = 0  # what a sequence may need beside the prefix: the piece that its last token lies in, and the fixed state
    for rules in pair.model.groups:
        for token_bytes, piece in zip(rules.token_bytes, rules.piece_bytes, strict=True):
            whole = -(-piece // page) * page
            tails += 2 * whole + -(-rules.guard_tokens * token_bytes // page) * page
    assert ten.used_bytes - one.used_bytes <= 9 * tails
    live = [s.mapped_bytes - s.parked_bytes for s in (one, ten)]
    assert live[1] - live[0] <= 9 * tails + 2 * page * len(pair.model.groups), "by the ledger of pages"
    if pair.contents and ten.physical_bytes:
        grown = ten.physical_bytes - one.physical_bytes
        assert grown <= ten.created_bytes - one.created_bytes + 9 * tails, "by what the system really holds"
        assert ten.physical_bytes <= ten.created_bytes
    if not pair.model.windows and not pair.model.fixed:
        assert ten.shared_bytes >= one.used_bytes - tails, "and all but the tail is read by more than one"


def test_two_that_compute_the_same_both_have_it(make: Make) -> None:
    """Neither knew of the other when it began. Paged: one block is left; virtual: both rows stay."""
    pair = world(make)
    size = pair.model.block_tokens
    prompt = text(2 * size + 1)
    one, two = pair.open(prompt), pair.open(prompt)
    assert cached(pair, one) == cached(pair, two) == 0
    go_on(pair, one, prompt)
    before = pair.alloc.stats().used_bytes
    go_on(pair, two, prompt)
    agree(pair)
    if not pair.virtual and pair.model.shares:
        tables = [pair.alloc.batch([h]).group(pair.model.main).block_table for h in (one, two)]
        blocks = 2 * size // pair.model.groups[pair.model.main].block_tokens
        assert tables[0] is not None and tables[1] is not None
        if not pair.model.windows:
            assert tables[0][0, :blocks].equal(tables[1][0, :blocks]), "one block, two readers"
            assert tables[0][0, blocks] != tables[1][0, blocks], "the tail is each one's own"
    assert pair.alloc.stats().used_bytes > before
    pair.free([one])
    agree(pair)
    third = pair.open(prompt)
    if pair.model.shares:
        assert cached(pair, third) == 2 * size
    agree(pair)


def test_a_writer_that_turns_back_leaves_the_copy_of_the_other(make: Make) -> None:
    """One and two hold the same prompt, each its own; one goes back and writes something else over it."""
    pair = world(make)
    size = pair.model.block_tokens
    prompt = text(3 * size)
    one, two = pair.open(prompt), pair.open(prompt)
    go_on(pair, one, prompt)
    go_on(pair, two, prompt)
    back = max(pair.model.least_tokens(one), size + 1)
    pair.truncate(one, back)
    assert pair.append(one, text(2 * size, 77))
    agree(pair)
    third = pair.open([*prompt, 1])
    if not pair.model.fixed and pair.model.shares:
        assert cached(pair, third) == 3 * size
    agree(pair)
    pair.free([two])
    fourth = pair.open([*prompt, 2])
    go_on(pair, fourth, [*prompt, 2])
    agree(pair)


def test_copy_on_write_touches_the_tail_only(make: Make) -> None:
    """The bytes copied for a hit, and for the write after it: at most a page per arena, or the blocks of a unit."""
    pair = world(make)
    size, page = pair.model.block_tokens, pair.alloc.pool.page_bytes
    prompt = text(4 * size)
    grow(pair, prompt)
    for cut in (4 * size, 4 * size - 1, 3 * size + 1, 2 * size + size // 2):
        take(pair)
        handle = pair.open([*prompt[:cut], 1, 2])
        assert pair.append(handle, [5])
        copies = [op for op in take(pair) if op[0] == "copy"]
        arenas: dict[int, int] = {}
        for _, arena, _, _, length, _ in copies:
            arenas[arena] = arenas.get(arena, 0) + length
        blocks = sum(size // rules.block_tokens for rules in pair.model.groups for _ in rules.token_bytes)
        assert len(copies) <= (len(arenas) if pair.virtual else blocks), (
            "one copy for each arena, or block of it, at most"
        )
        sizes = [
            max(page, rules.unit_tokens * size_) if pair.virtual else rules.unit_tokens * size_
            for rules in pair.model.groups
            for size_ in rules.token_bytes
        ]
        assert all(length <= sizes[arena] for arena, length in arenas.items())
        agree(pair)


# ---- Apart -----------------------------------------------------------------------------------------


def test_invariant_9_two_salts_never_share(make: Make) -> None:
    """Paired: whoever has the same salt and extra key shares, whoever has others does not, and no byte is another's."""
    size = 0
    for other in (("blue", "x"), ("red", "y"), ("red", None), (None, "x"), (None, None), ("redx", ""), (b"\0", "x")):
        pair = world(make)
        size = pair.model.block_tokens
        prompt, root = text(2 * size + 2), ("red", "x")
        grow(pair, prompt, root)
        alone = pair.alloc.stats().used_bytes
        same = pair.open(prompt, root)
        assert cached(pair, same) == (2 * size if pair.model.shares else 0)
        found = pair.match(prompt, other)
        assert found.num_tokens == 0
        assert found.reason == ("other salt" if pair.model.shares and not pair.model.fixed else found.reason)
        pair.free([same])
        stranger = grow(pair, prompt, other)
        assert cached(pair, stranger) == 0
        assert pair.alloc.stats().used_bytes == 2 * alone and pair.alloc.stats().shared_bytes == 0
        agree(pair)  # the patterns follow from salt and extra key: equal tokens, other bytes
        again = pair.open(prompt, other)
        assert cached(pair, again) == (2 * size if pair.model.shares else 0)
        agree(pair)


def test_a_fork_stays_under_its_salt(make: Make) -> None:
    pair = world(make)
    size = pair.model.block_tokens
    prompt = text(size, 3)
    child = pair.fork(grow(pair, prompt, ("a", None)))
    go_on(pair, child, prompt + text(size, 4))
    assert pair.match(prompt + text(size, 4) + [1]).num_tokens == 0
    assert pair.match(prompt + text(size, 4) + [1], ("a", None)).num_tokens == (2 * size if pair.model.shares else 0)
    agree(pair)
