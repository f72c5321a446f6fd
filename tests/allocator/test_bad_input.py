"""Bad input: a typed error that says what was asked, what there is and what would do; nothing changes, nothing is corrupted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from bad_input import CROSS, make, refused, world
from support import i32
from support_world import World

import kvmem
from kvmem import CacheSpec, SpecError, StaleHandle
from kvmem.allocator.scheduler import SchedulerCache

__all__ = ["world"]


# --- token counts ---

Seq = kvmem.Sequence
#: Verbs of the first sequence, what each is given, and what the refusal says.
VERBS: dict[str, tuple[Callable[[Seq, Any], object], list[tuple[Any, str]]]] = {
    "extend": (lambda seq, n: seq.extend(n), EXTENDED := [
        (-1, r"(?s)-1.*"), (-(2**31), "-2147483648"),
        (196, r"from 105 by 196 tokens; it can hold 300.*at most 195 more"), (2**31 - 1, r"at most 195 more"),
        (2**31, "n: got 2147483648; must fit"), (2**62, "n: got 4611686018427387904"),
        *((value, ".") for value in (2**63, 2**200, 1.0, 1.5, None, "1", True)),
    ]),
    "try_extend": (lambda seq, n: seq.try_extend(n), EXTENDED),
    "commit ids": (lambda seq, tokens: seq.commit(tokens), [
        (1, r"got 1; commit takes ids, \[1\] for one; a count is commit\(count=1\)"),
        (0, r"a count is commit\(count=0\)"), (-1, r"a count is commit\(count=-1\)"),
        (np.int64(5), r"a count is commit\(count=5\)"), (2**70, "a count is"), ([1, 2, 3, 4, 5, 6], "asked to commit 6"),
        ([-1], "got ids from -1 to -1"), ([[1, 2]], r"shape \(1, 2\)"), ([1.5], "float"), (True, "bool"), (1.0, "float"),
        ("12", "str|<U"), (None, r"tokens: missing.*commit\(count=n\)"), ([1, [2]], "list"),
    ]),
    "commit a count": (lambda seq, count: seq.commit(count=count), COUNTS := [
        (-1, "count: got -1"), (6, "asked to commit 6 tokens.*5 are reserved and not committed: extend"),
        (2**31, "count: got 2147483648"), (2**63 - 1, "count: got 9223372036854775807"),
        (2**200, "count: got a number of 201 bits"), (1.0, "count: got 1.0"), (True, "count: got True"),
        ([1], r"count: got \[1\]"),
    ]),
    "commit both": (lambda seq, count: seq.commit([1], count=count), [(count, "one of them") for count, _ in COUNTS]),
    "truncate": (lambda seq, tokens: seq.truncate(tokens), [
        (-1, "to -1 tokens; it has 105"), (106, "to 106 tokens; it has 105"), (2**40, "num_tokens: got 1099511627776"),
        (3, "sliding window of 40.*least that would do is"),
        *((value, ".") for value in (True, 1.0, "1", None, 2**63, 2**70)),
    ]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("verb", "value", "words"), [(verb, *case) for verb, (_, cases) in VERBS.items() for case in cases]
)
def test_a_verb_with_a_wrong_number(world: World, verb: str, value: Any, words: str) -> None:
    sequence = kvmem.Sequence(world.alloc, min(world.sequences))
    refused(world, SpecError, words, lambda: VERBS[verb][0](sequence, value))


def test_the_least_length_that_a_window_allows_is_right(world: World) -> None:
    handle = min(world.sequences)
    least = world.model.least_tokens(handle)
    refused(world, SpecError, f"least that would do is {least}$", lambda: world.core.truncate(handle, least - 1))
    assert world.run(world.truncate(handle, least))
    world.healthy()


# --- handles ---


def handle_calls(world: World, handle: Any) -> list[Callable[[], object]]:
    core, alloc = world.core, world.alloc
    return [
        lambda: core.extend(handle, 1, -1), lambda: core.commit(handle, 0, -1), lambda: core.truncate(handle, 0),
        lambda: core.fork(handle), lambda: core.free(handle), lambda: core.tokens(handle), lambda: core.committed(handle),
        lambda: core.first_token(handle), lambda: core.row(handle), lambda: alloc.batch([handle]),
        lambda: alloc.sequence_tensor(handle, 0, "k"), lambda: kvmem.Sequence(alloc, handle).num_tokens,
        lambda: alloc.extend_batch(i32(handle), i32(1)), lambda: alloc.try_extend_batch(i32(handle), i32(1)),
        lambda: alloc.commit_batch(i32(handle), i32(0)), lambda: alloc.free_batch(i32(handle)),
    ]  # fmt: skip


@pytest.mark.parametrize("handle", [0, 500, 1000, -1, -5, 2**31 - 1, -(2**31)])
def test_handles_that_were_never_given_out(world: World, handle: int) -> None:
    for call in handle_calls(world, handle):
        refused(world, StaleHandle, f"{handle} is not live", call)


@pytest.mark.parametrize("handle", [2**31, 2**40, -(2**31) - 1])
def test_handles_that_are_no_int32(world: World, handle: int) -> None:
    for call in handle_calls(world, handle):
        refused(world, (StaleHandle, SpecError, TypeError, OverflowError), ".", call)


def test_a_freed_handle_is_stale_also_when_its_place_has_a_new_tenant(world: World) -> None:
    old = kvmem.Sequence(world.alloc, min(world.sequences))
    world.run(world.free([old.id]))
    for call in handle_calls(world, old.id):
        refused(world, StaleHandle, f"{old.id} is not live.*freed", call)
    for _ in range(40):  # every place gets tenants
        handles = world.alloc.open_batch(3)
        assert old.id not in handles
        world.alloc.free_batch(handles)
    for call in handle_calls(world, old.id):
        refused(world, StaleHandle, "not live", call)
    for use in (old.free, old.fork, lambda: old.extend(1), lambda: old.num_tokens, lambda: old.kv(0)):
        refused(world, StaleHandle, "not live", use)


def test_a_handle_of_another_allocator(world: World) -> None:
    other = make(max_sequences=3)
    foreign = [other.open_batch(1)[0] for _ in range(3)]
    other.free_batch(i32(*foreign))
    stranger = other.sequence()
    if stranger.id not in world.sequences:
        refused(world, StaleHandle, "never gave it out", lambda: world.core.free(stranger.id))
    with pytest.raises(SpecError, match="another allocator|belongs"):
        world.alloc.batch([stranger])


def test_double_free_in_every_form(world: World) -> None:
    sequence = world.alloc.sequence()
    sequence.free()
    refused(world, StaleHandle, "not live", sequence.free)
    refused(world, StaleHandle, "not live", lambda: world.alloc.free_batch(i32(sequence.id)))
    with world.alloc.sequence() as inner:
        inner.free()
    first, second = sorted(world.sequences)
    refused(world, SpecError, f"{first} is named twice", lambda: world.alloc.free_batch(i32(first, second, first)))
    refused(world, StaleHandle, "not live", lambda: world.alloc.free_batch(i32(first, second, sequence.id)))


# --- batches ---


def test_a_sequence_stands_in_a_batch_once(world: World) -> None:
    first, second = sorted(world.sequences)
    refused(world, SpecError, "named twice", lambda: world.alloc.extend_batch(i32(first, second, first), i32(1, 1, 1)))
    refused(world, SpecError, "named twice", lambda: world.alloc.commit_batch(i32(first, first), i32(1, 1)))


def test_one_bad_entry_refuses_the_whole_batch(world: World) -> None:
    first, second = sorted(world.sequences)
    refused(world, SpecError, "-3", lambda: world.alloc.extend_batch(i32(first, second), i32(1, -3)))
    refused(world, SpecError, "at most 300 more", lambda: world.alloc.extend_batch(i32(first, second), i32(1, 301)))
    refused(world, SpecError, "0 are reserved", lambda: world.alloc.commit_batch(i32(first, second), i32(1, 1)))


def test_arrays_of_wrong_length_or_type(world: World) -> None:
    first, second = sorted(world.sequences)
    alloc = world.alloc
    refused(world, SpecError, "2 handles and 1 counts", lambda: alloc.extend_batch(i32(first, second), i32(1)))
    refused(world, SpecError, "1 handles and 2 counts", lambda: alloc.commit_batch(i32(first), i32(1, 1)))
    wrong: list[Any] = [
        np.array([first], np.float32), np.array([[first]], np.int32), [[first]], [first, [second]], None, first, "1",
        [str(first)], [True], [2**31], [1.0], np.array([2**31]), torch.tensor([first], device="meta"),
    ]  # fmt: skip
    for ids in wrong:
        for call in (
            alloc.free_batch,
            lambda x: alloc.extend_batch(x, i32(1)),
            lambda x: alloc.commit_batch(x, i32(0)),
        ):
            refused(world, SpecError, "^ids: got", lambda call=call, ids=ids: call(ids))
    refused(world, SpecError, "^counts: got", lambda: alloc.extend_batch(i32(first), [1.5]))
    refused(world, SpecError, 'ids: got a tensor on meta.*"?.cpu', lambda: alloc.free_batch(wrong[-1]))
    refused(world, SpecError, "^sequences: got a tensor on meta", lambda: alloc.batch(wrong[-1]))


def test_lists_and_every_integer_type(world: World) -> None:
    """What is an int32 in each entry is taken as it is by all batched calls, whatever holds it."""
    first, second = sorted(world.sequences)
    alloc, unsigned, strided = (
        world.alloc,
        lambda x: np.array(x, np.uint32),
        lambda x: np.array([x, x], np.int32).T[:, 0],
    )
    batch = alloc.make_batch(max_new_tokens=600)
    for form in (list, tuple, np.array, torch.tensor, unsigned, strided):
        before = [alloc.core.tokens(h) for h in (first, second)]
        ids: Any = form([first, second])
        alloc.extend_batch(ids, form([1, 2]))
        assert [alloc.core.tokens(h) for h in (first, second)] == [before[0] + 1, before[1] + 2]
        alloc.fill(ids, batch)
        rows = batch.num_rows
        assert rows == 2 and alloc.batch(ids).num_rows == 2
        due = sum(alloc.core.tokens(h) - alloc.core.committed(h) for h in (first, second))
        alloc.step(ids, batch, counts=form([1, 0]), tokens=form([7] * due))
        alloc.commit_batch(ids, form([1, 0]), form([3]))
        assert list(alloc.cascade_order(ids)) in ([0, 1], [1, 0])
    mine, _ = alloc.admit_batch([1, 2, 3], [2, 1])
    alloc.free_batch(mine.tolist())
    assert alloc.check() == []


def test_what_no_batch_can_mean(world: World) -> None:
    first, second = sorted(world.sequences)
    alloc, seq = world.alloc, kvmem.Sequence(world.alloc, first)
    for one in (seq, first, np.int32(first), None, 2.5):
        refused(world, SpecError, r"^sequences: got .*batch\(\[seq\]\)", lambda one=one: alloc.batch(one))
        refused(world, SpecError, r"^sequences: got .*\[seq\] for one", lambda one=one: alloc.cascade_order(one))
    buffers = alloc.make_batch(max_new_tokens=100)
    for call in (
        lambda: alloc.batch([seq, second, seq]),
        lambda: alloc.batch([first, first]),
        lambda: alloc.fill(i32(second, first, second), buffers),
        lambda: alloc.step(i32(first, first), buffers),
    ):
        refused(world, SpecError, f"handle {first}|{second} (stands in the batch|is named) twice", call)
    for rows in (0, 1):
        words = f"pad_to: got {rows}; the batch has 2 sequences.*give 2 or more"
        refused(world, SpecError, words, lambda rows=rows: alloc.batch([first, second], pad_to=rows))
        refused(world, SpecError, words, lambda rows=rows: alloc.fill(i32(first, second), buffers, pad_to=rows))
        refused(world, SpecError, words, lambda rows=rows: alloc.step(i32(first, second), buffers, pad_to=rows))
    assert alloc.batch([first, second], pad_to=2).num_rows == 2 and alloc.batch([], pad_to=0).num_rows == 0


def test_buffers_that_are_too_small(world: World) -> None:
    handles = sorted(world.sequences)
    alloc = world.alloc
    for sizes, words in [
        (dict(max_sequences=1, max_new_tokens=100), "2 rows does not fit"),
        (dict(max_new_tokens=4), "5 new tokens; the batch was made for"),
        (dict(max_new_tokens=100, max_tokens=32), "7 blocks for one sequence"),
    ]:
        batch = alloc.make_batch(**sizes)
        refused(world, SpecError, words, lambda batch=batch: alloc.batch(handles, out=batch))
        refused(world, SpecError, words, lambda batch=batch: alloc.fill(i32(*handles), batch))


@pytest.mark.parametrize(
    "new_tokens", [[6, 0], [-1, 0], [5], [5, 0, 0], [2**31 - 1, 0], [2**31, 0], [1.5, 0], [[5, 0]]]
)
def test_a_step_of_tokens_that_are_not_reserved(world: World, new_tokens: list[int]) -> None:
    refused(world, SpecError, ".", lambda: world.alloc.batch(sorted(world.sequences), new_tokens=new_tokens))


# --- groups ---


def test_numbers_beyond_every_size_and_arguments_of_other_types(world: World) -> None:
    alloc, handle = world.alloc, min(world.sequences)
    deep: Any = ()
    for _ in range(3000):
        deep = (deep,)
    sequence = kvmem.Sequence(alloc, handle)
    for words, call in [
        ("end", lambda: sequence.retain(0, 2**70, priority=60)),
        ("num_tokens", lambda: sequence.pin(2**70)),
        ("bytes", lambda: alloc.trim(2**80)),
        ("bytes", lambda: alloc.trim(10**5000)),
        ("bytes", lambda: alloc.compact("9" * 5000)),
        ("counts", lambda: alloc.admit_batch(i32(1, 2), 5)),
        ("extra_key.*bits", lambda: alloc.sequence([1], extra_key=10**5000)),
        ("extra_key.*deep", lambda: alloc.match([1], extra_key=deep)),
        ("sequence: got 's'", lambda: alloc.sequence_tensor("s", 0, "k")),
        ("out: got int", lambda: alloc.batch([handle], out=5)),
        ("ops: got int", lambda: alloc.apply(5)),
    ]:
        refused(world, SpecError, words, call)
    as_numpy_has_it = alloc.batch(np.array([handle]))  # int64
    assert as_numpy_has_it.seq_lens.tolist() == alloc.batch([handle]).seq_lens.tolist()


GROUP_CALLS: dict[str, Callable[[World, Any], object]] = {
    "extend": lambda world, group: _one(world).extend(1, group=group),
    "try_extend": lambda world, group: _one(world).try_extend(1, group=group),
    "commit a count": lambda world, group: _one(world).commit(count=0, group=group),
    "commit ids": lambda world, group: _one(world).commit([], group=group),
    "cascade_order": lambda world, group: world.alloc.cascade_order([_one(world)], group=group),
    "block_ids": lambda world, group: SchedulerCache(world.alloc).block_ids("a", group=group),
    "Batch.group": lambda world, group: world.alloc.batch([_one(world)]).group(group),
}


def _one(world: World) -> kvmem.Sequence:
    return kvmem.Sequence(world.alloc, min(world.sequences))


@pytest.mark.parametrize("group", [4, 99, 2**31, 2**63, -1, -2, -100, -(2**31), np.int32(-1), 1.5, "full"])
@pytest.mark.parametrize("call", GROUP_CALLS)
def test_groups_that_do_not_exist(world: World, call: str, group: Any) -> None:
    """-1 stands for no group in the core, and for the last element in Python; here it is no group's number."""
    refused(world, SpecError, rf"^(group|index): got .*{group}", lambda: GROUP_CALLS[call](world, group))


