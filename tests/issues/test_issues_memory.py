"""Issues that users of other systems reported about blocks, windows, allocation and matching, each as a test of kvmem.
``docs/peers_issues.md`` lists them."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from issue_world import case, words
from ops_rank import digest
from support import Steps
from support_world import PAGE, World, checked, plain_spec
from tier_world import MEMORY, MORE, SPECS, make
from tier_world import World as Prompts

import kvmem
from kvmem import CacheSpec, Component, Group

pytestmark = pytest.mark.core


@pytest.mark.parametrize("name", [*SPECS, *MORE])
@pytest.mark.parametrize("place", ["slots", "disk"])
def test_prompts_that_end_at_a_block_and_beside_it(
    place: str, name: str, backend: str, tmp_path: Path, rng: random.Random
) -> None:
    """vllm#51094: of a prompt of exactly N chunks N - 1 were restored with the state behind N, and the output was
    wrong. Here a match ends where every group, states too, has what belongs there."""
    with case(name, backend, place, tmp_path, memory=400 * PAGE) as here:
        size = here.alloc.tiering.block_size
        blocks = rng.randrange(1, 6)
        for length in (blocks * size - 1, blocks * size, blocks * size + 1):
            text = words(length, length)
            here.put_down(text)
            whole = (length - 1) // size * size  # one token is left to compute
            state_there = not here.fixed or length % size != 0  # its only snapshot is behind the last whole block
            assert here.run(text, load="all") == (whole if state_there else 0)
            here.put_down(text)
            assert here.run([*text, 7, 7], load="all") == length // size * size


@pytest.mark.parametrize("name", sorted(SPECS))
def test_a_sequence_that_has_the_pool_for_itself_commits(name: str, backend: str) -> None:
    """TensorRT-LLM#17926: eviction within a commit took the blocks of the sequence that committed, and crashed. Here
    nothing in use is a victim: the sequence grows to the last page, is refused there, and reads as it was written."""
    world = Prompts(make(name, backend, host_blocks=4, memory=8 * PAGE, max_tokens=200))
    text, seq = words(200), world.alloc.sequence()
    for n in range(0, 200, 2):
        try:
            seq.extend(2)
        except kvmem.OutOfMemory:
            break
        world.write(seq, text[: n + 2])
        seq.commit(text[n : n + 2])
        if world.fixed and (n + 2) % world.alloc.tiering.block_size == 0:
            with suppress(kvmem.OutOfMemory):
                seq.snapshot()
    windows_only = name == "windows only"  # its blocks leave the window, and serve again
    assert (seq.num_committed_tokens == 200) if windows_only else (8 < n < 199)
    world.check(seq, text)
    assert world.alloc.check() == []
    seq.free()
    world.run(words(12, 2))
    assert world.alloc.check() == []


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5])
def test_windows_smaller_than_a_block_in_one_slot(window: int, backend: str, tmp_path: Path) -> None:
    """TensorRT-LLM#15401: the least number of slots of a windowed pool underflowed, and it hung. Here windows of less
    than a block, host memory of one slot a group and a tier of one block serve every prompt."""
    kv = tuple(Component(n, heads=1, width=16, dtype=torch.float32) for n in "kv")
    spec = CacheSpec((Group("full", kv, (0,)), Group("window", kv, (1,), window_tokens=window)), block_size=4)
    for one in (spec, CacheSpec((Group("window", kv, (0,), window_tokens=window),), block_size=4)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(SPECS, "small", lambda one=one: one)
            with case("small", backend, "host", tmp_path, host_blocks=1, blocks=1, memory=24 * PAGE) as here:
                assert here.alloc.tiering.counts == [1] * len(one.groups)
                for n in range(5):
                    text = words(5 + 9 * n, n % 3)
                    here.run(text, load="all")
                    here.alloc.store(text)
                    here.leave_below()
                    here.run(text, load="all")


@pytest.mark.parametrize("name", ["full", "window", "state"])
def test_what_was_evicted_is_not_found(name: str, backend: str, tmp_path: Path, rng: random.Random) -> None:
    """kvcached#362: the hash of an evicted block still led to its page, which had other content. Here a match after an
    eviction is what is left; no more is found than memory holds, and every cached byte is right."""
    with case(name, backend, "slots", tmp_path, host_blocks=2, debug=True) as here:
        texts, found, loop = [words(25, n) for n in range(30)], 0, Steps(30)
        most = MEMORY[backend] // here.alloc.spec.bytes_per_token
        while loop.next(found > 0):
            text = rng.choice(texts[:3] if rng.random() < 0.4 else texts)
            told = here.alloc.match(text).num_tokens
            found += (cached := here.run(text, load="device"))
            assert cached <= told
            if name == "full":
                told = sum(here.alloc.match(one).by_tier["device"] for one in texts)
                assert told <= most < 30 * 24, "more is found than there is memory for"
        here.alloc.clear_cache()
        assert [here.alloc.match(text).num_tokens for text in texts] == [0] * 30


@pytest.mark.parametrize("code", [2, 719])
def test_an_allocation_that_fails_half_done_is_undone(code: int, backend: str) -> None:
    """kvcached#364: pages that an allocation had got before it failed stayed taken. Here each such call of the driver
    fails in turn, and all that can be seen, and every counted page, is as before."""
    driver, failed = checked(), 0
    world = World(kvmem.Allocator(
        plain_spec(), backend=backend, driver=driver, memory=64 * PAGE, page_bytes=PAGE, interleave=1, max_sequences=4,
        max_tokens=1024,
    ))  # fmt: skip
    handles = [world.start(60), world.start(10)]
    for nth in range(1, 100):
        before = world.observe()
        driver.fail("", nth, code)
        try:
            world.core.extend(handles[0], 500, -1)
        except kvmem.KVMemError as error:
            failed += 1
            assert isinstance(error, kvmem.OutOfMemory if code == 2 else kvmem.DeviceError)
            assert world.observe() == before
            driver.clear_failures()
            world.healthy()
            world.alloc.trim()
        else:
            assert driver.pending_failures(), "a driver's failure was swallowed"
            driver.clear_failures()
            break
    assert failed > 3
    world.alloc.free_batch(handles)
    world.alloc.trim()
    assert world.alloc.check() == [] and world.alloc.stats().used_bytes == 0


def follower(backend: str, driver: Any = None) -> kvmem.Allocator:
    options = {"record_ops": True} if driver is None else {"driver": driver}
    return kvmem.Allocator(
        plain_spec(), backend=backend, device="cpu", memory=64 * PAGE, page_bytes=PAGE, interleave=1, max_sequences=4,
        max_tokens=1024, **options,
    )  # fmt: skip


def test_a_map_that_fails_on_one_rank_is_an_error_there(backend: str) -> None:
    """kvcached#372: the failure of a map on one rank was swallowed, and its tables said that the memory was there.
    Here the list of ops fails as a whole on that rank, which changes nothing, and applies it once the device can."""
    driver, failed = checked(), 0
    leader, rank = follower(backend), follower(backend, driver)
    leader.sequence().extend(700)
    ops = leader.take_ops()
    before = digest(rank)
    for nth in range(1, 60):
        driver.fail("map", nth, 719)
        try:
            rank.apply(ops)
        except kvmem.DeviceError:
            failed += 1
            driver.clear_failures()
            assert digest(rank) == before and rank.check() == []
        else:
            break
    assert failed > 0 and driver.pending_failures()
    driver.clear_failures()
    assert digest(rank) == digest(leader) and rank.check() == []


def test_hashes_that_collide_share_nothing(
    backend: str, tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """openvino.genai#3722: two blocks with one hash, and the wrong one was used again. Here the token ids decide: with
    hashes of one bit every second prompt collides, and all matches and bytes are those of hashes of 64."""
    found = []
    texts = [[rng.randrange(3) for _ in range(rng.randrange(9, 40))] for _ in range(15)]
    for bits in ("1", "64"):
        monkeypatch.setenv("KVMEM_HASH_BITS", bits)
        with case("full", backend, "slots", tmp_path, memory=400 * PAGE) as here:
            found.append([here.run(text, salt=salt) for text in texts for salt in (None, "a")])
    assert found[0] == found[1] and sum(found[0]) > 0


def test_memory_of_a_step_in_flight_serves_nobody_else(backend: str) -> None:
    """vllm PR 45357: blocks were freed, and given to others, while a step that read them was in flight. Here whoever
    takes a page away waits for the event of its last user."""
    driver = checked()
    world = World(kvmem.Allocator(
        plain_spec(), backend=backend, driver=driver, memory=64 * PAGE, page_bytes=PAGE, interleave=1, max_sequences=4,
        max_tokens=1024,
    ))  # fmt: skip
    world.start(20)
    gone = world.start(500)
    driver.hold_events(True)
    assert world.run(world.free([gone]))
    user = max(entry.id for entry in driver.log() if entry.verb == "record")
    driver.clear_log()
    assert driver.held_waits() == 0, "freeing waits for nobody"
    world.alloc.trim()
    log = driver.log()
    waited = [i for i, entry in enumerate(log) if entry.verb == "wait" and entry.id >= user]
    taken = [i for i, entry in enumerate(log) if entry.verb == "unmap"]
    assert taken and waited and waited[0] < taken[0]
    world.healthy()
