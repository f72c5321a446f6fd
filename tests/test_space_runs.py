"""Records that continue each other are one driver call, and memory is as if each had been executed by itself."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from support_world import PAGE, World, checked, plain_spec, seed_from_environment

import kvmem
from kvmem import _core

pytestmark = pytest.mark.core

#: 64 bytes a token and layer, each of two layers in an arena of its own.
BLOCK, ARENAS = 1024, 2


def make(**options: object) -> tuple[World, _core.CheckedDriver]:
    driver = checked()
    sizes = {"memory": 64 * PAGE, "page_bytes": PAGE, "interleave": 1, "max_sequences": 8, "max_tokens": 1024}
    alloc = kvmem.Allocator(plain_spec(), driver=driver, **sizes | options)  # type: ignore[arg-type]
    return World(alloc), driver


def started(world: World, n: int) -> int:
    assert world.run(world.open())
    handle = max(world.sequences)
    assert world.run(world.extend(handle, n)) and world.run(world.commit(handle, n, [0]))
    return handle


def test_blocks_that_follow_each_other_are_zeroed_at_once() -> None:
    """Of each block the arenas alternate in the records; the driver zeroes each arena once."""
    world, driver = make(backend="paged", zero="always", record_ops=True)
    for _ in range(2):  # from new pages, and from those the first sequence has left
        world.alloc.take_ops()
        before = driver.counters()
        handle = world.alloc.core.open()
        world.alloc.core.extend(handle, 8 * 16, -1)
        zeroes = [op for op in world.alloc.take_ops() if op[0] == "zero"]
        assert len(zeroes) == 8 * ARENAS and [op[1] for op in zeroes[:4]] == [0, 1, 0, 1]
        assert driver.counters().zero - before.zero == ARENAS
        k = world.alloc.sequence_tensor(handle, 0, "k")
        assert k.shape[0] == 128 and not k.any()
        world.alloc.kv(0)[0][world.alloc.batch([handle]).block_table[0].long()] = 7.0
        world.alloc.free_batch(np.array([handle], np.int32))


@pytest.mark.parametrize("backend", ["virtual", "paged"])
def test_zeroing_does_not_cut_a_run_of_maps(backend: str) -> None:
    """A neighbour's pages, one here and one there, become one stretch of addresses: one set_access, one call to zero it.
    The books of a device that is not there count the same calls."""
    calls, pages = [], 32 if backend == "virtual" else 36  # the trash blocks have their place
    for driver in (checked(), None):
        device = "meta" if driver is None else "cpu"
        pool = kvmem.PagePool(device=device, memory=pages * PAGE, page_bytes=PAGE, driver=driver)
        mine, other = (
            kvmem.Allocator(plain_spec(), backend=backend, pool=pool, interleave=1, max_sequences=20, max_tokens=1024)
            for _ in range(2)
        )
        seq, theirs = mine.sequence(), []
        for _ in range(8):  # 64 tokens fill a page of each arena
            seq.extend(64)
            theirs.append(other.sequence())
            theirs[-1].extend(64)
        for neighbour in theirs:
            neighbour.free()
        before, counted = driver.counters() if driver else None, mine.stats().driver_calls
        seq.extend(6 * 64)
        calls.append(mine.stats().driver_calls - counted)
        assert mine.check() == []
        if driver is not None and before is not None:
            after = driver.counters()
            assert after.map - before.map == 6 * ARENAS
            assert (after.set_access - before.set_access, after.zero - before.zero) == (ARENAS, ARENAS)
            assert not mine.sequence_tensor(seq, 0, "k")[-6 * 64 :].any()
    assert calls[0] == calls[1]


def test_any_order_of_zeroes_and_copies() -> None:
    """Random lists, executed by the allocator in as few calls as it likes, against numpy, one record after the other."""
    rng = random.Random(seed_from_environment(5))
    world, driver = make(backend="paged", interleave="all", prefix_cache=False)
    handle = started(world, 1024)
    alloc, size = world.alloc, 8 * PAGE
    memory = alloc._arena(0, 0).numpy()[2 * 2 * BLOCK :]  # behind the trash blocks, which are not there
    first, made, executed, fence = 2 * 2 * BLOCK, 0, 0, 0
    for _ in range(150):
        memory[:size] = np.random.default_rng(rng.randrange(1 << 30)).integers(0, 256, size, np.uint8)
        expected, ops, cursor = memory[:size].copy(), [], (0, 0)
        for _ in range(rng.randint(1, 12)):
            kind, n = rng.random(), rng.choice([1, 16, 64, 1000])
            to, source = (rng.randrange(size - n) for _ in range(2)) if rng.random() < 0.4 else cursor
            if max(to, source) + n > size:
                continue
            if kind < 0.45:
                ops.append(("zero", 0, first + to, n, 0, 0))
                expected[to : to + n] = 0
            elif kind < 0.9 and abs(to - source) >= n:
                ops.append(("copy", 0, first + to, first + source, n, 0))
                expected[to : to + n] = expected[source : source + n]
            elif kind >= 0.9:
                fence += 1
                ops.append(("fence", 0, fence, 0, 0, 0))
            cursor = (to + n, source + n)
        before = driver.counters()
        alloc.apply(ops)
        after = driver.counters()
        assert np.array_equal(memory[:size], expected), ops
        made += sum(op[0] in ("zero", "copy") for op in ops)
        executed += after.zero + after.copy - before.zero - before.copy
    assert executed < 0.9 * made, "nothing was joined: the test asks too little"
    assert handle in world.sequences


def test_a_copy_does_not_read_what_it_writes() -> None:
    """Blocks moved up by one, from the first on: joined, the copy would overlap itself."""
    world, driver = make(backend="paged", interleave="all", prefix_cache=False)
    started(world, 1024)
    memory = world.alloc._arena(0, 0).numpy()
    block = 2 * BLOCK
    memory[2 * block : 12 * block] = np.repeat(np.arange(10, dtype=np.uint8), block)
    before = driver.counters().copy
    world.alloc.apply([("copy", 0, (5 + i) * block, (3 + i) * block, block, 0) for i in range(6)])
    assert memory[2 * block : 12 * block : block].tolist() == [0, 1, 2, 1, 2, 1, 2, 1, 2, 9]
    assert driver.counters().copy - before == 3  # two at a time do not meet
    assert torch.equal(torch.from_numpy(memory[5 * block : 6 * block]), torch.full((block,), 1, dtype=torch.uint8))
