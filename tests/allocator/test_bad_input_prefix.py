"""Bad input to prefix sharing: a typed error that says what to do, and nothing changed: no statistic, no length, no
answer of match(), and no op for anybody who follows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from support import compute, i32, make_allocator, plain, recurrent
from support_prefix import text

import kvmem
from kvmem import SpecError, StaleHandle
from kvmem.allocator.prefix import Pin

PROMPT = text(64)
MEMORY = {"memory": "1MiB", "page_bytes": 4096, "record_ops": True, "max_tokens": 400}


@dataclass
class Place:
    """An allocator with a live sequence (``seq``: 64 known tokens, 20 more reserved), a freed one, a pin, a cached prompt
    under a salt, and one pin that is undone."""

    alloc: kvmem.Allocator
    seq: kvmem.Sequence
    gone: kvmem.Sequence
    pin: Pin
    undone: Pin

    def seen(self) -> tuple[object, ...]:
        alloc, handles = self.alloc, sorted(self.alloc.core.handles())
        found = [
            alloc.match(prompt, salt=salt, extra_key=extra)
            for prompt in (PROMPT, PROMPT[:40], [*PROMPT, *text(40, 2), 1], text(70, 3), text(70, 4))
            for salt, extra in ((None, None), ("salt", None), (None, "extra"))
        ]
        lengths = [(alloc.core.tokens(h), alloc.core.committed(h)) for h in handles]
        return alloc.stats(), handles, lengths, [(match.num_tokens, match.reason) for match in found]

    def refuses(self, call: Callable[[], object], words: str = ".", error: type[Exception] = SpecError) -> None:
        """``words``: what the message must say, besides not being a message of somebody else's."""
        before = self.seen()
        self.alloc.take_ops()
        with pytest.raises(error, match=words) as caught:
            call()
        assert isinstance(caught.value, kvmem.KVMemError) and len(str(caught.value)) > 15, "a sentence"
        assert self.alloc.take_ops() == [], "somebody who follows would do something"
        assert self.seen() == before
        assert self.alloc.check() == []


def make_place(backend: str, spec: kvmem.CacheSpec) -> Place:
    alloc = make_allocator(spec, backend, **MEMORY)
    seq, gone = compute(alloc, PROMPT), compute(alloc, text(70, 3), salt="salt")
    pinned = compute(alloc, text(64, 4))
    if any(group.growth == "fixed" for group in spec.groups):  # else there is no state that a pin could keep
        seq.snapshot()
        pinned.snapshot()
    pin, undone = pinned.pin(), seq.pin()
    undone.unpin()
    seq.extend(20)
    gone.free()
    pinned.free()
    return Place(alloc, seq, gone, pin, undone)


@pytest.fixture
def place(backend: str) -> Place:
    return make_place(backend, plain(16))


@pytest.fixture
def hybrid(backend: str) -> Place:
    return make_place(backend, recurrent(16))


#: What is no flat list of token ids, and a word of what the message says of it.
NO_TOKENS: dict[str, tuple[Any, str]] = {
    "floats": ([1.0, 2.0], "integer|float"),
    "a float among them": ([1, 2.5], "integer|float"),
    "strings": (["1", "2"], "integer"),
    "a string": ("12", "integer|str"),
    "bytes": (b"12", "integer|bytes"),
    "None among them": ([1, None], "integer"),
    "bools": ([True, False], "integer|bool"),
    "a bool array": (np.array([True, False]), "integer|bool"),
    "negative": ([5, -1], "-1"),
    "beyond int32": ([5, 2**31], "2147483648"),
    "beyond int64": ([5, 2**70], "integer|1180591620717411303424"),
    "nested": ([[1, 2], [3, 4]], "shape|flat|nested"),
    "ragged": ([1, [2]], "flat|list"),
    "a float array": (np.zeros(3), "float"),
    "a 2-d array": (np.zeros((2, 3), np.int32), r"shape|flat"),
    "a 0-d array": (np.array(7), r"shape|flat"),
    "uint64 beyond": (np.array([2**63], np.uint64), "9223372036854775808"),
    "a float tensor": (torch.zeros(3), "float"),
    "a 2-d tensor": (torch.zeros(2, 3, dtype=torch.int32), r"shape|flat"),
    "a bool tensor": (torch.zeros(3, dtype=torch.bool), "bool"),
    "a dict": ({1: 2}, "dict|integer"),
    "an object": (object(), "object"),
}


