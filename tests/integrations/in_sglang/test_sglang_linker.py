"""``KVMemLinker`` against the interface of the installed SGLang: its pools, its transfers, its load counter."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support_sglang import (
    HEADS,
    LAYERS,
    PAGE,
    WIDTH,
    DictTier,
    completed,
    context,  # noqa: F401  a fixture
    device_pool,
    import_sglang,
    open_linker,
    rows,
    run_load,
    tier,  # noqa: F401
    transfer,
)

import_sglang()

from sglang.srt.mem_cache.hicache_storage import PoolName  # noqa: E402

from kvmem.integrations.sglang.linker import KVMemLinker  # noqa: E402
from kvmem.tiers.base import Result, Status  # noqa: E402


@pytest.fixture
def pool() -> Any:
    return device_pool(16)


@pytest.fixture
def linker(pool: Any, tier: DictTier, context: Any) -> Iterator[KVMemLinker]:  # noqa: F811
    with_closing = open_linker(pool)
    yield with_closing
    with_closing.close()
    assert (with_closing._staged, with_closing._waiting, with_closing._queued) == (0, 0, {})


def test_stored_reset_loaded(linker: KVMemLinker, pool: Any) -> None:
    kept = rows(pool, [1, 5, 3])
    assert linker.offload([transfer("abc", [1, 5, 3])], session_id="s")
    assert completed(linker, 1) == [True]
    linker.reset()
    for buffer in [*pool.k_buffer, *pool.v_buffer]:
        buffer.fill_(777)
    assert linker.lookup("r", [transfer("abcd")]) == [1, 2, 3]
    assert linker.load("r", [transfer("abc", [7, 2, 9])])
    assert linker._staged == 3 * linker._pages[PoolName.KV].page_bytes
    assert run_load(linker)
    assert torch.equal(rows(pool, [7, 2, 9]), kept)
    others = [page for page in range(17) if page not in (7, 2, 9)]
    assert (rows(pool, others) == 777).all()
    assert linker._staged == 0 and linker.start_layer_wise_loading() == -1


def test_layers_come_one_after_the_other(linker: KVMemLinker, pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = rows(pool, [1])
    linker.offload([transfer("a", [1])])
    completed(linker, 1)
    gate, copied = threading.Event(), linker._pages[PoolName.KV].scatter

    def slow(layer: int, *rest: Any) -> None:
        if layer == 1:
            assert gate.wait(20)
        copied(layer, *rest)

    monkeypatch.setattr(linker._pages[PoolName.KV], "scatter", slow)
    assert linker.load("r", [transfer("a", [2])])
    index = linker.start_layer_wise_loading()
    linker.layer_done_counter.set_consumer(index)
    linker.layer_done_counter.wait_until(0)
    assert torch.equal(rows(pool, [2])[[0, LAYERS]], kept[[0, LAYERS]])
    assert not torch.equal(rows(pool, [2]), kept)
    assert not linker.layer_done_counter.futures[index][1].done()
    gate.set()
    assert linker.finish_layer_wise_loading(index)
    assert torch.equal(rows(pool, [2]), kept)


def test_cancelled(linker: KVMemLinker, pool: Any) -> None:
    linker.offload([transfer("a", [1])])
    completed(linker, 1)
    assert linker.load("r", [transfer("a", [2])])
    assert not linker.load("r", [transfer("a", [3])]), "queued already"
    assert linker.cancel_queued_load("r") and not linker.cancel_queued_load("r")
    assert linker.start_layer_wise_loading() == -1 and linker._staged == 0


def fail(tier: DictTier, stage: str) -> threading.Event:  # noqa: F811
    """Let one stage fail. Return what lets a tier go on that waits."""
    call, _, kind = stage.partition(" ")
    gate = threading.Event()

    def fault(called: str, keys: Any) -> Result | None:
        if called != call:
            return None
        if kind == "raises":
            raise OSError("the disk is gone")
        if kind == "hangs":
            gate.wait(20)
        return Result(Status.FAILED, 0, "no")

    if kind == "damaged":
        tier.damage(next(iter(tier.held)))
    elif kind == "gone":
        tier.fault = lambda called, keys: Result(Status.MISS, 0, "evicted") if called == "get" else None
    else:
        tier.fault = fault
    return gate


@pytest.mark.parametrize("stage", ["get raises", "get fails", "get hangs", "get damaged", "get gone", "contains hangs"])
def test_a_load_that_fails_is_computed(linker: KVMemLinker, pool: Any, tier: DictTier, stage: str) -> None:  # noqa: F811
    linker.offload([transfer("ab", [1, 2])])
    completed(linker, 1)
    before, gate, start = rows(pool, range(16)), fail(tier, stage), time.monotonic()
    if stage == "contains hangs":
        assert linker.lookup("r", [transfer("ab")]) == []
    else:
        assert linker.lookup("r", [transfer("ab")]) == [1, 2]
        assert not linker.load("r", [transfer("ab", [3, 4])])
    if "hangs" in stage:  # a second one is refused at once, until the tier has answered
        assert not linker.load("q", [transfer("ab", [3, 4])]) or stage == "contains hangs"
        linker.cancel_queued_load("q")
    assert time.monotonic() - start < 10, "bounded by the deadline, whatever the machine's load"
    assert torch.equal(rows(pool, range(16)), before), "no byte of the device has changed"
    assert linker._staged == 0 and linker.start_layer_wise_loading() == -1
    gate.set()
    tier.fault = lambda call, keys: None
    assert linker.offload([transfer("ab", [1, 2])]) and completed(linker, 1) == [True]
    if stage != "get damaged":
        assert answers_again(linker)


def answers_again(linker: KVMemLinker) -> bool:
    until = time.monotonic() + 20
    while not linker.load("again", [transfer("ab", [5, 6])]):
        assert time.monotonic() < until
        time.sleep(0.01)
    return run_load(linker)


@pytest.mark.parametrize("stage", ["put raises", "put fails", "put hangs", "contains raises"])
def test_an_offload_that_fails_is_completed(linker: KVMemLinker, tier: DictTier, stage: str) -> None:  # noqa: F811
    gate = fail(tier, stage)
    assert linker.offload([transfer("ab", [1, 2])]) and linker.offload([transfer("cd", [3, 4])])
    assert completed(linker, 2) == [False, False]
    gate.set()
    tier.fault = lambda call, keys: None
    assert linker.lookup("r", [transfer("ab")]) in ([], [1, 2]), "a late put may have arrived, whole"
    assert linker._waiting == 0


def test_a_copy_that_fails_is_told(linker: KVMemLinker, monkeypatch: pytest.MonkeyPatch) -> None:
    linker.offload([transfer("a", [1])])
    completed(linker, 1)

    def broken(layer: int, *_: Any) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(linker._pages[PoolName.KV], "scatter", broken)
    assert linker.load("r", [transfer("a", [2])])
    assert not run_load(linker), "SGLang then aborts the request"
    assert linker._staged == 0


def test_reset_in_the_middle(linker: KVMemLinker, tier: DictTier) -> None:  # noqa: F811
    gate, began = threading.Event(), threading.Event()

    def wait(call: str, keys: Any) -> None:
        if call == "put":
            began.set()
            gate.wait(20)

    tier.fault = wait
    for name in "abc":
        linker.offload([transfer(name, [1])])
    assert began.wait(20)
    linker.reset()
    assert linker.num_completed_offloads() == 0 and linker._waiting == 0
    assert tier.calls.count("put") == 1, "what was queued behind is given up"
    gate.set()


def test_close_in_the_middle(pool: Any, tier: DictTier, context: Any) -> None:  # noqa: F811
    linker, gate = open_linker(pool), threading.Event()
    tier.fault = lambda call, keys: gate.wait(20) and None if call == "put" else None
    linker.offload([transfer("a", [1])])
    linker.close()
    linker.close()
    assert tier.closed and linker.lookup("r", [transfer("a")]) == []
    assert not linker.load("r", [transfer("a", [1])]) and not linker.offload([transfer("a", [1])])
    gate.set()


def test_staging_bounds_what_is_promised(pool: Any, tier: DictTier, context: Any) -> None:  # noqa: F811
    page_bytes = 2 * LAYERS * PAGE * HEADS * WIDTH * 4
    linker = open_linker(pool, staging=3 * page_bytes)
    assert linker.offload([transfer("abcde", range(5))]), "one that is larger than the bound goes alone"
    assert completed(linker, 1) == [True]
    assert linker.lookup("r", [transfer("abcde")]) == [1, 2, 3]
    assert not linker.load("r", [transfer("abcd", range(4))])
    assert linker.load("r", [transfer("ab", [1, 2])])
    assert linker.lookup("q", [transfer("abcde")]) == [1]
    linker.close()


def test_offloads_that_wait_are_bounded(pool: Any, tier: DictTier, context: Any) -> None:  # noqa: F811
    """What a slow tier cannot keep up with is completed as not stored, in its turn."""
    linker = open_linker(pool, staging=2 * 2 * LAYERS * PAGE * HEADS * WIDTH * 4, deadline_seconds=20)
    gate, began = threading.Event(), threading.Event()

    def wait(call: str, keys: Any) -> None:
        if call == "put":
            began.set()
            gate.wait(20)

    tier.fault = wait
    assert linker.offload([transfer("a", [1])]) and began.wait(20)
    assert linker.offload([transfer("b", [2])]) and linker.offload([transfer("c", [3])])
    gate.set()
    assert completed(linker, 3) == [True, True, False]
    linker.close()


def test_ranks_refuse_together(linker: KVMemLinker, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank misses a page: none loads, so that all compute."""
    linker.offload([transfer("a", [1])])
    completed(linker, 1)
    asked = []

    def reduce(verdict: torch.Tensor, op: Any, group: Any) -> None:
        asked.append((int(verdict), group))
        verdict.fill_(0)

    monkeypatch.setattr(linker, "_groups", [None, "attention"])
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
    assert not linker.load("r", [transfer("a", [2])])
    assert not linker.load("r", [transfer("b", [2])])
    assert asked == [(1, "attention"), (0, "attention")] and linker._staged == 0


