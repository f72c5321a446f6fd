"""Cache events as an allocator makes them: what a router concludes from them is what the allocator then finds."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from event_world import Held, Router
from lockstep_prefix import PrefixLockstep
from prefix_walk import author, step
from support import LONG, all_windows, compute, latent, make_allocator, plain, windows

import kvmem
from kvmem.events import AllBlocksCleared, BlockRemoved, BlockStored
from kvmem.events.digests import block_digests

pytestmark = pytest.mark.core
BLOCK = 16
Make = Callable[..., kvmem.Allocator]


@pytest.fixture
def make(backend: str) -> Iterator[Make]:
    opened: list[kvmem.Allocator] = []

    def build(spec: kvmem.CacheSpec | None = None, **options: object) -> kvmem.Allocator:
        defaults = {"events": 4096, "page_bytes": 4096, "partial_reuse": False}
        opened.append(make_allocator(spec or plain(BLOCK), backend, **{**defaults, **options}))
        return opened[-1]

    yield build
    for alloc in opened:
        assert alloc.check() == []


def tokens(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 1000, count).tolist()  # type: ignore[no-any-return]


def snapshot(alloc: kvmem.Allocator) -> Held:
    """What is held now, by another way than following: from the beginning."""
    router = Router()
    events = alloc.events(restart=True)
    assert isinstance(events[0], AllBlocksCleared) and not any(isinstance(e, BlockRemoved) for e in events)
    router.follow(events)
    return router.held


def test_hashes_are_made_with_the_key_of_the_allocator(make: Make) -> None:
    prompt, told = tokens(1, BLOCK), []
    for key in (b"", b"one", b"two"):
        alloc = make(event_key=key)
        with alloc.sequence(prompt) as sequence:
            sequence.extend(BLOCK)
            sequence.commit(prompt)
        (stored,) = alloc.events()
        assert isinstance(stored, BlockStored)
        assert stored.block_hashes == tuple(block_digests(alloc.spec, prompt, key=key))
        told.append(stored.block_hashes)
    assert len(set(told)) == 3


def test_full_blocks_are_told_when_they_are_committed_with_their_tokens(make: Make) -> None:
    alloc, prompt = make(), tokens(1, 3 * BLOCK + 5)
    sequence = alloc.sequence(prompt, salt="s", adapter="adapter")
    sequence.extend(len(prompt))
    assert alloc.events() == []
    sequence.commit(prompt[: BLOCK + 3])
    (first,) = alloc.events()
    sequence.commit(prompt[BLOCK + 3 :])
    (rest,) = alloc.events()
    digests = tuple(block_digests(alloc.spec, prompt, salt="s", adapter="adapter"))
    assert isinstance(first, BlockStored) and isinstance(rest, BlockStored)
    assert (first.block_hashes, first.parent_block_hash, first.ordinal) == (digests[:1], None, 0)
    assert (rest.block_hashes, rest.parent_block_hash, rest.ordinal) == (digests[1:], digests[0], 1)
    assert rest.token_ids == tuple(prompt[BLOCK : 3 * BLOCK]) and rest.block_size == BLOCK
    assert (rest.medium, rest.group, rest.group_kind, rest.adapter) == ("GPU", 0, "full_attention", "adapter")
    sequence.free()
    assert alloc.events() == [], "freed is not forgotten"


def test_what_is_found_is_not_told_again(make: Make) -> None:
    alloc, prompt = make(), tokens(2, 4 * BLOCK + 1)
    compute(alloc, prompt)
    alloc.events()
    again = compute(alloc, prompt)
    other = compute(alloc, [*prompt[: 2 * BLOCK], *tokens(3, BLOCK)])
    assert again.num_cached_tokens == 4 * BLOCK and other.num_cached_tokens == 2 * BLOCK
    (branch,) = alloc.events()
    assert isinstance(branch, BlockStored)
    assert branch.parent_block_hash == block_digests(alloc.spec, prompt)[1] and branch.ordinal == 2


def test_computed_twice_side_by_side_it_is_told_once(make: Make) -> None:
    alloc, prompt = make(), tokens(4, 2 * BLOCK)
    both = [alloc.sequence(prompt) for _ in range(2)]
    for sequence in both:
        sequence.extend(len(prompt))
        sequence.commit(prompt)
    router = Router()
    router.follow(alloc.events())
    assert {h for _, _, h in router.held} == set(block_digests(alloc.spec, prompt)) and len(router.held) == 2
    both[0].free()
    both[1].free()
    assert alloc.events() == []


def test_truncate_takes_back_what_nobody_else_has(make: Make) -> None:
    alloc, prompt = make(), tokens(5, 4 * BLOCK)
    sequence = compute(alloc, prompt)
    alloc.events()
    sequence.truncate(BLOCK + 4)
    digests = block_digests(alloc.spec, prompt)
    gone = [h for e in alloc.events() if isinstance(e, BlockRemoved) for h in e.block_hashes]
    assert sorted(gone) == sorted(digests[1:])


def test_clearing_leaves_what_is_pinned_or_in_use(make: Make) -> None:
    alloc, router = make(), Router()
    kept, used, rest = (tokens(seed, 3 * BLOCK) for seed in (6, 7, 8))
    compute(alloc, kept).free()
    pin = alloc.pin(kept)
    user = compute(alloc, used)
    compute(alloc, rest).free()
    router.follow(alloc.events())
    alloc.clear_cache()
    router.follow(alloc.events())
    left = {*block_digests(alloc.spec, kept), *block_digests(alloc.spec, used)}
    assert {h for _, _, h in router.held} == left
    pin.unpin(), user.free()


def test_nothing_is_told_of_unknown_tokens_or_without_a_capacity(make: Make) -> None:
    alloc = make()
    sequence = alloc.sequence()
    sequence.extend(2 * BLOCK)
    sequence.commit(count=2 * BLOCK)
    assert alloc.events() == []
    silent = make(events=0)
    compute(silent, tokens(9, 2 * BLOCK))
    assert silent.events() == []


def test_caches_of_two_salts_have_no_hash_in_common(make: Make) -> None:
    alloc, prompt = make(), tokens(10, 3 * BLOCK)
    found: list[bytes] = []
    for keys in (
        {},
        {"salt": "a"},
        {"salt": "b"},
        {"adapter": "a"},
        {"extra_key": "a"},
        {"salt": "a", "adapter": "a"},
        {"adapter": "a", "extra_key": "a"},
    ):
        compute(alloc, prompt, **keys).free()  # type: ignore[arg-type]
        (event,) = alloc.events()
        assert isinstance(event, BlockStored)
        found += event.block_hashes
    assert len(set(found)) == len(found) == 21


@pytest.mark.parametrize(("spec", "left"), [(plain, BLOCK), (windows, 47)])
def test_both_backends_tell_the_same(spec: Callable[[int], kvmem.CacheSpec], left: int) -> None:
    def told(backend: str) -> list[object]:
        alloc = make_allocator(spec(BLOCK), backend, page_bytes=4096, events=4096)
        sequences = [compute(alloc, tokens(seed, 40 + 9 * seed)) for seed in range(3)]
        sequences[1].truncate(left)
        sequences[0].free()
        compute(alloc, [*tokens(0, 40)[: 2 * BLOCK], *tokens(5, 20)])
        return list(alloc.events())

    assert told("paged") == told("virtual")


@pytest.mark.parametrize("spec", [plain, latent, windows, all_windows])
@pytest.mark.parametrize("capacity", [8, 4096])
def test_followed_or_asked_from_the_beginning_it_is_the_same(make: Make, spec: Callable[[int], kvmem.CacheSpec], capacity: int, rng: random.Random) -> None:  # fmt: skip
    """Random work in little memory, so that blocks are evicted; now and then the events are fetched, or too late."""
    alloc = make(spec(BLOCK), events=capacity, memory="128KiB", max_tokens=200, record_ops=True)
    pair, router = PrefixLockstep(alloc, contents=False, partial_reuse=False), Router()
    writer = author(pair, rng)
    for number in range(400 if LONG else 80):
        step(pair, rng, writer)
        if rng.random() < 0.3:
            router.follow(alloc.events())
            assert router.held == snapshot(alloc), f"step {number}"
            prompt = rng.choice(writer.prompts)
            if not pair.model.windows:
                known = [(0, "GPU", h) in router.held for h in block_digests(alloc.spec, prompt[:-1])]
                leading = next((i for i, k in enumerate(known) if not k), len(known))
                assert alloc.match(prompt).num_tokens == leading * BLOCK, f"step {number}"


def test_a_thread_may_poll_while_others_work(make: Make) -> None:
    alloc, router = make(events=64), Router()
    done = threading.Event()

    def work(seed: int) -> None:
        for i in range(60):
            compute(alloc, tokens(100 * seed + i % 7, 70)).free()

    poller = threading.Thread(target=lambda: [router.follow(alloc.events(7)) for _ in iter(done.is_set, True)])
    poller.start()
    with ThreadPoolExecutor(2) as pool:
        workers = [pool.submit(work, seed) for seed in (1, 2)]
    done.set()
    poller.join()
    for worker in workers:
        worker.result()
    router.follow(alloc.events())
    assert router.held == snapshot(alloc)


def test_events_take_an_integer(backend: str) -> None:
    spec = kvmem.CacheSpec.kv(num_layers=1, num_kv_heads=2, head_dim=8, dtype="float32")
    alloc = kvmem.Allocator(
        spec, backend=backend, device="meta", memory="2MiB", max_sequences=4, max_tokens=1024, events=8
    )
    for wrong in ("x", 1.0, True, -1):
        with pytest.raises(kvmem.SpecError, match="max_events: got"):
            alloc.events(wrong)  # type: ignore[arg-type]
