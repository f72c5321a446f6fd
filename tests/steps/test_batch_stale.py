"""A batch that is used after its sequences were freed, cut or moved is refused; one that others changed around is not."""

from __future__ import annotations

import random
from contextlib import suppress

import numpy as np
import pytest
import torch
from support import Steps

import kvmem
from kvmem.kernels.blocks import batch_slots
from kvmem.kernels.reference import oracle, sdpa
from kvmem.kernels.write import write_component, write_kv

SIZE, WINDOW = 4, 9


def full() -> kvmem.CacheSpec:
    return kvmem.CacheSpec.kv(num_layers=1, num_kv_heads=1, head_dim=8, dtype=torch.float32, block_size=SIZE)


def hybrid() -> kvmem.CacheSpec:
    part = kvmem.Component("k", heads=1, width=8, dtype=torch.float32)
    groups = [
        kvmem.Group(name="full", components=[part], layers=[0], block_size=SIZE),
        kvmem.Group(name="sliding", components=[part], layers=[1], block_size=SIZE, window_tokens=WINDOW),
    ]
    return kvmem.CacheSpec(groups=groups, num_layers=2)


def make(spec: kvmem.CacheSpec, backend: str, debug: bool = False) -> kvmem.Allocator:
    return kvmem.Allocator(
        spec, backend=backend, device="cpu", memory=40 * 4096, max_sequences=8, max_tokens=120, page_bytes=4096,
        debug=debug,
    )  # fmt: skip


def states(batch: kvmem.Batch) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = torch.randn(2, batch.num_new_tokens, 1, 8)
    return k, v


@pytest.mark.parametrize("change", ["free", "truncate", "regrown", "another's place"])
def test_what_uses_a_stale_batch_writes_nothing(backend: str, change: str) -> None:
    alloc = make(full(), backend)
    first, second = alloc.sequence(), alloc.sequence()
    first.extend(10), second.extend(7)
    batch = alloc.batch([first, second])
    write_kv(alloc.kv(0), batch, *states(batch))
    if change == "free":
        first.free()
    elif change == "truncate":
        first.truncate(9)
    elif change == "regrown":  # as long as before, and not where it was
        second.truncate(2)
        other = alloc.sequence()
        other.extend(6)
        second.extend(5)
    else:
        first.free()
        first = alloc.sequence()
        first.extend(10)
    if change == "regrown" and backend == "virtual":
        write_kv(alloc.kv(0), batch, *states(batch))  # a row is the sequence's as long as it lives
        return
    others = [seq for seq in (first, second) if seq.id in alloc.core.handles()]
    before = [torch.stack(seq.kv(0)).clone() for seq in others]
    for use in (
        lambda: write_kv(alloc.kv(0), batch, *states(batch)),
        lambda: write_component(alloc.tensor(0, "v"), batch, states(batch)[0]),
        lambda: sdpa(states(batch)[0], alloc.kv(0), batch),
        lambda: oracle(states(batch)[0], alloc.kv(0), batch),
        lambda: batch_slots(batch),
        batch.check_current,
    ):
        with pytest.raises(kvmem.StaleHandle, match=r"sequence handle \d+ was freed.*fill\(\) it again"):
            use()
    assert all(torch.equal(torch.stack(seq.kv(0)), b) for seq, b in zip(others, before, strict=True))
    batch = alloc.batch(others, out=None)
    write_kv(alloc.kv(0), batch, *states(batch))


def test_others_may_come_and_go_and_these_may_grow(backend: str) -> None:
    alloc = make(full(), backend)
    mine, done = alloc.sequence(), alloc.sequence()
    mine.extend(10), done.extend(20)
    batch = alloc.batch([mine])
    done.free()
    other = alloc.sequence()
    other.extend(30)
    mine.extend(8)
    alloc.trim()
    k, v = states(batch)
    write_kv(alloc.kv(0), batch, k, v)
    assert torch.equal(mine.kv(0)[0][:10], k) and torch.equal(mine.kv(0)[1][:10], v)
    mine.commit(count=10)
    batch.check_current()


def test_compaction_moves_what_a_batch_speaks_of() -> None:
    alloc = make(full(), "paged")
    seqs = [alloc.sequence() for _ in range(6)]
    for _ in range(6):
        for seq in seqs:
            seq.extend(SIZE)
    batch = alloc.batch(seqs[5:])
    for seq in seqs[:5]:
        seq.free()
    slots = batch.slot_mapping.clone()
    alloc.compact()
    assert not torch.equal(alloc.batch(seqs[5:]).slot_mapping, slots), "nothing was moved"
    with pytest.raises(kvmem.StaleHandle):
        write_kv(alloc.kv(0), batch, *states(batch))


