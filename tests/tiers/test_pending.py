"""Sequences that wait for a load: what may be done with them meanwhile, and what becomes of them."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence

import pytest
import torch
from tier_world import SPECS, DictTier, World, make, prompts

import kvmem
from kvmem import NotReady, SchedulerCache, SpecError, StaleHandle
from kvmem.allocator.tiers.loads import wait_until
from kvmem.tiers import Result
from kvmem.tiers.base import Buffer

pytestmark = pytest.mark.core

TEXT = [7 * i % 50 for i in range(50)]
WHOLE = 48  # tokens of its whole blocks, of which one token at least is left to compute


class Gate(threading.Event):
    """Open at first. A test that fails while it is shut must still end: closing an allocator waits for its tier."""

    def __init__(self) -> None:
        super().__init__()
        self.set()

    def pass_through(self) -> None:
        if not self.wait(30):
            self.set()
            raise AssertionError("nobody opened the gate")


class SlowTier(DictTier):
    """Answers when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = Gate()

    def get(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        self.go_on.pass_through()
        return super().get(keys, buffers)


@pytest.fixture
def tier() -> SlowTier:
    return SlowTier()


@pytest.fixture
def alloc(backend: str, tier: SlowTier) -> kvmem.Allocator:
    """Only the tier has the blocks of TEXT."""
    alloc = make("full", backend, host_blocks=20, lower=[tier])
    World(alloc).run(TEXT)
    assert alloc.store(TEXT) == 12 and alloc.flush(60)
    alloc.clear_cache()
    assert alloc.match(TEXT).by_tier == {"device": 0, "host": 0}
    tier.go_on.clear()
    return alloc


def test_no_call_but_free_takes_a_pending_sequence(alloc: kvmem.Allocator, tier: SlowTier) -> None:
    seq, other = alloc.sequence(TEXT, load="all", label="waits"), alloc.sequence()
    batch = alloc.make_batch(max_new_tokens=4)
    assert seq.pending and not other.pending and not alloc.core.is_live(seq.id)
    assert alloc.ready([seq, other]) == [other.id] and alloc.ready() == []
    for call in (
        lambda: seq.extend(1),
        lambda: seq.commit([1]),
        lambda: seq.step(1),
        lambda: seq.truncate(0),
        lambda: seq.num_tokens,
        seq.fork,
        seq.pin,
        lambda: alloc.batch([other, seq]),
        lambda: alloc.extend_batch([other, seq], [1, 1]),
        lambda: alloc.fill([seq], batch),
    ):
        with pytest.raises(NotReady, match=f"handle {seq.id} is pending: .* ready"):
            call()  # type: ignore[no-untyped-call]
    assert [live.id for live in alloc.sequences()] == [other.id]
    assert alloc.check() == [] and other.num_tokens == 0
    tier.go_on.set()
    assert seq.wait(60) and not seq.pending and alloc.ready([seq]) == [seq.id]
    assert seq.num_cached_tokens == WHOLE and seq.num_tokens == WHOLE
    World(alloc).check(seq, TEXT)
    World(alloc).go_on(seq, TEXT)


def test_a_pending_sequence_can_be_freed(alloc: kvmem.Allocator, tier: SlowTier) -> None:
    with alloc.sequence(TEXT, load="all") as seq:
        assert seq.pending
    with pytest.raises(StaleHandle):
        seq.free()
    second = alloc.sequence(TEXT, load="all")
    alloc.free_batch([second.id])
    tier.go_on.set()
    assert second.wait(60) and second.id not in [live.id for live in alloc.sequences()]
    while alloc.ready([seq]) == []:
        pass
    assert alloc.ready() == [] and alloc.check() == []
    assert World(alloc).run(TEXT) == WHOLE  # what arrived for nobody is cached all the same


def test_ready_moves_what_has_arrived(alloc: kvmem.Allocator, tier: SlowTier) -> None:
    seqs = [alloc.sequence(TEXT[:n], load="all") for n in (50, 21)]
    assert alloc.ready() == []
    tier.go_on.set()
    waiting = {seq.id for seq in seqs}
    while waiting:
        waiting -= set(alloc.ready())
    for seq, n in zip(seqs, (48, 20), strict=True):
        assert seq.num_cached_tokens == n
        World(alloc).check(seq, TEXT)


def test_close_does_not_wait_for_ever(alloc: kvmem.Allocator, tier: SlowTier) -> None:
    alloc.sequence(TEXT, load="all")
    tier.go_on.set()
    alloc.close()
    assert alloc.closed


def test_prefetch_to_host_and_to_the_device(alloc: kvmem.Allocator, tier: SlowTier) -> None:
    load = alloc.prefetch(TEXT, to="host")
    assert not load.done() and not load.wait(0.01)
    tier.go_on.set()
    assert load.wait(60) and load.num_reached == 12 and load.reason == ""
    assert alloc.match(TEXT).by_tier == {"device": 0, "host": WHOLE}
    load = alloc.prefetch(TEXT)
    assert load.wait(60) and alloc.match(TEXT).by_tier == {"device": WHOLE, "host": 0}
    unknown = alloc.prefetch([1, 2, 3, 4, 5, 6, 7, 8])
    assert unknown.wait(60) and unknown.num_reached == 0 and unknown.reason == "no tier has block 0"


def test_a_load_can_be_cancelled(alloc: kvmem.Allocator, tier: SlowTier) -> None:
    load = alloc.prefetch(TEXT)
    load.cancel()
    tier.go_on.set()
    assert load.wait(60) and load.num_reached == 0
    assert World(alloc).run(TEXT, load="all") == WHOLE and alloc.check() == []


def test_a_scheduler_sees_its_loads(alloc: kvmem.Allocator, tier: SlowTier) -> None:
    cache = SchedulerCache(alloc)
    assert cache.matched_tokens(TEXT) == 0
    load = cache.load(TEXT)
    assert load is not None and not load.done()
    tier.go_on.set()
    assert load.wait(60)
    assert cache.matched_tokens(TEXT) == WHOLE and cache.load(TEXT) is None
    assert cache.allocate("a", tokens=TEXT) is not None and cache.num_cached_tokens("a") == WHOLE
    World(alloc).check(cache.sequence("a"), TEXT[:WHOLE])


def test_without_tiers_these_calls_are_refused(backend: str) -> None:
    alloc = kvmem.Allocator(
        kvmem.CacheSpec.kv(num_layers=1, num_kv_heads=1, head_dim=8, dtype=torch.float16, block_size=4), backend=backend, device="cpu",
        memory="1MiB", max_sequences=2, max_tokens=64,
    )  # fmt: skip
    for call in (lambda: alloc.prefetch([1]), lambda: alloc.store([1]), alloc.flush):
        with pytest.raises(SpecError, match=r"no tiers: make it with tiers=Tiers\(host=\.\.\.\)"):
            call()
    assert alloc.sequence([1, 2, 3], load="all").num_cached_tokens == 0 and alloc.ready() == []


def test_match_asks_lower_tiers_when_it_is_told_to(alloc: kvmem.Allocator, tier: SlowTier) -> None:
    """And tells what no tier has, also of a tier that raises."""
    assert alloc.match(TEXT).by_tier == {"device": 0, "host": 0}
    found = alloc.match(TEXT, load="all")
    assert (found.num_tokens, found.by_tier) == (WHOLE, {"device": 0, "host": 0, "dict": WHOLE})
    assert (found.reason, found.missing) == ("shorter than a block", "")
    tier.go_on.set()
    World(alloc).run(TEXT[:20])  # the device has four blocks, and what follows is below
    found = alloc.match(TEXT, load="all")
    assert found.num_tokens == WHOLE and sum(found.by_tier.values()) == WHOLE and found.by_tier["device"] >= 16
    more = alloc.match([*TEXT[:WHOLE], *range(10)], load="all")
    assert (more.num_tokens, more.missing) == (WHOLE, "no tier has block 12")
    assert alloc.match(TEXT, salt="a", load="all").num_tokens == 0
    tier.contains = lambda keys: 1 // 0  # type: ignore[assignment]
    assert alloc.match([1, 2, 3, 4, 5], load="all").missing == "ZeroDivisionError: integer division or modulo by zero"
    with pytest.raises(SpecError, match="load: got 'device'"):
        alloc.match(TEXT, load="device")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(SPECS))
