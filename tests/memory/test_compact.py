"""compact(): blocks move out of the emptiest pages, what anybody reads stays what it was, and the pages can be had.

64 bytes a token and layer, blocks of 16 tokens, two layers in an arena each: a page of 4,096 bytes holds four blocks,
and pages come in pairs. Random programs compact too: ``prefix_walk``, ``conformance.step`` and ``World.choose``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lockstep_prefix import PrefixLockstep
from support_world import PAGE, World, checked, plain_spec

import kvmem
from kvmem import _core
from kvmem.kernels import blocks

pytestmark = pytest.mark.core

PAIR, ARENAS = 2 * PAGE, 2
SIZES = {"interleave": 1, "max_sequences": 32, "max_tokens": 256}
#: Live blocks in each page once ``scatter`` is done; the first page starts with the two trash blocks.
KEPT = (2, 1, 2, 3, 4, 1)


def make(backend: str = "paged", **options: object) -> tuple[World, _core.CheckedDriver]:
    driver = checked()
    if "pool" not in options:
        options = {"memory": 64 * PAGE, "page_bytes": PAGE, "driver": driver} | options
    return World(kvmem.Allocator(plain_spec(), backend=backend, **SIZES | options)), driver  # type: ignore[arg-type]


def scatter(world: World) -> None:
    """Sequences of one block each, in KEPT[i] blocks of page i."""
    pages = [[world.start(16) for _ in range(2 if page == 0 else 4)] for page in range(len(KEPT))]
    gone = [handle for page, kept in zip(pages, KEPT, strict=True) for handle in page[kept:]]
    assert world.run(world.free(gone))
    world.alloc.trim()


def table(alloc: kvmem.Allocator, handles: list[int]) -> list[list[int]]:
    return alloc.batch(np.array(handles, np.int32)).block_table.tolist()


def test_what_is_made_free_is_there_by_every_count() -> None:
    """By the ledger, by the driver's, and by what the file behind the memory really holds."""
    world, driver = make()
    scatter(world)
    alloc, before = world.alloc, world.alloc.stats()
    assert before.mapped_bytes == before.physical_bytes == len(KEPT) * PAIR and before.parked_bytes == 0
    made = driver.counters()
    assert alloc.compact() == 2 * PAIR, "13 blocks and two trash blocks fill four pages"
    after, now = alloc.stats(), driver.counters()
    assert after.parked_bytes == 2 * PAIR and after.mapped_bytes == before.mapped_bytes
    assert (after.used_bytes, after.wasted_bytes) == (before.used_bytes, before.wasted_bytes - 2 * PAIR)
    assert (now.map, now.unmap, now.create, now.wait) == (made.map, made.unmap, made.create, made.wait)
    assert now.copy - made.copy == 2 * ARENAS and now.record - made.record == 1, "the two pages with one block"
    world.healthy()
    assert alloc.trim() == 2 * PAIR
    left = alloc.stats()
    assert left.physical_bytes == left.mapped_bytes == driver.live().pages * PAGE == 4 * PAIR
    assert alloc.compact() == 0
    world.healthy()


def test_only_as_much_as_is_asked_for_from_the_emptiest_page() -> None:
    world, driver = make()
    scatter(world)
    handles = sorted(world.sequences)
    before, made = table(world.alloc, handles), driver.counters()
    assert world.alloc.compact(0) == 0 and table(world.alloc, handles) == before
    assert world.alloc.compact("1KiB") == PAIR
    after = table(world.alloc, handles)
    moved = [i for i, (one, other) in enumerate(zip(before, after, strict=True)) if one != other]
    assert [before[i] for i in moved] == [[20]], "the last of the pages that hold one block"
    assert [after[i] for i in moved] == [[15]], "to the first room in the fullest page that has any"
    assert driver.counters().copy - made.copy == ARENAS
    world.healthy()


def test_the_next_sequences_use_other_room_first() -> None:
    """Also room that was free in an emptied page before; so what was made free lasts."""
    world, _ = make()
    scatter(world)
    assert world.alloc.compact() == 2 * PAIR
    room = 4 * 4 - 2 - sum(KEPT)  # in the pages that stay
    assert room == 1
    world.start(16)
    assert world.alloc.stats().parked_bytes == 2 * PAIR
    world.start(16)
    assert world.alloc.stats().parked_bytes == PAIR
    world.healthy()


