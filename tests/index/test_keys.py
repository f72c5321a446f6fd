"""Keys by range, and adapters: what is shared before a key's position, what is not after it, and what events say."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import numpy as np
import pytest
from lockstep_prefix import marks_of
from support import BACKENDS, i32, make_allocator, plain

import kvmem
from kvmem import SchedulerCache
from kvmem.events import BlockStored, to_wire
from kvmem.events.digests import block_digests, key_marks, keys_in, placed

pytestmark = [pytest.mark.core, pytest.mark.parametrize("backend", BACKENDS)]

SIZE = 16
TEXT, IMAGE = list(range(100, 100 + 10 * SIZE)), [7] * 40


def open_allocator(backend: str, **options: Any) -> kvmem.Allocator:
    return make_allocator(plain(SIZE), backend, memory="8MiB", max_sequences=20, events=4096, **options)


def run(alloc: kvmem.Allocator, prompt: list[int], **keys: Any) -> int:
    """Computes a prompt and ends; how much of it was found."""
    with alloc.sequence(prompt, **keys) as sequence:
        found = sequence.num_cached_tokens
        sequence.extend(len(prompt) - found)
        sequence.commit(prompt[found:])
    return found


def key_at(position: int, name: str) -> list[tuple[int, str]]:
    return [(position, name)]


def test_text_before_an_image_is_shared_and_nothing_after(backend: str) -> None:
    """The image begins where a block does; then within one, whose text is copied; both ways to say where."""
    for text in (TEXT, TEXT[:-5]):
        for placed_by_hand in (False, True):
            key = partial(key_at, len(text)) if placed_by_hand else str
            alloc, prompt = open_allocator(backend), [*text, *IMAGE, *range(1000, 1020)]
            assert run(alloc, prompt, extra_key=key("cat")) == 0
            assert alloc.match(prompt, extra_key=key("dog")).num_tokens == len(text)
            assert alloc.match(prompt, extra_key=key("dog")).reason == "other salt"
            assert alloc.match(prompt).num_tokens == len(text), "a text that happens to have these ids has no image"
            assert run(alloc, prompt, extra_key=key("dog")) == len(text)
            for name in ("cat", "dog"):
                found = len(prompt) // SIZE * SIZE if len(prompt) % SIZE else len(prompt) - 1
                assert run(alloc, prompt, extra_key=key(name)) >= found
            whole = open_allocator(backend, partial_reuse=False)
            run(whole, prompt, extra_key=key("cat"))
            assert whole.match(prompt, extra_key=key("dog")).num_tokens == len(text) // SIZE * SIZE
            assert alloc.check() == []


def test_each_image_counts_from_its_own_position(backend: str) -> None:
    alloc, prompt = open_allocator(backend, max_tokens=800), TEXT + IMAGE + TEXT + IMAGE + TEXT
    first, second = len(TEXT), 2 * len(TEXT) + len(IMAGE)
    run(alloc, prompt, extra_key=[(first, "a"), (second, "b")])
    for keys, found in (
        ([(first, "a"), (second, "c")], second), ([(first, "c"), (second, "b")], first), ([(first, "a")], second),
        ([(second, "b")], first), ([(first, "a"), (second, "b")], len(prompt) - 1), ([(0, "a")], 0), ([(5, "a")], 5),
        ([(first, "a"), (first + 1, "b"), (second, "b")], first + 1),
    ):  # fmt: skip
        assert alloc.match(prompt, extra_key=keys).num_tokens == found, keys
    assert alloc.match(prompt[: first + 9], extra_key=[(first, "a")]).num_tokens == first + 8


def test_a_key_without_a_run_counts_from_the_first_token(backend: str) -> None:
    alloc = open_allocator(backend)
    run(alloc, [*TEXT, 1], extra_key="a")
    assert alloc.match([*TEXT, 1]).num_tokens == 0 == alloc.match([*TEXT, 1], extra_key="b").num_tokens
    assert alloc.match([*TEXT, 1], extra_key="a").num_tokens == len(TEXT)
    with alloc.sequence(extra_key="a") as sequence:  # no prompt: nothing is known of runs
        sequence.extend(len(TEXT))
        sequence.commit(TEXT[:50] + IMAGE + TEXT[90:])
    assert alloc.match([*TEXT[:50], *IMAGE, 1]).num_tokens == 0


def test_forks_truncations_and_steps_keep_the_keys(backend: str) -> None:
    """The image comes in chunks, after a step back, and in a child; everywhere it is the same image."""
    alloc, prompt = open_allocator(backend), [*TEXT[:50], *IMAGE]
    sequence = alloc.sequence(prompt, extra_key="cat")
    sequence.extend(56)
    sequence.commit(prompt[:56])
    child = sequence.fork()
    sequence.truncate(20)
    for one in (child, sequence):
        rest = prompt[one.num_tokens :]
        one.extend(len(rest))
        one.step(0, rest)
    assert alloc.match([*prompt, 1], extra_key="cat").num_tokens == len(prompt) // SIZE * SIZE
    assert alloc.match([*prompt, 1], extra_key="dog").num_tokens == 50
    assert alloc.check() == []


def test_pins_admissions_and_schedulers_take_the_same_keys(backend: str) -> None:
    alloc = open_allocator(backend)
    prompt, keys = [*TEXT, *IMAGE], {"extra_key": "cat", "adapter": "poet"}
    ids, cached = alloc.admit_batch(np.array(prompt * 2, np.int32), i32(len(prompt), len(prompt)), **keys)  # type: ignore[arg-type]
    assert cached.tolist() == [0, 0]
    alloc.commit_batch(ids, i32(len(prompt), len(prompt)), np.array(prompt * 2, np.int32))
    alloc.free_batch(ids)
    cache = SchedulerCache(alloc)
    assert cache.matched_tokens([*prompt, 1], **keys) == len(prompt) // SIZE * SIZE  # type: ignore[arg-type]
    assert cache.matched_tokens([*prompt, 1], extra_key="dog", adapter="poet") == len(TEXT)
    assert cache.matched_tokens([*prompt, 1], extra_key="cat") == 0, "another adapter: not even the text"
    cache.allocate("a", tokens=[*prompt, 1], **keys)  # type: ignore[arg-type]
    assert cache.num_cached_tokens("a") == len(prompt) // SIZE * SIZE
    with pytest.raises(kvmem.SpecError, match="adapter"):
        cache.allocate("a", 1, adapter="poet")
    with alloc.pin(prompt, **keys):  # type: ignore[arg-type]
        cache.free("a")
        alloc.clear_cache()
        assert cache.matched_tokens([*prompt, 1], **keys) == len(prompt) // SIZE * SIZE  # type: ignore[arg-type]
    with pytest.raises(kvmem.SpecError, match="160 are cached"):
        alloc.pin(prompt, adapter="poet")


def test_events_name_keys_and_adapters(backend: str) -> None:
    alloc, prompt = open_allocator(backend), [*TEXT, *IMAGE]
    run(alloc, prompt, extra_key="cat", adapter="poet")
    run(alloc, prompt, extra_key="dog", adapter="poet")
    events = [event for event in alloc.events() if isinstance(event, BlockStored)]
    assert {event.adapter for event in events} == {"poet"}
    told = [(digest, keys) for event in events
            for digest, keys in zip(event.block_hashes, event.extra_keys or [None] * 99, strict=False)]  # fmt: skip
    for name in ("cat", "dog"):
        digests = block_digests(alloc.spec, prompt, extra_key=name, adapter="poet")
        assert set(digests) <= {digest for digest, _ in told}
        assert dict(told)[digests[10]] == (name,) and dict(told)[digests[11]] is None
        assert digests == block_digests(alloc.spec, prompt, extra_key=[(len(TEXT), name)], adapter="poet")
        assert digests[:10] == block_digests(alloc.spec, prompt, adapter="poet")[:10]
    assert len(told) == len(dict(told)) == 14, "the ten blocks of text once, two of each image"
    wire = to_wire(events, 0.0)[1]
    assert all(event["lora_name"] == "poet" for event in wire)
    assert [["cat"], None] in [event["extra_keys"][-2:] for event in wire if "extra_keys" in event]
    restarted = [event for event in alloc.events(restart=True) if isinstance(event, BlockStored)]
    assert {d for event in restarted for d in event.block_hashes} == set(dict(told))


def test_names_of_keys_do_not_pile_up(backend: str) -> None:
    """What nobody holds any more leaves nothing behind: the index is as before after thousands of images."""
    alloc = open_allocator(backend)
    for number in range(300):
        run(alloc, [*TEXT[:20], *IMAGE], extra_key=f"image {number}")
        if number % 10 == 0:
            alloc.clear_cache()
    assert alloc.match([*TEXT[:20], *IMAGE, 1], extra_key="image 299").num_tokens == 48
    alloc.clear_cache()
    assert alloc.stats().cached_blocks == 0 and alloc.check() == []


def test_bad_keys_are_refused(backend: str) -> None:
    alloc = open_allocator(backend)
    for bad in ([(-1, "a")], [(5, "a"), (4, "b")], [(2**31, "a")], [(1, "a"), "b"], [(1.5, "a")], [], [(0, 1.5)], {3: "a"}):  # fmt: skip
        with pytest.raises(kvmem.SpecError, match="extra_key"):
            alloc.sequence(TEXT, extra_key=bad)  # type: ignore[arg-type]
    for bad in (1, b"a", ("a",)):
        with pytest.raises(kvmem.SpecError, match="adapter"):
            alloc.match(TEXT, adapter=bad)  # type: ignore[arg-type]
    for broken in (b"\1" * 5, b"s" + b"\xff" * 8, b"n" + bytes(8) + b"\0" * 5):
        with pytest.raises(kvmem.SpecError):
            alloc.core.match([1, 2], b"", broken)
    assert alloc.stats().num_sequences == 0 and alloc.check() == []


def test_core_digests_and_model_place_keys_alike(backend: str, seed: int) -> None:
    """Three places know where a key without a position begins; events of the core have the digests of the formula."""
    walk, alloc = random.Random(seed), open_allocator(backend)
    for _ in range(200):
        prompt = [walk.randrange(6) for _ in range(walk.randrange(2 * SIZE, 5 * SIZE))]
        ((place, key),) = placed(key_marks("k"), np.array(prompt))
        assert [(place, "k")] == marks_of((None, None, "k"), prompt)
        run(alloc, prompt, extra_key="k")
        digests = block_digests(alloc.spec, prompt, extra_key="k")
        alloc.clear_cache()
        stored = {d: keys for event in alloc.events() if isinstance(event, BlockStored)
                  for d, keys in zip(event.block_hashes, event.extra_keys or [None] * 99, strict=False)}  # fmt: skip
        assert set(digests) == set(stored)
        assert place // SIZE >= len(digests) or stored[digests[place // SIZE]] == ("k",)
        assert keys_in((place % SIZE).to_bytes(4, "little") + key) == ("k",)


def test_sequences_of_a_batch_share_with_others(backend: str) -> None:
    alloc = open_allocator(backend)
    ids = alloc.open_batch(1)
    alloc.extend_batch(ids, i32(len(TEXT)))
    alloc.commit_batch(ids, i32(len(TEXT)), np.array(TEXT, np.int32))
    assert alloc.match([*TEXT, 1]).num_tokens == len(TEXT)
    (event,) = alloc.events()
    assert isinstance(event, BlockStored) and event.block_hashes == tuple(block_digests(alloc.spec, TEXT))
