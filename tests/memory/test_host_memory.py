"""What memory an allocator on the CPU really takes, by the kernel's own numbers: the file's blocks, Pss, Rss, mappings."""

from __future__ import annotations

import gc
import re

import pytest
from support_drivers import assert_runs
from support_world import PAGE, World, plain_spec

import kvmem

TIB = 1 << 40
MIB = 1 << 20


def rollup(field: str) -> int:
    with open("/proc/self/smaps_rollup") as file:
        return int(re.search(rf"^{field}:\s+(\d+) kB", file.read(), re.M).group(1)) * 1024


def of_the_file(field: str) -> int:
    """Sum of a field over the mappings of our memory files."""
    total, ours = 0, False
    with open("/proc/self/smaps") as file:
        for line in file:
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                ours = "memfd:kvmem" in line
            elif ours and line.startswith(field + ":"):
                total += int(line.split()[1]) * 1024
    return total


def make(backend: str, memory: int | str = "64MiB", **options: object) -> kvmem.Allocator:
    sizes = dict(max_sequences=8, max_tokens=200_000, page_bytes=16 * PAGE, interleave=1)
    return kvmem.Allocator(plain_spec(), backend=backend, memory=memory, **(sizes | options))


def trash_bytes(backend: str) -> int:
    """The paged backend's trash blocks lie at the start of the first page of each layer, which stays."""
    return 2 * 16 * PAGE if backend == "paged" else 0


def test_physical_memory_follows_what_is_touched_and_trim_returns_it(backend: str) -> None:
    """Mapped is not touched: the file grows when tokens are written, never over what was created, and trim empties it."""
    alloc = make(backend)
    world = World(alloc)
    world.run(world.open())
    (handle,) = world.sequences
    assert alloc.stats().physical_bytes == 0
    world.run(world.extend(handle, 100_000))
    stats = alloc.stats()
    assert stats.physical_bytes == 0, "made room, wrote nothing"
    assert stats.created_bytes >= stats.used_bytes == 100_000 * 64 * 2
    for done in range(0, 100_000, 20_000):
        world.run(world.commit(handle, 20_000, [0]))
        stats = alloc.stats()
        written = (done + 20_000) * 64 * 2
        assert written <= stats.physical_bytes <= written + 4 * PAGE
        assert stats.physical_bytes <= stats.created_bytes <= stats.budget_bytes
    world.verify()
    world.run(world.truncate(handle, 10_000))
    before = alloc.stats()
    assert before.physical_bytes >= 100_000 * 64 * 2, "parked, ready for the next"
    given = alloc.trim()
    after = alloc.stats()
    assert given > 80_000 * 64 * 2 and before.created_bytes - after.created_bytes == given
    assert after.physical_bytes <= 10_000 * 64 * 2 + 2 * 16 * PAGE
    world.verify()
    world.run(world.free([handle]))
    alloc.trim()
    assert alloc.stats().physical_bytes == alloc.stats().created_bytes == trash_bytes(backend)


def test_forks_share_physical_memory(backend: str) -> None:
    """Seven forks of 20,000 tokens: the file holds them once. Virtual rows alias: Rss counts each, Pss the truth."""
    before = of_the_file("Rss")
    alloc = make(backend)
    world = World(alloc)
    world.run(world.open())
    (parent,) = world.sequences
    world.grow(parent, 20_000)
    once = alloc.stats().physical_bytes
    assert once >= 20_000 * 64 * 2
    for _ in range(7):
        world.run(world.fork(parent))
    world.healthy()  # reads every row, so that each is really in the page tables
    stats = alloc.stats()
    assert stats.physical_bytes <= once + 7 * 2 * 16 * PAGE, "one tail page a fork and layer"
    assert stats.used_bytes < 20_000 * 64 * 2 + 7 * 2 * 16 * PAGE
    resident, proportional = of_the_file("Rss") - before, of_the_file("Pss") - before
    assert proportional <= stats.physical_bytes + 64 * PAGE
    if backend == "virtual":
        assert resident > 6 * 20_000 * 64 * 2, "eight rows show the same pages"
    else:
        assert resident <= stats.physical_bytes + 64 * PAGE
    world.run(world.free(sorted(world.sequences)))
    alloc.trim()
    assert alloc.stats().physical_bytes == trash_bytes(backend) == of_the_file("Rss") - before