def test_blocks_that_go_together_are_copied_together() -> None:
    world, driver = make()
    handles = [world.start(16) for _ in range(10)]  # two beside the trash blocks, then two pages of four
    world.run(world.free([handles[4], handles[5], handles[8], handles[9]]))
    made = driver.counters()
    assert world.alloc.compact() == PAIR
    assert driver.counters().copy - made.copy == ARENAS
    world.healthy()


def test_shared_blocks_move_for_all_their_users() -> None:
    world, _ = make(debug=True)
    scatter(world)
    children = []
    for handle in sorted(world.sequences):
        world.run(world.fork(handle))
        children.append(max(world.sequences))
    shared = world.alloc.stats().shared_bytes
    assert shared == sum(KEPT) * ARENAS * 1024
    assert world.alloc.compact() == 2 * PAIR and world.alloc.stats().shared_bytes == shared
    assert world.alloc.check() == []
    parents = [handle for handle in sorted(world.sequences) if handle not in children]
    assert sorted(table(world.alloc, parents)) == sorted(table(world.alloc, children))
    for handle in sorted(world.sequences)[::2]:  # and each can go its own way
        world.grow(handle, 20)
    world.healthy()


def cached_pair(**options: object) -> PrefixLockstep:
    options = {"memory": 64 * PAGE, "page_bytes": PAGE, "record_ops": True, "debug": True} | options
    return PrefixLockstep(
        kvmem.Allocator(plain_spec(), backend="paged", device="cpu", **SIZES | options), plentiful=True  # type: ignore[arg-type]
    )  # fmt: skip


def test_cached_and_pinned_blocks_move_and_are_found_as_before() -> None:
    """In turns: a block in use, a cached one, a pinned one that nobody uses, and one that is forgotten."""
    pair = cached_pair()
    prompts = [[number] * 16 + [99] for number in range(30)]
    handles = []
    for prompt in prompts:
        handles.append(pair.open(prompt))
        pair.append(handles[-1], prompt[:16])
        if len(handles) % 4 == 3:
            pair.pin_tokens(prompt[:16])
    for number, handle in enumerate(handles):
        if number % 4 == 0:
            pair.truncate(handle, 0)  # forgets it
        if number % 4 != 1:
            pair.free([handle])
    before = pair.alloc.stats()
    assert before.cached_blocks == 7 and before.pinned_blocks == 7
    # Eight blocks in use, seven cached and seven pinned, in eight pages, one of which has the trash blocks.
    given = pair.compact()
    assert given >= PAIR and pair.alloc.compact() == 0
    pair.agree()
    pair.contents_agree()
    for number, prompt in enumerate(prompts):
        if number % 4:
            assert pair.match(prompt).num_tokens == 16
            reader = pair.open(prompt)
            pair.contents_agree()
            pair.free([reader])
    assert pair.alloc.stats().evicted_blocks == before.evicted_blocks
    for number in reversed(range(len(pair.pins))):
        pair.unpin(number)
    pair.clear_cache()
    pair.agree()


def test_what_sequences_hold_does_not_move_next_to_cached_blocks_alone() -> None:
    """Such a page can be had by forgetting; with a live block in it, it could not."""
    pair = cached_pair()
    handles = [pair.open([number] * 16 + [99]) for number in range(14)]
    for number, handle in enumerate(handles):
        pair.append(handle, [number] * 16)
    # Page 0: two in use. Page 1: three cached and room for one. Pages 2 and 3: one in use.
    pair.truncate(handles[10], 0)
    pair.append(handles[10], [77] * 16)  # in the room that it just left: the lowest there is
    pair.free(handles[2:5])
    for number in (5, 7, 8, 9, 11, 12, 13):
        pair.truncate(handles[number], 0)
    pair.free([handles[number] for number in (5, 7, 8, 9, 11, 12, 13)])
    before = pair.alloc.stats()
    assert pair.compact() == PAIR
    after = pair.alloc.stats()
    assert after.cached_blocks == before.cached_blocks == 3
    assert after.parked_bytes == before.parked_bytes, "and trim() has taken the page already"
    pair.contents_agree()


