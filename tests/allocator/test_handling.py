"""What people meet first: amounts of memory as they write them, lists of what is live, texts, and what cannot be sent."""

from __future__ import annotations

import copy
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import make_allocator, plain
from support_cuda import MIB, as_libcuda, fresh_stub

import kvmem
from kvmem import PagePool, SpecError
from kvmem.allocator.scheduler import SchedulerCache
from kvmem.arguments import parse_bytes
from kvmem.kernels.reference import sdpa
from kvmem.kernels.write import write_kv

pytestmark = pytest.mark.core


@pytest.fixture
def alloc(backend: str) -> kvmem.Allocator:
    return make_allocator(plain(16), backend, max_sequences=8, page_bytes=4096)


# ---- amounts of memory ----


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ("4G", 4 << 30), ("4GiB", 4 << 30), ("4GB", 4 * 10**9), ("1.5K", 1536), ("2 M", 2 << 20), ("1T", 1 << 40),
        (np.int64(4096), 4096), (np.uint8(7), 7), (0, 0), ("12", 12),
    ],
)  # fmt: skip
def test_bytes_as_people_write_them(given: Any, count: int) -> None:
    found = parse_bytes("memory", given)
    assert found == count and type(found) is int


@pytest.mark.parametrize(
    "given", ["4g", "4Gb", "G", "-4G", "4 G B", True, np.bool_(True), -1, np.int64(-1), None, b"4G"]
)
def test_what_is_no_amount(given: Any) -> None:
    with pytest.raises(SpecError, match='memory: got .*"20GiB", "20G" or "500MB"'):
        parse_bytes("memory", given)


def test_a_fraction_is_of_what_is_free(tmp_path: Path) -> None:
    stub = fresh_stub(tmp_path, MIB, memory_bytes=1000 * MIB, foreign_bytes=200 * MIB)
    with as_libcuda(stub):
        alloc = kvmem.Allocator(plain(16), device="cuda:0", memory=0.5, max_sequences=2, max_tokens=100)
        assert alloc.stats().budget_bytes == 400 * MIB
        stub.set("foreign_bytes", 600 * MIB)
        alloc.set_memory(np.float32(0.25))  # type: ignore[arg-type]
        assert alloc.stats().budget_bytes == 100 * MIB, "what it holds counts as free: a quarter of 400 MiB"
        del alloc
    assert not any(stub.held().values())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_where_there_is_nothing_to_take_a_fraction_of(device: str) -> None:
    with pytest.raises(SpecError, match=rf"memory: got 0.9, but device '{device}' does not report .*; give bytes"):
        PagePool(device=device, memory=0.9)
    with pytest.raises(SpecError, match="memory: got 0.9"):
        kvmem.Allocator(plain(16), device=device, memory=0.9, max_sequences=2, max_tokens=100)
    pool = PagePool(device=device, memory="4MiB")
    with pytest.raises(SpecError, match="memory: got 0.9"):
        pool.set_memory(0.9)
    assert pool.budget_bytes == 4 << 20


@pytest.mark.parametrize("given", [0.0, -0.5, 1.5, 2e9, float("nan"), float("inf")])
def test_no_fraction(given: float) -> None:
    with pytest.raises(SpecError, match="memory: got .*a float is a fraction, above 0 and at most 1"):
        PagePool(device="cpu", memory=given)


def test_a_part_of_a_pool() -> None:
    pool = PagePool(device="meta", memory="8MiB", page_bytes=4096)
    half = kvmem.Allocator(plain(16), pool=pool, memory=0.5, max_sequences=2, max_tokens=100)
    assert half.core.stats().limit_bytes == 4 << 20


# ---- what is live ----