def test_match_says_what_a_load_then_finds(name: str, backend: str, rng: random.Random) -> None:
    tier = DictTier()
    with make(name, backend, host_blocks=6, lower=[tier]) as alloc:
        world, texts = World(alloc), prompts(rng, 12)
        for step in range(40):
            text = rng.choice(texts)
            assert alloc.flush(60)
            found = alloc.match(text, load="all")
            assert sum(found.by_tier.values()) == found.num_tokens
            # Host memory may be too small for a load, and a partial block may match behind what it brings.
            assert world.run(text, load="all") < found.num_tokens + alloc.tiering.block_size, step
            if rng.random() < 0.3:
                for key in rng.sample(sorted(tier.data), len(tier.data) // 4):
                    del tier.data[key]


def test_one_write_at_a_time_while_a_load_is_under_way(backend: str) -> None:
    class Counting(SlowTier):
        def __init__(self) -> None:
            super().__init__()
            self.writing = self.most = 0
            self.write_on = Gate()

        def put(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
            with self._lock:
                self.writing += 1
                self.most = max(self.most, self.writing)
            self.write_on.pass_through()
            results = super().put(keys, buffers)
            with self._lock:
                self.writing -= 1
            return results

    tier = Counting()
    with make("full", backend, host_blocks=90, lower=[tier]) as alloc:
        world = World(alloc)
        world.run(TEXT)
        alloc.store(TEXT)
        assert alloc.flush(60)
        alloc.clear_cache()
        tier.go_on.clear()
        tier.write_on.clear()
        load = alloc.prefetch(TEXT, to="host")
        assert wait_until(lambda: bool(alloc.tiering.transfers._turns._loads), 60)
        tier.most = 0
        for first in range(100, 400, 100):
            world.run([first + i for i in range(20)], load="device")
            alloc.store([first + i for i in range(20)])
        assert wait_until(lambda: tier.writing > 0, 60)
        assert not alloc.flush(0.2)  # time for the others, if they did not wait
        tier.write_on.set()
        assert alloc.flush(60) and tier.most == 1  # one after the other, and the load is still under way
        tier.go_on.set()
        assert load.wait(60)