@pytest.mark.parametrize("case", NO_TOKENS)
def test_what_is_no_list_of_token_ids(place: Place, case: str) -> None:
    tokens, words = NO_TOKENS[case]
    alloc, seq = place.alloc, place.seq
    for call in (
        lambda: alloc.sequence(tokens),
        lambda: alloc.sequence(tokens, salt="salt"),
        lambda: alloc.match(tokens),
        lambda: alloc.pin(tokens),
    ):
        place.refuses(call, words)
    place.refuses(lambda: seq.commit(tokens), words)


@pytest.mark.parametrize("count", [5, np.int64(5), 0, -1])
def test_a_count_names_no_tokens(place: Place, count: Any) -> None:
    """Nowhere: ``commit(1)`` for token 1 would turn sharing off, and nothing would tell."""
    place.refuses(lambda: place.alloc.match(count))
    place.refuses(lambda: place.alloc.pin(count))
    place.refuses(lambda: place.alloc.sequence(count))
    place.refuses(
        lambda: place.seq.commit(count), rf"commit takes ids, \[{count}\] for one; a count is commit\(count={count}\)"
    )
    place.refuses(lambda: place.seq.step(1, count), "flat list of integer token ids")


@pytest.mark.parametrize(
    "given",
    [PROMPT, tuple(PROMPT), np.array(PROMPT), np.array(PROMPT, np.uint16), torch.tensor(PROMPT),
     torch.tensor(PROMPT, dtype=torch.int32), np.array(PROMPT * 2)[:: 1][:64], np.repeat(np.array(PROMPT), 2)[::2],
     [np.int64(t) for t in PROMPT]],
)  # fmt: skip
def test_every_kind_of_token_list_is_the_same(place: Place, given: Any) -> None:
    assert place.alloc.match(given) == place.alloc.match(PROMPT)
    seq = place.alloc.sequence(given)
    assert seq.num_cached_tokens == 63
    seq.extend(1)
    seq.commit(given[-1:])
    assert place.alloc.check() == []


def test_the_largest_token_id_is_fine(place: Place) -> None:
    tokens = [2**31 - 1] * 20 + [0] * 13
    seq = compute(place.alloc, tokens)
    assert place.alloc.match(tokens).num_tokens == 32
    seq.free()


@pytest.mark.parametrize("salt", [5, 1.5, ["a"], ("a", "b"), {"a"}, object(), True, np.array([1]), 0])
def test_a_salt_is_a_string_or_bytes(place: Place, salt: Any) -> None:
    for call in (place.alloc.sequence, place.alloc.match, place.alloc.pin):
        place.refuses(lambda call=call: call(PROMPT, salt=salt), "salt")  # type: ignore[misc]


@pytest.mark.parametrize("extra_key", [1.5, ["a"], {"a"}, object(), True, np.array([1]), (1, 2.5), ("a", ["b"])])
def test_an_extra_key_is_made_of_strings_bytes_and_ints(place: Place, extra_key: Any) -> None:
    for call in (place.alloc.sequence, place.alloc.match, place.alloc.pin):
        place.refuses(lambda call=call: call(PROMPT, extra_key=extra_key), "extra.key")  # type: ignore[misc]


