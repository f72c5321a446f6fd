"""Records that continue each other are one driver call, and memory is as if each had been executed by itself."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator

import numpy as np
import pytest
from support_drivers import ROOT, build_library
from support_world import PAGE, World, checked, plain_spec

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


def test_blocks_that_follow_each_other_are_zeroed_at_once() -> None:
    """A run of blocks is one record an arena, and one call of the driver."""
    world, driver = make(backend="paged", zero="always", record_ops=True)
    for _ in range(2):  # from new pages, and from those the first sequence has left
        world.alloc.take_ops()
        before = driver.counters()
        handle = world.alloc.core.open()
        world.alloc.core.extend(handle, 8 * 16, -1)
        zeroes = [op for op in world.alloc.take_ops() if op[0] == "zero"]
        assert [op[1:] for op in zeroes] == [(arena, zeroes[0][2], 8 * BLOCK, 0, 0) for arena in range(ARENAS)]
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


KINDS = (
    "create",
    "destroy",
    "map",
    "unmap",
    "zero",
    "copy",
    "load",
    "store",
    "fence",
)  # in the order of OpKind (csrc/base/ops.h)


class Executor:
    """csrc/memory/space.* below all rules: an allocator would refuse lists of others that write where tokens live."""

    def __init__(self, library: ctypes.CDLL, pages: int) -> None:
        self.library, self.space = library, ctypes.c_void_p(library.space_open(PAGE, pages))
        bytes_of = (ctypes.c_uint8 * (pages * PAGE)).from_address(library.space_memory(self.space))
        self.memory = np.frombuffer(bytes_of, np.uint8)

    def execute(self, ops: list[tuple[str, int, int, int, int, int]]) -> None:
        numbers = np.array([(KINDS.index(kind), *rest) for kind, *rest in ops], np.int64)
        error = self.library.space_execute(self.space, ctypes.c_void_p(numbers.ctypes.data), len(ops))
        assert error == b"", (error, ops)

    def calls(self, verb: str) -> int:
        return int(self.library.space_calls(self.space, verb.encode()))


@pytest.fixture(scope="module")
def space_library() -> ctypes.CDLL:
    csrc = ROOT / "csrc"
    names = ("memory/space", "memory/fences", "driver/driver", "driver/checked_driver", "driver/host/host_driver",
             "driver/host/host_file", "driver/host/host_limits", "base/fork_guard")  # fmt: skip
    sources = [ROOT / "tests/native/space_executor.cpp", *(csrc / f"{name}.cpp" for name in names)]
    library = ctypes.CDLL(str(build_library("libspace_executor", sources, sorted(csrc.rglob("*.h")))))
    library.space_open.restype = library.space_memory.restype = ctypes.c_void_p
    library.space_execute.restype = ctypes.c_char_p
    library.space_calls.restype = ctypes.c_longlong
    return library


@pytest.fixture
def executor(space_library: ctypes.CDLL) -> Iterator[Executor]:
    made = Executor(space_library, 8)
    yield made
    space_library.space_close(made.space)


def test_any_order_of_zeroes_and_copies(executor: Executor, rng: random.Random) -> None:
    """Random lists, executed in as few calls as it likes, against numpy, one record after the other."""
    memory, size = executor.memory, 8 * PAGE
    made, executed, fence = 0, 0, 0
    for _ in range(150):
        memory[:] = np.random.default_rng(rng.randrange(1 << 30)).integers(0, 256, size, np.uint8)
        expected, ops, cursor = memory.copy(), [], (0, 0)
        for _ in range(rng.randint(1, 12)):
            kind, n = rng.random(), rng.choice([1, 16, 64, 1000])
            to, source = (rng.randrange(size - n) for _ in range(2)) if rng.random() < 0.4 else cursor
            if max(to, source) + n > size:
                continue
            if kind < 0.45:
                ops.append(("zero", 0, to, n, 0, 0))
                expected[to : to + n] = 0
            elif kind < 0.9 and abs(to - source) >= n:
                ops.append(("copy", 0, to, source, n, 0))
                expected[to : to + n] = expected[source : source + n]
            elif kind >= 0.9:
                fence += 1
                ops.append(("fence", 0, fence, 0, 0, 0))
            cursor = (to + n, source + n)
        before = executor.calls("zero") + executor.calls("copy")
        executor.execute(ops)
        assert np.array_equal(memory, expected), ops
        made += sum(op[0] in ("zero", "copy") for op in ops)
        executed += executor.calls("zero") + executor.calls("copy") - before
    assert executed < 0.9 * made, "nothing was joined: the test asks too little"


def test_a_copy_does_not_read_what_it_writes(executor: Executor) -> None:
    """Blocks moved up by two: joined further than that, the copy would overlap itself."""
    memory, block = executor.memory, 2 * BLOCK
    memory[: 10 * block] = np.repeat(np.arange(10, dtype=np.uint8), block)
    executor.execute([("copy", 0, (3 + i) * block, (1 + i) * block, block, 0) for i in range(6)])
    assert memory[: 10 * block].tolist() == np.repeat([0, 1, 2, 1, 2, 1, 2, 1, 2, 9], block).tolist()
    assert executor.calls("copy") == 3  # two at a time do not meet