def test_nothing_to_gain_changes_nothing(backend: str) -> None:
    """Pages of the virtual backend belong to rows; and blocks of several pages each leave no room in any."""
    spec = kvmem.CacheSpec.kv(num_layers=2, num_kv_heads=1, head_dim=16, dtype=torch.float16, block_size=128)
    for each in (plain_spec(), spec)[: 1 if backend == "virtual" else 2]:
        driver = checked()
        alloc = kvmem.Allocator(
            each, backend=backend, memory=64 * PAGE, page_bytes=PAGE, driver=driver, record_ops=True, **SIZES
        )  # type: ignore[arg-type]
        if backend == "paged" and each is not spec:
            continue
        seqs = [alloc.sequence() for _ in range(6)]
        for seq in seqs:
            seq.extend(130 if each is spec else 16)
        for seq in seqs[::2]:
            seq.free()
        alloc.take_ops()
        before, made = alloc.stats(), driver.counters()
        assert alloc.compact() == 0
        assert alloc.take_ops() == [] and alloc.stats() == before
        assert (driver.counters().copy, driver.counters().record) == (made.copy, made.record)


def test_the_same_calls_move_the_same_blocks() -> None:
    records = []
    for _ in range(2):
        world, _ = make(record_ops=True)
        scatter(world)
        world.alloc.take_ops()
        world.alloc.compact()
        records.append(world.alloc.take_ops())
    assert records[0] == records[1] and {op[0] for op in records[0]} == {"version", "copy", "block", "fence"}


def test_a_replica_follows() -> None:
    """Its own sequences and, byte for byte, what the leader has cached, though it knows of no cache."""
    leader, _ = make(record_ops=True)
    follower, _ = make(prefix_cache=False)
    scatter(leader)
    a, b = leader.alloc, follower.alloc
    b.apply(a.take_ops())
    handles = np.array(sorted(leader.sequences), np.int32)
    for layer, name in [(0, "k"), (0, "v"), (1, "k"), (1, "v")]:
        for handle in handles:
            blocks.scatter(b, int(handle), layer, name, blocks.gather(a, int(handle), layer, name))
    before = table(a, handles)
    assert a.compact() == 2 * PAIR
    ops = a.take_ops()
    assert {op[0] for op in ops} == {"version", "copy", "block", "fence"}
    b.apply(ops)
    assert table(a, handles) == table(b, handles) != before
    assert b.check() == [] and b.stats().parked_bytes == a.stats().parked_bytes == 2 * PAIR
    for handle in handles:
        assert torch.equal(blocks.gather(a, int(handle), 1, "v"), blocks.gather(b, int(handle), 1, "v"))
    a.trim()
    b.apply(a.take_ops())
    leader.healthy()


@pytest.mark.parametrize("code", [2, 719])
def test_every_driver_call_fails_in_turn(code: int) -> None:
    """Invariant 5: tables, contents and what is free are as before, each time; then it succeeds."""
    world, driver = make(record_ops=True)
    scatter(world)
    world.alloc.take_ops()
    failed, verbs = 0, []
    while True:
        before, stats = world.observe(), world.alloc.stats()
        driver.fail("", failed + 1, code)
        try:
            world.alloc.compact()
            break
        except (kvmem.DeviceError, kvmem.OutOfMemory) as error:
            assert isinstance(error, kvmem.OutOfMemory) == (code == 2)
            verbs += [error.call] if isinstance(error, kvmem.DeviceError) else []
        failed += 1
        assert world.observe() == before and world.alloc.take_ops() == []
        assert world.alloc.stats().parked_bytes == stats.parked_bytes
        world.healthy()
    driver.clear_failures()
    assert failed == 2 * ARENAS + 1 and (code == 2 or verbs == ["copy"] * 4 + ["record"])
    assert world.alloc.stats().parked_bytes == 2 * PAIR
    world.healthy()
    for _ in range(4):
        world.start(30)
    world.healthy()