def test_no_two_keys_are_the_same(place: Place) -> None:
    """Text, bytes, numbers, tuples and nothing: whatever is written differently is another root (invariant 9)."""
    keys = [None, "", "1", b"1", b"", 1, 0, -1, ("1",), (1,), (), ((),), ("a", "b"), ("ab",), ("a", ("b",)), (None,)]
    tokens, alloc = text(34, 7), place.alloc
    for n, key in enumerate(keys):
        for other in keys[n:]:
            assert alloc.match(tokens, extra_key=other).num_tokens == 0, (keys[:n], other)
        compute(alloc, tokens, extra_key=key).free()
        assert alloc.match(tokens, extra_key=key).num_tokens == 32
    texts = [None, "", b"", "a", b"a", "1"]
    for n, salt in enumerate(texts):
        for other in texts[n:]:
            assert alloc.match(tokens, salt=other, extra_key="x").num_tokens == 0, (texts[:n], other)
        compute(alloc, tokens, salt=salt, extra_key="x").free()


def test_pinning_what_is_gone_or_never_was(place: Place) -> None:
    place.refuses(lambda: place.alloc.pin(text(70, 9)))
    place.refuses(lambda: place.alloc.pin([*PROMPT, *text(32, 9)]))
    place.refuses(lambda: place.alloc.pin(PROMPT, salt="salt"))
    place.alloc.clear_cache()
    place.refuses(lambda: place.alloc.pin(text(70, 3), salt="salt"))
    place.alloc.pin(PROMPT).unpin()


def test_unpinning_twice(place: Place) -> None:
    place.refuses(place.undone.unpin, error=StaleHandle)
    with place.pin:
        pass
    place.refuses(place.pin.unpin, error=StaleHandle)


@pytest.mark.parametrize("tokens", [-1, 65, 10**6, 2**40, 1.5, "32", True, [32]])
def test_pinning_more_than_is_known(place: Place, tokens: Any) -> None:
    place.refuses(lambda: place.seq.pin(tokens))


def test_what_is_freed_can_do_nothing(place: Place) -> None:
    gone = place.gone
    for call in (gone.fork, gone.pin, gone.free, gone.snapshot, lambda: gone.commit([1]), lambda: gone.truncate(0),
                 lambda: gone.retain(priority=10), lambda: gone.pin(16)):  # fmt: skip
        place.refuses(call, error=StaleHandle)
    place.refuses(lambda: place.alloc.commit_batch(i32(gone.id), i32(1), tokens=i32(1)), error=StaleHandle)


def test_going_back_behind_a_pin(place: Place) -> None:
    with place.seq.pin(40):
        for tokens in (0, 1, 16, 31):
            place.refuses(lambda tokens=tokens: place.seq.truncate(tokens), "pin")  # type: ignore[misc]
        place.seq.truncate(33)
        place.seq.truncate(32)
    place.seq.truncate(31)
    assert place.alloc.match([*PROMPT, 1]).num_tokens == 16
    assert place.alloc.check() == []


def test_a_snapshot_needs_a_fixed_state(place: Place) -> None:
    place.refuses(place.seq.snapshot, "fixed|state")


