"""Many prompts in one call: what comes of it is what `sequence()` and `extend()` would make, one prompt after the other,
up to the first that does not fit."""

from __future__ import annotations

import array
import random

import numpy as np
import pytest
import torch
from support import LAYOUTS, i32, make_allocator, plain
from support_prefix import text

import kvmem
from kvmem.errors import SpecError

LAYOUTS_HERE = ["kv interleaved", "full and window", "recurrent", "encoder decoder"]


def flat(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return i32(*(token for prompt in prompts for token in prompt)), i32(*map(len, prompts))


def one_by_one(
    alloc: kvmem.Allocator, prompts: list[list[int]], salt: str | None, kept: list[kvmem.Sequence]
) -> list[tuple[int, int, int]]:
    """Handle, cached tokens and length of each that got room; all of them in ``kept``, as garbage would be freed."""
    made = []
    for prompt in prompts:
        try:
            sequence = alloc.sequence(prompt, salt=salt)
        except kvmem.OutOfMemory:
            break
        if not sequence.try_extend(len(prompt) - sequence.num_cached_tokens):
            sequence.free()
            break
        kept.append(sequence)
        made.append((sequence.id, sequence.num_cached_tokens, sequence.num_tokens))
    return made


@pytest.mark.parametrize("layout", LAYOUTS_HERE)
def test_prompts_admitted_at_once_are_prompts_admitted_one_by_one(
    backend: str, layout: str, rng: random.Random
) -> None:
    spec, options = LAYOUTS[layout].spec(16), {"max_sequences": 12, "max_tokens": 900, "device": "meta"}
    batched, single = (make_allocator(spec, backend, page_bytes=4096, **options) for _ in range(2))
    kept: list[kvmem.Sequence] = []
    for turn in range(30):
        salt = rng.choice([None, "tenant"])
        prompts = [text(rng.randrange(600), rng.randrange(3)) for _ in range(rng.randrange(5))]
        ids, cached = batched.admit_batch(*flat(prompts), salt=salt)
        lengths = batched.batch(ids).seq_lens
        assert list(zip(ids.tolist(), cached.tolist(), lengths.tolist(), strict=True)) == one_by_one(
            single, prompts, salt, kept
        ), turn
        assert batched.stats().used_bytes == single.stats().used_bytes
        dropped = rng.sample(live := single.core.handles(), len(live) // 2)
        for alloc in (batched, single):
            for handle, hit, prompt in zip(ids, cached, prompts, strict=False):
                alloc.commit_batch(i32(handle), i32(len(prompt) - hit), i32(*prompt[hit:]))
            alloc.free_batch(i32(*dropped))


def test_as_many_get_room_as_there_is_memory_for(backend: str) -> None:
    alloc = make_allocator(
        plain(16), backend=backend, max_sequences=8, max_tokens=4096, memory="512KiB", prefix_cache=False
    )
    with alloc.sequence() as fits:
        while fits.num_tokens < 4096 and fits.try_extend(16):
            pass
        room = fits.num_tokens
    assert 1024 < room < 4096
    ids, cached = alloc.admit_batch(np.zeros(2 * room - 512, np.int32), i32(room - 544, 16, room, 16))
    assert len(ids) == 2 and not cached.any()
    assert alloc.stats().num_sequences == 2


def test_as_many_get_room_as_there_are_places(backend: str) -> None:
    alloc = make_allocator(plain(16), backend=backend, max_sequences=3, max_tokens=512)
    ids, _ = alloc.admit_batch(np.arange(80, dtype=np.int32), i32(*[16] * 5))
    assert len(ids) == 3
    assert len(alloc.admit_batch(np.arange(16, dtype=np.int32))[0]) == 0
    alloc.free_batch(ids)


def test_a_later_prompt_finds_what_an_earlier_call_has_committed(backend: str) -> None:
    alloc = make_allocator(plain(16), backend=backend, max_sequences=8, max_tokens=512)
    prompt = text(100)
    ids, cached = alloc.admit_batch(*flat([prompt, prompt]))
    assert list(cached) == [0, 0]  # neither is computed yet
    batch = alloc.make_batch(max_new_tokens=200)
    alloc.step(ids, batch, tokens=flat([prompt, prompt])[0])
    _, cached = alloc.admit_batch(*flat([prompt, prompt[:40], text(50, 2)]))
    size = alloc.match(prompt).num_tokens
    assert size >= 64 and list(cached) == [size, alloc.match(prompt[:40]).num_tokens, 0]
    assert list(alloc.admit_batch(prompt, salt="another")[1]) == [0]


@pytest.mark.parametrize("form", [list, array.array, torch.tensor, memoryview], ids=lambda form: form.__name__)
def test_token_ids_in_any_form(form: type) -> None:
    alloc = make_allocator(plain(16), backend="paged", max_sequences=8, max_tokens=512)
    tokens = i32(*text(40))
    made = {list: tokens.tolist, array.array: lambda: array.array("i", tokens.tolist()),
            torch.tensor: lambda: torch.from_numpy(tokens), memoryview: lambda: memoryview(tokens)}[form]()  # fmt: skip
    ids, _ = alloc.admit_batch(made)
    assert alloc.batch(ids).seq_lens.tolist() == [40]
    alloc.commit_batch(ids, i32(40), tokens)
    assert alloc.match(made).num_tokens == alloc.sequence(made).num_cached_tokens == 32
    with alloc.pin(made) as pin:
        assert pin.num_tokens == 32
    if isinstance(made, array.array):
        made.append(1)  # a BufferError while anybody holds it


def test_bad_prompts_change_nothing(backend: str) -> None:
    alloc = make_allocator(plain(16), backend=backend, max_sequences=8, max_tokens=64)
    before = alloc.stats()
    for tokens, counts, says in (
        (text(10), i32(4, 4), "10 token ids for counts of 8"),
        (text(66), i32(1, 65), "can hold 64"),
        (text(10), i32(11, -1), "-1 tokens|10 token ids"),
        (text(10), np.array([10.0]), "^counts: got"),
        ([[1, 2]], None, "flat list"),
        ([-1], None, "0 or more"),
    ):
        with pytest.raises(SpecError, match=says):
            alloc.admit_batch(tokens, counts)
    assert alloc.stats() == before