def test_a_prefill_group_grows_once(world: World) -> None:
    handle = min(world.sequences)
    sequence = kvmem.Sequence(world.alloc, handle)
    refused(world, SpecError, "by 101 tokens; it can hold 100", lambda: sequence.extend(101, group=CROSS))
    assert world.run(world.prefill(handle, CROSS, 30))
    refused(world, SpecError, "fixed after prefill and already holds 30", lambda: sequence.extend(1, group=CROSS))
    refused(world, SpecError, "asked to commit 31.*30 are reserved", lambda: sequence.commit(count=31, group=CROSS))


def test_layers_and_components_that_do_not_exist(world: World) -> None:
    alloc = world.alloc
    for layer, name in [(0, "q"), (4, "k"), (-1, "k"), (1, "cross_k")]:
        refused(world, SpecError, ".", lambda layer=layer, name=name: alloc.tensor(layer, name))
    if alloc.backend == "paged":
        refused(world, SpecError, "no rows", lambda: alloc.rows(0))


STRANGE: list[Any] = [np.array([0, 1]), 1.0, True, None, "0", [0], 10**5000, float("nan")]


@pytest.mark.parametrize("strange", STRANGE, ids=[type(x).__name__ + str(i) for i, x in enumerate(STRANGE)])
def test_values_of_strange_types(world: World, strange: Any) -> None:
    """No call compares them entry by entry, rounds them, takes True for 1, or fails while it writes its message."""
    alloc, sequence = world.alloc, kvmem.Sequence(world.alloc, min(world.sequences))
    batch = alloc.make_batch(max_sequences=1, max_new_tokens=1)
    calls: list[Callable[[], object]] = [
        lambda: alloc.kv(strange), lambda: alloc.tensor(strange, "k"), lambda: alloc.tensor(0, strange),
        lambda: alloc.rows(strange), lambda: batch.group(strange), lambda: sequence.extend(strange),
        lambda: alloc.set_memory(strange), lambda: alloc.extend_batch([strange], [1]),
        lambda: CacheSpec.from_config({strange: 1} if isinstance(strange, (float, str)) else strange),
    ]  # fmt: skip
    if isinstance(strange, float):  # a float is a fraction of the memory: 1.0 is fine, others have their own test
        calls.pop(6)
    for call in calls:
        refused(world, SpecError, ".", call)