def test_a_batch_whose_fill_failed_is_refused() -> None:
    alloc = make(full(), "virtual")
    seq = alloc.sequence()
    seq.extend(3)
    batch = alloc.batch([seq])
    seq.extend(40)
    with pytest.raises(kvmem.SpecError, match="the batch was made for"):
        alloc.batch([seq], out=batch)
    with pytest.raises(kvmem.SpecError, match="last fill failed"):
        write_kv(alloc.kv(0), batch, torch.zeros(3, 1, 8), torch.zeros(3, 1, 8))


def expected_stale(alloc: kvmem.Allocator, ids: list[int], kept: list[tuple[np.ndarray, ...]]) -> list[bool]:
    """By group, from what fills say now: whether a new token is gone, or any token still held lies elsewhere."""
    found = []
    for group, (lengths, fresh, slots, tables) in enumerate(kept):
        stale, at = False, 0
        for handle, length, count, blocks in zip(ids, lengths, fresh, tables, strict=True):
            mine = slots[at : at + count]
            at += count
            if handle not in alloc.core.handles() or alloc.core.tokens(handle, group) < length:
                stale = True
                continue
            if count and alloc.core.first_token(handle, group) > length - count:
                stale = True
                continue
            table = alloc.batch(np.array([handle], np.int32)).group(group).block_table[0].numpy()
            begin, end = -(-alloc.core.first_token(handle, group) // SIZE), -(-length // SIZE)
            stale |= bool((table[begin:end] != blocks[begin:end]).any())
            positions = np.arange(length - count, length)
            stale |= bool((table[positions // SIZE].astype(np.int64) * SIZE + positions % SIZE != mine).any())
        found.append(stale)
    return found


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("spec", [full(), hybrid()], ids=["full", "hybrid"])
def test_random_changes_after_a_fill(spec: kvmem.CacheSpec, backend: str, debug: bool, rng: random.Random) -> None:
    """What is refused is exactly what would be written, or was to be read, at another place."""
    alloc = make(spec, backend, debug)
    live: list[kvmem.Sequence] = []
    outcomes = {True: 0, False: 0}
    loop = Steps(300)
    while loop.next(min(outcomes.values()) > 15):
        while len(live) < 3:
            live.append(alloc.sequence())
        for seq in live:
            if seq.num_tokens < 80:
                seq.try_extend(rng.choice([0, 1, 3, 10]))
        mine = rng.sample(live, rng.randint(1, len(live)))
        batch = alloc.batch(mine)
        kept = [
            tuple(x.numpy().copy() for x in (b.seq_lens, b.cu_seqlens_q.diff(), b.slot_mapping, b.block_table))
            for b in batch.groups
        ]
        ids = [seq.id for seq in mine]
        for _ in range(rng.randint(0, 3)):
            change(alloc, live, rng)
        for group, stale in zip(batch.groups, expected_stale(alloc, ids, kept), strict=True):
            outcomes[stale] += 1
            if stale:
                with pytest.raises(kvmem.StaleHandle):
                    group.check_current()
            else:
                group.check_current()
                group.check_current()
        for seq in live:
            seq.commit(count=seq.num_tokens - seq.num_committed_tokens)


def change(alloc: kvmem.Allocator, live: list[kvmem.Sequence], rng: random.Random) -> None:
    kind = rng.choice(["free", "cut", "grow", "fork", "new", "commit", "compact", "trim", "none", "none"])
    if kind == "new" or not live:
        if len(live) < 8:
            live.append(alloc.sequence(list(range(rng.choice([3, 20])))))
        return
    seq = rng.choice(live)
    if kind == "free":
        live.remove(seq)
        seq.free()
    elif kind == "cut":
        if seq.num_tokens > seq.num_committed_tokens:
            seq.truncate(rng.randint(seq.num_committed_tokens, seq.num_tokens))
            seq.try_extend(rng.choice([0, 2, 9]))
    elif kind == "grow" and seq.num_tokens < 80:
        seq.try_extend(rng.choice([1, 6]))
    elif kind == "fork" and len(live) < 8:
        with suppress(kvmem.OutOfMemory):
            live.append(seq.fork())
    elif kind == "commit":
        seq.commit(count=seq.num_tokens - seq.num_committed_tokens)
    elif kind == "compact":
        alloc.compact()
    elif kind == "trim":
        alloc.trim()