def test_random_worlds(linker: KVMemLinker, pool: Any, tier: DictTier, seed: int) -> None:  # noqa: F811
    """Offloads, loads, faults, evictions, cancels and resets against a dict of what each page was stored with."""
    rng = random.Random(seed)
    model: dict[str, torch.Tensor] = {}
    for step in range(300):
        names = [f"p{n}" for n in range(rng.randrange(6), 6)] or ["p0"]
        pages = rng.sample(range(16), len(names))
        match rng.randrange(6):
            case 0 | 1:
                for name, page in zip(names, pages, strict=True):  # content follows from the name, as in SGLang
                    for i, buffer in enumerate([*pool.k_buffer, *pool.v_buffer]):
                        buffer[page * PAGE : (page + 1) * PAGE] = hash((name, i)) % 1009
                model |= {name: rows(pool, [page]) for name, page in zip(names, pages, strict=True)}
                broken = rng.random() < 0.2
                tier.fault = lambda call, keys, broken=broken: (
                    Result(Status.FULL, 0, "full") if broken and call == "put" else None
                )
                assert linker.offload([transfer(names, pages)])
                assert completed(linker, 1) == [
                    not broken or all(key in tier.held for key in linker._keys.of("kv", names))
                ]
                tier.fault = lambda call, keys: None
            case 2 if tier.held:
                key = rng.choice(list(tier.held))
                rng.choice([tier.damage, tier.held.pop])(key)
            case 3:
                linker.reset()
            case _:
                lengths = linker.lookup(str(step), [transfer(names)])
                assert lengths == list(range(1, len(lengths) + 1))
                if lengths and linker.load(str(step), [transfer(names[: lengths[-1]], pages[: lengths[-1]])]):
                    if rng.random() < 0.2:
                        assert linker.cancel_queued_load(str(step))
                    else:
                        assert run_load(linker)
                        for name, page in zip(names[: lengths[-1]], pages, strict=False):
                            assert torch.equal(rows(pool, [page]), model[name]), (seed, step)
        assert linker._staged == 0 and linker._waiting == 0