def test_the_list_of_what_is_live(alloc: kvmem.Allocator) -> None:
    assert alloc.sequences() == []
    first = alloc.sequence(label="first")
    first.extend(20), first.commit([1] * 17)
    time.sleep(0.1)
    ids = alloc.open_batch(2)
    fork = first.fork()
    found = alloc.sequences()
    assert [one.id for one in found] == [first.id, *ids.tolist(), fork.id]
    ages = [one.age for one in found]
    assert ages == sorted(ages, reverse=True) and ages[0] - ages[1] > 0.08 and ages[3] >= 0
    assert [one.label for one in found] == ["first", None, None, None]
    assert (found[0].num_tokens, found[0].num_committed_tokens) == (20, 17)
    assert (found[3].num_tokens, found[3].num_committed_tokens) == (17, 17)
    for _ in range(50):
        alloc.sequence(label="short").free()
    assert [one.id for one in alloc.sequences()] == [one.id for one in found]
    assert len(alloc._labels) == 1, "labels of what was freed are forgotten"
    assert first.label == "first" and fork.label is None


def test_labels_do_not_pile_up_without_a_listing(alloc: kvmem.Allocator) -> None:
    kept = alloc.sequence(label="kept")
    for i in range(100):
        alloc.sequence(label=str(i)).free()
        assert len(alloc._labels) <= 2 * alloc.max_sequences + 1
    assert kept.label == "kept"


# ---- texts ----


def test_texts_for_people(alloc: kvmem.Allocator) -> None:
    seq = alloc.sequence(label="a")
    assert repr(seq) == f"Sequence(id={seq.id}, label='a', num_tokens=0, committed=0)"
    seq.extend(20), seq.commit([1] * 16)
    assert repr(seq) == f"Sequence(id={seq.id}, label='a', num_tokens=20, committed=16)"
    batch = alloc.batch([seq])
    assert repr(batch) == "Batch(1 rows, 4 new tokens, at most 20 tokens a row, 2 blocks of 16)"
    assert repr(alloc.make_batch(max_new_tokens=1)) == "Batch(block_size=16, not filled)"
    assert "PagePool(device='cpu', page_bytes=4 KiB, " in repr(alloc.pool)
    assert repr(SchedulerCache(alloc)) == f"SchedulerCache(0 requests, {alloc!r})"
    text = alloc.stats().summary()
    assert "1 of 8 sequences" in text and "used by tokens" in text and max(map(len, text.splitlines())) <= 120
    assert "device:" not in text
    seq.free()
    assert repr(seq) == f"Sequence(id={seq.id}, label='a', freed)"
    with alloc.sequence([1] * 17) as again:
        again.extend(1)
        assert "16 of 16 tokens found cached (100%)" in alloc.stats().summary()


def test_what_is_memory_of_this_process_is_not_sent(alloc: kvmem.Allocator) -> None:
    seq = alloc.sequence()
    seq.extend(16), seq.commit(list(range(16)))
    cache = SchedulerCache(alloc)
    things: dict[object, str] = {
        seq: r"^Sequence\(id=.*fork\(\)", alloc: r"^Allocator\(backend=.*take_ops\(\)", alloc.batch([seq]): r"^Batch\(.*send its tensors",
        seq.pin(): r"^Pin\(16 tokens\).*pin again", alloc.pool: r"^PagePool\(.*arguments", cache: r"^SchedulerCache\(.*TableChanges",
        alloc.kv(0)[0]: "^pickling: a cache tensor|^a deep copy: a cache tensor|cache tensor",
    }  # fmt: skip
    before = alloc.core.digest()
    for thing, words in things.items():
        for call in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(SpecError, match=words):
                call(thing)
    assert alloc.core.digest() == before


def test_a_sequence_in_the_place_of_a_batch(alloc: kvmem.Allocator) -> None:
    seq = alloc.sequence()
    seq.extend(3)
    q = torch.zeros(3, 2, 8)
    for call in (
        lambda: sdpa(q, alloc.kv(0), seq),  # type: ignore[arg-type]
        lambda: write_kv(alloc.kv(0), seq, q, q),  # type: ignore[arg-type]
    ):
        with pytest.raises(SpecError, match=r"batch: got Sequence\(id=.*alloc.batch\(\[seq\]\)"):
            call()
    with pytest.raises(SpecError, match=r"^batch: got \[Sequence\(id="):
        sdpa(q, alloc.kv(0), [seq])  # type: ignore[arg-type]
    batch = alloc.batch([seq], new_tokens=[3])
    for given in (seq.kv(0), alloc.kv(0)[0], [alloc]):
        with pytest.raises(SpecError, match=r"^cache: got \[.*must be alloc.kv\(layer\)"):
            sdpa(q, given, batch)  # type: ignore[arg-type]
        with pytest.raises(SpecError, match=r"^cache: got \["):
            write_kv(given, batch, q, q)  # type: ignore[arg-type]