@pytest.mark.parametrize("code", [2, 719])
def test_giving_the_pages_away_fails_in_turn(code: int) -> None:
    """What has moved stays where it is now, whatever becomes of the pages that it left."""
    world, driver = make()
    scatter(world)
    assert world.alloc.compact() == 2 * PAIR
    before, nth = world.observe(), 0
    while True:
        nth += 1
        driver.fail("", nth, code)
        try:
            world.alloc.trim()
            break
        except (kvmem.DeviceError, kvmem.OutOfMemory):
            assert world.observe() == before
            world.healthy()
    driver.clear_failures()
    assert nth > 4 and world.alloc.stats().mapped_bytes == 4 * PAIR
    world.healthy()


def test_nothing_waits_until_the_pages_are_taken() -> None:
    """Invariant 4: the copies are still reading the pages that they empty."""
    world, driver = make()
    scatter(world)
    driver.hold_events(True)
    made, waits = driver.counters(), driver.held_waits()
    driver.clear_log()
    assert world.alloc.compact() == 2 * PAIR
    assert driver.held_waits() == waits and driver.counters().unmap == made.unmap
    verbs = [entry.verb for entry in driver.log()]
    assert verbs == ["copy"] * 4 + ["record"]
    fence = driver.log()[-1].id
    world.alloc.trim()
    log = driver.log()
    waited = next(i for i, entry in enumerate(log) if entry.verb == "wait" and entry.id == fence)
    unmapped = [i for i, entry in enumerate(log) if entry.verb == "unmap"]
    assert unmapped and min(unmapped) > waited and driver.held_waits() > waits
    driver.hold_events(False)
    world.healthy()


@pytest.mark.parametrize("shared", [False, True], ids=["own pool", "shared pool"])
def test_set_memory_refuses_and_names_the_way_out(shared: bool) -> None:
    pool = kvmem.PagePool(memory=64 * PAGE, page_bytes=PAGE, driver=checked()) if shared else None
    world, _ = make(**({"pool": pool} if shared else {}))
    scatter(world)
    before = world.observe()
    with pytest.raises(kvmem.OutOfMemory, match=r"12, which is the smallest .* or compact\(\)"):
        world.alloc.set_memory(4 * PAIR)
    assert world.observe() == before
    assert world.alloc.compact(2 * PAIR) == 2 * PAIR
    world.alloc.set_memory(4 * PAIR)
    assert world.alloc.stats().mapped_bytes == 4 * PAIR
    world.healthy()


def test_a_neighbour_gets_the_pages_only_when_the_owner_compacts() -> None:
    """Blocks never move behind their owner's back: it may have a batch in hand."""
    pool = kvmem.PagePool(memory=14 * PAGE, page_bytes=PAGE, driver=checked())
    world, _ = make(pool=pool)
    scatter(world)
    other = World(kvmem.Allocator(plain_spec(), backend="virtual", pool=pool, **SIZES))  # type: ignore[arg-type]
    other.start(64)
    handles = sorted(world.sequences)
    before = table(world.alloc, handles)
    with pytest.raises(kvmem.OutOfMemory):
        other.alloc.core.extend(min(other.sequences), 64, -1)
    with pytest.raises(kvmem.OutOfMemory):
        pool.set_memory(10 * PAGE)
    assert table(world.alloc, handles) == before
    assert world.alloc.compact() == 2 * PAIR
    other.start(128)
    world.healthy()
    other.healthy()


def test_a_batch_is_refilled_in_place() -> None:
    """What a captured graph reads: the same buffers, with the new ids in them."""
    world, _ = make()
    scatter(world)
    handles = np.array(sorted(world.sequences), np.int32)
    batch = world.alloc.make_batch(max_new_tokens=0, max_tokens=16)
    world.alloc.fill(handles, batch)
    address, before = batch.full("block_table").data_ptr(), batch.block_table.clone()
    cache = world.alloc.kv(1)[0]
    contents = cache[batch.block_table[:, 0].long()].clone()
    assert world.alloc.compact() > 0
    world.alloc.fill(handles, batch)
    assert batch.full("block_table").data_ptr() == address and not torch.equal(batch.block_table, before)
    assert world.alloc.kv(1)[0].data_ptr() == cache.data_ptr()
    assert torch.equal(cache[batch.block_table[:, 0].long()], contents)