def test_a_snapshot_needs_whole_known_blocks(hybrid: Place) -> None:
    seq = hybrid.seq
    hybrid.refuses(seq.snapshot, "64 committed.*84")  # more is reserved: the state may be ahead of what is committed
    seq.truncate(64)
    hybrid.refuses(seq.snapshot, "more than its 64 tokens")  # still: what was cut off may have been run
    seq.extend(16)
    seq.commit(text(16))
    seq.snapshot()
    seq.extend(3)
    seq.commit(text(3))
    hybrid.refuses(seq.snapshot, "83|block")
    seq.extend(13)
    seq.commit(count=13)
    hybrid.refuses(seq.snapshot, "known|token ids|unknown|named|ids")  # a multiple of the block, but only counted
    empty = hybrid.alloc.sequence()
    hybrid.refuses(empty.snapshot)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"priority": -1}, "priority.*-1"), ({"priority": 101}, "priority.*101"), ({"priority": 50.5}, "priority"),
        ({"priority": "high"}, "priority"), ({"priority": None}, "priority"), ({"priority": True}, "priority"),
        ({"priority": 10, "ttl": -1}, "ttl"), ({"priority": 10, "ttl": float("nan")}, "ttl"),
        ({"priority": 10, "ttl": "5s"}, "ttl"), ({"priority": 10, "ttl": True}, "ttl"),
        ({"priority": 10, "start": -1}, "start"), ({"priority": 10, "start": 1.5}, "start"),
        ({"priority": 10, "start": 32, "end": 16}, r"\[32, 16\)"), ({"priority": 10, "end": -5}, "end"),
        ({"priority": 10, "end": "all"}, "end"), ({"priority": 10, "start": None}, "start"),
    ],
)  # fmt: skip
def test_retain_with_wrong_arguments(place: Place, arguments: dict[str, Any], words: str) -> None:
    place.refuses(lambda: place.seq.retain(**arguments), words)


def test_commit_batch_with_wrong_tokens(place: Place) -> None:
    alloc, seq = place.alloc, place.seq
    other = compute(alloc, text(30, 8))
    other.extend(10)
    ids, counts = i32(seq.id, other.id), i32(2, 3)
    for tokens in (i32(1, 2, 3, 4), i32(1, 2, 3, 4, 5, 6), i32(), np.zeros(5), np.zeros(5, np.int64), [1, 2, 3, 4, 5.5],
                   i32(1, 2, 3, 4, -5), np.zeros((5, 1), np.int32), np.zeros(10, np.int32)[::2], "12345"):  # fmt: skip
        if isinstance(tokens, np.ndarray) and tokens.dtype == np.int64:
            continue  # may be taken: every id fits
        if isinstance(tokens, np.ndarray) and tokens.size == 5 and not tokens.flags.c_contiguous:
            continue  # may be copied
        place.refuses(lambda tokens=tokens: alloc.commit_batch(ids, counts, tokens=tokens))  # type: ignore[misc]
    place.refuses(lambda: alloc.commit_batch(ids, i32(2, 11), tokens=i32(*range(13))))  # one of them has no room
    alloc.commit_batch(ids, counts, tokens=i32(1, 2, 3, 4, 5))
    assert seq.num_committed_tokens == 66 and other.num_committed_tokens == 33


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"policy": "newest"}, "policy.*newest|newest.*polic"), ({"policy": 5}, "policy"), ({"policy": None}, "policy"),
        ({"prefix_cache": "yes"}, "prefix_cache"), ({"partial_reuse": 1.5}, "partial_reuse"),
        ({"events": -1}, "events"), ({"events": 1.5}, "events"), ({"events": "all"}, "events"),
    ],
)  # fmt: skip
def test_an_allocator_with_wrong_options(backend: str, option: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words) as caught:
        make_allocator(plain(16), backend, **MEMORY, **option)
    if option.get("policy") == "newest":
        assert "lru" in str(caught.value).lower(), "the message lists the names there are"


def test_a_prompt_longer_than_a_sequence_can_be(place: Place) -> None:
    """It could not be computed to its end, so it is not begun; a match may be asked for all the same."""
    found = place.alloc.match(PROMPT * 20)
    assert found.num_tokens <= place.alloc.max_tokens
    most = place.alloc.max_tokens
    for prompt in ([*PROMPT, *text(1000, 5)], np.zeros(most + 1, np.int32), [1] * (most + 1)):
        words = rf"tokens: got a prompt of {len(prompt)}; a sequence can hold {most} \(max_tokens\): cut the prompt"
        place.refuses(lambda prompt=prompt: place.alloc.sequence(prompt), words)
    seq = place.alloc.sequence([*PROMPT, *text(most, 5)][:most])
    assert seq.num_cached_tokens == 64
    seq.extend(most - 64)
    seq.free()