# ---- requests ----


@pytest.mark.parametrize("request_id", [["r"], {"r": 1}, {1}, np.array([1])], ids=["list", "dict", "set", "array"])
def test_what_names_no_request(alloc: kvmem.Allocator, request_id: Any) -> None:
    cache = SchedulerCache(alloc)
    cache.allocate("r", 5)
    before = alloc.core.digest()
    for call in (
        lambda: cache.allocate(request_id, 1), lambda: cache.publish(request_id, [1]), lambda: cache.step(request_id),
        lambda: cache.publish(request_id, count=1), lambda: cache.truncate(request_id, 0), lambda: cache.free(request_id),
        lambda: cache.snapshot(request_id), lambda: cache.block_ids(request_id), lambda: cache.sequence(request_id),
        lambda: cache.num_tokens(request_id), lambda: cache.num_cached_tokens(request_id), lambda: request_id in cache,
        lambda: cache.handles([request_id]), lambda: cache.handles(["r", request_id]), lambda: cache.free_all([request_id]),
        lambda: cache.common_prefix_blocks([request_id]),
    ):  # fmt: skip
        with pytest.raises(SpecError, match="request: got .*cannot be hashed; a request id is"):
            call()
    assert alloc.core.digest() == before and list(cache) == ["r"]


@pytest.mark.parametrize("requests", ["r", 5, None, b"r"])
def test_what_names_no_requests(alloc: kvmem.Allocator, requests: Any) -> None:
    cache = SchedulerCache(alloc)
    cache.allocate("r", 5)
    for call in (cache.handles, cache.free_all):
        with pytest.raises(SpecError, match=r"requests: got .*must be several request ids: \[.*\] for one"):
            call(requests)
    assert list(cache) == ["r"]


def test_a_schedulers_batched_calls_take_lists(alloc: kvmem.Allocator) -> None:
    cache = SchedulerCache(alloc)
    cache.allocate("a", 1), cache.allocate("b", 1)
    handles = cache.handles(["a", "b"]).tolist()
    assert cache.allocate_step(handles, [16, np.int64(3)]) is not None and cache.num_tokens("a") == 17
    cache.publish_step(np.array(handles), [2, 1], [5, 6, 7])
    assert cache.sequence("a").num_committed_tokens == 2 and len(cache.tables(handles)) > 0
    for call in (
        lambda: cache.allocate_step(handles, [1.5, 1]), lambda: cache.publish_step(handles, [1, "x"]), lambda: cache.tables([None]),
    ):  # fmt: skip
        with pytest.raises(SpecError, match="(handles|counts): got"):
            call()


def test_a_refusal_does_not_show_what_was_tried_before(alloc: kvmem.Allocator) -> None:
    """Lists and other integers are taken by a second call: its error stands alone, for whoever reads the traceback."""
    seq, cache = alloc.sequence(), SchedulerCache(alloc)
    cache.allocate("a", 4)
    batch = alloc.make_batch(max_sequences=2, max_new_tokens=4)
    for call in (
        lambda: seq.commit(3),
        lambda: alloc.free_batch([seq.id + 50]),
        lambda: alloc.extend_batch([seq.id + 50], [1]),
        lambda: alloc.commit_batch([seq.id], [7]),
        lambda: alloc.fill([seq.id + 50], batch),
        lambda: alloc.step([seq.id + 50], batch),
        lambda: alloc.match("no ids"),
        lambda: cache.publish("a", 3),
        lambda: cache.step("a", tokens="no ids"),
    ):
        with pytest.raises(kvmem.KVMemError) as refused:
            call()
        assert refused.value.__context__ is None or refused.value.__suppress_context__, refused.value
    seq.free(), cache.free("a")


def test_a_fraction_as_a_text_is_told_to_be_a_float() -> None:
    with pytest.raises(SpecError, match=r"^memory: got '0.9', a text without a unit; .*as a float"):
        parse_bytes("memory", "0.9")