def test_a_tebibyte_of_rows_costs_nothing() -> None:
    pss = rollup("Pss")
    alloc = kvmem.Allocator(plain_spec(), memory="64MiB", max_sequences=256, max_tokens=100_000_000, interleave=1)
    stats = alloc.stats()
    assert stats.reserved_bytes > 2 * TIB and stats.created_bytes == stats.physical_bytes == 0
    assert rollup("Pss") - pss < 4 * MIB, "no books before rows are used"
    sequence = alloc.sequence()
    sequence.extend(1000)
    assert alloc.stats().created_bytes <= 8 * 65536 and alloc.check() == []


@pytest.mark.parametrize("interleave", ["all", "none"])
def test_host_memory_grows_with_what_is_in_use(backend: str, interleave: str) -> None:
    """Made for 10,000 sequences of a million tokens; the books of a sequence come when it is opened."""
    spec = kvmem.CacheSpec.kv(num_layers=8, num_kv_heads=1, head_dim=8, dtype="float16", block_size=16)
    before = rollup("Pss")
    alloc = kvmem.Allocator(
        spec, backend=backend, memory="256MiB", max_sequences=10_000, max_tokens=1_000_000, interleave=interleave
    )  # fmt: skip
    made = rollup("Pss") - before
    assert made < 16 * MIB
    sequences = [alloc.sequence() for _ in range(100)]
    for sequence in sequences:
        sequence.extend(100)
    assert rollup("Pss") - before - made < 8 * MIB
    assert alloc.check() == []
    for sequence in sequences:
        sequence.free()


def test_the_limit_of_mappings_is_out_of_memory_and_no_crash(backend: str) -> None:
    """Scattered 4 KiB pages use up the kernel's 65,530 mappings long before the memory. The step is refused like any other
    that has no room; what is there stays usable; and when something is freed, it goes on."""
    printed = assert_runs(
        f"""
import sys
sys.path.insert(0, "tests/support")
import numpy as np
from support_world import *
alloc = kvmem.Allocator(plain_spec(4), backend={backend!r}, memory="1GiB", page_bytes=PAGE, interleave=1, max_sequences=1024,
                        max_tokens=20_000)
world = World.__new__(World)
handles = alloc.open_batch(1024)
refused, first = None, 0
for round_number in range(300):
    for at in range(0, 1024, 64):     # rows in turn, so that no two of their pages lie together in the file
        part = np.ascontiguousarray(handles[at : at + 64])
        try:
            alloc.extend_batch(part, np.full(64, 64, np.int32))
            alloc.commit_batch(part, np.full(64, 64, np.int32))
        except kvmem.OutOfMemory as error:
            refused = error
            break
    if refused:
        break
maps = sum(1 for _ in open("/proc/self/maps"))
print("mappings", maps, "refused:", refused)
assert alloc.check() == []
lengths = np.empty(1024, np.int64); done = np.empty(1024, np.int64)
alloc.core.lengths(handles, 0, lengths, done)
assert lengths.max() >= 64
alloc.free_batch(np.ascontiguousarray(handles[:512]))
alloc.trim()
again = alloc.open_batch(8)
alloc.extend_batch(again, np.full(8, 640, np.int32))
assert alloc.check() == []
del alloc
""",
        timeout=120,
    )
    print(printed)
    if backend == "virtual":
        assert "refused: asked to extend" in printed


def test_an_allocator_that_goes_returns_everything(backend: str) -> None:
    gc.collect()  # or what other tests left would go meanwhile
    before = of_the_file("Rss")
    alloc = make(backend)
    world = World(alloc)
    world.run(world.open())
    (handle,) = world.sequences
    world.grow(handle, 50_000)
    assert of_the_file("Rss") - before >= 50_000 * 64 * 2
    world.__dict__.clear()
    del alloc
    assert of_the_file("Rss") == before
